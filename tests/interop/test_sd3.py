"""SD3-medium as a start: both layouts say the same, what is taken is what the published filter takes, and the image
stream computes what diffusers' own modules compute. The names and shapes are written out here once more.
"""

import functools
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from ddt_jax import cli, config, experiment, settings
from ddt_jax.errors import UserError
from ddt_jax.interop import layout, sd3, selftok
from ddt_jax.io import safetensors_file
from ddt_jax.nn import blocks, spans
from ddt_jax.tokenizers import base, ddt, selftok_networks
from ddt_jax.training.state import unbox

DEPTH, WIDTH, HEADS, SIDE, CHANNELS, TEXT, POOLED, K = 3, 32, 2, 10, 3, 24, 12, 8
MODEL = settings.SelftokTokenizer(
    num_tokens=K,
    scan_layers=False,
    encoder=settings.SelftokEncoder(depth=1, image_width=8, image_heads=2, width=16, heads=2, position_grid=8),
    decoder=settings.SelftokDecoder(depth=DEPTH, width=WIDTH, heads=HEADS, position_grid=SIDE),
    quantizer=settings.Quantizer(code_dim=16, codebook_size=32),  # not one that Selftok's files could hold
    schedule=settings.Schedule(kind="uniform", direction="selftok"),
    codec=settings.IdentityCodec(),
)
SIZE = 8
SCANNED = replace(MODEL, scan_layers=True)


