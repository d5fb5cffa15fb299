"""LLaMA files: every tensor in and out with its bits, larger vocabularies, and memory that stays at a tensor or two."""

import json
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ddt_jax import cli, config, experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.errors import UserError
from ddt_jax.interop import llama
from ddt_jax.io import weights_folder
from ddt_jax.multimodal import backbone
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.nn.params import split
from ddt_jax.tokenizers.text import train_sentencepiece
from ddt_jax.training import corpus, weights
from ddt_jax.training.state import shardings_of

TINY = settings.Transformer(vocab_size=24, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24, head_dim=4)
LLAMA3 = replace(TINY, rope_scaling=settings.RopeScaling(kind="llama3", factor=32.0))


def tensors(c, dtype=ml_dtypes.bfloat16, seed=0):
    """A model of theirs, by names and shapes written down here."""
    rng, d, e = np.random.default_rng(seed), c.width, c.head_dim
    shapes = {"model.embed_tokens.weight": (c.vocab_size, d), "model.norm.weight": (d,)}
    for i in range(c.depth):
        block = f"model.layers.{i}."
        shapes |= {
            block + "self_attn.q_proj.weight": (c.heads * e, d),
            block + "self_attn.k_proj.weight": (c.kv_heads * e, d),
            block + "self_attn.v_proj.weight": (c.kv_heads * e, d),
            block + "self_attn.o_proj.weight": (d, c.heads * e),
            block + "mlp.gate_proj.weight": (c.mlp_width, d),
            block + "mlp.up_proj.weight": (c.mlp_width, d),
            block + "mlp.down_proj.weight": (d, c.mlp_width),
            block + "input_layernorm.weight": (d,),
            block + "post_attention_layernorm.weight": (d,),
        }
    if not c.tied_head:
        shapes["lm_head.weight"] = (c.vocab_size, d)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def write_model(folder, c, dtype=ml_dtypes.bfloat16, file_bytes=3000):
    weights_folder.save(folder, tensors(c, dtype), file_bytes=file_bytes)
    config = {
        "model_type": "llama",
        "vocab_size": c.vocab_size,
        "hidden_size": c.width,
        "num_hidden_layers": c.depth,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "intermediate_size": c.mlp_width,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": c.tied_head,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "torch_dtype": str(np.dtype(dtype)),
        "max_position_embeddings": 131072,
    }
    if c.rope_scaling.kind == "llama3":
        config["rope_scaling"] = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0}
        config["rope_scaling"] |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert np.asarray(found[name]).dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(found[name]).view(np.uint8), array.view(np.uint8))


@pytest.mark.parametrize("c", [TINY, LLAMA3, replace(TINY, tied_head=True)], ids=["plain", "llama3", "tied"])
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_what_is_imported_is_exported_bit_by_bit(tmp_path, c, dtype):
    write_model(tmp_path / "theirs", c, dtype)
    read = llama.import_folder(tmp_path / "theirs", tmp_path / "ours")
    assert replace(read, head_dim=4) == c
    arrays, config = weights.load(tmp_path / "ours")
    assert config["settings"]["rope_scaling"]["factor"] == c.rope_scaling.factor
    llama.export_folder(arrays, read, tmp_path / "again", beside=tmp_path / "ours", file_bytes=5000)
    assert_same_bits(weights_folder.load(tmp_path / "again"), tensors(c, dtype))
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "again")]
    assert {name: configs[1][name] for name in configs[0]} == configs[0]
    assert (tmp_path / "again" / "tokenizer.json").exists()


