"""Published Selftok checkpoints: every tensor has its place, both ways; what does not fit is named. Numbers against
PyTorch. The names and shapes are written out here once more, from the description of the published files.
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
from ddt_jax.interop import layout, selftok
from ddt_jax.io import torch_file
from ddt_jax.nn import blocks
from ddt_jax.tokenizers import base, ddt, selftok_networks
from ddt_jax.training import checkpoint
from ddt_jax.training.state import unbox
from tests.tokenizers import selftok_reference as reference

K, CODES, SIZE, CHANNELS = 64, 256, 32, 16  # a codec that divides by 4 gives latents of 8 x 8 x 16
CODEC = settings.VAECodec(
    preset="custom",
    random_weights=True,
    sizes=settings.Autoencoder(block_out_channels=(8, 8, 8), layers_per_block=1, norm_groups=4),
)
TINY = settings.SelftokTokenizer(
    num_tokens=K,
    encoder=settings.SelftokEncoder(depth=2, image_width=32, image_heads=2, width=64, heads=4, position_grid=8),
    decoder=settings.SelftokDecoder(depth=2, width=128, heads=4, position_grid=10),
    quantizer=replace(settings.SelftokTokenizer().quantizer, codebook_size=CODES),
    schedule=settings.Schedule(kind="uniform", direction="selftok"),
    flow=replace(settings.SelftokTokenizer().flow, solver_steps=2),
    codec=CODEC,
)
DEEP = replace(TINY, encoder=replace(TINY.encoder, depth=3), decoder=replace(TINY.decoder, depth=3))
RENDERER = replace(
    TINY,
    decoder=settings.SelftokRenderer(depth=2, width=128, heads=4, position_grid=10),
    flow=settings.Flow(prediction="x0", time="uniform", shift=1.0, solver_steps=1),
)
FORMS = {
    "scanned": DEEP,
    "unrolled": replace(DEEP, scan_layers=False),
    "renderer": RENDERER,
    "renderer_each": replace(RENDERER, decoder=replace(RENDERER.decoder, repeat=False)),
}
SAMPLER = [f"diffusion.{n}" for n in ("timestep_map", "scheduled_t", "scheduled_t_prev", "one_minus_scheduled_t")]
COUNTERS = [f"encoder.quantizer.{n}" for n in ("continuous", "steps", "count")]
BOOK = "encoder.quantizer._codebook"


def published(*, tokens, codes, image, query, encoder_depth, encoder_side, width, decoder_depth, decoder_side):
    """Name → shape. image, query: widths of the encoder's streams; width: of the decoder."""
    shapes = dict.fromkeys(SAMPLER, (100,))

    def linear(name, outputs, inputs):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    shapes["encoder.pos_embed"] = (1, encoder_side * encoder_side, image)
    shapes["encoder.query_tokens"] = (1, tokens, query)
    shapes["encoder.x_embedder.proj.weight"], shapes["encoder.x_embedder.proj.bias"] = (image, 16, 2, 2), (image,)
    for i in range(encoder_depth):
        name = f"encoder.blocks.{i}"
        linear(f"{name}.attn.qkv", 3 * image, image)
        linear(f"{name}.attn.to_query_kv", 2 * query, image)
        linear(f"{name}.attn.query_linear", 3 * query, query)
        linear(f"{name}.attn.proj", image, image)
        linear(f"{name}.attn.query_proj", query, query)
        linear(f"{name}.mlp.fc1", 4 * image, image)
        linear(f"{name}.mlp.fc2", image, 4 * image)
        linear(f"{name}.q_mlp.fc1", 4 * query, query)
        linear(f"{name}.q_mlp.fc2", query, 4 * query)
        linear(f"{name}.adaLN_modulation.1", 6 * query, query)
        linear(f"{name}.t_embedder.mlp.0", query, 256)
        linear(f"{name}.t_embedder.mlp.2", query, query)
    for name, size in (("final_layer_norm", query), ("final_layer_norm2", 16), ("final_layer_norm3", 16)):
        shapes[f"encoder.{name}.weight"] = shapes[f"encoder.{name}.bias"] = (size,)
    shapes |= {"encoder.quantizer.continuous": (1,), "encoder.quantizer.steps": (1,)}
    shapes["encoder.quantizer.count"] = (1, codes)
    linear("encoder.quantizer.project_in", 16, query)
    shapes |= {f"{BOOK}.initted": (1,), f"{BOOK}.tpc_initted": (1,)}
    shapes |= {f"{BOOK}.cluster_size": (1, codes), f"{BOOK}.cluster_size_wo_react": (1, codes)}
    shapes |= {f"{BOOK}.embed_avg": (1, codes, 16), f"{BOOK}.embed": (1, codes, 16)}
    shapes[f"{BOOK}.timestep_p_over_c"] = (1, tokens, codes)

    shapes["model.pos_embed"] = (1, decoder_side * decoder_side, width)
    shapes["model.context_pos_embed"] = (1, tokens, width)
    shapes["model.x_embedder.proj.weight"], shapes["model.x_embedder.proj.bias"] = (width, 16, 2, 2), (width,)
    linear("model.t_embedder.mlp.0", width, 256)
    linear("model.t_embedder.mlp.2", width, width)
    linear("model.y_embedder.mlp.0", width, 16)
    linear("model.y_embedder.mlp.2", width, width)
    linear("model.context_embedder", width, 16)
    for i in range(decoder_depth):
        last = i == decoder_depth - 1
        for stream in ("context_block", "x_block"):
            name, ends = f"model.joint_blocks.{i}.{stream}", last and stream == "context_block"
            linear(f"{name}.attn.qkv", 3 * width, width)
            if not ends:
                linear(f"{name}.attn.proj", width, width)
                linear(f"{name}.mlp.fc1", 4 * width, width)
                linear(f"{name}.mlp.fc2", width, 4 * width)
            linear(f"{name}.adaLN_modulation.1", (2 if ends else 6) * width, width)
        linear(f"model.joint_blocks.{i}.context_block.t_embedder.mlp.0", width, 256)
        linear(f"model.joint_blocks.{i}.context_block.t_embedder.mlp.2", width, width)
    linear("model.final_layer.linear", 64, width)
    linear("model.final_layer.adaLN_modulation.1", 2 * width, width)
    return shapes


