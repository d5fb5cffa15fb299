"""A comparison is run once, whatever stops or kills it; a shell script stands for `ddt-jax`."""

import importlib
import io
import json
import os
import re
import signal
import subprocess
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from ddt_jax import ledger
from ddt_jax.errors import UserError
from ddt_jax.evaluation import comparison
from ddt_jax.evaluation.comparison import Row
from ddt_jax.scaling import sweep_state
from ddt_jax.scaling.trial import Arm, Trial

ROOT = Path(__file__).resolve().parents[2]
TRIAL = Trial(
    name="two",
    arms={"codes": Arm("x.py:{root}/codes", {"t.py": 3}), "pixels": Arm("y.py")},
    total=1.0,
    rates=(1.0, 2.0, 4.0),
    guidances=(1.0, 3.0),
    first_guidance=1.0,
)
# Does what `ddt-jax` does as far as a comparison looks. ROOT/calls has a line for each call; ROOT/end/NAME of a workdir
# is how its training ends instead, a shell's line.
PROGRAM = """
root=$0 verb=$1; shift
for text in "$@"; do case $text in
    --config.train.steps=*) steps=${text#*=} ;;
    --config.evaluate.text_to_image.guidance=*) guidance=${text#*=} ;;
    --config.*) ;;
    --*) name=${text#--} ;;
    *) eval "$name=\\$text" ;;
esac; done
own=${workdir##*/}
echo "$verb ${workdir#$root/} ${guidance:-} $(sed -n 's/Cpus_allowed_list:\\t//p' /proc/self/status)" >> $root/calls
case $verb in
    train)
        [ -e $root/end/$own ] && . $root/end/$own
        mkdir -p $workdir/checkpoints/$steps ;;
    tokenize) mkdir -p $to; echo '{}' > $to/index.json ;;
    evaluate)
        step=$(ls $workdir/checkpoints)
        case $own in lr2*) share=0.6 ;; *) share=0.5 ;; esac
        [ "${guidance:-}" = 3 ] && share=0.7
        drawn='{"text_to_image": {"guidance": '${guidance:-1}'}, "image_to_text": {}}'
        mkdir -p $workdir/sampling
        echo '{"step": '$step', "prompts": 9, "drawn_with": '$drawn', "plain_perplexity": 2.5,
               "t2i_all_correct": '$share', "caption_all_correct": '$share'}' > ${json:-$workdir/results.json} ;;
esac
"""


@pytest.fixture
def run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("compare_run")
    monkeypatch.setattr(module, "_TICK_SECONDS", 0.01)
    return module


class Comparison:
    """Of two arms in a folder."""

    def __init__(self, run, root: Path):
        self.run, self.root, self.trial = run, root, TRIAL
        plan = importlib.import_module("compare_plan")
        stages = (plan.Stage("t.py", "t.py", 3, 1.0),)
        folders = tuple((f"scenes:{x}", 9, f"{root}/codes/codes/{x}") for x in ("train", "heldout"))
        read = {"tokenizer": stages, "workdir": f"{root}/codes/tokenizer", "folders": folders}
        codes = plan.Arm("codes", "x.py", "x.py", 5, {"training": 8.0, "tokenizer": 1.0, "encoding": 1.0}, **read)
        self.arms = [codes, plan.Arm("pixels", "y.py", "y.py", 4, {"training": 10.0})]
        self.said = io.StringIO()

    def work(self, **how):
        def command(arguments):
            return ["sh", "-c", PROGRAM, str(self.root), *arguments]

        return self.run.Work(self.trial, self.arms, str(self.root), command=command, **how)

    def go(self, **how):
        """(whether nothing is left, the work, what was called)"""
        work, before = self.work(**how), len(self.calls())
        return self.run.run(work, self.said), work, self.calls()[before:]

    def calls(self) -> list[str]:
        path = self.root / "calls"
        return [" ".join(line.split()[:-1]) for line in path.read_text().splitlines()] if path.exists() else []

    def end(self, name: str, how: str) -> Path:
        (self.root / "end").mkdir(exist_ok=True)
        (self.root / "end" / name).write_text(how)
        return self.root / "end" / name