@pytest.mark.parametrize("scan", [False, True])
def test_parameters_come_from_and_go_to_any_layout(tmp_path, scan):
    write_model(tmp_path / "theirs", TINY, np.float32)
    c = replace(TINY, scan_layers=scan)
    params = llama.read(tmp_path / "theirs", c)
    ours = params["blocks"]["scanned"]["block"] if scan else params["blocks"]["block_1"]
    q = ours["query"]["kernel"][1] if scan else ours["query"]["kernel"]
    theirs = tensors(TINY, np.float32)["model.layers.1.self_attn.q_proj.weight"]
    np.testing.assert_array_equal(q[:, 2, 3], theirs[2 * 4 + 3])  # head 2, its fourth feature
    llama.export_folder(weights.unrolled_arrays(params), c, tmp_path / "again")
    assert_same_bits(weights_folder.load(tmp_path / "again"), tensors(TINY, np.float32))
    assert replace(llama.read_settings(tmp_path / "again"), scan_layers=scan) == c


def test_a_mesh_reads_its_parts_only(tmp_path):
    write_model(tmp_path, TINY)
    mesh = meshes.make_mesh(settings.Mesh(fsdp=4, tensor=2))
    boxed = jax.eval_shape(lambda: backbone.init(TINY, jax.random.key(0)))
    shardings, _ = shardings_of(boxed, mesh)
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=s), split(boxed)[0], shardings
    )
    placed = llama.read(tmp_path, TINY, abstract)
    jax.tree.map(lambda x, s: x.sharding == s or pytest.fail(str(x.sharding)), placed, shardings)
    whole = llama.read(tmp_path, TINY)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a, np.float32), b), placed, whole)


def test_new_ids_get_rows_like_the_others_and_old_ones_keep_theirs(tmp_path):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(6, 6)).astype(np.float32)
    table = (3 + rng.normal(size=(4000, 6)) @ mix).astype(np.float32)
    lazy = weights_folder.Lazy(table.shape, table.dtype, lambda: table)
    longer = np.asarray(llama.extended(lazy, 24_000, seed=0, rows=1024))
    np.testing.assert_array_equal(longer[:4000], table)
    new = longer[4000:]
    np.testing.assert_allclose(new.mean(0), table.mean(0), atol=0.1)
    np.testing.assert_allclose(np.cov(new.T), np.cov(table.T), atol=0.05 * np.trace(np.cov(table.T)))
    assert len(np.unique(new[:, 0])) > 19_000
    np.testing.assert_array_equal(longer, np.asarray(llama.extended(lazy, 24_000, seed=0, rows=1024)))


def test_a_longer_vocabulary_reaches_embeddings_head_and_export(tmp_path):
    write_model(tmp_path / "theirs", TINY)
    c = llama.import_folder(tmp_path / "theirs", tmp_path / "ours", vocab_size=40)
    llama.export_folder(weights.load(tmp_path / "ours")[0], c, tmp_path / "again", beside=tmp_path / "ours")
    again, before = weights_folder.load(tmp_path / "again"), tensors(TINY)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        array = np.asarray(again[name])
        assert array.shape == (40, 16) and array.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(array[:24], before[name])
        assert np.isfinite(array.astype(np.float32)).all()
    assert not np.array_equal(again["lm_head.weight"].make()[24:], again["model.embed_tokens.weight"].make()[24:])
    assert llama.read_settings(tmp_path / "again").vocab_size == 40
    with pytest.raises(UserError, match="smaller than the model's own, 24"):
        llama.import_folder(tmp_path / "theirs", tmp_path / "ours", vocab_size=8)


