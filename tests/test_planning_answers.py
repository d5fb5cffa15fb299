"""`ddt-jax plan --of generate` and `--of caption`: programs against counts by hand, and what is said of them."""

import json
from dataclasses import replace

import jax
import pytest

from ddt_jax import cli, planning
from ddt_jax.errors import UserError
from ddt_jax.scaling import generation_text
from tests.test_planning import CONFIGS, POD, of_tokenizer, request

# Sizes of `tests.test_planning`: depth, width, width of the MLP, vocabulary, heads and their dimension, those of keys.
L, W, M, V, H, E, G = 2, 64, 128, 512, 4, 16, 2
MATRICES = L * (2 * W * W + 2 * W * G * E + 3 * W * M)
ROWS, CODES, PROMPT = 8, 16, 16  # 12 tokens of text, BOS and BOV, filled up to 16


def asked(of="generate", mesh="", **changes):
    return replace(request(mesh, **{"sequences.context": 128} | changes), of=of, prompt=12, rows=ROWS)


@pytest.fixture(scope="module")
def drawn():
    return planning.plan_one(asked(), POD, jax.devices())


def of_prompts(rows, slots):
    """Operations of prompts of so many rows: matrices, attention to all slots of the cache, and logits of the last."""
    return 2 * rows * PROMPT * MATRICES + L * 4 * rows * PROMPT * slots * H * E + 2 * rows * V * W


def test_every_turn_of_the_loop_over_tokens_is_counted(drawn):
    """With guidance: prompts and an unconditional one, then two rows of each. The first code comes before the loop."""
    slots = PROMPT + CODES
    prompts, token = drawn["parts"]
    assert (prompts["part"], prompts["times"], token["part"], token["times"]) == ("prompts", 1, "token", CODES - 1)
    assert prompts["flops"] == of_prompts(ROWS, slots) + of_prompts(1, slots)
    assert token["flops"] == 2 * 2 * ROWS * (MATRICES + V * W) + L * 4 * 2 * ROWS * slots * H * E
    assert drawn["hardware_flops"] == prompts["flops"] + (CODES - 1) * token["flops"]
    assert drawn["hardware_flops_per_token"] == drawn["hardware_flops"] / (ROWS * CODES)
    assert drawn["answers"] == ROWS and drawn["tokens"] == ROWS * CODES and not drawn["uncounted"]


def test_memory_is_that_of_weights_and_cache_and_before_that_of_weights_as_they_are_restored(drawn):
    kinds = drawn["memory"]
    weights = 4 * (MATRICES + 2 * V * W + 5 * W)
    assert kinds["parameters"] == weights
    assert kinds["cache"] == L * 2 * 2 * ROWS * G * (PROMPT + CODES) * E * 4  # keys, values; two rows for each prompt
    # Their average as trained, in a loop, and the decoder's copies; nothing else is read.
    assert drawn["loading_bytes_per_chip"] == pytest.approx(2 * weights, abs=64)
    assert drawn["fits"] and drawn["hbm_bytes_per_chip"] == max(sum(kinds.values()), drawn["loading_bytes_per_chip"])


def test_weights_are_kept_in_the_type_that_they_are_computed_with(drawn):
    half = planning.plan_one(asked(**{"model.transformer.dtype": "bfloat16"}), POD, jax.devices())
    kept = 2 * (MATRICES + 2 * V * W) + 4 * 5 * W  # norms stay
    assert half["memory"]["parameters"] == kept
    assert half["loading_bytes_per_chip"] == pytest.approx(drawn["memory"]["parameters"] + kept, abs=64)


def test_a_token_is_bound_by_what_it_reads(drawn):
    prompts, token = drawn["parts"]
    read = 4 * (MATRICES + V * W) + drawn["memory"]["cache"]
    assert read <= token["hbm_traffic_bytes"] <= 4 * read  # and what a CPU writes in between
    assert token["bound"] == "memory" == drawn["estimate"]["bound"]
    assert token["seconds"] == token["memory_seconds"] == token["hbm_traffic_bytes"] / POD.chip.hbm_bandwidth
    e = drawn["estimate"]
    assert e["seconds"] == pytest.approx(prompts["seconds"] + (CODES - 1) * token["seconds"])
    assert e["token_seconds"] == token["seconds"] and e["seconds_per_image"] == e["seconds"] / ROWS
    assert e["tokens_per_second_per_chip"] == pytest.approx(ROWS * CODES / e["seconds"])


def test_it_reads_well_and_is_marked_as_an_estimate(drawn):
    text = generation_text.text(drawn)
    assert "8 images at once, of 16 tokens each, behind prompts of 16 positions" in text
    assert "estimate from the chip's figures, not a measurement" in text and "(memory)" in text
    assert "image tokenizer, is not part of this plan" in text and text.endswith("GB of 80 GB on each chip")
    small = {k: v for k, v in drawn.items() if k not in ("estimate", "prompt_positions")} | {"fits": False}
    assert "does NOT fit" in generation_text.text(small)


