"""`ddt-jax plan`: settings for pods, operations against counts by hand, and a whole plan on fake devices."""

import json
from pathlib import Path

import jax
import pytest

from ddt_jax import cli, experiment, monitoring, planning
from ddt_jax.errors import UserError
from ddt_jax.scaling import memory, plan, plan_text, topology

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
DOCS = CONFIGS.parent / "docs"
POD = topology.parse("h100:8")
# Two layers, so that a loop turns; the loss has all of its rows in one chunk, so that nothing else loops.
SIZES = {
    "model.transformer.vocab_size": 512,
    "model.image.num_tokens": 16,
    "model.image.codebook_size": 64,
    "model.image.code_vectors": False,
    "model.image.code_places": False,
    "model.whole_prompts": False,
    "model.transformer.scan_layers": True,
    "model.transformer.depth": 2,
    "model.transformer.width": 64,
    "model.transformer.heads": 4,
    "model.transformer.kv_heads": 2,
    "model.transformer.mlp_width": 128,
    "model.transformer.loss_chunk": 1024,
    "model.transformer.remat": "full",
    "sequences.context": 64,
    "sequences.targets": 0,
    "optimizer.name": "adamw",
    "train.batch_size": 16,
}


def request(mesh="fsdp=4,tensor=2", **changes):
    settings = {key: str(value) for key, value in (SIZES | changes).items()}
    return planning.Request(str(CONFIGS / "llama_scenes.py"), tuple(settings.items()), mesh)


def of_tokenizer(mesh="", rows=0, **changes):
    pairs = tuple((key, str(value)) for key, value in changes.items())
    return planning.Request(str(CONFIGS / "smoke.py"), pairs, mesh, rows)


@pytest.fixture(scope="module")
def scanned():
    return planning.plan_one(request(), POD, jax.devices())


def matrices_of(width, mlp):
    """Parameters of the two layers' matrices."""
    return 2 * (width * width * 2 + 2 * width * width // 2 + 3 * width * mlp)


def operations_by_hand(width, mlp, vocab):
    """Of each parameter two operations forwards, four backwards; and half of all pairs of rows, 2 + 4 products."""
    pairs = 64 * 65 / 2
    return 6 * (matrices_of(width, mlp) + vocab * width) * 16 * 64 + 6 * 2 * 2 * width * 16 * pairs


def test_the_mfu_of_a_run_has_the_same_operations_and_the_peak_of_its_chips(monkeypatch):
    s = planning.prepare(request(), POD, 8)[0]
    monkeypatch.setattr(monitoring, "of_device", lambda kind: POD.chip)
    speed = monitoring.speed(s, 8, experiment.build, experiment.abstract_batch)
    found = speed.figures(32.0)  # two steps a second
    assert found["mfu"] == pytest.approx(2 * operations_by_hand(64, 128, 512) / (8 * 989e12), rel=1e-6)
    assert found["tokens_per_second_per_chip"] == 32 * 64 / 8


def test_a_plan_says_what_a_step_needs(scanned):
    t = {key.rsplit(".", 1)[1]: value for key, value in SIZES.items()}
    width, mlp, vocab = t["width"], t["mlp_width"], t["vocab_size"]
    matrices = matrices_of(width, mlp)
    assert scanned["parameters"] == matrices + 2 * vocab * width + 5 * width
    # Everything but the norms is divided by 8; Adam keeps two numbers for each parameter, and one counter.
    assert scanned["memory"]["parameters"] == pytest.approx(4 * scanned["parameters"] / 8, rel=0.01)
    assert scanned["memory"]["optimizer"] == pytest.approx(2 * scanned["memory"]["parameters"], abs=64)
    assert scanned["fits"] and scanned["hbm_bytes_per_chip"] == sum(scanned["memory"].values())
    assert scanned["mesh"] == {"fsdp": 4, "tensor": 2} and scanned["tokens_per_step"] == 16 * 64
    assert {c["axis"] for c in scanned["collectives"]} >= {"fsdp", "tensor"}
    by_hand = operations_by_hand(width, mlp, vocab)
    assert scanned["model_flops"] == pytest.approx(by_hand, rel=1e-6)
    e = scanned["estimate"]
    assert e["step_seconds"] == max(e[f"{term}_seconds"] for term in ("compute", "memory", "communication"))
    assert e["mfu"] == pytest.approx(by_hand / e["step_seconds"] / 8 / 989e12, rel=1e-6)


def test_moments_of_the_hosts_are_none_of_a_chips_memory(scanned):
    waits = planning.plan_one(request(**{"optimizer.offload": True}), POD, jax.devices())
    assert waits["memory"]["optimizer"] < 64 and waits["memory"]["padding"] == scanned["memory"]["padding"]
    assert waits["host_bytes_per_chip"] == 2 * waits["memory"]["parameters"] and scanned["host_bytes_per_chip"] == 0
    assert waits["estimate"]["host_seconds"] == pytest.approx(waits["host_bytes_per_chip"] / 64e9)
    assert waits["model_flops"] == scanned["model_flops"] and waits["hardware_flops"] == scanned["hardware_flops"]
    text = plan_text.text(waits)
    assert "with its host" in text and "host 0.0 ms" in text and "with its host" not in plan_text.text(scanned)


@pytest.mark.parametrize(
    ("said", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.50G of 15.75G hbm. Exceeded",
            21.5 * 2**30,
        ),
        ("the total memory required for HLO temporaries (15.83G) exceeds available HBM (15.75G).", 15.83 * 2**30),
        ("INVALID_ARGUMENT: something else (3G)", None),
    ],
)
def test_what_a_compiler_says_that_it_would_need(said, needed):
    assert plan._needed(said) == needed