def test_what_does_not_fit_is_named_in_one_line(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        llama.read_settings(tmp_path)
    write_model(tmp_path, TINY)
    config = json.loads((tmp_path / "config.json").read_text())

    def refused(match, **changes):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(UserError, match=match) as error:
            llama.import_folder(tmp_path, tmp_path / "ours")
        assert "\n" not in str(error.value)

    refused("model_type='mistral' instead of 'llama'", model_type="mistral")
    refused("config.json.width must be a whole number, got 'wide'", hidden_size="wide")
    refused("config.json makes no sense: ", rope_scaling=[1])
    refused("rotary positions of kind 'yarn'", rope_scaling={"type": "yarn", "factor": 2.0})
    refused(r"model.layers.0.mlp.down_proj.weight is \(16, 24\), not \(16, 32\)", intermediate_size=32)
    refused("lm_head.weight is missing|model.layers.2.* is missing", num_hidden_layers=3)
    with pytest.raises(UserError, match="a LLaMA has no qk_norm"):
        llama.export_folder({}, replace(TINY, qk_norm=True), tmp_path / "again")
    with pytest.raises(UserError, match="holds no imported weights"):
        weights.load(tmp_path)


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.mark.smoke
@pytest.mark.parametrize("c", [LLAMA3, replace(TINY, tied_head=True)], ids=["llama3", "tied"])
def test_the_verbs_take_a_model_in_and_out_bit_by_bit(tmp_path, capsys, c):
    theirs, ours, again = tmp_path / "theirs", tmp_path / "ours", tmp_path / "again"
    write_model(theirs, c)
    report = ["--json", tmp_path / "report.json"]
    assert run("import", "llama", "--from", theirs, "--workdir", ours, *report) == 0
    count = sum(x.size for x in tensors(c).values())
    expected = f"{len(tensors(c))} tensors, {count:,} parameters in bfloat16 (0.00 GB)"
    assert capsys.readouterr().out == f"{expected}, width 16, depth 2, vocabulary 24: {ours}\n"
    assert json.loads((tmp_path / "report.json").read_text())["parameters"] == count
    assert run("export", "llama", "--workdir", ours, "--to", again, *report) == 0
    assert capsys.readouterr().out == f"imported weights, {expected}: {again}\n"
    assert_same_bits(weights_folder.load(again), tensors(c))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (theirs, again)]
    assert {name: configs[1][name] for name in configs[0]} == configs[0]
    assert (again / "tokenizer.json").read_text() == "{}"
    arrays, read = llama.load(ours)
    assert replace(read, head_dim=4) == c and arrays["embed"].shape == (24, 16)


