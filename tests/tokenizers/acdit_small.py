"""The smallest ACDiT that has everything: images of 8 x 8 pixels, 4 x 4 tokens, four blocks."""

import jax
import numpy as np

from ddt_jax import settings
from ddt_jax.nn.params import is_box, split

SIZE = 8


def small(**changes) -> settings.ACDiT:
    """Its settings, three classes, with others laid over them."""
    sizes = {"depth": 1, "width": 16, "heads": 2, "patch_size": 2, "block_size": 4, "classes": 3, "scan_layers": False}
    return settings.ACDiT(**{"codec": settings.IdentityCodec(), **sizes, **changes})


def random_state(model):
    """(parameters, extra) of a model, none of them zero: a fresh network predicts zero whatever it is told."""
    boxed, extra = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(0)
    fill = lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32)  # noqa: E731
    extra = jax.tree.map(lambda x: x.value if is_box(x) else x, extra, is_leaf=is_box)
    return jax.tree.map(fill, split(boxed)[0]), jax.tree.map(fill, extra)
