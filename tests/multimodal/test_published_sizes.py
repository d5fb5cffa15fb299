"""Transfusion's five sizes: parameters of the transformer, and what each coder of patches adds (arXiv 2408.11039). What
SEED-LLaMA trains of its LLaMA.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from ddt_jax import config, settings
from ddt_jax.multimodal import backbone
from ddt_jax.nn import lora, params
from ddt_jax.nn.patch_coder import make_coder

# Name, then millions of parameters; table 7's percentages that the linear coder and the U-Net add, and what the U-Net's
# makes in millions. The row of 0.16 B says 106.1 %, 172 M: inconsistent with the 0.27 B "at every size" of §3 and with
# the other four rows (166 % would be consistent), so it binds nothing here.
SIZES = [
    ("160m", 162, 0.5, None),
    ("370m", 374, 0.4, 71.3),
    ("760m", 778, 0.4, 35.5),
    ("1.4b", 1364, 0.4, 19.3),
    ("7b", 6738, 0.3, 3.8),
]
LINEAR_MILLIONS = {"160m": 0.84, "370m": 1.38, "760m": 2.85, "1.4b": 4.85, "7b": 18.1}
LATENT = (32, 32, 8)  # of 256 pixels (§4.1)


def count(config, width):
    coder = make_coder(config, 2, LATENT[-1], width)
    shapes = jax.eval_shape(lambda: coder.init(jax.random.key(0), jnp.zeros((1, 1, *LATENT)), jnp.zeros((1, 1))))
    return sum(x.size for x in jax.tree.leaves(shapes))


@pytest.mark.parametrize(("name", "millions", "linear", "unet"), SIZES)
def test_transformers_have_the_sizes_of_table_2(name, millions, linear, unet):
    c = backbone.preset(f"transfusion_{name}")
    layer = 4 * c.width**2 + 3 * c.width * c.mlp_width + 2 * c.width
    assert backbone.count_parameters(c) == c.depth * layer + c.width + 2 * 32_000 * c.width
    assert backbone.count_parameters(c) == pytest.approx(millions * 1e6, abs=0.5e6)


@pytest.mark.parametrize(("name", "millions", "linear", "unet"), SIZES)
def test_linear_coders_add_what_table_7_says(name, millions, linear, unet):
    """Two maps of 2 x 2 x 8 values and an MLP 256 → D → D: nothing smaller gives all five percentages."""
    c = backbone.preset(f"transfusion_{name}")
    added, d = count(settings.LinearCoder(), c.width), c.width
    assert added == (257 * d) + (d + 1) * d + 33 * d + (d + 1) * 32
    assert added / 1e6 == pytest.approx(LINEAR_MILLIONS[name], rel=0.006)
    assert round(100 * added / backbone.count_parameters(c), 1) == linear


@pytest.mark.parametrize(("name", "millions", "linear", "unet"), [row for row in SIZES if row[3]])
def test_unets_add_what_table_7_says(name, millions, linear, unet):
    """267, 276, 262 and 256 M are what its percentages make."""
    c = backbone.preset(f"transfusion_{name}")
    added = count(settings.UNetCoder(), c.width)
    assert added == pytest.approx(unet / 100 * backbone.count_parameters(c), rel=0.06)
    assert added == pytest.approx(0.27e9, rel=0.06)


def test_seed_llama_trains_its_updates_both_tables_and_all_norms():
    c = config.load(str(Path(__file__).parents[2] / "configs" / "seed_llama_7b.py")).model.transformer
    boxed = jax.eval_shape(lambda: backbone.init(c, jax.random.key(0)))
    trained, _ = lora.split(params.split(boxed)[0], c.lora.whole)
    both_ways = 4 * (c.width + c.width) + 3 * (c.width + c.mlp_width)  # of every linear map of a block
    wanted = c.depth * 16 * both_ways + (2 * c.depth + 1) * c.width + 2 * 40_320 * c.width
    assert sum(x.size for x in jax.tree.leaves(trained)) == wanted
