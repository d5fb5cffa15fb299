"""Pretraining of image tokenizers and multimodal transformers around discrete diffusion timestep tokens, in JAX."""

__version__ = "0.1.0"
