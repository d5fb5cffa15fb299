"""Published ACDiT checkpoints become parameters whose network equals the reference, and go out again bit by bit."""

from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest

from ddt_jax import cli, settings
from ddt_jax.errors import UserError
from ddt_jax.interop import acdit, layout
from ddt_jax.io import torch_file
from ddt_jax.nn import blocks
from ddt_jax.nn.params import split
from ddt_jax.tokenizers.acdit import ACDiT
from tests.tokenizers import test_acdit_parity as parity

DEPTH, WIDTH, HEADS, CLASSES = parity.DEPTH, parity.WIDTH, parity.HEADS, parity.CLASSES
MODEL = settings.ACDiT(
    depth=DEPTH, width=WIDTH, heads=HEADS, block_size=4, classes=CLASSES, rope="released", scan_layers=False,
    codec=settings.IdentityCodec(), patch_size=1,
)  # fmt: skip
VALUES = 3


def reference_arrays(dtype=np.float32):
    """By the names of `acdit_reference`, which is checked against our network in `test_acdit_parity`."""
    d, e = WIDTH, WIDTH // HEADS
    shapes = {"x": (d, VALUES), "t0.w": (d, 256), "t0.b": (d,), "t2.w": (d, d), "t2.b": (d,), "y": (CLASSES + 1, d)}
    shapes |= {"norm": (d,), "ada.w": (2 * d, d), "ada.b": (2 * d,), "out.w": (VALUES, d), "out.b": (VALUES,)}
    for i in range(DEPTH):
        linear = {"q": (d, d), "k": (d, d), "v": (d, d), "proj": (d, d)}
        linear |= {"fc1": (4 * d, d), "fc2": (d, 4 * d), "ada": (6 * d, d)}
        shapes |= {f"{i}.{name}.w": shape for name, shape in linear.items()}
        shapes |= {f"{i}.{name}.b": shape[:1] for name, shape in linear.items()}
        shapes |= {f"{i}.norm1": (d,), f"{i}.norm2": (d,), f"{i}.q_norm": (e,), f"{i}.k_norm": (e,)}
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def published(a):
    """The same by the names of their files, in the order of their module."""

    def linear(ours, theirs):
        return {f"{theirs}.weight": a[f"{ours}.w"], f"{theirs}.bias": a[f"{ours}.b"]}

    found = linear("t0", "t_embedder.mlp.0") | linear("t2", "t_embedder.mlp.2")
    found |= {"y_embedder.embedding_table.weight": a["y"], "x_embedder.weight": a["x"]}
    for i in range(DEPTH):
        theirs = f"blocks.{i}"
        found[f"{theirs}.norm1.weight"] = a[f"{i}.norm1"]
        found[f"{theirs}.attn.qkv.weight"] = np.concatenate([a[f"{i}.{n}.w"] for n in "qkv"])
        found[f"{theirs}.attn.qkv.bias"] = np.concatenate([a[f"{i}.{n}.b"] for n in "qkv"])
        found |= {f"{theirs}.attn.{n}.weight": a[f"{i}.{n}"] for n in ("q_norm", "k_norm")}
        found |= linear(f"{i}.proj", f"{theirs}.attn.proj")
        found[f"{theirs}.norm2.weight"] = a[f"{i}.norm2"]
        found |= linear(f"{i}.fc1", f"{theirs}.mlp.fc1") | linear(f"{i}.fc2", f"{theirs}.mlp.fc2")
        found |= linear(f"{i}.ada", f"{theirs}.adaLN_modulation.1")
    found["final_layer.norm_final.weight"] = a["norm"]
    return found | linear("out", "final_layer.linear") | linear("ada", "final_layer.adaLN_modulation.1")


def blank(model):
    shapes = jax.eval_shape(lambda: ACDiT(model, 4, 2).init(jax.random.key(0)))[0]
    return {"params": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), split(shapes)[0])}


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_every_tensor_lands_where_the_reference_has_it_and_goes_out_as_it_came(scan):
    model, arrays = replace(MODEL, scan_layers=scan), published(reference_arrays())
    tree = blank(model)
    tensors = acdit.FORMAT.tensors(model, tree)
    acdit.FORMAT.check(arrays, tensors)
    filled = layout.fill(arrays, tensors, tree)
    expected = parity.ours(reference_arrays())
    expected["stack"] = blocks.scanned(expected["stack"]) if scan else expected["stack"]
    jax.tree.map(np.testing.assert_array_equal, filled["params"], expected)
    written = acdit.FORMAT.to_arrays(filled, model)
    assert list(written) == list(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(written[key], array, strict=True)


def test_files_of_half_precision_are_read():
    arrays, tree = published(reference_arrays(ml_dtypes.bfloat16)), blank(MODEL)
    filled = layout.fill(arrays, acdit.FORMAT.tensors(MODEL, tree), tree)
    label = filled["params"]["label"]
    assert label.dtype == np.float32
    np.testing.assert_array_equal(label, arrays["y_embedder.embedding_table.weight"].astype(np.float32))


def test_what_does_not_fit_is_named_at_once():
    arrays, tree = published(reference_arrays()), blank(MODEL)
    del arrays["x_embedder.weight"]
    arrays["pos_embed"] = np.zeros(3, np.float32)
    with pytest.raises(UserError, match=r"pos_embed has no place.*") as error:
        acdit.FORMAT.check(arrays, acdit.FORMAT.tensors(MODEL, tree), "x.pt")
    assert "x_embedder.weight is missing" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"caption_bytes=8.*set them"):
        acdit.FORMAT.tensors(replace(MODEL, caption_bytes=8), tree)
    with pytest.raises(UserError, match=r"model.kind='ddt'"):
        acdit.FORMAT.tensors(settings.DDTTokenizer(), tree)


def test_published_sizes_have_a_tensor_for_every_parameter():
    model = replace(settings.ACDiT(**settings.acdit_size("B")), codec=settings.IdentityCodec())
    shapes = jax.eval_shape(lambda: ACDiT(model, 32, 2).init(jax.random.key(0)))[0]
    tree = {"params": split(shapes)[0]}
    held = sum(int(np.prod(tensor.shape)) for tensor in acdit.FORMAT.tensors(model, tree))
    assert held == sum(int(np.prod(x.shape)) for x in jax.tree.leaves(tree))


@pytest.mark.slow
def test_a_checkpoint_becomes_a_run_and_a_file_again(tmp_path):
    arrays = published(reference_arrays())
    torch_file.save(tmp_path / "theirs.pt", {"model": arrays, "args": {"lr": 1e-4}})
    shape = {"depth": DEPTH, "width": WIDTH, "heads": HEADS, "block_size": 4, "classes": CLASSES, "rope": "released"}
    sizes = [f"--config.model.{name}={value}" for name, value in (shape | {"patch_size": 1}).items()]
    data = ["--config.data.image_size=4", "--config.train.batch_size=2"]
    config = ["--config", "configs/acdit_scenes.py:published", *sizes, *data]
    workdir = str(tmp_path / "run")
    read = ["import", "acdit", "--from", str(tmp_path / "theirs.pt"), "--workdir", workdir, *config]
    assert cli.main(read) == 0
    assert cli.main(["export", "acdit", "--workdir", workdir, "--to", str(tmp_path / "ours.pt")]) == 0
    found = torch_file.load(tmp_path / "ours.pt")
    assert list(found) == list(arrays)
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array, strict=True)
