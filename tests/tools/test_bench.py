"""tools/bench.py runs, and compares what it says it compares."""

import importlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return importlib.import_module("bench")


@pytest.mark.slow
def test_decoding_is_held_against_one_pass_of_the_same_batch(bench, capsys):
    arguments = ["decode", "--images", "8", "--steps", "3", "--repeats", "2", "--config"]
    assert bench.main([*arguments, str(ROOT / "configs" / "smoke.py"), "--config.model.width=16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["config"], found["images"], found["steps"]) == ("smoke", 8, 3)
    seconds = found["seconds"]
    assert found["decode_in_forwards"] == pytest.approx(seconds["decode"] / seconds["forward"], rel=0.05)
    assert found["with_encoder_in_forwards"] > found["decode_in_forwards"]


@pytest.mark.slow
def test_a_train_step_is_held_against_one_product_of_matrices(bench, capsys):
    arguments = ["step", "--steps", "2", "--repeats", "1", "--matrix", "256", "--config"]
    assert bench.main([*arguments, str(ROOT / "configs" / "smoke.py"), "--config.train.batch_size=16"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["config"], found["batch_size"], found["settings"]) == ("smoke", 16, ["train.batch_size=16"])
    assert found["examples_per_second"] == pytest.approx(16 / found["seconds_per_step"], rel=1e-3)
    devices = int(found["device"].split()[0])
    per_device = found["tflop_per_step"] / found["seconds_per_step"] / devices
    assert found["tflops_per_device"] == pytest.approx(per_device, abs=1e-4)
    assert found["share_of_one_product"] > 0 and found["product"] == "256 x 256 float32"


@pytest.mark.slow
def test_a_mixed_step_is_held_against_two_of_the_same_positions_and_images(bench, capsys):
    sizes = {"transformer.width": 48, "transformer.depth": 2, "transformer.mlp_width": 64, "image.patch_size": 8}
    small = [f"--config.model.{name}={value}" for name, value in sizes.items()]
    small += ["--config.train.batch_size=16", "--config.sequences.context=100", "--config.optimizer.name=adamw"]
    assert bench.main(["mixed", "--repeats", "2", *small]) == 0
    found = json.loads(capsys.readouterr().out)
    # An image has 16 positions and 4 marks, and a text alone as many: two pairs of 40 in a row.
    assert found["context"] == 80 and found["images"] == 32
    assert found["positions"] == {"mixed": 16 * 80, "text": 8 * 80, "images": 8 * 80}
    seconds, (step, gradient) = found["seconds"], found["gflop_over_apart"]
    assert found["step_over_apart"] == pytest.approx(seconds["mixed"] / seconds["apart"], rel=0.05)
    assert found["gradient_over_apart"] == pytest.approx(
        seconds["mixed_gradient"] / seconds["apart_gradient"], rel=0.05
    )
    # The same rows through the model, but for the last block of texts alone, which makes rows with a target only. AdamW
    # has no products.
    assert step == gradient == pytest.approx(1, abs=0.02)


@pytest.mark.slow
def test_a_cache_is_held_against_forwards_over_the_whole_text(bench, capsys, monkeypatch):
    tiny = {"width": 16, "depth": 2, "heads": 2, "kv_heads": 1, "mlp_width": 32}
    for name, value in {"WIDE": tiny, "SMALL": tiny, "TOKENS": 16, "LENGTHS": (8, 32), "FEW": 2, "MANY": 6}.items():
        monkeypatch.setattr(bench, name, value)
    assert bench.main(["cache", "--repeats", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    seconds = found["seconds"]
    assert found["tokens"] == 16 and seconds.keys() == {"with_cache", "without_cache", "token_at_8", "token_at_32"}
    assert found["with_over_without"] == pytest.approx(seconds["with_cache"] / seconds["without_cache"], abs=1e-3)


@pytest.mark.slow
def test_blocks_are_held_against_a_mask(bench, capsys, monkeypatch):
    monkeypatch.setattr(bench, "BLOCKS", (2, 8))
    assert bench.main(["blocks", "--repeats", "3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["share_of_the_logits"] == 0.375 and (found["blocks"], found["tokens_of_a_block"]) == (2, 8)
    for name in ("forwards", "forwards_and_backwards"):
        assert found[name].keys() == {"seconds_by_block", "seconds_dense", "by_block_over_dense"}
        assert all(value > 0 for value in found[name].values())


@pytest.mark.slow
def test_the_verbs_for_llama_are_measured_in_processes_of_their_own(bench, capsys, monkeypatch, tmp_path):
    tiny = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "num_attention_heads": 4}
    llama = importlib.import_module("bench_llama")
    monkeypatch.setattr(llama, "LLAMA", llama.LLAMA | tiny | {"vocab_size": 1024, "num_key_value_heads": 2})
    held = np.ones(1_000_000_000, np.uint8)  # what this process holds must not count
    assert bench.main(["llama", "--gigabytes", "0.002", "--folder", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert held.all() and found["identical"] and found["within_limits"] and found["files"] >= 8
    assert found["model_gb"] == 0.002 and found["tensors"] % 9 == 3
    assert found["baseline_gb"].keys() == {"import", "export", "import_longer"}
    assert all(0.05 < x < 1 for x in found["baseline_gb"].values())
    assert not list(tmp_path.iterdir())


def test_the_first_call_is_not_timed_and_the_least_of_the_others_counts(bench):
    waits = iter([0.2, 0.03, 0.001, 0.05])
    assert 0.001 <= bench.least_seconds({"part": lambda: time.sleep(next(waits))}, 3)["part"] < 0.03


def test_settings_that_cannot_be_used_are_one_line(bench, capsys):
    assert bench.main(["step", "--config", str(ROOT / "configs" / "ddt_selftok_256.py")]) == 2
    assert capsys.readouterr().err.startswith("bench: config: model.codec.weights is empty")


def test_a_mixed_step_needs_images_that_are_denoised(bench, capsys):
    assert bench.main(["mixed", "--config", str(ROOT / "configs" / "smoke.py")]) == 2
    assert capsys.readouterr().err.startswith(
        "bench: mixed needs a config with model.image.kind='diffusion', not smoke"
    )


def test_what_is_not_an_option_is_refused(bench, capsys):
    with pytest.raises(SystemExit):
        bench.main(["decode", "--image=3"])
    assert "unknown" in capsys.readouterr().err
