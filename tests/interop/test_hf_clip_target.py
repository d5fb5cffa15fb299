"""CLIP's encoders as what SEED's features are learned from, against NumPy from the same folder by hand."""

import json
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.interop import hf_clip
from ddt_jax.io import weights_folder
from ddt_jax.nn.vit import CLIP_DEVIATION, CLIP_MEAN
from ddt_jax.tokenizers.seed_targets import TARGET, make_target

BEGIN, END = 20, 21
TEXT = settings.CLIPText(vocab_size=22, length=7, depth=2, width=8, heads=2, mlp_width=12, gelu="exact")
VIT = replace(settings.vit("Ti", "clip", 4), depth=2, width=12, heads=2, mlp_width=16, final_norm=True, gelu="exact")
IMAGE = settings.CLIPImage(vision=VIT, image_size=8, width=6)
PARTS = {"text_model": TEXT, "vision_model": VIT}


def their_arrays():
    """All of a small CLIP by Hugging Face's names."""
    shapes = {"visual_projection.weight": (6, 12), "text_projection.weight": (6, 8), "logit_scale": ()}
    shapes["text_model.embeddings.token_embedding.weight"] = (22, 8)
    shapes["text_model.embeddings.position_embedding.weight"] = (7, 8)
    shapes["vision_model.embeddings.patch_embedding.weight"] = (12, 3, 4, 4)
    shapes["vision_model.embeddings.class_embedding"] = (12,)
    shapes["vision_model.embeddings.position_embedding.weight"] = (5, 12)
    norms = ["text_model.final_layer_norm", "vision_model.pre_layrnorm", "vision_model.post_layernorm"]
    for part, c in PARTS.items():
        d, m = c.width, c.mlp_width
        for i in range(c.depth):
            layer = f"{part}.encoder.layers.{i}"
            maps = {f"self_attn.{x}_proj": (d, d) for x in ("q", "k", "v", "out")}
            for name, shape in (maps | {"mlp.fc1": (m, d), "mlp.fc2": (d, m)}).items():
                shapes |= {f"{layer}.{name}.weight": shape, f"{layer}.{name}.bias": shape[:1]}
            norms += [f"{layer}.layer_norm1", f"{layer}.layer_norm2"]
    for name in norms:
        shapes |= {f"{name}.{x}": (8 if name.startswith("text") else 12,) for x in ("weight", "bias")}
    rng = np.random.default_rng(0)
    return {name: (0.4 * rng.normal(size=shape)).astype(np.float32) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    weights_folder.save(folder, their_arrays())
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": "gelu", "layer_norm_eps": 1e-5}
    text = common | {"hidden_size": 8, "intermediate_size": 12, "vocab_size": 22, "max_position_embeddings": 7}
    vision = common | {"hidden_size": 12, "intermediate_size": 16, "image_size": 8, "patch_size": 4}
    config = {"model_type": "clip", "projection_dim": 6, "text_config": text, "vision_config": vision}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def norm(x, arrays, name):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * arrays[f"{name}.weight"] + arrays[f"{name}.bias"]


def linear(x, arrays, name):
    return x @ arrays[f"{name}.weight"].T + arrays[f"{name}.bias"]


def gelu(x):
    return x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))) / 2