@pytest.fixture
def two(run, tmp_path):
    return Comparison(run, tmp_path)


def test_all_is_run_once_in_an_order_that_works_and_the_second_time_nothing(two):
    jobs = min(2, len(os.sched_getaffinity(0)))
    ended, work, calls = two.go(jobs=jobs)
    assert ended and set(work.states()) == {"finished"} and len(calls) == len(work.steps) == 26
    assert [work.chosen[name] for name in ("codes", "pixels")] == [
        importlib.import_module("compare_plan").Chosen(2, 3)
    ] * 2
    assert calls.index("train codes/tokenizer") < calls.index("tokenize codes/tokenizer")
    assert calls.index("train codes/lr1_seed0") > max(i for i, c in enumerate(calls) if c.startswith("tokenize"))
    trained = [line.split()[1] for line in calls if line.startswith("train")]
    runs = {f"lr{r}_seed0" for r in (1, 2, 4)} | {"lr2_seed1", "lr2_seed2"}
    assert sorted(trained) == sorted([f"{a}/{r}" for a in ("codes", "pixels") for r in runs] + ["codes/tokenizer"])
    # The first seed is drawn with every guidance, the others with the best.
    drawn = {(line.split()[1], line.split()[2]) for line in calls if line.startswith("evaluate pixels/lr2")}
    assert drawn == {("pixels/lr2_seed0", "1"), *((f"pixels/lr2_seed{seed}", "3") for seed in range(3))}
    cores = {line.split()[-1] for line in (two.root / "calls").read_text().splitlines()}
    assert jobs == 1 or (len(cores) > 1 and all(core.isdigit() for core in cores))
    assert two.go(jobs=jobs)[2] == [] and "26 steps: 26 finished" in two.said.getvalue()
    assert work.lost() == []


@pytest.mark.parametrize(
    ("rates", "beyond", "tried", "best"),
    [
        ((1.0, 2.0), 2, (1.0, 2.0, 4.0), 2.0),  # up, until the best is inside
        ((4.0, 8.0), 2, (1.0, 2.0, 4.0, 8.0), 2.0),  # down
        ((4.0, 8.0), 1, (2.0, 4.0, 8.0), 2.0),  # as often as is allowed
        ((1.0, 2.0), 0, (1.0, 2.0), 2.0),
    ],
)
def test_the_grid_of_an_arm_goes_on_while_its_best_rate_is_at_an_edge(two, rates, beyond, tried, best):
    two.trial = replace(TRIAL, rates=rates, beyond=beyond)
    two.end("lr2_seed0", "[ $workdir = $root/pixels/lr2_seed0 ] || exit 3\n")
    ended, work, _ = two.go()
    pixels = sorted(path.name for path in (two.root / "pixels").glob("lr*_seed0"))
    assert ended and pixels == sorted(f"lr{rate:g}_seed0" for rate in tried)
    assert work.chosen["pixels"].rate == best
    assert work.chosen["codes"].rate is None  # whose best is not known, as one rate has failed
    assert two.go()[2] == []


def test_a_rate_beyond_that_diverges_has_lost(two):
    two.trial = replace(TRIAL, rates=(1.0, 2.0), beyond=3)
    two.end("lr4_seed0", "echo 'ddt-jax: train: 50 steps in a row were not finite'; exit 2\n")
    ended, work, _ = two.go()
    assert ended and {(c.rate, c.beyond) for c in work.chosen.values()} == {(2.0, (4.0,))}
    assert [(row.arm, row.lr) for row in work.diverged()] == [("codes", 4.0), ("pixels", 4.0)]


