"""Operations of a train step that the model asks for, each done once: what MFU is measured by (docs/plan.md).

They are counted where the step is traced (`scaling/flops.py`): without remat, with attention that holds all its logits
at once, on one device; of causal attention those pairs are taken off again whose key is behind its row.
"""

from collections.abc import Callable
from dataclasses import replace

from ddt_jax import settings
from ddt_jax.nn.decoder import head_dim
from ddt_jax.scaling import flops


def of_step(s: settings.Experiment, build: Callable, batch: Callable, devices: list) -> float:
    """Operations of one optimizer step. build, batch, devices: as `traced`."""
    return traced(without_remat(s), build, batch, devices) - behind(s)


def without_remat(s: settings.Experiment) -> settings.Experiment:
    """The same run, computing nothing a second time."""
    m = s.model
    if isinstance(m, settings.Multimodal):
        coder = getattr(m.image, "coder", None)
        image = replace(m.image, coder=replace(coder, remat=False)) if hasattr(coder, "remat") else m.image
        return replace(s, model=replace(m, image=image, transformer=replace(m.transformer, remat="none")))
    if hasattr(m, "remat"):
        return replace(s, model=replace(m, remat="none" if isinstance(m.remat, str) else False))  # the VAE's is bool
    return s


def traced(s: settings.Experiment, build: Callable, batch: Callable, devices: list) -> float:
    """Of a step with all logits of attention held at once, as it is written.

    Args:
      build, batch: `experiment.build` and `experiment.abstract_batch`.
      devices: one, abstract or real.
    """
    built = build(replace(every_pair(s), mesh=settings.Mesh()), devices)
    return flops.count(built.step, built.abstract, batch(built))


def every_pair(s: settings.Experiment) -> settings.Experiment:
    """The same run as it is counted: its transformer's attention to all keys at once, whichever kernel computes it.

    Kernels with loops over tiles skip those that no row sees: how often such a loop turns is not known when it is
    traced, and it would count once. Other networks have no such setting.
    """
    if not isinstance(s.model, settings.Multimodal):
        return s
    return replace(s, model=replace(s.model, transformer=replace(s.model.transformer, attention="dense")))


def behind(s: settings.Experiment) -> float:
    """Operations of attention on keys behind their row, which no causal model asks for: of two products forwards and
    four backwards.
    """
    n = s.sequences.context
    return attention(s, 6, n * (n - 1) / 2) if isinstance(s.model, settings.Multimodal) else 0.0


def attention(s: settings.Experiment, products: int, pairs: float) -> float:
    """Operations of some of attention's products, each 2 E for a pair of a row and a key. pairs: of one example."""
    t = s.model.transformer
    return products * 2.0 * t.depth * t.heads * head_dim(t) * s.train.batch_size * pairs