@pytest.mark.slow
def test_layers_in_a_loop_count_as_without_one(scanned):
    """The program without loops is its own oracle: there is nothing that could be multiplied."""
    unrolled = planning.plan_one(request(**{"model.transformer.scan_layers": False}), POD, jax.devices())
    assert scanned["hardware_flops"] == pytest.approx(unrolled["hardware_flops"], rel=0.01)
    assert scanned["model_flops"] == unrolled["model_flops"]
    assert 1.2 < scanned["hardware_over_model_flops"] < 1.5
    assert scanned["hardware_over_model_flops_without_remat"] < scanned["hardware_over_model_flops"] - 0.2
    assert not scanned["uncounted"] and not unrolled["uncounted"]


def test_a_plan_reads_well_and_is_marked_as_an_estimate(scanned):
    text = plan_text.text(scanned)
    assert "estimate from the chip's figures, not a measurement" in text
    assert "the CPU's compiler made" in text  # for the GPU's is not at hand
    assert text.endswith("verdict: fits, 0.0 GB of 80 GB on each chip")
    small = scanned | {"fits": False, "hbm_bytes_of_chip": 1e5}
    assert "does NOT fit" in plan_text.text(small)
    assert plan_text.table([scanned, small]).count("\n|") == 3
    grown = scanned | {"chips": 16, "batch_size": 32, "hbm_bytes_per_chip": 1.02 * scanned["hbm_bytes_per_chip"]}
    growth = "h100, from 8 to 16 chips: FLOPs per token +0.0%, memory of a chip +2.0%"
    assert growth in plan_text.table([grown, scanned])


def test_a_quick_plan_whose_memory_is_nearly_full_asks_for_that_of_a_run(scanned):
    quick = scanned | {"compiler": "tpu", "effort": -1.0, "hbm_bytes_of_chip": 1.05 * scanned["hbm_bytes_per_chip"]}
    assert "--effort 0" in plan_text.warnings(quick)[1]
    assert len(plan_text.warnings(quick | {"hbm_bytes_of_chip": 1.2 * scanned["hbm_bytes_per_chip"]})) == 1
    assert plan_text.warnings(quick | {"effort": 0.0}) == []


def test_a_plan_warns_of_rows_that_travel(scanned):
    moved, waits = [{"axis": "data+fsdp", "bytes": 80 * scanned["parameters"]}], {"bound": "communication"}
    travels = scanned | {"collectives": moved, "estimate": scanned["estimate"] | waits}
    (note,) = plan_text.rows_that_travel(travels, 1)
    assert "move 20 times the parameters" in note
    for other in ({"collectives": [moved[0] | {"axis": "tensor"}]}, {"estimate": {"bound": "compute"}}):
        assert plan_text.rows_that_travel(travels | other, 1) == []
    assert plan_text.rows_that_travel(travels, 4) == plan_text.rows_that_travel(scanned, 1) == []


def test_the_verb_plans_a_tokenizer_and_writes_json(tmp_path, capsys):
    out = tmp_path / "deep" / "plan.json"
    arguments = ["plan", "--config", str(CONFIGS / "smoke.py:linear"), "--topology", "h100:8", "--to", str(out)]
    assert cli.main([*arguments, "--mesh", "data=2,fsdp=4", "--rows", "2"]) == 0
    report = json.loads(out.read_text())
    assert report["unit"] == "image" and report["batch_size"] == 16 and report["flops_per_image"] > 0
    assert "verdict: fits" in capsys.readouterr().out


