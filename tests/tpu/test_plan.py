"""A plan by the TPU's own compiler: its programs are read, and what is counted in them is what was asked for."""

from dataclasses import replace
from pathlib import Path

import pytest

from ddt_jax import planning
from ddt_jax.scaling import plan_text, topology

pytestmark = pytest.mark.tpu_compile

CONFIG = str(Path(__file__).resolve().parents[2] / "configs" / "llama_scenes.py")
POD = topology.parse("v5p:2x2x1")
# Each of two chips has 128 columns of a matrix, as many as a tile of a TPU, and two more have the same.
DEPTH, WIDTH, MLP, VOCAB, ROWS, CONTEXT = 3, 256, 768, 1024, 4, 1024
SIZES = {
    "model.transformer.vocab_size": VOCAB,
    "model.image.num_tokens": 16,
    "model.image.codebook_size": 64,
    "model.image.code_vectors": False,
    "model.image.code_places": False,
    "model.whole_prompts": False,
    "model.transformer.scan_layers": True,
    "model.transformer.depth": DEPTH,
    "model.transformer.width": WIDTH,
    "model.transformer.heads": 2,
    "model.transformer.kv_heads": 2,
    "model.transformer.mlp_width": MLP,
    "model.transformer.loss_chunk": 512,
    "model.transformer.remat": "full",
    "model.transformer.dtype": "bfloat16",
    "sequences.context": CONTEXT,  # long enough for the kernel
    "sequences.targets": 0,
    "optimizer.name": "adamw",
    "train.batch_size": ROWS,
}


def request(**changes):
    pytest.importorskip("libtpu", reason="libtpu is not installed; `make test-tpu` makes an environment with it")
    overrides = tuple((key, str(value)) for key, value in (SIZES | changes).items())
    return planning.Request(CONFIG, overrides, effort=-1.0)


@pytest.fixture(scope="module")
def report():
    return planning.plan_one(replace(request(), mesh="data=2,fsdp=2"), POD, topology.devices(POD))


def test_every_product_of_a_scanned_model_is_counted(report):
    """By hand: each layer's matrices forwards, again for the gradients (but the last, of which they need nothing), and
    twice backwards; the head three times. The kernel of attention computes 2 products forwards, again, and 3 + 4
    backwards, in 3 of the 4 tiles of 512 x 512.
    """
    tokens = ROWS * CONTEXT
    layers, head = DEPTH * (4 * WIDTH**2 + 3 * WIDTH * MLP), VOCAB * WIDTH
    attention = DEPTH * (2 + 2 + 3 + 4) * 2 * tokens * CONTEXT * WIDTH * 3 / 4
    products = 4 * layers - DEPTH * WIDTH * MLP + 3 * head
    assert report["hardware_flops"] == pytest.approx(2 * tokens * products + attention, rel=1e-3)
    once = 2 * tokens * 3 * (layers + head) + attention * 9 / 11
    without = report["hardware_over_model_flops_without_remat"] * report["model_flops"]
    assert without == pytest.approx(once, rel=1e-3)
    assert not report["uncounted"]


def test_parameters_are_gathered_layer_by_layer(report):
    """A gather of all layers' matrices at once, or of the table and its moments, would be the end of a large model."""
    gathered = [c for c in report["collectives"] if c["kind"] == "all-gather"]
    assert gathered and {c["axis"] for c in gathered} == {"fsdp"}
    stacked = DEPTH * WIDTH * MLP * 4
    assert max(c["largest"] for c in gathered) < stacked / 2
    # The head alone is there whole, once, in the type of the products; its gradient, and the table and its, never are.
    (head,) = report["whole_parameters"]
    assert head == {
        "parameters": ["embed", "head"],
        "kind": "all-gather",
        "axis": "fsdp",
        "count": 1,
        "bytes": VOCAB * WIDTH * 2,
    }
    assert report["fits"] and report["compiler"] == "tpu"


def test_moments_that_wait_with_the_host_leave_the_chip_to_activations(report):
    """Nearly all of their memory: they are fetched when what activations took is free again."""
    asked = replace(request(**{"optimizer.offload": True}), mesh="data=2,fsdp=2")
    waits = planning.plan_one(asked, POD, topology.devices(POD))
    moments = report["memory"]["optimizer"] - waits["memory"]["optimizer"]
    assert moments == waits["host_bytes_per_chip"] == 2 * report["memory"]["parameters"]
    assert waits["hbm_bytes_per_chip"] < report["hbm_bytes_per_chip"] - 0.8 * moments
    assert waits["hardware_flops"] == report["hardware_flops"] and not waits["uncounted"]


def test_a_step_for_which_a_chip_has_not_the_memory_is_refused_with_what_it_needs():
    asked = replace(request(**{"train.batch_size": 4096, "model.transformer.remat": "none"}), mesh="data=2,fsdp=2")
    found = planning.plan_one(asked, topology.parse("v5e:2x2"), topology.devices(topology.parse("v5e:2x2")))
    assert not found["fits"] and found["hbm_bytes_per_chip"] > 16e9 and "estimate" not in found
    assert "does NOT fit" in plan_text.text(found)


def test_a_token_reads_the_weights_and_the_cache_and_little_else():
    """By hand, with guidance: two rows for each prompt, in a loop behind the first code. Heads share keys, so that the
    compiler makes products of attention, and not sums.
    """
    rows, codes, prompt = 8, 16, 32
    asked = replace(request(**{"model.transformer.kv_heads": 1, "model.transformer.depth": 2}), of="generate")
    report = planning.plan_one(replace(asked, rows=rows, prompt=prompt - 2), POD, topology.devices(POD))
    prompts, token = report["parts"]
    assert token["times"] == codes - 1 and report["chips"] == 1 and not report["uncounted"]
    matrices, head, slots = 2 * (3 * WIDTH**2 + 3 * WIDTH * MLP), VOCAB * WIDTH, prompt + codes
    attention = 2 * 4 * slots * WIDTH
    assert token["flops"] == 2 * rows * (2 * (matrices + head) + attention)
    assert prompts["flops"] == pytest.approx((rows + 1) * (prompt * (2 * matrices + attention) + 2 * head), rel=1e-3)
    assert report["memory"]["cache"] == 2 * 2 * 2 * rows * slots * WIDTH // 2 * 2  # in bf16
    read = 2 * (matrices + head) + report["memory"]["cache"]
    assert read <= token["hbm_traffic_bytes"] <= 1.5 * read
    assert token["bound"] == "memory" and report["fits"]
