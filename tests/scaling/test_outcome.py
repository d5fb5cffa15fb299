"""What became of a run is read from its log and its checkpoints; a run that cannot be believed says so."""

import json
import math

import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.scaling import outcome

S = settings.Experiment(train=settings.Train(steps=100))


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Writes a run's files; its checkpoints are said to reach some step."""

    def write(losses, step=100, results=None):
        lines = [{"step": (i + 1) * 100 // len(losses), "loss": loss} for i, loss in enumerate(losses)]
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if results:
            (tmp_path / "results.json").write_text(json.dumps(results))
        monkeypatch.setattr("ddt_jax.training.checkpoint.saved_steps", lambda workdir: [step])
        return outcome.read(str(tmp_path), S)

    return write


def test_training_figures_are_means_of_the_last_steps(run):
    found = run([9.0] + [3.0] * 95 + [1.0, 2.0, 1.0, 2.0], results={"step": 100, "psnr": 20, "tokens": 7, "ok": True})
    assert found.status == "finished" and found.metrics == {
        "loss": pytest.approx((3 + 1 + 2 + 1 + 2) / 5),
        "psnr": 20.0,
    }


def test_evaluations_while_it_trained_count_as_they_were_last():
    records = [{"step": 40, "eval/psnr": 10.0}, {"step": 50, "loss": 1.0}, {"step": 98, "eval/psnr": 20.0}]
    records += [{"step": 99, "eval/psnr": 30.0}, {"step": 100, "loss": 2.0, "grad": 1.0}]
    assert outcome.last_figures(records) == {"eval/psnr": 30.0, "loss": 2.0, "grad": 1.0}


@pytest.mark.parametrize(
    ("losses", "step", "status", "why"),
    [
        ([3.0, "nan"], 100, "diverged", "the loss ends at nan"),
        ([3.0, 1.0, 7.0], 100, "diverged", "ends at 7 and began at 3"),
        ([3.0, 2.0, 1.0], 66, "stopped", "at step 66 of 100"),
    ],
)
def test_a_run_that_cannot_be_believed_says_why(run, losses, step, status, why):
    found = run(losses, step)
    assert found.status == status and why in found.why


def test_what_is_logged_behind_the_checkpoint_does_not_count(run):
    assert run([3.0, math.pi, 1.0], 66).metrics == {"loss": math.pi}


def test_results_of_another_step_are_refused(run):
    with pytest.raises(UserError, match="is of step 50, the run is at 100"):
        run([3.0, 1.0], results={"step": 50})