def as_renderer(shapes, patches, width, repeat):
    shapes = {name: shape for name, shape in shapes.items() if not name.startswith("model.x_embedder")}
    mask = {"model.mask_token": (1, 1 if repeat else patches, width)}
    return shapes | mask | {"model.positional_embedding": (patches, width)}


def expected(form):
    e, d = form.encoder, form.decoder
    shapes = published(
        tokens=K,
        codes=CODES,
        image=32,
        query=64,
        encoder_depth=e.depth,
        encoder_side=8,
        width=128,
        decoder_depth=d.depth,
        decoder_side=10,
    )
    return as_renderer(shapes, 16, 128, d.repeat) if isinstance(d, settings.SelftokRenderer) else shapes


def shapes_of(model, size):
    tokenizer = base.make_tokenizer(model, size, 4)
    params, extra = jax.eval_shape(tokenizer.init, jax.random.key(0))
    return {"params": unbox(params), "extra": unbox(extra)}


@functools.cache
def blank(model):
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes_of(model, SIZE))


OTHER_TYPES = {"diffusion.timestep_map": np.int64, "diffusion.scheduled_t": np.float64}
OTHER_TYPES |= {"encoder.quantizer.continuous": np.bool_, "encoder.quantizer.steps": np.int64}


def random_file(form, seed=0):
    """Weights at the scale of trained ones, buffers of several types."""
    rng, arrays = np.random.default_rng(seed), {}
    for name, shape in expected(form).items():
        if name.endswith("bias"):
            value = rng.normal(0, 0.1, shape)
        elif name.endswith("weight"):
            value = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape) if len(shape) > 1 else rng.normal(1, 0.1, shape)
        else:
            value = rng.normal(0, 1, shape)
        if name == f"{BOOK}.embed":
            value /= np.linalg.norm(value, axis=-1, keepdims=True)
        value = value * 1000 if OTHER_TYPES.get(name) is np.int64 else value
        arrays[name] = value.astype(OTHER_TYPES.get(name, np.float32))
    return arrays | {f"{BOOK}.initted": np.ones(1, np.float32), f"{BOOK}.tpc_initted": np.ones(1, np.float32)}


def imported(form, arrays):
    tensors = selftok.layout(form, blank(form))
    selftok.FORMAT.check(arrays, tensors)
    return layout.fill(arrays, tensors, blank(form))


