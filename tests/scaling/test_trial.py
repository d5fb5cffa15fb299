"""A trial's file is read whole, or refused in one line."""

from pathlib import Path

import pytest

from ddt_jax import config
from ddt_jax.errors import UserError
from ddt_jax.scaling import trial

LANGUAGES = str(Path(__file__).resolve().parents[2] / "configs" / "sweeps" / "image_languages.py")
FILE = """
from ddt_jax.scaling import trial
def get_trial():
    how = dict(total=1.0, rates=(1.0, 2.0), guidances=(1.0, 2.0), first_guidance=2.0)
    how |= dict({changes})
    return trial.Trial("t", how.pop("arms", {{"a": trial.Arm("x.py"), "b": trial.Arm("y.py")}}), **how)
"""


def test_the_six_image_languages_are_there_and_live_in_the_folder_that_is_asked_for():
    found = trial.load(LANGUAGES)
    assert list(found.arms) == ["codes", "spatial", "unordered", "seed", "transfusion", "blocks"]
    for name, arm in found.arms.items():
        s = config.load(trial.place(LANGUAGES, arm.config, "/somewhere"))
        codes = s.model.image.kind == "codes"
        assert bool(arm.tokenizer) == codes
        assert s.sequences.tokenizer == (f"/somewhere/{name}/tokenizer" if codes else "")
        for text, steps in arm.tokenizer.items():
            config.load(trial.place(LANGUAGES, text, "/somewhere"), (("train.steps", f"{steps}"),))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ("arms={}", "has 0 arms; a comparison takes two or more"),
        ("rates=()", "rates of .* must be one value or more, each once; got ()"),
        ("seeds=(0, 0)", "each once; got (0, 0)"),
        ("seeds=(1, 0)", "must begin with the lowest"),
        ("total=0.0", "total of .* must be above 0, got 0.0"),
        ("rates=(1.0, -1.0)", "rates and guidances of .* must be above 0"),
        ("rates=(2.0, 1.0)", "rates of .* must rise"),
        ("rates=(1.0,), beyond=1", "must rise, and be two or more to go beyond; got (1.0,)"),
        ("beyond=-1", "beyond of .* must be 0 or more, got -1"),
        ("first_guidance=3.0", "first_guidance=3.0 of .* is none of its guidances"),
        ("arms=1 / 0", "failed with ZeroDivisionError"),
    ],
)
def test_what_makes_no_trial_is_one_line(tmp_path, changes, said):
    path = tmp_path / "t.py"
    path.write_text(FILE.format(changes=changes))
    with pytest.raises(UserError) as error:
        trial.load(str(path))
    start, _, end = said.partition(".*")
    assert start in str(error.value) and end in str(error.value) and "\n" not in str(error.value)


def test_a_file_that_is_missing_or_a_sweep_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere.py does not exist; there are configs/sweeps/image_languages.py"):
        trial.load("nowhere.py")
    path = tmp_path / "t.py"
    path.write_text("def get_trial(): return 3")
    with pytest.raises(UserError, match="must return a Trial, got int"):
        trial.load(str(path))
