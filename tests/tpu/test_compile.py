"""The train step of every config for small images compiles for four chips of a TPU v5e, on a machine that has none.

libtpu holds the real compiler, and abstract devices need no hardware. It lives in an environment of its own
(`make test-tpu`), because with libtpu installed every ordinary JAX program looks for a TPU.
"""

import os
from pathlib import Path

import pytest

pytestmark = pytest.mark.tpu_compile

ROOT = Path(__file__).resolve().parents[2]
# The published tokenizers need a pod, and the autoencoder's default is for images of 256 px. The compilation of the
# released tokenizer for 64 chips had not ended after 8 minutes on two cores. Part by part, for four chips and 24
# images: nearest codes take 4 s of CPU time, the diversity loss 26 s, the whole quantizer 48 s (0.27 GB of temporary
# memory), and encoding with SD3's autoencoder had not ended after 165 s; encoder and decoder were not measured. A step
# on latents (`data.source=latents:...`) has no autoencoder. tests/tokenizers/test_selftok_networks.py traces the step.
LARGE = {"ddt_selftok_256.py", "ddt_selftok_1024.py", "ddt_llama_256.py", "ddt_llama_8b.py", "vae.py"}
CONFIGS = [*sorted({path.name for path in (ROOT / "configs").glob("*.py")} - LARGE), "vae.py:small"]
# What text and codes would decide, in a run that has them.
SIZES = (
    ("model.transformer.vocab_size", "1024"),
    ("model.image.num_tokens", "16"),
    ("model.image.codebook_size", "512"),
    ("model.image.code_width", "8"),
)
OVERRIDES = {"llama_scenes.py": SIZES}
TOPOLOGY = "v5e:2x2"
HBM_BYTES = 16e9  # of one v5e chip
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@pytest.fixture(scope="session")
def chips():
    """Abstract devices. The variables tell libtpu, when it is loaded here, not to look for real ones."""
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_ACCELERATOR_TYPE="v5litepod-4",
        JAX_PLATFORMS="cpu",
    )
    pytest.importorskip("libtpu", reason="libtpu is not installed; `make test-tpu` makes an environment with it")
    from jax.experimental import topologies

    return topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGY).devices


def compile_step(name, chips, overrides=()):
    """The compiled train step of a config file over the chips."""
    import jax

    from ddt_jax import config, experiment

    built = experiment.build(config.load(str(ROOT / "configs" / name), overrides), chips)
    with jax.set_mesh(built.mesh):
        return built.step.lower(built.abstract, experiment.abstract_batch(built)).compile()


def test_chips_are_what_was_asked_for(chips):
    assert [chip.device_kind for chip in chips] == ["TPU v5 lite"] * 4


@pytest.mark.parametrize("name", CONFIGS)
def test_train_step_compiles_and_fits(name, chips):
    compiled = compile_step(name, chips, OVERRIDES.get(name, ()))
    memory = compiled.memory_analysis()
    needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes + memory.output_size_in_bytes
    assert 0 < needed < HBM_BYTES
    # Four chips that never talk to each other would each train a model of their own.
    assert any(word in compiled.as_text() for word in COLLECTIVES)


def test_train_step_compiles_with_two_way_tensor_parallelism(chips):
    compile_step("smoke.py", chips, (("mesh.fsdp", "2"), ("mesh.tensor", "2")))