def assert_same_bytes(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        got = np.ascontiguousarray(found[name])
        assert (got.dtype, got.shape) == (value.dtype, value.shape), name
        assert got.tobytes() == value.tobytes(), name


@pytest.mark.parametrize("decoder", [settings.SelftokDecoder(), settings.SelftokRenderer(repeat=False)])
def test_released_sizes_give_the_published_names_and_shapes(decoder):
    codec = settings.VAECodec(random_weights=True)
    model = settings.SelftokTokenizer(decoder=decoder, codec=codec)
    if isinstance(decoder, settings.SelftokRenderer):
        model = replace(model, flow=RENDERER.flow)
    found = {t.key: t.shape for t in selftok.layout(model, shapes_of(model, 256))}
    sizes = {"tokens": 512, "codes": 32768, "image": 64, "query": 512, "encoder_depth": 16, "encoder_side": 64}
    wanted = published(**sizes, width=1536, decoder_depth=24, decoder_side=192)
    # Some lines of the description as they stand there.
    assert wanted["encoder.blocks.15.attn.to_query_kv.weight"] == (1024, 64)
    assert wanted["model.joint_blocks.23.context_block.adaLN_modulation.1.weight"] == (3072, 1536)
    assert wanted["model.joint_blocks.0.x_block.attn.qkv.weight"] == (4608, 1536)
    assert wanted["model.pos_embed"] == (1, 36864, 1536)
    if isinstance(decoder, settings.SelftokRenderer):
        wanted = as_renderer(wanted, 256, 1536, repeat=False)
    assert found == wanted


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_is_imported_is_exported_bitwise(tmp_path, form):
    wanted = random_file(form)
    torch_file.save(tmp_path / "theirs.pth", wanted)
    tree = imported(form, selftok.FORMAT.read(tmp_path / "theirs.pth"))
    torch_file.save(tmp_path / "ours.pth", selftok.FORMAT.to_arrays(tree, form))
    assert_same_bytes(torch_file.load(tmp_path / "ours.pth"), wanted)


def test_every_leaf_of_the_networks_and_the_codebook_comes_from_the_file():
    form = FORMS["scanned"]
    places = {place.path for tensor in selftok.layout(form, blank(form)) for place in tensor.places}
    leaves = {
        jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree_util.tree_leaves_with_path(blank(form))
    }
    ours = {name for name in leaves - places if not name.startswith("extra/codec/")}
    assert places <= leaves and ours == {"extra/codebook/revived"}


@pytest.mark.parametrize("form", [FORMS["unrolled"], replace(RENDERER, scan_layers=False)], ids=["mmdit", "renderer"])
def test_weights_lie_where_the_parity_tests_have_them(form):
    """Those tests compare with PyTorch under a naming of their own; what it leaves out is not computed with."""
    arrays = random_file(form)
    found = reference.published_names(imported(form, arrays)["params"])
    for name, value in found.items():
        np.testing.assert_array_equal(value, arrays[name], err_msg=name)
    idle = arrays.keys() - found.keys() - {name for name in arrays if name.startswith(("diffusion.", BOOK))}
    unused = {"encoder.pos_embed", "model.context_pos_embed", *COUNTERS}
    names = [
        "encoder.final_layer_norm",
        "encoder.final_layer_norm2",
        "model.y_embedder.mlp.0",
        "model.y_embedder.mlp.2",
    ]
    assert idle == unused | {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}


def test_scanned_layers_hold_the_same_as_unrolled_ones():
    arrays = random_file(DEEP)
    tight, loose = imported(FORMS["scanned"], arrays), imported(FORMS["unrolled"], arrays)
    assert jax.tree.structure(tight["extra"]) == jax.tree.structure(loose["extra"])
    for a, b in (
        (tight["params"], blocks.scanned(loose["params"])),
        (blocks.unrolled(tight["params"]), loose["params"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, a, b)


def test_the_codebook_lies_where_the_quantizer_looks():
    arrays = random_file(TINY)
    book = imported(TINY, arrays)["extra"]["codebook"]
    pairs = {"codes": "embed", "sum": "embed_avg", "count": "cluster_size", "usage": "timestep_p_over_c"}
    for ours, theirs in pairs.items():
        np.testing.assert_array_equal(book[ours], arrays[f"{BOOK}.{theirs}"][0])
    assert book["initialized"] and book["usage_started"]
    assert not imported(TINY, arrays | {f"{BOOK}.initted": np.zeros(1, np.float32)})["extra"]["codebook"]["initialized"]


def test_flags_follow_our_state_once_it_has_changed():
    tree = imported(TINY, random_file(TINY) | {f"{BOOK}.initted": np.zeros(1, np.bool_)})
    tree["extra"]["codebook"]["initialized"] = np.array(True)
    found = selftok.FORMAT.to_arrays(tree, TINY)[f"{BOOK}.initted"]
    assert found.dtype == np.bool_ and found.tolist() == [True]
    tree = imported(TINY, random_file(TINY) | {f"{BOOK}.tpc_initted": np.full(1, 7, np.int64)})
    assert selftok.FORMAT.to_arrays(tree, TINY)[f"{BOOK}.tpc_initted"].tolist() == [7]


def test_a_run_that_was_not_imported_is_written_without_what_only_the_sampler_knows():
    tree = jax.tree.map(np.copy, blank(TINY))
    tree["extra"]["codebook"]["count"][:] = np.arange(CODES)
    found = selftok.FORMAT.to_arrays(tree, TINY)
    assert expected(TINY).keys() - found.keys() == {*SAMPLER, *COUNTERS}
    assert {name: found[name].shape for name in found} == {n: s for n, s in expected(TINY).items() if n in found}
    np.testing.assert_array_equal(found[f"{BOOK}.cluster_size_wo_react"], np.arange(CODES, dtype=np.float32)[None])
    assert found[f"{BOOK}.initted"].tolist() == [0]
    # And such a file is read, and comes back as it was.
    assert_same_bytes(selftok.FORMAT.to_arrays(imported(TINY, found), TINY), found)


def test_half_precision_is_read():
    arrays = random_file(TINY)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        name = "encoder.query_tokens"
        half = arrays | {name: arrays[name].astype(dtype)}
        queries = imported(TINY, half)["params"]["encoder"]["queries"]
        assert queries.dtype == np.float32
        np.testing.assert_array_equal(queries, half[name][0].astype(np.float32))


def complaint(arrays, form=TINY):
    with pytest.raises(UserError) as error:
        selftok.FORMAT.check(arrays, selftok.layout(form, blank(form)), "x.pth")
    assert "\n" not in str(error.value) and str(error.value).startswith("selftok: x.pth does not fit")
    return str(error.value)


def unfolded(text, ending):
    """Names in front of an ending, `{0..1,3}` written out."""
    names = set()
    for part in text.split(": ", 2)[-1].split("; "):
        before, _, rest = part.partition("{")
        numbers, _, after = rest.partition("}")
        for run in numbers.split(",") if rest else []:
            first, _, last = run.partition("..")
            names |= {f"{before}{n}{after}" for n in range(int(first), int(last or first) + 1)}
        names |= set() if rest else {part}
    return {name.removesuffix(ending) for name in names if name.endswith(ending)}


def test_tensors_that_do_not_fit_are_named_in_one_line_and_counted():
    arrays = random_file(TINY)
    total = len(arrays)
    del arrays["encoder.final_layer_norm2.bias"]  # nothing computes with it, and yet it has to be there
    arrays["model.extra"] = np.zeros(3, np.float32)
    arrays["encoder.query_tokens"] = np.zeros((1, 32, 64), np.float32)
    text = complaint(arrays)
    assert f"3 of {total} tensors" in text
    assert "encoder.final_layer_norm2.bias is missing" in text
    assert "model.extra has no place" in text
    assert "encoder.query_tokens is 1 x 32 x 64, not 1 x 64 x 64" in text
    name = "model.pos_embed"
    assert f"{name} is of type int32" in complaint(random_file(TINY) | {name: np.zeros((1, 100, 128), np.int32)})
    assert f"{name} is no tensor" in complaint(random_file(TINY) | {name: 3})
    many = complaint({})
    assert f"{total - len(SAMPLER + COUNTERS)} of {total} tensors" in many
    assert unfolded(many, " is missing") == expected(TINY).keys() - {*SAMPLER, *COUNTERS}
    one = {n: v for n, v in random_file(TINY).items() if n != SAMPLER[0]}  # all of the sampler's, or none
    assert f"1 of {total} tensors: {SAMPLER[0]} is missing" in complaint(one)
    assert "model.x_embedder.proj.bias has no place" in complaint(random_file(TINY), RENDERER)


def test_settings_without_a_published_counterpart_are_refused():
    for wrong, message in (
        (replace(TINY, quantizer=replace(TINY.quantizer, normalize_input="batch")), "normalize_input='batch'"),
        (replace(TINY, quantizer=replace(TINY.quantizer, diversity=0.0, revive_from="uniform")), "usage of codes"),
        (settings.DDTTokenizer(), "model.kind='ddt'"),
    ):
        with pytest.raises(UserError, match=message):
            selftok.layout(wrong, {})


class Settings(dict):
    """Stands for what a trainer's settings are made of (theirs: an EasyDict)."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__ = self


def test_a_trainers_file_is_read(tmp_path):
    arrays, path = random_file(TINY), tmp_path / "iter.pth"
    torch_file.save(path, {"iter": 7, "state_dict": arrays, "cfg": {"lr": 0.1, "names": ["a"]}})
    assert_same_bytes(selftok.FORMAT.read(path), arrays)


def test_a_file_without_tensors_is_refused(tmp_path):
    path = tmp_path / "iter.pth"
    for content in ({"iter": 7, "cfg": {}}, {"state_dict": {"a": 1}}):
        torch_file.save(path, content)
        with pytest.raises(UserError, match="holds no tensors by name"):
            selftok.FORMAT.read(path)


@pytest.mark.slow
def test_files_of_pytorch_come_back_bitwise_through_pytorch(oracle, tmp_path):
    torch = oracle("torch")
    wanted = {name: torch.tensor(value) for name, value in random_file(DEEP).items()}
    for content in (wanted, {"iter": 3, "state_dict": wanted, "cfg": Settings(a=1, b=Settings(names=["c"]))}):
        torch.save(content, tmp_path / "theirs.pth")
        tree = imported(DEEP, selftok.FORMAT.read(tmp_path / "theirs.pth"))
        torch_file.save(tmp_path / "ours.pth", selftok.FORMAT.to_arrays(tree, DEEP))
        found = torch.load(tmp_path / "ours.pth", weights_only=True)
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@pytest.mark.slow
@pytest.mark.parametrize("form", [TINY, replace(TINY, scan_layers=False), RENDERER], ids=["scan", "unroll", "renderer"])
def test_imported_networks_compute_what_the_file_says(oracle, form):
    """The reference reads the same tensors by their published names. fp32 on both sides, as in the parity tests."""
    torch = oracle("torch")
    torch.set_num_threads(1)
    arrays = random_file(form)
    # The reference makes the fixed tables itself.
    arrays["encoder.pos_embed"] = reference.sincos_2d(torch, 8, 32).reshape(1, 64, 32).numpy()
    arrays["model.context_pos_embed"] = (
        reference.sincos(torch, reference.positions(torch, K), 128).float()[None].numpy()
    )
    w = {name: torch.tensor(value) for name, value in arrays.items()}
    tree = imported(form, arrays)
    rng, b = np.random.default_rng(1), 2
    z = rng.normal(size=(b, 8, 8, CHANNELS)).astype(np.float32)
    t, end = np.array([0.3, 1.0], np.float32), np.array([K // 2, K], np.int32)
    tokenizer, network = base.make_tokenizer(form, SIZE, 4), selftok_networks.Network(form, (4, 4))
    one_step = isinstance(form.decoder, settings.SelftokRenderer)
    end = np.full_like(end, K) if one_step else end

    @jax.jit
    def ours(tree, z):
        variables, patches, book = {"params": tree["params"]}, ddt.patchify(z, 2), tree["extra"]["codebook"]
        features = network.apply(variables, patches, method="encode")
        codes = tokenizer.quantizer.encode(book, features)
        vectors = tokenizer.quantizer.lookup(book, codes)
        out = network.apply(variables, patches, t, vectors, np.zeros_like(end), end, method="predict")
        return features, codes, ddt.unpatchify(out, 2, 8)

    features, codes, out = ours(jax.tree.map(jnp.asarray, tree), z)
    image = torch.tensor(z).permute(0, 3, 1, 2)
    wanted = reference.encoder(torch, w, image, depth=2, image_heads=2, heads=4, side=8)
    assert np.abs(features - wanted.numpy()).max() < 1e-5 * wanted.abs().max()
    embed = w[f"{BOOK}.embed"][0]
    cosine = torch.nn.functional.normalize(wanted, dim=-1) @ embed.T
    best = cosine.topk(2, dim=-1).values
    clear = (best[..., 0] - best[..., 1] > 1e-5).numpy()
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(np.asarray(codes)[clear], cosine.argmax(dim=-1).numpy()[clear])
    chosen = embed[torch.tensor(np.asarray(codes), dtype=torch.long)]
    options = {"depth": 2, "heads": 4, "see_xt": form.decoder.context_see_xt, "renderer": one_step}
    wanted = reference.decoder(torch, w, image, torch.tensor(t), chosen, torch.tensor(end), **options)
    wanted = wanted.permute(0, 2, 3, 1).numpy()
    assert np.abs(out - wanted).max() < 1e-5 * np.abs(wanted).max()


def run(*arguments):
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A config file and a published file that fits it."""
    folder = tmp_path_factory.mktemp("selftok")
    s = settings.Experiment(
        model=TINY,
        train=settings.Train(batch_size=4, ema=0.5),
        evaluate=settings.Evaluate(images=8, batch_size=8, visible=(1.0,), pictures=2, probe_images=64),
    )
    tree = repr(config.dump(s))
    text = f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict({tree})\n"
    (folder / "tiny.py").write_text(text)
    torch_file.save(folder / "theirs.pth", random_file(TINY))
    return folder


def test_mistakes_are_found_before_anything_is_written(files, tmp_path, capsys):
    into = ["--workdir", tmp_path / "run"]
    theirs, sizes = ["--from", files / "theirs.pth"], ["--config", files / "tiny.py"]
    for arguments, message in (
        ([*theirs, *into], "model.codec.weights is empty"),
        ([*theirs, *into, *sizes, "--config.model.num_tokens=128"], "encoder.query_tokens is 1 x 64 x 64, not 1 x 128"),
        (["--from", tmp_path / "none.pth", *into, *sizes], "none.pth: cannot be read"),
    ):
        assert run("import", "selftok", *arguments) == cli.EXIT_USER
        error = capsys.readouterr().err.strip()
        assert message in error and error.splitlines()[-1].startswith("ddt-jax: ")
        assert not (tmp_path / "run").exists()
    assert run("export", "selftok", *into, "--to", tmp_path / "x.pth") == cli.EXIT_USER
    assert "holds no run" in capsys.readouterr().err


@pytest.fixture(scope="module")
def workdir(files):
    path = files / "run"
    arguments = ["--config", files / "tiny.py", "--from", files / "theirs.pth", "--workdir", path]
    assert run("import", "selftok", *arguments, "--json", files / "import.json") == 0
    return path


@pytest.mark.slow
def test_an_imported_checkpoint_is_an_ordinary_run(files, workdir, tmp_path, capsys):
    from PIL import Image

    assert json.loads((files / "import.json").read_text())["tensors"] == len(random_file(TINY))
    assert checkpoint.saved_steps(workdir)[0] == 0
    assert run("evaluate", "--workdir", workdir) == 0
    assert json.loads((workdir / "results.json").read_text())["commitment_distance"] > 0
    Image.new("RGB", (40, 40), (200, 10, 10)).save(tmp_path / "a.png")
    assert run("reconstruct", "--workdir", workdir, tmp_path / "a.png") == 0
    assert len(capsys.readouterr().out.splitlines()[-2].split(": ")[1].split()) == K


@pytest.mark.slow
def test_a_run_is_exported_with_its_average_and_not_overwritten(files, workdir, tmp_path, capsys):
    out, wanted = tmp_path / "ours.pth", random_file(TINY)
    arguments = ["--config", files / "tiny.py", "--from", files / "theirs.pth", "--workdir", workdir]
    assert run("import", "selftok", *arguments) == cli.EXIT_USER
    assert "use another --workdir" in capsys.readouterr().err
    assert run("export", "selftok", "--workdir", workdir, "--to", out) == 0
    assert_same_bytes(torch_file.load(out), wanted)
    assert run("export", "selftok", "--workdir", workdir, "--to", "/proc/none/x.pth") == cli.EXIT_USER
    assert "cannot write /proc/none/x.pth" in capsys.readouterr().err

    # As if it had been trained: parameters move away from the average, which stays.
    built, state = experiment.restore(str(workdir), whole=True)
    state = state.replace(step=state.step + 1, params=jax.tree.map(lambda x: x + 1, state.params))
    points = checkpoint.Checkpoints(workdir, built.settings.train)
    points.save(state, config.dump(built.settings))
    points.close()
    assert run("export", "selftok", "--workdir", workdir, "--to", out) == 0
    assert "step 1, average" in capsys.readouterr().out
    assert_same_bytes(torch_file.load(out), wanted)
