"""tools/soak.py kills, resumes, compares and records; a small program stands in for `ddt-jax`."""

import importlib
import json
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]

# Counts to 60 and keeps every tenth count, with a log; with WRONG only the undisturbed run has the right digest, with
# FORGETS a killed one begins anew each time.
STAND_IN = """
import json, os, pathlib, sys, time
workdir = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
kept, log = workdir / "checkpoints", workdir / "metrics.jsonl"
kept.mkdir(parents=True, exist_ok=True)
if sys.argv[1] == "checkpoint":
    print((workdir / "digest").read_text())
    sys.exit()
time.sleep(0.05)
step = max([int(p.name) for p in kept.iterdir()], default=0)
lines = log.read_text().splitlines()[:step] if log.exists() else []
log.write_text("".join(line + "\\n" for line in lines))
while step < 200:
    step += 1
    time.sleep(0.005)
    with log.open("a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
    if step % 10 == 0 and not ("FORGETS" in os.environ and workdir.name != "undisturbed"):
        (kept / str(step)).mkdir(exist_ok=True)
(workdir / "digest").write_text("other" if "WRONG" in os.environ and workdir.name != "undisturbed" else "same")
"""


@pytest.fixture
def soak(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    module = importlib.import_module("soak")
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    monkeypatch.setattr(
        module.programs, "command", lambda *args: [sys.executable, str(tmp_path / "stand_in.py"), *args]
    )
    monkeypatch.setattr(module.programs, "dump_config", lambda config, options: {})
    return module


def test_kill_counts_compares_and_says_where_it_was_made(soak, tmp_path):
    assert soak.main(["kill", "--kills", "3", "--out", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "kill.json").read_text())
    kills = record["results"]["kills"]
    assert len(kills) == 3
    assert any(k["went_on_from"] > 0 for k in kills)
    assert all(k["step"] >= k["went_on_from"] for k in kills)
    assert record["passed"] and record["machine"]["cores"] and record["machine"]["versions"]["jax"]
    assert {"commit", "dirty", "date", "seeds", "config", "wall_seconds"} <= set(record)
    assert record["command"] == "python tools/soak.py kill --kills 3"


def test_the_command_of_a_record_names_no_folder_of_its_machine(soak):
    assert soak.without_folders(["x", "--keep", "/a", "--seeds", "0", "--out=/b"]) == ["x", "--seeds", "0"]


def test_another_digest_misses_the_gate(soak, tmp_path, monkeypatch):
    monkeypatch.setenv("WRONG", "1")
    assert soak.main(["kill", "--kills", "1", "--out", str(tmp_path)]) == 1


def test_kills_of_which_none_met_a_checkpoint_prove_nothing(soak, tmp_path, monkeypatch):
    monkeypatch.setenv("FORGETS", "1")
    assert soak.main(["kill", "--kills", "3", "--out", str(tmp_path)]) == 1
    missed = [g["gate"] for g in json.loads((tmp_path / "kill.json").read_text())["gates"] if not g["passed"]]
    assert missed == ["of these, of a run that had gone on from a checkpoint"]


def test_schedules_reports_any_ordering_and_judges_the_runs_alone(soak, tmp_path, capsys, monkeypatch):
    def stand_in(config, workdir, seed, options):
        arm = config.partition(":")[2]
        psnr = {"uniform_custom_weighted": 40, "uniform_logit_normal": 30}.get(arm, 20 + len(arm) / 10) + seed
        report = {"psnr": psnr, "n": 1024, "psnr_drop_shuffled": 0.5 if arm == "uniform_uniform" else 5.0}
        return report, [soak.programs.Outcome(0, "", 1.0, [], 0, 0)]

    monkeypatch.setattr(soak.programs, "train_and_evaluate", stand_in)
    assert soak.main(["schedules", "--seeds", "0,1", "--out", str(tmp_path)]) == 1
    record = json.loads((tmp_path / "schedules.json").read_text())
    missed = [(g["arm"], g["gate"]) for g in record["gates"] if not g["passed"]]
    assert set(missed) == {("uniform_uniform", "PSNR lost by shuffling codes")} and len(missed) == 2
    found = record["results"]
    assert [row["arm"] for row in found["ordering"]][:2] == ["uniform_custom_weighted", "uniform_logit_normal"]
    first = {"arm": "uniform_custom_weighted", "psnr": 40.5, "from": 40, "to": 41, "published": None}
    assert found["ordering"][0] == first
    # By hand: uniform_logit_normal comes first here, the others by the length of their names. Only three of the arms,
    # fourth to sixth in the published order, are in it among themselves.
    assert (found["pairs_in_published_order"], found["pairs"]) == (3, 15)
    assert "3 of 15 pairs" in capsys.readouterr().out


def test_arms_are_the_variants_of_their_config(soak):
    from ddt_jax import config

    trees = {}
    for arm in importlib.import_module("schedule_arms").ARMS:
        model = config.dump(config.load(str(ROOT / "configs" / f"schedule_ablation.py:{arm}")))["model"]
        trees[arm] = (model["flow"]["time"], model["schedule"]["kind"], model["token_gradient_weights"])
    assert trees["logit_normal_custom"] == ("logit_normal", "piecewise", False)
    assert trees["uniform_uniform_weighted"] == ("uniform", "uniform", True)
    assert len(set(trees.values())) == len(trees) == 8


def test_a_missed_gate_is_recorded_and_is_a_failure(soak, tmp_path, monkeypatch):
    gates = [importlib.import_module("soak_gates").at_least("psnr", 27.9, 28)]
    found = {"config": "c", "gates": gates, "results": {}}
    monkeypatch.setitem(soak.MEASUREMENTS, "kill", lambda options, folder: found)
    assert soak.main(["kill", "--out", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "kill.json").read_text())["passed"] is False


def test_the_renderer_begins_with_the_tokenizer_and_is_held_against_it(soak, tmp_path, monkeypatch):
    calls = []
    figures = {
        "n": 1024,
        "psnr": 33.5,
        "psnr_by_tokens": {"8": 27.0, "16": 33.5},
        "psnr_drop_shuffled": 15.0,
        "scenes_all_correct": 0.97,
        "train_seconds": 590.0,
        "codebook_used_by_position": [40] * 16,
        "codebook_perplexity_by_position": [31.5] * 16,
    }
    rendered = figures.copy()

    def train_and_evaluate(config, workdir, seed, options, also=()):
        calls.append((config, workdir.name, also))
        return (rendered if also else figures), []

    monkeypatch.setattr(soak.programs, "train_and_evaluate", train_and_evaluate)
    assert soak.main(["scenes", "--out", str(tmp_path)]) == 0
    assert [call[1] for call in calls] == ["tokenizer", "renderer"]
    assert calls[0][2] == () and calls[1][2][0].startswith("--config.init_from=") and "/tokenizer" in calls[1][2][0]
    for wrong in ({"psnr": 32.4}, {"codebook_perplexity_by_position": [31.5] * 15 + [31.6]}, {"train_seconds": 601}):
        rendered = figures | wrong
        assert soak.main(["scenes", "--out", str(tmp_path)]) == 1
        gates = json.loads((tmp_path / "scenes.json").read_text())["gates"]
        assert [check["passed"] for check in gates].count(False) == 1


def test_the_spatial_baseline_counts_only_at_the_bits_of_the_ddt_tokenizer(soak, tmp_path, monkeypatch):
    figures = {
        "n": 1024,
        "psnr": 30.0,
        "bits_per_image": 144.0,
        "psnr_drop_shuffled": 15.0,
        "scenes_all_correct_originals": 1.0,
        "train_seconds": 1700.0,
    }
    found = figures.copy()
    monkeypatch.setattr(soak.programs, "train_and_evaluate", lambda config, workdir, seed, options: (found, []))
    assert soak.main(["spatial", "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "spatial.json").read_text())["config"] == "configs/spatial_scenes.py"
    for wrong in ({"bits_per_image": 128.0}, {"train_seconds": 1801.0}, {"scenes_all_correct_originals": 0.9}):
        found = figures | wrong
        assert soak.main(["spatial", "--out", str(tmp_path)]) == 1
        gates = json.loads((tmp_path / "spatial.json").read_text())["gates"]
        assert [check["passed"] for check in gates].count(False) == 1


def test_variants_of_transfusion_are_trained_one_after_the_other(soak, tmp_path, monkeypatch):
    calls = []

    def train_and_evaluate(config, workdir, seed, options):
        calls.append((config, workdir.name))
        return {"prompts": 256, "train_seconds": seconds[workdir.name]}, []

    # Only the config as it stands has a time to keep: beside it, the machine may do other things.
    seconds = {"linear": 1100.0, "unlimited": 1300.0, "causal": 1300.0, "plain": 1300.0}

    monkeypatch.setattr(soak.programs, "train_and_evaluate", train_and_evaluate)
    assert soak.main(["transfusion", "--arms", "linear,unlimited", "--out", str(tmp_path)]) == 0
    names = ("linear", "unlimited")
    assert calls == [(f"configs/transfusion_scenes.py:{name}", name) for name in names]
    seconds["linear"] = 1201.0
    assert soak.main(["transfusion", "--out", str(tmp_path)]) == 1
    record = json.loads((tmp_path / "transfusion.json").read_text())
    assert list(record["results"]["arms"]) == ["linear", "causal", "plain", "unlimited"]
    assert [check["arm"] for check in record["gates"] if not check["passed"]] == ["linear"]


@pytest.mark.parametrize("given", [False, True], ids=["its own tokenizer", "a tokenizer that was trained before"])
def test_transformers_on_codes_begin_with_a_tokenizer(soak, tmp_path, monkeypatch, given):
    calls, ran = [], []

    def train_and_evaluate(config, workdir, seed, options, to_evaluate=()):
        calls.append((config.partition(":")[0], workdir.name))
        return {"prompts": 256, "edits": 255}, []

    monkeypatch.setattr(soak.programs, "train_and_evaluate", train_and_evaluate)
    monkeypatch.setattr(soak.programs, "digest", lambda workdir: f"digest of {workdir.resolve().name}")
    monkeypatch.setattr(
        soak.programs, "run", lambda args: ran.append(args) or soak.programs.Outcome(0, "", 1.0, [], 0, 1)
    )
    (tmp_path / "before").mkdir()
    more = ["--tokenizer", str(tmp_path / "before")] if given else []
    assert soak.main(["edits", "--out", str(tmp_path), *more]) == 1  # one edit too few
    record = json.loads((tmp_path / "edits.json").read_text())
    assert [check["gate"] for check in record["gates"] if not check["passed"]] == ["edits asked for"]
    both = [("configs/quickstart.py", "tokenizer"), ("configs/llama_edits.py", "transformer")]
    assert calls == both[given:]
    sources = [args[args.index("--source") + 1] for args in ran]
    assert sources == ["scenes:train", "scenes:heldout", "scenes_edits:train", "scenes_edits:heldout"]
    assert (record["results"]["tokenizer"] == {"digest": "digest of before"}) == given
    assert "before" not in record["command"]


def test_seed_trains_codes_in_both_recipes_on_what_its_first_stage_has_learned(soak, tmp_path, monkeypatch):
    calls = []

    def recall(share):
        return {way: {"1": share} for way in ("image_to_text", "text_to_image")}

    shares = {"by_embedding": 0.62, "by_code": 0.58, "by_shuffled_codes": 0.004}
    changed = {}

    def train_and_evaluate(config, workdir, seed, options, also=()):
        calls.append((config.partition(":")[2], workdir.name, seed, also, options.overrides))
        figures = shares | {"used": 512, "seconds": 400.0} | (changed if workdir.name == "codes" else {})
        if workdir.name == "untrained":
            figures["by_embedding"] = changed.get("untrained", 0.001)
        report = {"retrieval": {by: recall(figures[by]) for by in shares}, "retrieval_images": 1000}
        report |= {"codebook_used": figures["used"], "codebook_size": 512, "train_seconds": figures["seconds"]}
        return report, []

    monkeypatch.setattr(soak.programs, "train_and_evaluate", train_and_evaluate)
    more = ["--seeds", "3", "--out", str(tmp_path), "--config.train.steps=9"]
    assert soak.main(["seed", *more]) == 0
    assert [call[:3] for call in calls] == [
        ("align", "untrained", 3),
        ("align", "align", 3),
        ("codes", "codes", 3),
        ("codes_published", "codes_published", 3),
    ]
    assert [call[4][-1] for call in calls[:2]] == ["--config.optimizer.lr=1e-12", "--config.train.steps=9"]
    assert calls[1][3] == () and calls[2][3] == calls[3][3]
    assert calls[2][3][0].startswith("--config.init_from=") and calls[2][3][0].endswith("seed3/align")
    for wrong in (
        {"by_embedding": 0.49, "by_code": 0.49},
        {"by_code": 0.56},
        {"by_shuffled_codes": 0.02},
        {"untrained": 0.02},
        {"used": 486},
        {"seconds": 501.0},
    ):
        changed = wrong
        assert soak.main(["seed", *more]) == 1
        gates = json.loads((tmp_path / "seed.json").read_text())["gates"]
        assert [check["passed"] for check in gates].count(False) == 1, wrong


def test_what_causality_costs_is_paired_over_seeds(soak, tmp_path, monkeypatch):
    higher = {0: 0.05, 1: 0.06, 2: 0.07}  # of bidirectional queries

    def train_and_evaluate(config, workdir, seed, options):
        value = 0.1 * seed + higher[seed] * config.endswith(":align_bidirectional")
        names = ("recall_image_to_text_1_by_embedding", "recall_text_to_image_1_by_embedding")
        return dict.fromkeys((*names, "recall_mean_by_embedding"), value), []

    monkeypatch.setattr(soak.programs, "train_and_evaluate", train_and_evaluate)
    out = ["--out", str(tmp_path)]
    assert soak.main(["seed_causal", "--seeds", "0,1,2", *out]) == 1
    record = json.loads((tmp_path / "seed_causal.json").read_text())
    found = record["results"]["bidirectional_less_causal"]["recall_mean_by_embedding"]
    # By hand: 0.06 -+ 4.303 * 0.01 / sqrt(3).
    assert found == {"by_seed": [0.05, 0.06, 0.07], "mean": 0.06, "interval": [0.0352, 0.0848]}
    assert [check["passed"] for check in record["gates"]].count(False) == 2
    higher[0] = 0.0  # the interval reaches the limit: nothing is proven
    assert soak.main(["seed_causal", "--seeds", "0,1,2", *out]) == 0
    assert soak.main(["seed_causal", *out]) == 1  # one seed


def test_a_language_model_on_seed_codes_reads_what_one_stage_writes_and_another_draws(soak, tmp_path, monkeypatch):
    trained, written = [], []

    def train_and_evaluate(config, workdir, seed, options, also=()):
        trained.append((Path(config.split(":")[0]).name, workdir.name, *(text.rpartition("/")[2] for text in also)))
        return {"prompts": 256}, []

    def run(args):
        if "tokenize" in args:
            written.append(tuple(Path(args[args.index(name) + 1]).name for name in ("--workdir", "--to")))
        return soak.programs.Outcome(0, "a digest", 1.0, [], 0, 0)

    monkeypatch.setattr(soak.programs, "train_and_evaluate", train_and_evaluate)
    monkeypatch.setattr(soak.programs, "run", run)
    assert soak.main(["seed_codes", "--out", str(tmp_path)]) == 0
    stage = "seed_scenes.py"
    rest = [(stage, "draw", "codes"), ("seed_llama_scenes.py", "transformer")]
    assert trained == [(stage, "align"), (stage, "codes", "align"), *rest]
    assert written == [("codes", "train_codes"), ("codes", "heldout_codes")]
    trained.clear()
    assert soak.main(["seed_codes", "--tokenizer", str(tmp_path), "--out", str(tmp_path)]) == 0
    assert trained == rest
    assert json.loads((tmp_path / "seed_codes.json").read_text())["results"]["tokenizer"]["codes"]["digest"] == "digest"


@pytest.mark.parametrize("given", [False, True], ids=["from_nothing", "first_stages_given"])
def test_free_transformers_differ_in_what_queries_see_alone(soak, tmp_path, monkeypatch, given):
    trained, written = [], []

    def shown(arguments):
        return [text.rpartition("/")[2].removeprefix("--config.") for text in arguments]

    def train_and_evaluate(config, workdir, seed, options, also=(), to_evaluate=()):
        trained.append([workdir.parent.name, *shown([str(workdir), config.rpartition(":")[2], *also])])
        assert bool(to_evaluate) == (workdir.name == "transformer")
        return {"prompts": 1024, "t2i_valid": 0.5}, []

    def run(args):
        if "train" in args:
            workdir = Path(args[args.index("--workdir") + 1])
            trained.append([workdir.parent.name, "draw", *shown(args[args.index("--workdir") + 2 :])])
        return soak.programs.Outcome(0, "a digest", 1.0, [], 0, 0)

    monkeypatch.setattr(soak.programs, "train_and_evaluate", train_and_evaluate)
    monkeypatch.setattr(soak.programs, "run", run)
    monkeypatch.setattr(soak.programs, "codes_of", lambda workdir, folder, sources: written.append(folder.name) or [])
    before = ["--tokenizer", str(tmp_path)] if given else []
    assert soak.main(["seed_free", *before, "--out", str(tmp_path)]) == 0
    for arm, first in (("causal", "align"), ("bidirectional", "align_bidirectional")):
        sees = f"model.causal={arm == 'causal'}"
        assert [rest for name, *rest in trained if name == arm] == [
            *([] if given else [["align", first]]),
            ["codes", "codes", sees, "align", "train.steps=1200"],
            ["draw", sees, "codes", "train.steps=1"],
            ["transformer", arm, "train.steps=2000"],
        ]
    assert written == ["causal", "bidirectional"]
    found = json.loads((tmp_path / "seed_free.json").read_text())["results"]["arms"]["bidirectional"]
    assert found["transformer"]["t2i_valid"] == 0.5 and found["align"].get("digest") == ("digest" if given else None)


def test_text_is_learned_alone_and_beside_images_with_one_text_tokenizer(soak, data_dir, tmp_path, monkeypatch):
    trained, texts = [], {}

    def train_and_evaluate(config, workdir, seed, options, also=()):
        trained.append((config.split(":")[1], seed, [text.rpartition("/")[0].rpartition("/")[2] for text in also]))
        for path in (workdir.parent / "text").glob("*.parquet"):
            texts[path.stem] = pq.read_table(path)["text"].to_pylist()
        return {"plain_perplexity": 4.0}, []

    monkeypatch.setattr(soak.programs, "train_and_evaluate", train_and_evaluate)
    assert soak.main(["text_beside_images", "--seeds", "0,1", "--out", str(tmp_path)]) == 0
    first = ["alone_0"]
    later = [(arm, seed, first) for seed in (0, 1) for arm in ("alone", "updates", "pixels")][1:]
    assert trained == [("alone", 0, []), *later]
    whole = (data_dir / "text" / "tinyshakespeare.txt").read_text()
    assert "\n\n".join(texts["train"] + texts["heldout"]) == whole
    assert len(texts["heldout"]) / len(texts["train"]) == pytest.approx(1 / 9, rel=0.01)


def test_both_tokenizers_of_scenes_have_the_same_bits_and_pictures():
    from ddt_jax import config

    ddt, spatial = (config.load(str(ROOT / "configs" / name)) for name in ("ddt_scenes.py", "spatial_scenes.py"))
    side = spatial.data.image_size // 2 ** (len(spatial.model.block_out_channels) - 1)
    assert (side * side, spatial.model.quantizer.codebook_size) == (ddt.model.num_tokens, 512)
    assert ddt.model.quantizer.codebook_size == 512 and ddt.model.num_tokens * 9 == 144
    assert (ddt.data, ddt.evaluate) == (spatial.data, spatial.evaluate)


def test_a_compiled_step_has_to_fit_its_chips(soak, tmp_path, monkeypatch):
    asked, totals = [], iter((11e9, 96e9))

    def run(args):
        asked.append(args)
        chip = {"chips": "8 x TPU v5", "seconds": 60.0, "bytes_of_a_chip": {"total": next(totals)}, "hbm_bytes": 95e9}
        return soak.programs.Outcome(0, json.dumps(chip | {"collectives": ["all-gather"]}), 1.0, [], 0, 0)

    monkeypatch.setattr(soak.programs, "run", run)
    for code in (0, 1):
        assert soak.main(["selftok_tpu", "--out", str(tmp_path), "--config.train.batch_size=8"]) == code
    assert json.loads((tmp_path / "selftok_tpu.json").read_text())["results"]["bytes_of_a_chip"] == {"total": 96e9}
    assert asked[0][-2:] == ["--config.train.batch_size=48", "--config.train.batch_size=8"]  # the last of two wins


def test_a_save_costs_what_the_turns_with_one_are_longer(soak):
    """Steps of 0.1 s; a save stops them for 0.3 s, and ten of those that follow are 0.02 s longer."""
    module, clock, stamps = importlib.import_module("soak_saves"), 0.0, []
    for step in range(4 * 20 + 1):
        stamps.append((clock, 2 * clock))
        saved = step and step % 40 == 39
        clock += 0.1 + (0.3 if saved else 0) + (0.02 if step >= 40 and step % 40 < 10 else 0)
    found = module.shares(stamps, turns=1, steps=20)
    assert found["step_seconds"] == [0.1] and found["blocked_seconds"] == [0.3]
    assert found["share"] == found["processor_share"] == 0.25


def test_a_missing_figure_misses_its_gate(soak):
    gates = importlib.import_module("soak_gates")
    assert not gates.at_least("psnr", None, 28)["passed"]
    assert not gates.at_most("seconds", None, 300)["passed"]


def test_a_run_that_fails_leaves_no_record(soak, tmp_path, monkeypatch):
    monkeypatch.setattr(soak.programs, "command", lambda *args: [sys.executable, "-c", "raise SystemExit(1)"])
    assert soak.main(["kill", "--kills", "1", "--out", str(tmp_path)]) == 1
    assert not (tmp_path / "kill.json").exists()


def test_warnings_and_processes_left_over_are_seen(soak, monkeypatch):
    code = """
import subprocess, sys, warnings
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
warnings.warn("look", UserWarning)
"""
    runs = importlib.import_module("soak_runs")
    monkeypatch.setattr(runs, "PATIENCE", 0.5)
    outcome = runs.run([sys.executable, "-c", code])
    assert outcome.leftover == 1
    assert any("UserWarning" in line for line in outcome.complaints)
    assert runs.session_members(outcome.session, patience=5) == 0