def encoder(x, arrays, part, causal):
    """[S, D] through the blocks of two heads."""
    s, d = x.shape
    for i in range(2):
        layer = f"{part}.encoder.layers.{i}"
        h = norm(x, arrays, f"{layer}.layer_norm1")
        q, k, v = (linear(h, arrays, f"{layer}.self_attn.{n}_proj").reshape(s, 2, d // 2) for n in "qkv")
        logits = np.einsum("qhe,khe->hqk", q, k) / np.sqrt(d // 2)
        logits = np.where(np.tri(s, dtype=bool) | (not causal), logits, -np.inf)
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        seen = np.einsum("hqk,khe->qhe", share, v).reshape(s, d)
        x = x + linear(seen, arrays, f"{layer}.self_attn.out_proj")
        h = linear(norm(x, arrays, f"{layer}.layer_norm2"), arrays, f"{layer}.mlp.fc1")
        x = x + linear(gelu(h), arrays, f"{layer}.mlp.fc2")
    return x


def target_of(clip):
    c = settings.SEED(stage="codes", features="clip", clip=clip)
    target = make_target(c, 4)
    return target, jax.jit(target), {TARGET: hf_clip.read_target(clip)}


def test_the_text_encoders_rows_are_those_of_a_caption_behind_the_last_norm(folder):
    arrays = their_arrays()
    target, run, extra = target_of(replace(TEXT, weights=folder))
    ids = np.array([[BEGIN, 3, 7, END, END, END, END], [BEGIN, 1, 2, 3, 4, 5, END]], np.int32)
    found = run(extra, None, None, ids)
    assert target.shape == (7, 8) and target.caption_length == 7 and found.shape == (2, 7, 8)
    places = arrays["text_model.embeddings.position_embedding.weight"]
    for row, made in zip(ids, found, strict=True):
        x = arrays["text_model.embeddings.token_embedding.weight"][row] + places
        expected = norm(encoder(x, arrays, "text_model", True), arrays, "text_model.final_layer_norm")
        np.testing.assert_allclose(made, expected, atol=1e-5)


def test_the_image_encoders_vector_is_projected_and_keeps_its_length(folder):
    arrays = their_arrays()
    target, run, extra = target_of(replace(IMAGE, weights=folder))
    images = np.random.default_rng(1).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    found = run(extra, None, jnp.asarray(images), None)
    assert target.shape == (1, 6) and target.caption_length == 0 and found.shape == (2, 1, 6)
    kernel = arrays["vision_model.embeddings.patch_embedding.weight"]
    pixels = ((images + 1) / 2 - CLIP_MEAN) / CLIP_DEVIATION
    for image, made in zip(pixels, found, strict=True):
        patches = image.reshape(2, 4, 2, 4, 3).transpose(0, 2, 4, 1, 3).reshape(4, 3, 4, 4)
        patches = np.einsum("ncij,dcij->nd", patches, kernel)
        x = np.concatenate([arrays["vision_model.embeddings.class_embedding"][None], patches])
        x = norm(x + arrays["vision_model.embeddings.position_embedding.weight"], arrays, "vision_model.pre_layrnorm")
        x = encoder(x, arrays, "vision_model", False)[:1]
        expected = norm(x, arrays, "vision_model.post_layernorm") @ arrays["visual_projection.weight"].T
        np.testing.assert_allclose(made, expected, atol=1e-5)
    # Others are resized to its size, and a flat picture stays one.
    small, large = (run(extra, None, jnp.full((2, side, side, 3), 0.5), None) for side in (4, 8))
    np.testing.assert_allclose(small, large, atol=1e-5)


def test_other_sizes_than_are_set_are_named(folder):
    with pytest.raises(UserError, match="has other sizes than are set: model.clip.depth, model.clip.gelu; set them"):
        hf_clip.read_target(replace(TEXT, weights=folder, depth=3, gelu="quick"))
    wrong = replace(IMAGE, weights=folder, width=5, vision=replace(VIT, depth=1))
    with pytest.raises(UserError, match="model.clip.vision.depth, model.clip.width; set them"):
        hf_clip.read_target(wrong)
    scanned = replace(IMAGE, weights=folder, vision=replace(VIT, scan_layers=True))
    assert hf_clip.read_target(scanned)["vision"]["blocks"]["scanned"]
    with pytest.raises(UserError, match="learns from a CLIP; set model.clip.weights to its folder"):
        make_target(settings.SEED(stage="codes", features="clip", clip=TEXT), 4)
    assert make_target(settings.SEED(stage="draw", features="clip"), 4).shape == (77, 768)
    assert make_target(settings.SEED(stage="draw", features="clip", clip=settings.CLIPImage()), 4).shape == (1, 1024)