def original(dtype=np.float32):
    """A transformer under the names of the original file, without their prefix."""
    rng, shapes = np.random.default_rng(0), {}

    def linear(name, outputs, inputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    shapes["pos_embed"] = (1, SIDE * SIDE, WIDTH)
    shapes["x_embedder.proj.weight"], shapes["x_embedder.proj.bias"] = (WIDTH, CHANNELS, 2, 2), (WIDTH,)
    linear("t_embedder.mlp.0", WIDTH, 256)
    linear("t_embedder.mlp.2", WIDTH, WIDTH)
    linear("y_embedder.mlp.0", WIDTH, POOLED)
    linear("y_embedder.mlp.2", WIDTH, WIDTH)
    linear("context_embedder", WIDTH, TEXT)
    for i in range(DEPTH):
        for stream in ("context_block", "x_block"):
            name, ends = f"joint_blocks.{i}.{stream}", stream == "context_block" and i == DEPTH - 1
            linear(f"{name}.attn.qkv", 3 * WIDTH, WIDTH)
            if not ends:
                linear(f"{name}.attn.proj", WIDTH, WIDTH)
                linear(f"{name}.mlp.fc1", 4 * WIDTH, WIDTH)
                linear(f"{name}.mlp.fc2", WIDTH, 4 * WIDTH)
            linear(f"{name}.adaLN_modulation.1", (2 if ends else 6) * WIDTH, WIDTH)
    linear("final_layer.linear", 4 * CHANNELS, WIDTH)
    linear("final_layer.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    return {name: rng.normal(0, 0.2, shape).astype(dtype) for name, shape in shapes.items()}


def as_diffusers(arrays):
    """The same under diffusers' names: queries, keys and values apart, scale before shift where a norm stands alone."""
    found = {}
    parts = {"x_block": ("to_q", "to_k", "to_v"), "context_block": ("add_q_proj", "add_k_proj", "add_v_proj")}
    after = {"x_block": "", "context_block": "_context"}
    plain = {
        "pos_embed": "pos_embed.pos_embed",
        "x_embedder.proj": "pos_embed.proj",
        "t_embedder.mlp.0": "time_text_embed.timestep_embedder.linear_1",
        "t_embedder.mlp.2": "time_text_embed.timestep_embedder.linear_2",
        "y_embedder.mlp.0": "time_text_embed.text_embedder.linear_1",
        "y_embedder.mlp.2": "time_text_embed.text_embedder.linear_2",
        "final_layer.linear": "proj_out",
        "final_layer.adaLN_modulation.1": "norm_out.linear",
    }
    for name, array in arrays.items():
        stem, _, kind = name.rpartition(".")
        if name == "pos_embed":
            stem, kind = "pos_embed.pos_embed", ""
        elif name.startswith("joint_blocks"):
            _, i, stream, *rest = stem.split(".")
            block, part = f"transformer_blocks.{i}", ".".join(rest)
            if part == "attn.qkv":
                for role, piece in zip(parts[stream], np.split(array, 3), strict=True):
                    found[f"{block}.attn.{role}.{kind}"] = piece
                continue
            stem = {
                "attn.proj": f"{block}.attn.{'to_out.0' if stream == 'x_block' else 'to_add_out'}",
                "mlp.fc1": f"{block}.ff{after[stream]}.net.0.proj",
                "mlp.fc2": f"{block}.ff{after[stream]}.net.2",
                "adaLN_modulation.1": f"{block}.norm1{after[stream]}.linear",
            }[part]
        else:
            stem = plain.get(stem, stem)
        if len(array) == 2 * WIDTH and "norm" in stem:
            array = np.concatenate([array[WIDTH:], array[:WIDTH]])
        found[f"{stem}.{kind}".rstrip(".")] = array
    return found


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], value, strict=True, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_both_layouts_say_the_same(tmp_path, dtype):
    wanted = original(dtype)
    beside = {"first_stage_model.decoder.conv_in.bias": np.zeros(3, np.float32), "text_encoders.a": np.zeros(1)}
    whole = {f"model.diffusion_model.{name}": array for name, array in wanted.items()} | beside
    found, others = sd3.read(safetensors_file.save(tmp_path / "sd3_medium.safetensors", whole))
    same(found, wanted)
    assert sorted(others) == sorted(beside)
    same(sd3.read(safetensors_file.save(tmp_path / "bare.safetensors", wanted))[0], wanted)

    theirs = as_diffusers(wanted)
    folder = tmp_path / "sd3" / "transformer"
    safetensors_file.save(folder / "diffusion_pytorch_model.safetensors", theirs)
    for path in (tmp_path / "sd3", folder, folder / "diffusion_pytorch_model.safetensors"):
        found, others = sd3.read(path)
        same(found, wanted)
        assert not others

    # Cut into files in the midst of a block's queries, keys and values.
    folder, halves = tmp_path / "cut", [dict(list(theirs.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        safetensors_file.save(folder / f"part-{i}.safetensors", half)
    index = {"weight_map": {name: f"part-{i}.safetensors" for i, half in enumerate(halves) for name in half}}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    same(sd3.read(folder)[0], wanted)


def test_other_files_are_refused(tmp_path):
    path = safetensors_file.save(tmp_path / "vae.safetensors", {"encoder.conv_in.bias": np.zeros(3, np.float32)})
    with pytest.raises(UserError, match="it is no SD3 transformer"):
        sd3.read(path)
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    with pytest.raises(UserError, match="index.json: is no index"):
        sd3.read(tmp_path)


@functools.cache
def blank(model):
    tokenizer = base.make_tokenizer(model, SIZE, 4)
    trees = jax.eval_shape(tokenizer.init, jax.random.key(0))
    params, extra = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), unbox(trees))
    return {"params": params, "extra": extra}


def selected(arrays, model=MODEL):
    return sd3.select(arrays, model, selftok.decoder_layout(model, blank(model)), "x.safetensors")


def test_what_is_taken_is_what_the_published_filter_takes():
    """It copies what agrees in name and shape, but for `context_embedder.*` and all with `context_block`."""
    theirs = original()
    ours = {t.key.removeprefix("model."): t.shape for t in selftok.decoder_layout(MODEL, blank(MODEL))}
    wanted = {
        f"model.{name}"
        for name, array in theirs.items()
        if ours.get(name) == array.shape and not name.startswith("context_embedder.") and "context_block" not in name
    }
    chosen, left = selected(theirs)
    assert chosen.keys() == wanted
    assert left.keys() == theirs.keys() - {name.removeprefix("model.") for name in wanted}
    assert left["y_embedder.mlp.0.weight"] == "is 32 x 12, not 32 x 16"
    assert left["joint_blocks.2.context_block.attn.qkv.bias"] == left["context_embedder.bias"] == "of the text stream"


def test_the_report_names_everything():
    tensors = selftok.decoder_layout(MODEL, blank(MODEL))
    chosen, left = selected(original())
    copied, skipped, fresh = sd3.report(chosen, left, ["first_stage_model.a", "first_stage_model.b"], tensors).split(
        "\n"
    )
    assert f"copied, {len(chosen)} tensors" in copied and "joint_blocks.{0..2}.x_block.attn.qkv.weight" in copied
    assert "pos_embed" in copied and "final_layer.linear.bias" in copied and "context" not in copied
    assert "context_embedder.weight (of the text stream)" in skipped
    assert "y_embedder.mlp.0.weight (is 32 x 12, not 32 x 16)" in skipped
    assert "2 of first_stage_model (not the transformer)" in skipped
    assert "joint_blocks.{0..2}.context_block.t_embedder.mlp.0.weight" in fresh and "x_block" not in fresh


def test_an_image_stream_that_does_not_fit_is_refused_with_all_names():
    arrays = original()
    del arrays["t_embedder.mlp.2.bias"]
    for i in range(DEPTH):  # as in SD3.5
        arrays[f"joint_blocks.{i}.x_block.attn.ln_q.weight"] = np.zeros(16, np.float32)
    arrays["pos_embed"] = np.zeros((1, 64, WIDTH), np.float32)
    arrays["final_layer.linear.bias"] = np.zeros(4 * CHANNELS, np.int32)
    with pytest.raises(UserError) as error:
        selected(arrays)
    text = str(error.value)
    assert "\n" not in text and "x.safetensors does not fit model.decoder, 6 tensors" in text
    assert "t_embedder.mlp.2.bias is missing" in text
    assert "joint_blocks.{0..2}.x_block.attn.ln_q.weight has no place" in text
    assert "pos_embed is 1 x 64 x 32, not 1 x 100 x 32" in text
    assert "final_layer.linear.bias is of type int32" in text
    half = as_diffusers(original())
    del half["transformer_blocks.1.attn.to_k.weight"]
    with pytest.raises(UserError, match="joint_blocks.1.x_block.attn.qkv.weight is missing"):
        selected(sd3.from_diffusers(half))


def test_models_without_an_image_stream_are_refused():
    flow = settings.Flow(prediction="x0", time="uniform", shift=1.0, solver_steps=1)
    decoder = settings.SelftokRenderer(depth=DEPTH, width=WIDTH, heads=HEADS, position_grid=SIDE)
    with pytest.raises(UserError, match="starts from a trained decoder"):
        selected(original(), replace(MODEL, decoder=decoder, flow=flow))
    with pytest.raises(UserError, match="model.kind='ddt'"):
        selftok.decoder_layout(settings.DDTTokenizer(), {})


@pytest.mark.parametrize("model", [MODEL, SCANNED], ids=["unrolled", "scanned"])
def test_only_the_image_stream_moves(model):
    tensors, tree = selftok.decoder_layout(model, blank(model)), blank(model)
    chosen, _ = selected(original(np.float16), model)
    filled = layout.fill(chosen, tensors, tree)
    moved = {
        jax.tree_util.keystr(path, simple=True, separator="/").replace("scanned/block/", "")
        for path, leaf in jax.tree_util.tree_leaves_with_path(filled)
        if np.asarray(leaf).any()
    }
    assert all(name.startswith("params/decoder/") for name in moved)
    assert not [name for name in moved if "token" in name or "/position/" in name]
    for part in ("positions", "embed/kernel", "time/up/bias", "final/kernel", "last_block/joint/adaln/modulate/kernel"):
        assert f"params/decoder/{part}" in moved
    assert {np.asarray(leaf).dtype for leaf in jax.tree.leaves(filled["params"])} == {np.dtype(np.float32)}


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture
def files(tmp_path):
    """A config file, and a transformer in both layouts."""
    s = settings.Experiment(
        model=SCANNED,
        data=settings.Data(source="digits:train", eval_source="digits:test", image_size=SIZE),
        train=settings.Train(batch_size=8, steps=1, tensorboard=False),
        optimizer=settings.Optimizer(name="adamw"),
    )
    text = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({config.dump(s)!r})\n"
    (tmp_path / "tiny.py").write_text(text)
    whole = {f"model.diffusion_model.{name}": array for name, array in original(np.float16).items()}
    safetensors_file.save(tmp_path / "original.safetensors", whole)
    theirs = as_diffusers(original(np.float16))
    safetensors_file.save(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors", theirs)
    return tmp_path


def test_mistakes_are_found_before_anything_is_written(files, capsys):
    start = ["import", "sd3", "--workdir", files / "run", "--from"]
    for arguments, message in (
        ([files / "original.safetensors"], "import sd3: needs --config FILE"),
        ([files / "none", "--config", files / "tiny.py"], "none: cannot be read"),
        (
            [files / "original.safetensors", "--config", files / "tiny.py", "--config.model.decoder.depth=2"],
            "joint_blocks.2.x_block.attn.qkv.weight has no place",
        ),
    ):
        assert run(*start, *arguments) == cli.EXIT_USER
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (files / "run").exists()


@pytest.mark.slow
def test_a_run_starts_from_a_file_and_trains(files, capsys):
    workdir = files / "run"
    start = ["--config", files / "tiny.py", "--workdir", workdir]
    transformer = ["--from", files / "transformer", "--json", files / "report.json"]
    assert run("import", "sd3", *start, *transformer) == 0
    assert "copied, " in capsys.readouterr().out
    report = json.loads((files / "report.json").read_text())
    assert "model.pos_embed" in report["copied"] and report["not_copied"]["context_embedder.bias"]

    # What does not come from the file is as without it; the average starts there too.
    built, state = experiment.restore(str(workdir), whole=True)
    with jax.set_mesh(built.mesh):
        fresh = built.init()
    table = state.params["decoder"]["positions"]
    np.testing.assert_array_equal(table, original(np.float16)["pos_embed"].astype(np.float32).reshape(table.shape))
    np.testing.assert_array_equal(state.ema["decoder"]["positions"], table)
    for path in (("encoder",), ("code_norm",), ("decoder", "token_embed"), ("decoder", "token_positions")):
        before, after = (functools.reduce(lambda t, step: t[step], path, s.params) for s in (fresh, state))
        jax.tree.map(np.testing.assert_array_equal, before, after)

    assert run("train", *start) == 0
    assert "goes on from step 0" in capsys.readouterr().err
    assert run("import", "sd3", *start, "--from", files / "original.safetensors") == cli.EXIT_USER
    assert "holds a run at step 1 already" in capsys.readouterr().err


def theirs(oracle):
    torch, diffusers = oracle("torch"), oracle("diffusers")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=DEPTH,
        attention_head_dim=WIDTH // HEADS,
        num_attention_heads=HEADS,
        joint_attention_dim=TEXT,
        caption_projection_dim=WIDTH,
        pooled_projection_dim=POOLED,
        pos_embed_max_size=SIDE,
    )
    with torch.no_grad():  # away from the zeros that biases start with
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return torch, model.eval()


def relative(found, wanted):
    wanted = wanted.detach().numpy()
    return np.abs(np.asarray(found) - wanted).max() / np.abs(wanted).max()


@pytest.mark.slow
def test_names_and_shapes_are_those_of_diffusers(oracle):
    shapes = {name: tuple(value.shape) for name, value in theirs(oracle)[1].state_dict().items()}
    assert {name: array.shape for name, array in as_diffusers(original()).items()} == shapes


@pytest.mark.slow
def test_blocks_compute_what_those_of_diffusers_compute(oracle):
    """Both streams: with the weights of the text in the place of the tokens', and the time in that of their places."""
    torch, model = theirs(oracle)
    arrays = sd3.from_diffusers({name: value.numpy() for name, value in model.state_dict().items()})
    tensors = selftok.decoder_layout(MODEL, blank(MODEL))
    held = {t.key: arrays[t.key[6:]] for t in tensors if t.key[6:] in arrays and arrays[t.key[6:]].shape == t.shape}
    decoder = layout.fill(held, tensors, blank(MODEL))["params"]["decoder"]
    rng = np.random.default_rng(1)
    tokens, x, time = (rng.normal(size=s).astype(np.float32) for s in ((2, K, WIDTH), (2, 16, WIDTH), (2, WIDTH)))
    for i, block in enumerate([*decoder["blocks"].values(), decoder["last_block"]]):
        last = i == DEPTH - 1
        ours = blocks.JointBlock(HEADS, 4, False, last)
        everything = spans.full(K + 16)
        found = jax.jit(ours.apply)({"params": block["joint"]}, (tokens, x), time, time, everything)
        with torch.no_grad():
            wanted = model.transformer_blocks[i](*(torch.tensor(a) for a in (x, tokens, time)))
        assert relative(found[1], wanted[1]) < 1e-5
        assert (wanted[0] is None and last) or relative(found[0], wanted[0]) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("model", [MODEL, SCANNED], ids=["unrolled", "scanned"])
def test_a_decoder_that_starts_from_sd3_and_sees_no_token_is_sd3_without_text(oracle, tmp_path, model):
    torch, transformer = theirs(oracle)
    with torch.no_grad():
        for p in transformer.time_text_embed.text_embedder.parameters():
            p.zero_()
    transformer.save_pretrained(tmp_path)
    arrays, _ = sd3.read(tmp_path)
    tensors = selftok.decoder_layout(model, blank(model))
    chosen, _ = selected(arrays, model)
    rng = np.random.default_rng(2)
    # The rest is random: it must not matter.
    noise = jax.tree.map(lambda a: rng.normal(size=a.shape).astype(np.float32), blank(model)["params"])
    params = layout.fill(chosen, tensors, {"params": noise})["params"]
    z, t = rng.normal(size=(2, 8, 8, CHANNELS)).astype(np.float32), np.array([0.3, 1.0], np.float32)
    network, none = selftok_networks.Network(model, (4, 4)), jnp.zeros(2, jnp.int32)
    codes = rng.normal(size=(2, K, 16)).astype(np.float32)

    @jax.jit
    def ours(params):
        out = network.apply({"params": params}, ddt.patchify(z, 2), t, codes, none, none, method="predict")
        return ddt.unpatchify(out, 2, 8).transpose(0, 3, 1, 2)

    with torch.no_grad():
        image, text = torch.tensor(z).permute(0, 3, 1, 2), torch.zeros(2, 0, TEXT)
        wanted = transformer(image, text, torch.zeros(2, POOLED), torch.tensor(1000 * t)).sample
    assert relative(ours(params), wanted) < 1e-5
