"""What is exported for PyTorch users, run by them: the same codes exactly, the same images to 1e-4.

That is the tolerance of a whole sampling with shared noise, float32 on both sides and up to 8 evaluations of networks
with random weights; what is measured is 1e-6 to 2e-5.
"""

import functools
import importlib.util
import json
import subprocess
import sys
import typing
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import cli, config, experiment, settings
from ddt_jax.errors import UserError
from ddt_jax.interop import torch_export
from ddt_jax.io import safetensors_file
from ddt_jax.nn import params as declared
from ddt_jax.tokenizers import base
from ddt_jax.training import checkpoint
from ddt_jax.training.claim import claim

B, SIZE = 3, 16
VAE = settings.VAECodec(
    preset="custom",
    random_weights=True,
    sizes=settings.Autoencoder(block_out_channels=(8, 16), layers_per_block=1, latent_channels=4, norm_groups=4),
)
# For latents of some hundreds, as random weights make them where noise is predicted: else all would be clipped.
LARGE = replace(VAE, sizes=replace(VAE.sizes, use_quant_conv=True, scaling_factor=300.0))
BOOK = settings.Quantizer(code_dim=4, codebook_size=32)
DDT = settings.DDTTokenizer(
    num_tokens=8,
    patch_size=4,
    width=16,
    heads=2,
    encoder_depth=2,
    decoder_depth=2,
    mlp_ratio=2,
    quantizer=BOOK,
    flow=settings.Flow(solver_steps=4),
)
PLAIN = replace(BOOK, normalize_input="none")
SELFTOK = settings.SelftokTokenizer(
    num_tokens=8,
    encoder=settings.SelftokEncoder(depth=3, image_width=8, image_heads=2, width=16, heads=4, position_grid=8),
    decoder=settings.SelftokDecoder(depth=3, width=16, heads=2, position_grid=10),
    quantizer=replace(PLAIN, code_dim=16),
    schedule=settings.Schedule(
        kind="piecewise", direction="selftok", breakpoints=(200, 400, 600, 800, 1000), tokens=(3, 2, 1, 1, 1)
    ),
    flow=replace(settings.SelftokTokenizer().flow, solver_steps=5),
    codec=VAE,
)
RENDERER = replace(
    SELFTOK,
    decoder=settings.SelftokRenderer(depth=2, width=16, heads=2, position_grid=10),
    flow=settings.Flow(prediction="x0", time="uniform", shift=1.0, solver_steps=1),
    codec=settings.IdentityCodec(),
    patch_size=4,
)
PIECES = replace(SELFTOK.schedule, direction="coarse_first")
CASES = {
    "cross_mix": DDT,
    "joint": replace(
        DDT,
        coupling="joint",
        mix=False,
        qk_norm=False,
        quantizer=PLAIN,
        schedule=settings.Schedule(kind="uniform", groups=4),
        flow=settings.Flow(prediction="velocity", solver="heun", solver_steps=4),
    ),
    "timesteps": replace(
        DDT, schedule=settings.Schedule(kind="timesteps", direction="selftok"), flow=settings.Flow(solver_steps=8)
    ),
    "joint_mix_scanned": replace(
        DDT,
        coupling="joint",
        decoder_depth=3,
        scan_layers=True,
        schedule=settings.Schedule(kind="logit_normal", direction="selftok"),
        flow=settings.Flow(solver="dpmpp_2m", solver_steps=6, guidance=1.5, shift=2.0),
    ),
    "cross_noise_vae": replace(
        DDT, mix=False, codec=LARGE, schedule=PIECES, flow=settings.Flow(prediction="noise", solver_steps=4)
    ),
    "selftok": SELFTOK,
    "selftok_unrolled_blind": replace(
        SELFTOK,
        scan_layers=False,
        codec=settings.IdentityCodec(),
        patch_size=4,
        decoder=replace(SELFTOK.decoder, context_see_xt=False),
        quantizer=replace(BOOK, code_dim=16),
    ),
    "renderer": RENDERER,
    "small_renderer": replace(DDT, decoder=settings.Renderer(), decoder_depth=3),
    "small_renderer_joint": replace(DDT, decoder=settings.Renderer(repeat=True), coupling="joint", codec=VAE),
    "renderer_each_vae": replace(
        RENDERER,
        codec=VAE,
        patch_size=2,
        decoder=replace(RENDERER.decoder, repeat=False, canvas_keeps_table=False, context_see_xt=True),
    ),
}