def test_a_step_that_fails_stops_what_needs_it_and_nothing_else(two):
    wrong = two.end("tokenizer", "echo 'ddt-jax: data: no such thing'; exit 2\n")
    ended, work, calls = two.go()
    assert ended and [line for line in calls if "codes" in line] == ["train codes/tokenizer"]
    states = {arm: [work.stands[s.name][0] for s in work.steps if s.arm == arm] for arm in ("codes", "pixels")}
    assert set(states["pixels"]) == {"finished"} and states["codes"] == ["failed"] + ["blocked"] * 14
    line = "codes-tokenizer failed: data: no such thing; 14 steps that need it were not run"
    assert work.lost() == [line]
    text = two.said.getvalue()
    assert "failed    codes-tokenizer  0:00  data: no such thing" in text and "14 steps need codes-tokenizer" in text
    assert two.go()[2] == []  # it is not tried again by itself
    wrong.unlink()
    ended, work, calls = two.go(retry=True)
    assert ended and set(work.states()) == {"finished"} and not any("pixels" in line for line in calls)


def test_a_rate_that_diverges_has_lost_and_one_that_fails_leaves_the_choice_open(two):
    two.end("lr4_seed0", "echo 'ddt-jax: train: 50 steps in a row were not finite'; exit 2\n")
    ended, work, _ = two.go()
    assert ended and {c.rate for c in work.chosen.values()} == {2.0} and work.lost() == []
    assert [(row.arm, row.lr, row.seed) for row in work.diverged()] == [("codes", 4.0, 0), ("pixels", 4.0, 0)]
    assert "were not finite" in work.diverged()[0].diverged

    other = Comparison(two.run, two.root / "other")
    other.root.mkdir()
    other.end("lr4_seed0", "exit 3\n")
    ended, work, _ = other.go()
    assert ended and {c.rate for c in work.chosen.values()} == {None}
    assert [line.partition(":")[0] for line in work.lost()] == ["codes-lr4-s0 failed", "pixels-lr4-s0 failed"]
    assert "train ended with code 3; 6 steps that need it were not run" in work.lost()[0]


def test_a_program_that_ends_well_but_made_nothing_has_failed(two):
    two.end("lr1_seed0", "exit 0\n")
    _, work, _ = two.go()
    assert "pixels-lr1-s0 failed: train ended well, but" in work.lost()[1]


def test_what_was_asked_to_stop_goes_on_with_the_same_command(two):
    hangs = two.end("lr2_seed0", "trap 'exit 75' TERM; touch $workdir.on; while :; do sleep 0.01; done\n")

    def ask():
        while not (two.root / "pixels" / "lr2_seed0.on").exists():
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    (two.root / "pixels").mkdir()
    (two.root / "codes").mkdir()
    two.arms = two.arms[1:]
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    ended, work, calls = two.go()
    assert not ended and work.stands["pixels-lr2-s0"][0] == "stopped" and calls[-1] == "train pixels/lr2_seed0"
    hangs.unlink()
    ended, work, more = two.go()
    assert ended and set(work.states()) == {"finished"} and more[0] == "train pixels/lr2_seed0"
    assert len(calls) + len(more) == len(work.steps) + 1


def test_after_a_kill_the_dead_are_run_again_and_orphans_are_waited_for(two):
    """As a killed process leaves them: records that say "running", one of a process that lives, one of one that not."""
    work = two.work()
    by_name = {step.name: step for step in work.steps}
    orphan, dead = by_name["pixels-lr1-s0"], by_name["pixels-lr2-s0"]
    made = f"{orphan.workdir}/checkpoints/{orphan.steps}"
    child = subprocess.Popen(
        ["sh", "-c", f"sleep 0.3; mkdir -p {made}; echo orphan >> {two.root}/calls", orphan.workdir]
    )
    reaper = threading.Thread(target=child.wait)  # as the first process of a machine does
    reaper.start()
    sweep_state.write(str(two.root), orphan, sweep_state.Record().started(orphan, child.pid))
    sweep_state.write(str(two.root), dead, sweep_state.Record().started(dead, 2**22 + 1))
    ended, work, calls = two.go()
    reaper.join()
    assert ended and set(work.states()) == {"finished"}
    assert "train pixels/lr1_seed0" not in calls and calls.count("train pixels/lr2_seed0") == 1