def test_what_answers_no_prompts_is_refused_in_one_line():
    with pytest.raises(UserError, match="not model.kind=linear; of that there is --of train") as error:
        planning.plan_one(replace(of_tokenizer(), config=str(CONFIGS / "smoke.py:linear"), of="caption"), POD, [])
    assert "\n" not in str(error.value)


def test_answers_have_no_rows_to_split():
    with pytest.raises(UserError, match="--of generate has no rows to split over context=2; leave it out of --mesh"):
        planning.plan_one(asked(mesh="fsdp=4,context=2"), POD, jax.devices())


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--search"], "leave it out with --of generate"),
        (["--config.model.transformer.vocab_size=70"], "leaves no id for text"),
        (["--config.model.transformer.vocab_size=512", "--prompt", "90"], "leaves no room for an answer of 17"),
        (["--config.model.transformer.vocab_size=512", "--prompt", "-1"], "--prompt must be at least 0"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(more, says, capsys):
    sizes = ["num_tokens=16", "codebook_size=64", "code_vectors=False"]
    command = ["plan", "--config", str(CONFIGS / "llama_scenes.py"), "--topology", "h100:8", "--of", "generate", *more]
    assert cli.main([*command, *(f"--config.model.image.{size}" for size in sizes)]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error


@pytest.mark.slow
def test_over_a_mesh_weights_and_cache_are_divided_and_no_work_is_done_twice(drawn):
    parted = planning.plan_one(replace(asked(mesh="fsdp=4,tensor=2"), rows=ROWS // 4), POD, jax.devices())
    assert parted["answers"] == ROWS and parted["chips"] == 8
    assert parted["memory"]["cache"] == drawn["memory"]["cache"] / 8
    assert parted["memory"]["parameters"] == pytest.approx(drawn["memory"]["parameters"] / 8, rel=0.01)
    assert parted["parts"][1]["flops"] == drawn["parts"][1]["flops"] / 8
    assert {c["axis"] for c in parted["collectives"]} >= {"fsdp", "tensor"}


@pytest.mark.slow
def test_texts_are_as_long_as_they_may_be(tmp_path, capsys):
    """The loop ends where all rows have ended, which no plan knows; and the verb writes what it has found."""
    request_, out = asked("caption", **{"model.transformer.depth": 1}), tmp_path / "plan.json"
    settings = [f"--config.{key}={value}" for key, value in request_.overrides]
    command = ["plan", "--config", request_.config, "--topology", "h100:8", "--of", "caption", "--rows", str(ROWS)]
    assert cli.main([*command, *settings, "--config.evaluate.image_to_text.tokens=9", "--to", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [part["times"] for part in report["parts"]] == [1, 8] and report["tokens"] == ROWS * 9
    assert not report["uncounted"] and "texts that are as long as they may be" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "turn", "times"), [("linear", "step", 3), ("blocks", "block", 4)])
def test_images_that_are_denoised_are_planned_by_the_same_door(variant, turn, times):
    sizes = {
        "model.transformer.vocab_size": 512,
        "model.transformer.depth": 1,
        "model.image.diffusion.solver_steps": 3,
        "data.image_size": 16,
    }
    if variant == "blocks":
        sizes["model.image.block_size"] = 4
    overrides = tuple((key, str(value)) for key, value in sizes.items())
    config = str(CONFIGS / f"transfusion_scenes.py:{variant}")
    report = planning.plan_one(
        planning.Request(config, overrides, "", ROWS, of="generate", prompt=12), POD, jax.devices()
    )
    prompts, image, each = report["parts"]
    assert [part["part"] for part in report["parts"]] == ["prompts", "image", turn] and each["times"] == times
    assert report["images"] == ROWS and not report["uncounted"] and report["fits"]
    rows, width, depth = 16, 96, 1  # of an image, and the transformer's
    slots = 16 + rows + 1  # prompts, and an image with EOV behind them
    state = depth * 2 * ROWS * slots * width * 4 + ROWS * 512 * 4 + ROWS * 4  # keys and values, logits, lengths
    assert report["memory"]["cache"] == state
    if turn == "step":  # rows of an image of each prompt, with it before them and without; the coder's maps beside
        matrices = depth * (4 * width**2 + 3 * width * 256)
        seen = (slots + rows) + (2 + rows)
        by_hand = 2 * 2 * ROWS * rows * matrices + depth * 4 * ROWS * rows * seen * width
        assert by_hand < each["flops"] < 1.1 * by_hand