def test_a_longer_vocabulary_keeps_its_first_rows_through_the_verbs(tmp_path, capsys):
    write_model(tmp_path / "theirs", TINY)
    start = ["import", "llama", "--from", tmp_path / "theirs", "--workdir", tmp_path / "ours"]
    assert run(*start, "--vocab-size", 8) == cli.EXIT_USER
    assert "smaller than the model's own, 24" in capsys.readouterr().err
    assert run(*start, "--vocab-size", 40) == 0
    assert "vocabulary 24 → 40: " in capsys.readouterr().out
    assert run("export", "llama", "--workdir", tmp_path / "ours", "--to", tmp_path / "again") == 0
    again = {name: np.asarray(x) for name, x in weights_folder.load(tmp_path / "again").items()}
    longer = ("model.embed_tokens.weight", "lm_head.weight")
    assert {again[name].shape for name in longer} == {(40, 16)}
    assert_same_bits(again | {name: again[name][:24] for name in longer}, tensors(TINY))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A model, the same imported, the same damaged, and what is left of two runs of other models."""
    root = tmp_path_factory.mktemp("places")
    write_model(root / "theirs", TINY)
    write_model(root / "damaged", TINY)
    min((root / "damaged").glob("*.safetensors")).write_bytes(b"cut")
    llama.import_folder(root / "theirs", root / "ours")
    (root / "run" / "checkpoints").mkdir(parents=True)
    (root / "other").mkdir()
    tree = config.dump(settings.Experiment(model=settings.LinearTokenizer()))
    (root / "other" / "config.json").write_text(json.dumps(tree))
    return root


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("import llama --from none --workdir new", "none is no folder; download the model"),
        ("import llama --from run/checkpoints --workdir new", "holds no config.json; name a folder in the format of"),
        ("import llama --from theirs/config.json --workdir new", "is no folder"),
        ("import llama --from damaged --workdir new", "damaged"),
        ("import llama --from theirs --workdir ours", "workdir: ours holds imported weights already; use another"),
        ("import llama --from theirs --workdir run", "workdir: run holds a run already; use another"),
        ("import llama --from theirs --workdir other", "workdir: other holds config.json already; use another"),
        ("import llama --from theirs --workdir theirs/config.json", "config.json is a file; name a new folder"),
        ("import llama --from theirs --workdir /proc/none/new", "import: /proc/none"),
        ("import llama --from theirs --workdir new --config x.py", "takes no --config, its settings are in --from"),
        ("import llama --from theirs --workdir new --config.model.width=8", "takes no --config"),
        ("import llama --from theirs --workdir new --vocab-size -1", "smaller than the model's own, 24"),
        ("import selftok --from theirs --workdir new --vocab-size 40", "import selftok: takes no --vocab-size"),
        ("export llama --workdir none --to new", "none holds no run"),
        ("export llama --workdir other --to new", "holds a model of kind 'linear', neither 'multimodal' nor imported"),
        ("export llama --workdir ours --to theirs", "--to: theirs holds config.json already; use another folder"),
        ("export llama --workdir ours --to ours", "--to: ours holds imported weights already; use another folder"),
        ("export llama --workdir ours --to /proc/none/new", "export: cannot write /proc/none/new"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_trace(places, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(places)
    before = {path: path.stat().st_mtime_ns for path in places.rglob("*")}
    assert run(*arguments.split()) == cli.EXIT_USER
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("ddt-jax: ") and message in line
    assert {path: path.stat().st_mtime_ns for path in places.rglob("*")} == before


# A tokenizer of ours knows neither BOS nor EOS nor PAD: they stand behind its ids, in this order.
TEXT = train_sentencepiece(["a red square above a blue circle"], 300)
VOCABULARY = Vocabulary.extend(TEXT.vocab_size, 8)
IDS = {f"{name}_token_id": TEXT.vocab_size + i for i, name in enumerate(("bos", "eos", "pad"))}


@pytest.fixture
def export_run(tmp_path, monkeypatch):
    """(settings of the transformer, init_from) → `export llama` of a run with rows of 96 positions, as a folder."""

    def export(c=TINY, init_from=""):
        c = replace(c, vocab_size=VOCABULARY.size)
        weights_folder.save(tmp_path / "arrays", tensors(c, np.float32))
        params = llama.read(tmp_path / "arrays", c)
        image, sequences = settings.CodeImages(num_tokens=4, codebook_size=8), settings.Sequences(context=96)
        model = settings.Multimodal(transformer=c, image=image)
        s = settings.Experiment(name="run", init_from=str(init_from), model=model, sequences=sequences)
        state = SimpleNamespace(step=7, params=params, extra={}, ema=None)
        built = SimpleNamespace(settings=s, model=SimpleNamespace(all_params=lambda params, extra: params))
        corpus.save(tmp_path / "run", corpus.Corpus(TEXT, VOCABULARY, None))
        monkeypatch.setattr(experiment, "saved_settings", lambda workdir: s)
        monkeypatch.setattr(experiment, "restore", lambda workdir: (built, state))
        assert run("export", "llama", "--workdir", tmp_path / "run", "--to", tmp_path / "again") == 0
        return tmp_path / "again"

    return export


def said(folder, name="config.json"):
    return json.loads((folder / name).read_text())


def test_the_weights_of_a_multimodal_run_are_exported_too(export_run, capsys):
    again = export_run(replace(TINY, scan_layers=True))
    assert capsys.readouterr().out == f"step 7, parameters, 21 tensors: {again}\n"
    assert_same_bits(weights_folder.load(again), tensors(replace(TINY, vocab_size=VOCABULARY.size), np.float32))
    assert (again / "vocabulary.json").exists() and (again / "tokenizer.model").read_bytes() == TEXT.data


def test_a_run_from_scratch_says_where_its_texts_end_and_how_long_a_row_is(export_run):
    """Else transformers takes 2 for the end, which is a text id here, and 2,048 positions."""
    again = export_run()
    assert said(again).items() >= (IDS | {"max_position_embeddings": 96}).items()
    assert said(again, "generation_config.json") == IDS


@pytest.mark.slow
def test_transformers_reads_ids_and_context_of_a_run(export_run, oracle):
    transformers, again = oracle("transformers"), export_run()
    read = transformers.LlamaConfig.from_pretrained(again)
    assert read.max_position_embeddings == 96
    for found in (read, transformers.GenerationConfig.from_pretrained(again)):
        assert {name: getattr(found, name) for name in IDS} == IDS


def later_stage(root, theirs, *, c=LLAMA3, generation=None):
    """Imported weights whose files say so, and a run that has begun with them."""
    write_model(root / "theirs", c)
    (root / "theirs" / "config.json").write_text(json.dumps(said(root / "theirs") | theirs))
    (root / "theirs" / "tokenizer_config.json").write_text('{"theirs": 1}')
    if generation is not None:
        (root / "theirs" / "generation_config.json").write_text(json.dumps(generation))
    llama.import_folder(root / "theirs", root / "ours")
    (root / "first").mkdir()
    tree = config.dump(settings.Experiment(init_from=str(root / "ours"), model=settings.Multimodal()))
    (root / "first" / "config.json").write_text(json.dumps(tree))
    return root / "first"


def test_a_run_that_began_with_another_one_keeps_what_was_imported(export_run, tmp_path):
    ends = [IDS["eos_token_id"], 5]
    before = {"bos_token_id": 1, "eos_token_id": ends, "attention_dropout": 0.0}
    first = later_stage(tmp_path, before, generation={"bos_token_id": 1, "eos_token_id": 2, "temperature": 0.6})
    again = export_run(LLAMA3, first)
    assert said(again, "tokenizer_config.json") == {"theirs": 1}
    # Longer rows than those of training: positions turn as they did when it was made for them.
    expected = IDS | {"eos_token_id": ends, "attention_dropout": 0.0, "max_position_embeddings": 131072}
    assert said(again).items() >= expected.items()
    assert said(again, "generation_config.json") == IDS | {"temperature": 0.6}


@pytest.mark.parametrize("theirs", [{"max_position_embeddings": 64}, {"rope_theta": 1e6}])
def test_rows_are_as_long_as_in_training_where_no_longer_ones_were_imported(export_run, tmp_path, theirs):
    again = export_run(replace(LLAMA3, rope_theta=500_000.0), later_stage(tmp_path, theirs))
    assert said(again)["max_position_embeddings"] == 96


@pytest.mark.parametrize("start", ["gone", "run"])
def test_runs_that_have_gone_or_began_with_each_other_lead_to_no_import(export_run, tmp_path, start):
    (tmp_path / "run").mkdir()
    tree = config.dump(settings.Experiment(init_from=str(tmp_path / "run"), model=settings.Multimodal()))
    (tmp_path / "run" / "config.json").write_text(json.dumps(tree))
    assert said(export_run(init_from=tmp_path / start), "generation_config.json") == IDS


# getrusage would count what the process of these tests held when it forked.
_MEASURED = """
import sys
from ddt_jax.interop import llama
from ddt_jax.training import weights
peak = lambda: 1024 * next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))
small, big, out = sys.argv[1:]
def both(folder, out):
    c = llama.import_folder(folder, out + "/ours")
    llama.export_folder(weights.load(out + "/ours")[0], c, out + "/again", beside=out + "/ours")
both(small, out)
before = peak()
both(big, out)
print(peak() - before)
"""


@pytest.mark.slow
def test_memory_stays_at_two_tensors_while_a_model_goes_in_and_out(tmp_path):
    c = replace(TINY, vocab_size=16_384, width=1024, depth=14, heads=8, head_dim=128, mlp_width=4096)
    write_model(tmp_path / "small", TINY)
    write_model(tmp_path / "big", c, file_bytes=60_000_000)
    files = list((tmp_path / "big").glob("*.safetensors"))
    total, largest = sum(f.stat().st_size for f in files), 2 * c.vocab_size * c.width
    assert len(files) >= 8 and total > 12 * largest
    command = [sys.executable, "-c", _MEASURED, *map(str, (tmp_path / "small", tmp_path / "big", tmp_path))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2 * largest + 50e6  # where 1 GB is allowed, of which a model this small would not speak