def test_every_choice_that_the_exported_file_makes_is_among_the_cases():
    parts = {
        settings.Schedule: ("schedule", ("kind", "direction")),
        settings.Flow: ("flow", ("prediction", "solver")),
        settings.Quantizer: ("quantizer", ("normalize_input",)),
    }
    for kind, (part, names) in parts.items():
        for name in names:
            wanted = set(typing.get_args(typing.get_type_hints(kind)[name])) - {"unpublished"}  # refused
            assert {getattr(getattr(case, part), name) for case in CASES.values()} == wanted, name
    for model in (settings.SelftokTokenizer, settings.DDTTokenizer):
        for name in ("decoder", "codec"):
            found = {type(getattr(c, name)) for c in CASES.values() if isinstance(c, model)}
            assert found == set(typing.get_args(typing.get_type_hints(model)[name])), name
    wanted = set(typing.get_args(typing.get_type_hints(settings.DDTTokenizer)["coupling"]))
    assert {case.coupling for case in CASES.values() if isinstance(case, settings.DDTTokenizer)} == wanted


@functools.cache
def build(name):
    """(tokenizer, parameters, extra): random, adaLN and biases too, tables as they are initialised."""
    tokenizer = base.make_tokenizer(CASES[name], SIZE, 4)
    boxed, extra = jax.eval_shape(tokenizer.init, jax.random.key(0))
    shapes, _ = declared.split(boxed)
    rng = np.random.default_rng(3)

    def draw(path, shape):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        centre, spread = (1.0, 0.1) if name.endswith("scale") else (0.0, 0.25)
        spread = 0.05 if name.startswith("decoder/final/") else spread
        if "embed/kernel" in name or "image_to_query" in name:
            spread = 1.0  # else codes would hardly depend on the image
        return (centre + spread * rng.normal(size=shape.shape)).astype(np.float32)

    params, codec = (
        jax.tree_util.tree_map_with_path(draw, tree)
        for tree in (shapes, declared.split(extra["codec"])[0] if "codec" in extra else {})
    )
    book = {key: np.zeros(value.shape, value.dtype) for key, value in extra["codebook"].items()}
    codes = rng.normal(size=book["codes"].shape).astype(np.float32)
    book["codes"] = codes / np.linalg.norm(codes, axis=-1, keepdims=True)
    if "mean" in book:
        book["mean"] = rng.normal(size=book["mean"].shape).astype(np.float32)
        book["var"] = rng.uniform(0.5, 2, book["var"].shape).astype(np.float32)
    return tokenizer, params, {"codebook": book} | ({"codec": codec} if codec else {})


def test_what_nothing_computes_with_is_left_out_and_tables_are_cut():
    names = torch_export.to_arrays(*build("selftok"))
    assert not [n for n in names if "unused" in n or "token_query" in n]
    assert "encoder.blocks.1.image_mlp.up.weight" in names and "encoder.blocks.2.image_mlp.up.weight" not in names
    assert "decoder.blocks.1.position.up.weight" in names and "decoder.blocks.2.position.up.weight" not in names
    assert names["decoder.positions"].shape == (16, 16) and names["encoder.positions"].shape == (16, 8)
    table = build("selftok")[1]["decoder"]["positions"]
    np.testing.assert_array_equal(names["decoder.positions"].reshape(4, 4, 16), table[3:7, 3:7])
    assert {array.dtype for array in names.values()} == {np.dtype(np.float32)}


