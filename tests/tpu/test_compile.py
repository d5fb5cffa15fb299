"""The train step of every config for small images compiles for four chips of a TPU v5e, on a machine that has none.

Of configs whose steps differ in sizes and numbers alone, one is compiled (`tests/tpu/test_alike.py`). The released
tokenizer's step, at full size, is a measurement: `.venv-tpu/bin/python tools/soak.py selftok_tpu`.

libtpu holds the real compiler, and abstract devices need no hardware. It lives in an environment of its own
(`make test-tpu`), because with libtpu installed every ordinary JAX program looks for a TPU.
"""

import importlib
from pathlib import Path

import pytest

from ddt_jax.scaling import program, topology

compile_tpu = importlib.import_module("tools.compile_tpu")
pytestmark = pytest.mark.tpu_compile

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# The published models need a pod, and the autoencoder's default is for images of 256 px.
LARGE = {"ddt_selftok_256.py", "ddt_selftok_1024.py", "ddt_llama_256.py", "ddt_llama_8b.py", "vae.py"}
LARGE |= {"transfusion_256.py", "transfusion_7b.py", "acdit_ucf101.py", "seed_llama_7b.py", "seed_opt.py"}
SMALL = sorted({path.name for path in CONFIGS.glob("*.py")} - LARGE)
# Config → the one that is compiled in its place.
ALIKE = {
    "acdit_cifar10.py": "acdit_scenes.py",
    "cifar10_tokenizers.py": "smoke.py",
    "comparison_cifar10.py": "llama_spatial_scenes.py",
    "comparison_scenes.py": "llama_spatial_scenes.py",
    "ddt_cifar10.py": "smoke.py",
    "ddt_scenes.py": "quickstart.py",
    "llama_edits.py": "llama_scenes.py",
    "seed_llama_scenes.py": "llama_scenes.py",
}
COMPILED = [*(name for name in SMALL if name not in ALIKE), "vae.py:small", "ddt_selftok_256.py:small"]
# What text and codes would decide, in a run that has them.
VOCABULARY = ("model.transformer.vocab_size", "1024")
SIZES = (
    VOCABULARY,
    ("model.image.num_tokens", "16"),
    ("model.image.codebook_size", "512"),
    ("model.image.code_width", "8"),
)
OVERRIDES = {
    "llama_scenes.py": SIZES,
    "llama_spatial_scenes.py": SIZES,
    "text_beside_images.py": (VOCABULARY,),
    "transfusion_scenes.py": (VOCABULARY,),
    # Two resolutions have every kind of layer; each further one is as many convolutions again to compile.
    "vae.py:small": (("model.sizes.block_out_channels", "16,32"),),
    "spatial_scenes.py": (("model.block_out_channels", "16,"),),  # the same network: what changes resolution is above
    "schedule_ablation.py": (("model.decoder_depth", "1"),),  # what it does with times and tokens; layers are above
    # The published networks on latents, for which the autoencoder is in no step. Layers are scanned, so that their
    # number hardly matters for the time to compile; numbers of tokens and codes do.
    "ddt_selftok_256.py:small": (
        ("data.source", "latents:DIR"),
        ("model.codec.random_weights", "True"),
        ("model.num_tokens", "64"),
        ("model.schedule.tokens", "24,23,9,6,2"),
        ("model.quantizer.codebook_size", "1024"),
        ("train.batch_size", "8"),
    ),
}
POD = topology.parse("v5e:2x2")


@pytest.fixture(scope="session")
def chips():
    """Abstract devices."""
    pytest.importorskip("libtpu", reason="libtpu is not installed; `make test-tpu` makes an environment with it")
    return topology.devices(POD)


def compile_step(name, chips, overrides=(), effort=-1.0):
    """The compiled train step of a config; the least effort, because what is asked is whether it compiles and fits."""
    return compile_tpu.compile_step(str(CONFIGS / name), chips, overrides, effort)


def test_chips_are_what_was_asked_for(chips):
    assert [chip.device_kind for chip in chips] == ["TPU v5 lite"] * 4


@pytest.mark.parametrize("name", COMPILED)
def test_train_step_compiles_and_fits(name, chips):
    compiled = compile_step(name, chips, OVERRIDES.get(name, ()))
    assert 0 < compile_tpu.memory_of(compiled)["total"] < POD.chip.hbm_bytes
    # Four chips that never talk to each other would each train a model of their own.
    assert any(word in compiled.as_text() for word in program.COLLECTIVES)


def test_train_step_compiles_with_two_way_tensor_parallelism(chips):
    compile_step("smoke.py", chips, (("mesh.fsdp", "2"), ("mesh.tensor", "2")), effort=0.0)  # that of a run