def test_one_process_runs_it_and_no_more_jobs_than_cores(two):
    work = two.work()
    with two.run._alone(str(two.root)), pytest.raises(UserError, match="another process runs the comparison in"):
        two.run.run(work, two.said)
    with pytest.raises(UserError, match=r"--jobs 4096 is not between 1 and the \d+ cores"):
        two.work(jobs=4096)


def rows_of(work) -> list[Row]:
    """As `ledger.rows` makes them of what the shell script has left."""
    made = []
    for arm in work.arms:
        for place in work_dirs(work)[arm.name]:
            rate, seed = re.search(r"lr(.+)_seed(.+)", place).groups()
            pictures = dict.fromkeys(comparison.TOKENIZER, 1.0) if arm.tokenizer else {}
            for found in ledger.evaluations(place):
                of = (arm.name, str(Path(place).relative_to(work.root)), int(seed), float(rate), arm.steps, arm.steps)
                made.append(Row(*of, arm.flops, {}, {}, found["drawn_with"], found | pictures))
    return made


def work_dirs(work):
    return importlib.import_module("compare_run").workdirs(work)


@pytest.fixture
def part(two):
    """(a whole comparison, a function that writes the rows that are wanted of it)."""
    _, work, _ = two.go()
    rows = rows_of(work)

    def write(wanted):
        path = two.root / "comparison.json"
        found = comparison.Comparison((), ())
        path.write_text(json.dumps(comparison.as_json(found, [row for row in rows if wanted(row)])))
        return str(path)

    return work, write


def elsewhere(two) -> Comparison:
    other = Comparison(two.run, two.root / "elsewhere")
    other.root.mkdir(exist_ok=True)
    return other


def test_what_an_earlier_part_has_made_is_not_run_again_nor_what_that_alone_needs(two, part):
    whole, write = part
    other = elsewhere(two)
    _, work, calls = other.go(known=[write(lambda row: True)])
    assert calls == [] and set(work.states()) == {"finished"} and work.lost() == []
    assert work.chosen == whole.chosen and work_dirs(work) == {"codes": [], "pixels": []}

    # One arm of the grid whole, the first rate of the other: its codes are needed for what is left.
    _, work, calls = other.go(known=[write(lambda row: row.seed == 0 and (row.arm == "pixels" or row.lr == 1))])
    assert set(work.states()) == {"finished"} and work.chosen == whole.chosen
    trained = {line.split()[1] for line in calls if line.startswith("train")}
    left = {"codes/lr2_seed0", "codes/lr4_seed0", *(f"{a}/lr2_seed{s}" for a in ("codes", "pixels") for s in (1, 2))}
    assert trained == left | {"codes/tokenizer"} and sum(line.startswith("tokenize") for line in calls) == 2
    merged = [row for arm in work.arms for row in work.known.merged(arm.name, of_arm(rows_of(work), arm))]
    assert {(row.arm, row.lr, row.seed, row.point) for row in merged} == {
        (row.arm, row.lr, row.seed, row.point) for row in rows_of(whole)
    }


def of_arm(rows, arm):
    return [row for row in rows if row.arm == arm.name]


def test_a_run_is_trained_again_if_it_is_to_be_drawn_in_another_way(two, part):
    whole, write = part
    known = write(lambda row: (row.lr, row.seed, comparison.guidance(row.point)) != (2, 0, 3))
    _, work, calls = elsewhere(two).go(known=[known])
    assert set(work.states()) == {"finished"} and work.chosen == whole.chosen
    calls = sorted(line for line in calls if "pixels" in line)
    assert calls == ["evaluate pixels/lr2_seed0 3", "train pixels/lr2_seed0"]


