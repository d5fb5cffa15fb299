"""Package metadata. `REQUIRES` and `EXTRAS` are plain literals, so that tests/test_packaging.py can read them as text.

A range begins where the tests have run and ends before the next series that may break us: on Python 3.11 pip picks
JAX 0.10.2, the last release that supports it, on 3.12 and later the newest; `.ci/run` tests both.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

REQUIRES = [
    "absl-py>=2.5,<3",
    "array-record>=0.8.6,<0.9",
    "einops>=0.8.2,<0.9",
    "etils[epath]>=1.15,<2",
    "flax>=0.12.8,<0.13",
    "grain>=0.2.18,<0.3",
    "jax>=0.10.2,<0.13",
    "matplotlib>=3.11,<4",
    "ml-collections>=1.1,<2",
    "ml-dtypes>=0.5.4,<0.7",
    "msgpack>=1.2,<2",
    "numpy>=2.4,<3",
    "optax>=0.2.8,<0.3",
    "orbax-checkpoint>=0.12.8,<0.13",
    "pillow>=13,<14",
    "pyarrow>=26,<27",
    "rich>=15,<16",
    "scipy>=1.17,<2",
    "sentencepiece>=0.2.3,<0.3",
    "tensorboardX>=2.6.5,<3",
    "tensorflow-datasets>=4.9.10,<5",
    "tensorstore>=0.1.84,<0.2",
]

EXTRAS = {
    # Accelerators. With libtpu installed, ordinary programs look for a TPU: not for a machine that has none.
    "tpu": ["jax[tpu]>=0.10.2,<0.13"],
    "cuda": ["jax[cuda12]>=0.10.2,<0.13"],
    "cuda13": ["jax[cuda13]>=0.10.2,<0.13"],
    "kernels": ["tokamax>=0.0.12,<0.1"],
    # Data and files.
    "digits": ["scikit-learn>=1.9,<2"],
    "gcs": ["etils[epath-gcs]>=1.15,<2"],
    "s3": ["etils[epath-s3]>=1.15,<2"],
    "tokenizers": ["tokenizers>=0.23.1,<0.24"],
    "video": ["av>=18.1,<19"],
    "wandb": ["wandb>=0.31,<1"],
    # Oracles that tests compare with, and the tests themselves.
    "torch": ["torch>=2.13,<3"],
    "oracle": [
        "av>=18.1,<19",
        "diffusers>=0.42.1,<0.43",
        "pycocoevalcap>=1.2,<1.3",
        "torch>=2.13.0,<2.13.1",
        "torchmetrics>=1.9,<1.10",
        "transformers>=5.24,<6",
    ],
    "transfusion": ["torch>=2.13.0,<2.13.1", "transfusion-pytorch>=0.19.4,<0.19.5"],
    "test": [
        "fsspec>=2026.4,<2027",
        "hypothesis>=6.170,<7",
        "pytest>=9.2,<10",
        "pytest-xdist>=3.8,<4",
        "pyyaml>=6,<7",
        "ruff>=0.17.5,<0.18",
        "safetensors>=0.8,<0.9",
        "scikit-image>=0.26,<0.27",
        "scikit-learn>=1.9,<2",
        "tokenizers>=0.23.1,<0.24",
    ],
}

# Files of the package that are no modules of it.
PACKAGE_DATA = {"ddt_jax.interop": ["templates/*.py"]}


def version() -> str:
    text = (HERE / "ddt_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


setup(
    name="ddt-jax",
    version=version(),
    description="Image tokenizers and multimodal transformers around discrete diffusion timestep tokens, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["ddt_jax", "ddt_jax.*"]),
    package_data=PACKAGE_DATA,
    install_requires=REQUIRES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["ddt-jax = ddt_jax.cli:console"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
    ],
)
