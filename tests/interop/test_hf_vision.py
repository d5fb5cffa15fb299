"""Vision transformers of CLIP, SigLIP and BLIP-2 give what transformers' own give, from the same files."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.interop import hf_vision
from ddt_jax.io import weights_folder
from ddt_jax.nn import blocks
from ddt_jax.nn.vit import CLIP_DEVIATION, CLIP_MEAN, ViT

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"image_size": 12, "patch_size": 4}


def their_model(transformers, torch, family):
    torch.manual_seed(0)
    kind = {"clip": "CLIP", "siglip": "Siglip", "eva": "Blip2"}[family]
    options = {"eva": {"qkv_bias": True}}.get(family, {})
    config = getattr(transformers, f"{kind}VisionConfig")(**SIZES, attn_implementation="eager", **options)
    model = getattr(transformers, f"{kind}VisionModel")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # biases and norms start at values that hide a mistake
            p.copy_(torch.randn_like(p) * 0.3 + ("norm" in name and "weight" in name))
            if name.endswith("qkv.bias"):
                p[16:32] = 0  # EVA has none for keys
    return model


@pytest.mark.slow
@pytest.mark.parametrize("family", ["clip", "siglip", "eva"])
def test_all_rows_equal_those_of_transformers(oracle, tmp_path, family):
    torch, transformers = oracle("torch"), oracle("transformers")
    model = their_model(transformers, torch, family)
    model.save_pretrained(tmp_path)
    c = hf_vision.read_settings(tmp_path)
    expected = settings.vit("B", family, 4)
    sizes = {"depth": 3, "width": 16, "heads": 2, "mlp_width": 24}
    if family == "siglip":
        sizes["gelu"] = "tanh"
    assert c == replace(expected, **sizes)
    params = hf_vision.read(tmp_path, c, 12)
    images = np.random.default_rng(0).uniform(-1, 1, (2, 12, 12, 3)).astype(np.float32)
    pixels = images if c.pixels == "half" else ((images + 1) / 2 - CLIP_MEAN) / CLIP_DEVIATION
    with torch.no_grad():
        theirs = model(torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)).last_hidden_state.numpy()
    ours = ViT(c).apply({"params": params}, images)
    np.testing.assert_allclose(ours, theirs, atol=2e-5)
    scanned = ViT(replace(c, scan_layers=True)).apply({"params": blocks.scanned(params)}, images)
    np.testing.assert_allclose(scanned, theirs, atol=2e-5)
    assert np.abs(theirs).max() > 1


def siglip_arrays(c):
    rng, d, m = np.random.default_rng(0), c.width, c.mlp_width
    shapes = {"patch_embedding.weight": (d, 3, 4, 4), "patch_embedding.bias": (d,), "position_embedding.weight": (9, d)}
    shapes = {f"embeddings.{name}": shape for name, shape in shapes.items()} | {"post_layernorm.weight": (d,)}
    shapes |= {"post_layernorm.bias": (d,), "head.probe": (1, 1, d)}
    for i in range(c.depth):
        linear = {f"self_attn.{x}_proj": (d, d) for x in ("q", "k", "v", "out")} | {
            "mlp.fc1": (m, d),
            "mlp.fc2": (d, m),
        }
        for name, shape in linear.items():
            shapes |= {f"encoder.layers.{i}.{name}.weight": shape, f"encoder.layers.{i}.{name}.bias": shape[:1]}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"encoder.layers.{i}.{name}.{x}": (d,) for x in ("weight", "bias")}
    return {f"vision_model.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_a_file_of_another_size_is_refused_by_name(tmp_path):
    c = replace(settings.vit("Ti", "siglip", 4), depth=2, width=8, heads=2, mlp_width=12)
    arrays = siglip_arrays(c)
    weights_folder.save(tmp_path, arrays)
    params = hf_vision.read(tmp_path, c, 12)
    kernel = params["blocks"]["block_1"]["attention"]["query"]["kernel"]
    np.testing.assert_array_equal(
        kernel.reshape(8, 8).T, arrays["vision_model.encoder.layers.1.self_attn.q_proj.weight"]
    )
    with pytest.raises(UserError, match=r"position_embedding.weight is 9 x 8, not 16 x 8"):
        hf_vision.read(tmp_path, c, 16)
    with pytest.raises(UserError, match=r"encoder.layers.\{0..1\}.self_attn.q_proj.bias is missing"):
        hf_vision.from_arrays({k: v for k, v in arrays.items() if "q_proj.bias" not in k}, c, 12)
    with pytest.raises(UserError, match="holds no vision transformer"):
        hf_vision.from_arrays({"embeddings.weight": kernel}, c, 12)


def test_a_config_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    with pytest.raises(UserError, match="describes no vision transformer of CLIP, SigLIP or BLIP-2 .*'llama'"):
        hf_vision.read_settings(tmp_path)
    with pytest.raises(UserError, match="'XXL', 'clip' is no vision transformer"):
        settings.vit("XXL", "clip", 14)


@pytest.mark.slow
def test_published_sizes():
    """EVA-CLIP-g without its last block: counted in the published code."""
    c = settings.vit("g", "eva", 14)
    shapes = jax.tree.leaves(hf_vision.abstract_params(c, 224))
    norm = 2 * c.width  # ours holds ln_vision as well
    assert sum(int(np.prod(s.shape)) for s in shapes) - norm == 985_894_528
    assert shapes[0].dtype == jnp.float32
