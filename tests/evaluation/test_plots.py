"""Plots are drawn from whatever an evaluation finds: few tokens and many, one run and several."""

import json

import numpy as np
import pytest
from PIL import Image

from ddt_jax.evaluation import plots


def _records(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": s, "loss": 1 / s, "grad_norm": 0.5} for s in range(1, 60)]
    lines[10]["loss"] = "nan"
    lines += [{"step": 50, "eval/psnr": 20.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 60, "lo')
    return path


def test_loss_curve_survives_torn_lines_and_non_finite_values(tmp_path):
    (path,) = plots.loss_curve(_records(tmp_path), tmp_path / "loss.png")
    with Image.open(path) as image:
        assert image.width > 3 * 400


def test_a_run_that_has_logged_nothing_has_no_loss_curve(tmp_path):
    (tmp_path / "empty.jsonl").write_text("")
    for name in ("empty.jsonl", "missing.jsonl"):
        assert plots.loss_curve(tmp_path / name, tmp_path / "x.png") == []
    assert not (tmp_path / "x.png").exists()


def test_tokens_plot_orders_by_number_of_tokens(tmp_path):
    a = plots.tokens_plot({"2": 17.6, "4": 21.1, "16": 29.4}, tmp_path / "a.png").read_bytes()
    b = plots.tokens_plot({"16": 29.4, "2": 17.6, "4": 21.1}, tmp_path / "b.png").read_bytes()
    assert a == b


def is_drawn(path):
    """Whether a picture holds more than paper and one ink."""
    with Image.open(path) as image:
        return image.width > 400 and len(image.convert("P", colors=32).getcolors()) > 8


@pytest.mark.parametrize("tokens", [1, 16, 512])
def test_usage_and_entropy_for_any_number_of_tokens(tmp_path, tokens):
    rng = np.random.default_rng(0)
    used = rng.integers(1, 64, tokens)
    results = {"n": 40, "codebook_size": 64, "codebook_used_by_position": used.tolist()}
    results["codebook_perplexity_by_position"] = (used * 0.7).tolist()
    assert is_drawn(plots.usage_plot(results, tmp_path / "usage.png"))
    by_stride = {
        str(s): {"mean": 2.0, "by_place": rng.uniform(1, 3, tokens).tolist()} for s in (1, 2, 4) if s <= tokens
    }
    assert is_drawn(plots.entropy_plot(by_stride, 64, tmp_path / "entropy.png"))


def test_probes_with_their_intervals(tmp_path):
    def found(value):
        return {"accuracy": value, "interval": [max(0.0, value - 0.1), min(1.0, value + 0.1)], "n": 50}

    by_tokens = {k: {"linear": found(v), "knn": found(v / 2)} for k, v in {"2": 0.0, "16": 0.6, "4": 1.0}.items()}
    assert is_drawn(plots.probe_plot(by_tokens, 0.1, tmp_path / "probes.png"))
    backwards = plots.probe_plot(dict(list(by_tokens.items())[::-1]), 0.1, tmp_path / "backwards.png")
    assert backwards.read_bytes() == (tmp_path / "probes.png").read_bytes()


def test_runs_with_other_codebooks_are_compared_by_bits(tmp_path):
    def draw(name, sizes):
        runs = {k: {"psnr_by_tokens": {"2": 17.0, "16": 28.0}, "codebook_size": size} for k, size in sizes.items()}
        return plots.comparison_plot(runs, tmp_path / name)

    same, other = draw("same.png", {"a": 512, "b": 512}), draw("other.png", {"a": 512, "b": 64})
    assert is_drawn(same) and is_drawn(other) and same.read_bytes() != other.read_bytes()