def test_a_tokenizer_without_a_counterpart_is_refused():
    tokenizer = base.make_tokenizer(settings.LinearTokenizer(), 32, 4)
    with pytest.raises(UserError, match="model.kind='linear' has no PyTorch counterpart"):
        torch_export.to_arrays(tokenizer, {}, {})


def exported(folder, name):
    torch_export.write(folder, *build(name), about={"step": 7})
    return folder


def imported(folder):
    """As `import tokenizer` by someone whose path has the folder."""
    spec = importlib.util.spec_from_file_location("tokenizer", folder / "tokenizer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def loaded(folder):
    return imported(folder).load(folder)


def images():
    return np.random.default_rng(0).uniform(-1, 1, (B, SIZE, SIZE, 3)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_pytorch_gives_the_same_codes_and_images(oracle, tmp_path, record_property, name):
    torch = oracle("torch")
    torch.set_num_threads(1)
    tokenizer, params, extra = build(name)
    model = loaded(exported(tmp_path, name))
    params, extra = jax.tree.map(jnp.asarray, (params, extra))
    codes = jax.jit(tokenizer.encode)(params, extra, images())
    theirs = model.encode(torch.tensor(images()).permute(0, 3, 1, 2))
    np.testing.assert_array_equal(codes, theirs.numpy())
    assert len(np.unique(codes)) > 4 and (codes != codes[0]).any()  # or it would not say much

    keys = jax.random.split(jax.random.key(1), B)
    channels, *sides = model.latent_shape
    noise = jax.vmap(lambda key: jax.random.normal(key, (*sides, channels)))(keys)
    noise = torch.tensor(np.array(noise)).permute(0, 3, 1, 2)
    some = np.array([1, 4, 8], np.int32)
    guidance = 1.0 if model.one_step else 2.0
    for ours, options in (
        ({}, {}),
        ({"num_visible": some}, {"num_visible": torch.tensor(some)}),
        ({"steps": 3, "guidance": guidance, "num_visible": 5},) * 2,
    ):
        if model.one_step:
            ours = {key: value for key, value in ours.items() if key == "num_visible"}
            options = {key: value for key, value in options.items() if key == "num_visible"}
        wanted = jax.jit(functools.partial(tokenizer.decode, **ours))(params, extra, codes, keys)
        found = model.render(theirs, **options) if model.one_step else model.decode(theirs, noise=noise, **options)
        found = found.permute(0, 2, 3, 1).numpy()
        assert (np.abs(found) < 1).mean() > 0.3 and found.std() > 0.1  # not all clipped, not all alike
        distance = float(np.abs(found - wanted).max())
        record_property(f"{name} {sorted(ours)}", distance)
        print(f"{name} {sorted(ours)}: {distance:.1e}")
        assert distance < 1e-4


@pytest.mark.slow
def test_the_exported_file_runs_where_nothing_but_pytorch_can_be_imported(oracle, tmp_path):
    torch = oracle("torch")
    folder = exported(tmp_path, "cross_noise_vae")
    program = f"""
import json, sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"jax", "jaxlib", "flax", "ddt_jax", "numpy", "safetensors", "ml_dtypes"}}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Nothing())
sys.path.insert(0, {str(folder)!r})
import tokenizer, torch
model = tokenizer.load()
images = torch.linspace(-1, 1, {3 * SIZE * SIZE}).sin().reshape(1, 3, {SIZE}, {SIZE})
codes = model.encode(images)
found = model.decode(codes, 2, seed=5)
again = model.decode(torch.cat([codes, codes]), steps=2, seed=5)[:1]
print(json.dumps([codes.tolist(), found.flatten().tolist(), (found - again).abs().max().item()]))
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    codes, found, batch = json.loads(done.stdout.splitlines()[-1])
    model = loaded(folder)
    image = torch.linspace(-1, 1, 3 * SIZE * SIZE).sin().reshape(1, 3, SIZE, SIZE)
    assert model.encode(image).tolist() == codes and batch < 1e-5
    np.testing.assert_allclose(model.decode(torch.tensor(codes), 2, seed=5).flatten(), found, atol=1e-6)
    assert model.decode(torch.tensor(codes), 2, seed=6).sub(torch.tensor(found).view(image.shape)).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cross_noise_vae", "selftok"])
def test_on_the_meta_device_a_model_has_shapes_alone_until_tensors_are_assigned(oracle, tmp_path, name):
    torch = oracle("torch")
    module, tokenizer = imported(exported(tmp_path, name)), build(name)[0]
    with torch.device("meta"):
        model = module.build(tmp_path)
    assert all(weight.is_meta for weight in model.state_dict().values())
    assert model.encode(torch.empty(B, 3, SIZE, SIZE, device="meta")).shape == (B, tokenizer.config.num_tokens)

    tensors = module.read_safetensors(tmp_path / "model.safetensors")
    model.load_state_dict(tensors, assign=True)
    assert {n: w.data_ptr() for n, w in model.state_dict().items()} == {n: t.data_ptr() for n, t in tensors.items()}
    given, wanted = torch.tensor(images()).permute(0, 3, 1, 2), module.load(tmp_path)
    assert torch.equal(model.encode(given), wanted.encode(given)) and not model.training
    with pytest.raises(RuntimeError, match="Missing key.*codebook"):
        module.build(tmp_path).load_state_dict({n: t for n, t in tensors.items() if n != "codebook"}, assign=True)


@pytest.mark.slow
def test_loading_allocates_no_weights_and_copies_none(oracle, tmp_path):
    made = set()

    class Watch(oracle("torch.utils._python_dispatch").TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            made.add((function.overloadpacket.__name__, str(getattr(out, "device", None))))
            return out

    module = imported(exported(tmp_path, "selftok"))
    with Watch():
        model = module.load(tmp_path)
    assert ("empty", "meta") in made  # or nothing was watched
    assert {name for name, device in made if device == "cpu"} <= {"view", "detach", "alias"}, made
    with Watch():
        model.codebook.clone()
    assert ("clone", "cpu") in made


@pytest.mark.slow
def test_mistakes_of_a_pytorch_user_are_named(oracle, tmp_path):
    torch = oracle("torch")
    codes = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(ValueError, match="use render"):
        loaded(exported(tmp_path / "renderer", "renderer")).decode(codes)
    model = loaded(exported(tmp_path / "flow", "cross_mix"))
    with pytest.raises(ValueError, match="use decode"):
        model.render(codes)
    with pytest.raises(ValueError, match="none of euler, heun, dpmpp_2m"):
        model.decode(codes, solver="rk4")
    path = tmp_path / "flow" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}))
    with pytest.raises(ValueError, match="has format 99, this file reads 1"):
        loaded(tmp_path / "flow")


@pytest.mark.slow
def test_export_writes_the_average_of_a_run(tmp_path, capsys):
    """Through the command line, from a checkpoint."""
    s = settings.Experiment(model=DDT, data=settings.Data(image_size=SIZE), train=settings.Train(batch_size=8))
    built, tree = experiment.build(s, jax.devices()[:1]), config.dump(s)
    claim(tmp_path / "run", tree, built.frozen_weights)
    points = checkpoint.Checkpoints(tmp_path / "run", s.train)
    with jax.set_mesh(built.mesh):
        state = built.init()
        points.save(state.replace(ema=jax.tree.map(lambda x: x + 1, state.params)), tree)
    points.close()
    run = ["--workdir", str(tmp_path / "run")]
    assert cli.main(["export", "torch", *run, "--to", str(tmp_path / "out")]) == 0
    assert "step 0, average" in capsys.readouterr().out
    found = safetensors_file.load(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(found["encoder.queries"], np.asarray(state.params["encoder"]["queries"]) + 1)
    about = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (about["step"], about["weights"], about["image_size"]) == (0, "average", SIZE)
    assert (tmp_path / "out" / "tokenizer.py").read_bytes() == torch_export.TEMPLATE.read_bytes()
    assert cli.main(["export", "torch", *run, "--to", "/proc/none/x"]) == cli.EXIT_USER
    assert "cannot write /proc/none/x" in capsys.readouterr().err
