"""The Q-Former's weights in the names of Hugging Face and of SEED, there and back."""

import jax
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.interop import blip2

C = settings.QFormer(depth=3, width=8, heads=2, mlp_width=12, norm="post", norm_epsilon=1e-12)


def theirs():
    shapes = {"query_tokens": (1, 5, 8), "qformer.layernorm.weight": (8,), "qformer.layernorm.bias": (8,)}
    for i in range(3):
        layer = f"qformer.encoder.layer.{i}."
        linear = {"intermediate_query.dense": (12, 8), "output_query.dense": (8, 12)}
        for part in ("attention", "crossattention") if i != 1 else ("attention",):
            read = 6 if part == "crossattention" else 8
            linear |= {f"{part}.attention.{x}": (8, 8 if x == "query" else read) for x in ("query", "key", "value")}
            linear[f"{part}.output.dense"] = (8, 8)
            shapes |= {f"{layer}{part}.output.LayerNorm.{x}": (8,) for x in ("weight", "bias")}
        shapes |= {f"{layer}output_query.LayerNorm.{x}": (8,) for x in ("weight", "bias")}
        shapes |= {f"{layer}{name}.weight": shape for name, shape in linear.items()}
        shapes |= {f"{layer}{name}.bias": shape[:1] for name, shape in linear.items()}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_every_array_comes_back_under_its_name():
    arrays = theirs()
    text = {"qformer.encoder.layer.0.intermediate.dense.weight": arrays["query_tokens"], "language_model.x": C}
    params = blip2.from_arrays(arrays | text, C, 5, 6)
    back = blip2.to_arrays(params, C)
    assert back.keys() == arrays.keys()
    jax.tree.map(np.testing.assert_array_equal, back, arrays)
    seeds = blip2.to_arrays(params, C, "seed")
    assert {"query_tokens", "Qformer.bert.embeddings.LayerNorm.bias"} < seeds.keys()
    name = "Qformer.bert.encoder.layer.2.crossattention.self.key.weight"
    np.testing.assert_array_equal(seeds[name], arrays["qformer.encoder.layer.2.crossattention.attention.key.weight"])
    jax.tree.map(np.testing.assert_array_equal, blip2.from_arrays(seeds, C, 5, 6), params)


def test_the_published_size():
    params = blip2.abstract_params(settings.BLIP2_QFORMER, 32, 1408)
    count = {name: sum(int(np.prod(x.shape)) for x in jax.tree.leaves(p)) for name, p in params.items()}
    assert count["queries"] == 24_576 and sum(count.values()) - count["queries"] == 105_137_664


def test_another_size_is_refused_by_name():
    arrays = theirs()
    with pytest.raises(UserError, match="crossattention.attention.key.weight is 8 x 6, not 8 x 7"):
        blip2.from_arrays(arrays, C, 5, 7)
    del arrays["qformer.encoder.layer.1.output_query.dense.bias"]
    with pytest.raises(UserError, match="qformer.encoder.layer.1.output_query.dense.bias is missing"):
        blip2.from_arrays(arrays, C, 5, 6)
    with pytest.raises(UserError, match="query_tokens is 1 x 5 x 8, not 4 x 8"):
        blip2.from_arrays(theirs(), C, 4, 6)