def test_a_rate_that_is_known_to_diverge_has_lost(two, part):
    _, write = part
    path = Path(write(lambda row: row.arm == "pixels" and row.lr != 4))
    tree = json.loads(path.read_text())
    why = {"lr": 4.0, "run": "pixels/lr4_seed0", "flops": {}, "sampling": {}, "results": {}, "diverged": "not finite"}
    tree["rows"].append(tree["rows"][0] | why)
    path.write_text(json.dumps(tree))
    _, work, calls = elsewhere(two).go(known=[str(path)])
    assert not any("pixels" in line for line in calls) and work.chosen["pixels"].rate == 2.0
    assert [(row.arm, row.lr, row.diverged) for row in work.diverged()] == [("pixels", 4.0, "not finite")]
    _, work, calls = elsewhere(two).go(known=[str(path)], retry=True)
    assert "train pixels/lr4_seed0" in calls and work.diverged() == []


def test_rates_are_known_that_a_grid_may_go_on_to(two, part):
    _, write = part
    path = write(lambda row: row.arm == "pixels" and row.lr == 4)
    other = elsewhere(two)
    other.trial = replace(TRIAL, rates=(1.0, 2.0), beyond=1)
    _, work, calls = other.go(known=[path])
    assert "train pixels/lr4_seed0" not in calls and "train codes/lr4_seed0" in calls
    assert work.chosen["pixels"] == work.chosen["codes"] and work.chosen["pixels"].beyond == (4.0,)
    other.trial = replace(TRIAL, rates=(1.0, 2.0))
    with pytest.raises(UserError, match="learning rate 4 and seed 0, is not of this trial"):
        other.work(known=[path])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"arm": "words"}, "learning rate 1 and seed 0, is not of this trial"),
        ({"lr": 3.0}, "learning rate 3 and seed 0, is not of this trial"),
        ({"steps": 9}, "was to have 9 steps, here 4 are paid for"),
        ({"flops": {"training": 20.0}}, r"cost 2.000e\+01 FLOPs in all, here 1.000e\+01"),
        ({"sampling": {"text_to_image": {"guidance": 5.0}}}, "was drawn with guidance 5, which is not tried here"),
        ({"sampling": {}}, "is no comparison.json that `compare.py` has written"),
        (None, "is no comparison.json that `compare.py` has written"),
    ],
)
def test_rows_of_another_trial_are_not_taken(two, part, change, message):
    _, write = part
    path = Path(write(lambda row: row.arm == "pixels" and row.lr == 1))
    tree = json.loads(path.read_text())
    tree["rows"][0] = tree["rows"][0] | change if change else {"arm": "pixels"}
    path.write_text(json.dumps(tree))
    with pytest.raises(UserError, match=message):
        two.work(known=[str(path)])


def test_a_changed_plan_takes_another_folder(two):
    two.go()
    two.arms[1] = replace(two.arms[1], steps=7)
    with pytest.raises(
        UserError, match=r"pixels-lr1-s0 .* began with other settings \(train.steps\); use another --to"
    ):
        two.work()


def test_the_table_says_when_it_ends(two):
    work = two.work()
    assert "26 steps: 26 waiting; ends unknown" in work.table() and "... 22 more wait" in work.table()
    two.go()
    kinds = {step.name: step.kind for step in work.steps}
    run = two.root / "pixels" / "lr4_seed0"
    (run / "checkpoints" / "4").rmdir()
    (run / "sampling" / "1.json").unlink()
    work = two.work()
    for name, record in work._records.items():
        seconds = 100.0 if kinds.get(name, "training") == "training" else 10.0
        work._records[name] = replace(record, seconds=seconds if name in work._done else 0.0)
    # The run whose files are gone, its evaluation; and as the choice is open again, two seeds with one each, and one
    # more guidance: three times 100 seconds and four times 10.
    assert work._ends(0.0).startswith("in 5:40")