@pytest.mark.slow
def test_a_search_lists_what_fits_the_fastest_first():
    asked, said = planning.Request(str(CONFIGS / "smoke.py:linear")), []
    found = planning.search(asked, POD, ["fsdp=2,8,16", "tensor=1", "remat=full", "accumulate=1"], said.append)
    assert any("left out: mesh: mesh.data=-1, mesh.fsdp=16 does not fit 8 devices" in line for line in said)
    plans = found["found"]
    assert {p["chosen"]["fsdp"] for p in plans} == {"2", "8"}
    seconds = [p["estimate"]["step_seconds"] for p in plans]
    assert seconds == sorted(seconds)


def test_a_batch_that_does_not_divide_is_made_to_and_said():
    s, notes = planning.prepare(of_tokenizer(**{"train.batch_size": 12}), POD, 8)
    assert s.train.batch_size == 16 and "training would refuse it; planned with 16" in notes[0]
    s, notes = planning.prepare(of_tokenizer("fsdp=2,tensor=4", rows=3, **{"train.accumulate": 2}), POD, 8)
    assert s.train.batch_size == 3 * 2 * 2 and not notes


def test_slices_lie_on_the_replica_axis():
    pod = topology.parse("v5p:2x2x1", 2)
    assert planning.prepare(of_tokenizer(), pod, 8)[0].mesh.replica == 2
    assert planning.prepare(of_tokenizer("replica=4"), pod, 8)[0].mesh.replica == 4


def test_no_weights_of_a_frozen_codec_are_needed():
    s, _ = planning.prepare(planning.Request(str(CONFIGS / "ddt_selftok_256.py:small")), POD, 8)
    assert s.model.codec.random_weights


def test_a_codebook_of_moving_averages_is_whole_on_every_chip_as_the_docs_say():
    """Codes, their sums and counts, and how often each place has each code."""
    request = planning.Request(str(CONFIGS / "ddt_selftok_256.py:small"), mesh="fsdp=4,tensor=2")
    s, _ = planning.prepare(request, POD, 8)
    held = memory.of_tree(experiment.build(s, jax.devices()).abstract.extra["codebook"])
    codes, width, tokens = 32_768, 16, 512
    assert held == pytest.approx(4 * (2 * codes * width + codes + tokens * codes), abs=16)
    assert f"{held / 1e6:.1f} MB" in (DOCS / "plan.md").read_text()


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (lambda: request(**{"model.image.num_tokens": 0}), "add --config.model.image.num_tokens=N"),
        (lambda: of_tokenizer("fdsp=4"), "write AXIS=SIZE; axes are replica, data, fsdp"),
        (lambda: of_tokenizer("fsdp"), "write AXIS=SIZE"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(asked, says):
    with pytest.raises(UserError) as error:
        planning.prepare(asked(), POD, 8)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--rows", "-1"], "--rows must be at least 1"),
        (["--search", "depth=3"], "write NAME=VALUE,VALUE"),
        (["--search", "--mesh", "fsdp=8"], "leave --mesh out"),
        (["--mesh", "fsdp=3"], "does not fit 8 devices"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(more, says, capsys):
    assert cli.main(["plan", "--config", str(CONFIGS / "smoke.py"), "--topology", "h100:8", *more]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error and "\n" not in error


@pytest.mark.parametrize("file", sorted((DOCS / "scaling").glob("plan_*.json")), ids=lambda file: file.stem)
def test_large_configs_scale_weakly_as_the_docs_say(file):
    """What docs/plan.md shows is what the reports say, and it is what is asked of pods of 64 to 4,096 chips."""
    plans = json.loads(file.read_text())["plans"]
    table = "\n".join(line for line in plan_text.table(plans).splitlines() if line.startswith("|"))
    assert table in (DOCS / "plan.md").read_text()
    first, per_unit = plans[0], f"flops_per_{plans[0]['unit']}"
    for report in plans:
        assert report["fits"] and report["effort"] == -1 and not report["uncounted"]
        assert report["compile_seconds"] < 180
        assert report["batch_size"] / report["chips"] == first["batch_size"] / first["chips"]
        for key in (per_unit, f"hardware_{per_unit}"):
            assert report[key] == pytest.approx(first[key], rel=0.05)
        assert report["unit"] == "image" or report["hardware_over_model_flops"] <= 1.40
        if report["topology"].startswith("v5p"):
            assert report["hbm_bytes_per_chip"] <= 1.02 * first["hbm_bytes_per_chip"]
