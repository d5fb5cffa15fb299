"""The published networks: what must hold of them without any other implementation, at a size that compiles fast."""

import functools
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import config, experiment, mesh, settings
from ddt_jax.diffusion import time
from ddt_jax.errors import UserError
from ddt_jax.nn import blocks, embeddings
from ddt_jax.nn import params as declared
from ddt_jax.tokenizers import base, ddt, selftok_networks

CONFIGS = Path(__file__).parents[2] / "configs"
B, K, GRID, PATCH = 2, 6, (2, 3), 8
TINY = settings.SelftokTokenizer(
    num_tokens=K,
    scan_layers=False,
    encoder=settings.SelftokEncoder(
        depth=2, image_width=8, image_heads=2, width=16, heads=4, mlp_ratio=2, position_grid=8
    ),
    decoder=settings.SelftokDecoder(depth=2, width=16, heads=2, mlp_ratio=2, position_grid=8),
    quantizer=replace(settings.SelftokTokenizer().quantizer, code_dim=4, codebook_size=16, entropy_groups=2),
    schedule=settings.Schedule(kind="uniform", direction="selftok"),
    flow=replace(settings.SelftokTokenizer().flow, solver_steps=2),
    codec=settings.IdentityCodec(),
)
RENDERER = replace(
    TINY,
    decoder=settings.SelftokRenderer(depth=2, width=16, heads=2, mlp_ratio=2, position_grid=8),
    image_loss=settings.ImageLoss(lpips_weight=0, lpips_weight_late=0, adversarial_weight_late=0),
)


def shapes_of(config, grid, patch):
    network = selftok_networks.Network(config, grid)
    example = jax.ShapeDtypeStruct((1, grid[0] * grid[1], patch), jnp.float32)
    return network, declared.split(jax.eval_shape(network.init, jax.random.key(0), example)["params"])


@functools.cache
def build(config=TINY):
    """(network, parameters away from the zeros of adaLN-zero, declarations)."""
    network, (shapes, declarations) = shapes_of(config, GRID, PATCH)
    rng = np.random.default_rng(7)
    values = jax.tree.map(lambda s: rng.normal(0, 0.15, s.shape).astype(np.float32), shapes)
    return network, values, declarations


@functools.cache
def compiled(config, method, **more):
    network = build(config)[0]
    return jax.jit(lambda values, *args: network.apply({"params": values}, *args, method=method, **more))


def predict(config, *args, values=None):
    return compiled(config, "predict")(build(config)[1] if values is None else values, *args)


def inputs(seed=0):
    """x, t, codes, start and end of what is visible."""
    rng = np.random.default_rng(seed)
    x, codes = rng.normal(size=(B, GRID[0] * GRID[1], PATCH)), rng.normal(size=(B, K, 4))
    visible = jnp.zeros((B,), jnp.int32), jnp.array([1, 4])
    return (jnp.asarray(x, jnp.float32), jnp.array([0.3, 1.0]), jnp.asarray(codes, jnp.float32), *visible)


@pytest.mark.parametrize("form", [TINY, RENDERER, replace(TINY, decoder=replace(TINY.decoder, context_see_xt=False))])
def test_what_a_hidden_token_holds_has_exactly_no_effect(form):
    x, t, codes, start, end = inputs()
    hidden = np.arange(K) >= np.asarray(end)[:, None]
    plain = predict(form, x, t, codes, start, end)
    np.testing.assert_array_equal(plain, predict(form, x, t, jnp.where(hidden[..., None], jnp.nan, codes), start, end))
    last_seen = jnp.arange(B), end - 1  # inclusive: token k(t) is seen
    changed = predict(form, x, t, codes.at[last_seen].multiply(jnp.array([1.0, -1.0, 2.0, 3.0])), start, end)
    assert np.abs(changed - plain).max(axis=(1, 2)).min() > 1e-4


def test_an_encoder_at_initialisation_says_the_same_about_every_image():
    network = build()[0]
    initial = declared.split(jax.jit(network.init)(jax.random.key(0), inputs()[0])["params"])[0]
    encode = compiled(TINY, "encode")
    np.testing.assert_array_equal(encode(initial, inputs(0)[0]), encode(initial, inputs(1)[0]))
    values = build()[1]
    assert np.abs(encode(values, inputs(0)[0]) - encode(values, inputs(1)[0])).min(axis=(1, 2)).max() > 0
    initial = initial["decoder"]
    np.testing.assert_array_equal(initial["positions"], 0)  # until published weights are loaded
    np.testing.assert_array_equal(initial["final"]["kernel"], 0)


@pytest.mark.parametrize("sees", [False, True])
def test_tokens_of_the_decoder_know_time_and_noise_only_by_seeing_the_patches(sees):
    form = replace(TINY, decoder=replace(TINY.decoder, depth=3, context_see_xt=sees))
    kept = compiled(form, "predict", capture_intermediates=True, mutable="intermediates")

    def tokens(x, t, *rest):
        found = kept(build(form)[1], x, t, *rest)[1]["intermediates"]["decoder"]["blocks"]
        return [np.asarray(found[f"block_{i}"]["__call__"][0][0]) for i in range(2)]

    args = inputs()
    for other in ((args[0], args[1] / 2, *args[2:]), (-args[0], *args[1:])):
        for a, b in zip(tokens(*args), tokens(*other), strict=True):
            if sees:
                assert np.abs(a - b).max() > 1e-4
            else:
                np.testing.assert_array_equal(a, b)


def test_canvas_ignores_noise_and_time_and_its_shape_is_as_published():
    x, t, codes, start, end = inputs()
    plain = predict(RENDERER, x, t, codes, start, end)
    np.testing.assert_array_equal(plain, predict(RENDERER, -x, t / 2, codes, start, end))
    each = replace(RENDERER, decoder=replace(RENDERER.decoder, repeat=False))
    both = {name: build(form)[1]["decoder"] for name, form in (("mmdit", TINY), ("one", RENDERER), ("each", each))}
    assert both["one"]["mask_token"].shape == (1, 16) and both["each"]["mask_token"].shape == (6, 16)
    assert both["one"].keys() - both["mmdit"].keys() == {"mask_token", "canvas_positions"}
    assert both["mmdit"].keys() - both["one"].keys() == {"embed"}
    bare = replace(RENDERER, decoder=replace(RENDERER.decoder, canvas_keeps_table=False))
    values = build(RENDERER)[1]
    assert np.abs(predict(bare, x, t, codes, start, end, values=values) - plain).max() > 1e-4


IDLE = {"decoder/last_block/position", "decoder/last_block/token_query", "decoder/unused_pooled"}
IDLE |= {f"encoder/last_block/image_{part}" for part in ("project", "output", "mlp")}
IDLE |= {"encoder/unused_norm_1", "encoder/unused_norm_2"}
TABLES = {"encoder/positions", "decoder/positions", "decoder/token_positions"}


@pytest.mark.parametrize(
    "form", [pytest.param(TINY, id="mmdit"), pytest.param(RENDERER, id="renderer", marks=pytest.mark.slow)]
)
def test_frozen_is_what_published_models_never_move_and_all_else_has_a_gradient(form):
    network, values, declarations = build(form)
    x, t, _, start, end = inputs()

    def loss(values):
        codes = network.apply({"params": values}, x, method="encode")
        return jnp.sum(jnp.sin(network.apply({"params": values}, x, t, codes, start, end, method="predict")))

    gradients = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(values))
    idle = set()
    for (path, g), d in zip(gradients, jax.tree.leaves(declarations), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        assert (d.group == "frozen") == (np.abs(g).max() == 0), name
        if d.group == "frozen":
            assert not d.decay, name
            idle.add(name)
        assert set(d.axes) - {None} <= mesh.RULES.keys(), name
        meshes = [mesh.RULES[a] for a in d.axes if a and mesh.RULES[a]]
        assert len(meshes) == len(set(meshes)), name
    assert {
        name if name in TABLES else "/".join(name.split("/")[: 2 if "last" not in name else 3]) for name in idle
    } == (IDLE | TABLES)


def test_released_size_is_the_published_one():
    released = settings.SelftokTokenizer()
    _, (shapes, _) = shapes_of(released, (16, 16), 64)
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    assert size(shapes["encoder"]) + size(shapes["code_norm"]) == 84_326_544  # "84.3 M"
    decoder = shapes["decoder"]
    last, rest = decoder["last_block"], decoder["blocks"]["scanned"]["block"]
    token = size([last["position"], last["token_query"], rest["position"]])
    joint = {False: 0, True: 0}
    for block in (last["joint"], rest["joint"]):
        for name, part in block.items():
            joint[name.startswith("token")] += size(part)
    assert round(joint[False] / 1e9, 3) == 1.020
    assert round((joint[True] + token) / 1e9, 3) == 1.055
    tables = size([decoder["positions"], decoder["token_positions"]])  # no parameters there
    assert round((size(decoder) - tables) / 1e9, 3) == 2.085
    assert decoder["positions"].size == 36864 * 1536


def load(name, *overrides):
    return config.load(str(CONFIGS / name), (("model.codec.weights", "none.safetensors"), *overrides))


def test_one_dial_gives_the_family_with_the_released_model_at_its_end():
    released = settings.SelftokTokenizer()
    assert settings.selftok_size("xl") == {"encoder": released.encoder, "decoder": released.decoder}
    billions = {}
    for name in settings.SELFTOK_SIZES:
        member = load(f"ddt_selftok_256.py:{name}")
        assert member.name.endswith("256" if name == "xl" else name)
        _, (shapes, _) = shapes_of(member.model, (16, 16), 64)
        billions[name] = round(sum(x.size for x in jax.tree.leaves(shapes)) / 1e9, 2)
    assert billions == {"small": 0.05, "base": 0.30, "large": 0.96, "xl": 2.23}
    with pytest.raises(UserError, match="'xxl' is no size .* small, base, large, xl"):
        load("ddt_selftok_256.py:xxl")


def test_every_member_has_a_second_stage_of_its_own_size():
    for name in settings.SELFTOK_SIZES:
        first, second = (load(f"ddt_selftok_256.py:{variant}").model for variant in (name, f"{name}_renderer"))
        assert (second.stage, second.decoder.kind, second.encoder) == ("decoder", "renderer", first.encoder)
        assert not second.decoder.context_see_xt and first.decoder.context_see_xt  # as released
        for size in ("depth", "width", "heads"):
            assert getattr(first.decoder, size) == getattr(second.decoder, size)
    with pytest.raises(UserError, match="'xl_rendered' is no variant"):
        load("ddt_selftok_256.py:xl_rendered")


def test_a_start_from_sd3_has_the_published_rates():
    """A fifth for patches and the image stream of the decoder, which SD3 has trained; the rest is new."""
    s = load("ddt_selftok_256.py:small_sd3")
    built = experiment.build(replace(s, mesh=settings.Mesh()), jax.devices()[:1], to_train=False)
    rates = {
        jax.tree_util.keystr(path, simple=True, separator="/"): d.lr_scale
        for path, d in jax.tree_util.tree_leaves_with_path(built.declarations)
    }
    slow = {name for name, rate in rates.items() if rate != 1}
    assert {rates[name] for name in slow} == {0.2}
    image = {n for n in rates if n.startswith("decoder/") and "/joint/" in n and "/joint/token_" not in n}
    assert slow == image | {"decoder/embed/kernel", "decoder/embed/bias"} and len(image) == 20


def test_the_first_generation_has_its_published_sizes():
    model = load("ddt_llama_256.py").model
    _, (shapes, _) = shapes_of(model, (16, 16), 64)
    assert shapes["encoder"]["queries"].shape == (480, 256) and shapes["encoder"]["to_code"]["kernel"].shape == (
        256,
        16,
    )
    tokenizer = base.make_tokenizer(model, 256, 384)
    assert (tokenizer.num_tokens, tokenizer.codebook_size) == (480, 65536)
    assert "usage" not in jax.eval_shape(tokenizer.quantizer.init, jax.random.key(0))  # 126 MB of no use
    # Tokens 1..t at timestep t, of which decoding takes every tenth.
    seen = tokenizer.schedule.count(time.grid(48)[:-1], sampling=True)
    np.testing.assert_array_equal(seen, np.arange(480, 0, -10))


@pytest.mark.slow
def test_without_a_published_schedule_a_model_loads_and_encodes_and_only_a_renderer_decodes():
    assert load("ddt_selftok_1024.py").model.schedule.kind == "unpublished"
    unknown = replace(TINY, schedule=replace(TINY.schedule, kind="unpublished"))
    tokenizer, params, extra = tokenizer_of(unknown)
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (B, 8, 8, 3)), jnp.float32)
    codes = jax.jit(tokenizer.encode)(params, extra, images)
    np.testing.assert_array_equal(codes, jax.jit(tokenizer_of(TINY)[0].encode)(params, extra, images))
    batch = {"image": images, "slot": jnp.arange(B)}
    for use in (
        tokenizer.check_trainable,
        lambda: tokenizer.loss_fn(params, extra, batch, jax.random.key(0)),
        lambda: tokenizer.decode(params, extra, codes, jax.random.key(0)),
        tokenizer.schedule.gradient_weights,
    ):
        with pytest.raises(UserError, match="model.schedule.kind: 'unpublished' .* set it to 'uniform'"):
            use()
    assert load("ddt_selftok_1024.py:renderer").model.schedule.kind == "unpublished"
    renderer = replace(RENDERER, schedule=unknown.schedule)
    tokenizer_of(renderer)[0].check_trainable()
    decode = [
        jax.jit(lambda params, extra, t=t: t.decode(params, extra, codes, jax.random.key(0)))
        for t in (tokenizer_of(renderer)[0], tokenizer_of(RENDERER)[0])
    ]
    _, params, extra = tokenizer_of(RENDERER)
    np.testing.assert_array_equal(decode[0](params, extra), decode[1](params, extra))


def test_training_without_a_schedule_is_refused_before_anything_is_written(tmp_path):
    s = replace(settings.Experiment(), model=replace(TINY, schedule=settings.Schedule(kind="unpublished")))
    s = replace(s, data=replace(s.data, image_size=8))
    with pytest.raises(UserError, match="model.schedule.kind"):
        experiment.train(s, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("init", ["first_batch", "when_varied"])
def test_codes_of_the_first_batch_are_as_few_as_tokens_as_released_or_are_waited_for(init):
    form = replace(TINY, quantizer=replace(TINY.quantizer, init=init))
    tokenizer = base.make_tokenizer(form, 8, B)

    @jax.jit
    def start():
        params, extra = tokenizer.init(jax.random.key(0))
        return declared.split(params)[0], extra

    @jax.jit
    def first_step(params, extra):
        image = jax.random.uniform(jax.random.key(1), (B, 8, 8, 3), minval=-1)
        stats = tokenizer.loss_fn(params, extra, {"image": image, "slot": jnp.arange(B)}, jax.random.key(2))[2]
        return tokenizer.update_extra(extra, stats, jax.random.key(2))

    params, extra = start()
    before, after = (jax.tree.map(np.asarray, x["codebook"]) for x in (extra, first_step(params, extra)))
    if init == "when_varied":
        np.testing.assert_array_equal(before["codes"], after["codes"])
        assert not after["initialized"]
    else:
        assert len(np.unique(after["codes"].round(5), axis=0)) == K and after["initialized"]


def test_tables_are_the_formulas():
    table = embeddings.sincos_2d(5, 8)
    row, column, two = 3, 4, 10_000 ** -(1 / 2)
    expected = [np.sin(column), np.sin(column * two), np.cos(column), np.cos(column * two)]
    expected += [np.sin(row), np.sin(row * two), np.cos(row), np.cos(row * two)]
    np.testing.assert_allclose(table[row, column], expected, atol=1e-6)
    np.testing.assert_array_equal(embeddings.centre_crop(table, 2, 3), table[1:3, 1:4])
    with pytest.raises(ValueError, match="6 x 2 patches"):
        embeddings.centre_crop(table, 6, 2)
    got = embeddings.released_sinusoids(np.array([1000, 1008]), 4)
    expected = [np.cos(1008), np.cos(10.08), np.sin(1008), np.sin(10.08)]
    np.testing.assert_allclose(got[1], expected, atol=1e-4)
    np.testing.assert_allclose(
        jax.jit(lambda t: embeddings.released_sinusoids(t, 4))(jnp.array([1000.0, 1008.0])), got, atol=1e-6
    )


def test_scanned_layers_compute_the_same():
    form = replace(TINY, encoder=replace(TINY.encoder, depth=3), decoder=replace(TINY.decoder, depth=3))
    tight = replace(form, scan_layers=True)
    values = build(form)[1]
    assert jax.tree.map(jnp.shape, blocks.scanned(values)) == jax.tree.map(jnp.shape, build(tight)[1])
    for method, args in (("encode", inputs()[:1]), ("predict", inputs())):
        loose = compiled(form, method)(values, *args)
        np.testing.assert_allclose(compiled(tight, method)(blocks.scanned(values), *args), loose, atol=1e-4)


@functools.cache
def tokenizer_of(form):
    tokenizer = base.make_tokenizer(form, 8, B)
    shapes = declared.split(jax.eval_shape(tokenizer.init, jax.random.key(0))[0])[0]
    rng = np.random.default_rng(7)
    params = jax.tree.map(lambda s: rng.normal(0, 0.15, s.shape).astype(np.float32), shapes)
    return tokenizer, params, {"codebook": tokenizer.quantizer.init(jax.random.key(0))}


@pytest.mark.parametrize("form", [TINY, RENDERER], ids=["mmdit", "renderer"])
def test_the_tokenizer_trains_and_decodes_with_them(form):
    tokenizer, params, extra = tokenizer_of(form)
    assert isinstance(tokenizer, ddt.DDTTokenizer)
    image = np.random.default_rng(0).integers(0, 256, (B, 8, 8, 3), dtype=np.uint8)
    batch = {"image": image, "slot": np.arange(B, dtype=np.int32)}
    loss = jax.jit(lambda rng: tokenizer.loss_fn(params, extra, batch, rng)[0])
    losses = [loss(jax.random.key(seed)) for seed in (0, 1)]
    assert all(np.isfinite(v) for sums in losses for v in sums.values())
    # A renderer sees no noise: there is nothing random about its loss.
    term = "pixel" if form is RENDERER else "flow"
    assert (float(losses[0][term]) == float(losses[1][term])) is (form is RENDERER)
    codes = jnp.asarray(np.random.default_rng(0).integers(0, 16, (B, K)), jnp.int32)
    decode = jax.jit(lambda rng, shown: tokenizer.decode(params, extra, codes, rng, num_visible=shown))
    whole = decode(jax.random.key(0), K)
    assert whole.shape == (B, 8, 8, 3) and np.isfinite(whole).all()
    assert np.abs(decode(jax.random.key(0), 1) - whole).max() > 1e-4
    again = decode(jax.random.key(1), K)
    if form is RENDERER:
        np.testing.assert_allclose(again, whole, atol=1e-5)
    else:
        assert np.abs(again - whole).max() > 1e-4


def test_settings_come_from_a_config_and_wrong_ones_are_named():
    tree = config.dump(replace(settings.Experiment(), model=settings.SelftokTokenizer()))
    assert config.from_dict(tree).model == settings.SelftokTokenizer()
    tree["model"]["decoder"] = config.dump(settings.SelftokRenderer(repeat=False))
    assert config.from_dict(tree).model.decoder == settings.SelftokRenderer(repeat=False)
    tree["model"]["patch_size"] = 3
    with pytest.raises(UserError, match="model.patch_size"):
        config.from_dict(tree)
    for wrong, message in (
        (replace(TINY, encoder=replace(TINY.encoder, heads=3)), "model.encoder.heads: 3"),
        (replace(TINY, encoder=replace(TINY.encoder, image_heads=3)), "model.encoder.image_heads: 3"),
        (replace(TINY, decoder=replace(TINY.decoder, heads=3)), "model.decoder.heads: 3"),
        (replace(TINY, decoder=replace(TINY.decoder, position_grid=3)), "model.decoder.position_grid: 3"),
        (replace(TINY, decoder=replace(TINY.decoder, depth=0)), "model.decoder.depth"),
    ):
        with pytest.raises(UserError, match=message):
            base.make_tokenizer(wrong, 8, B)


@pytest.mark.slow
def test_the_step_of_the_released_config_is_traced_whole_over_a_mesh():
    built = experiment.build(load("ddt_selftok_256.py"))
    assert not built.fallbacks
    with jax.set_mesh(built.mesh):
        built.step.lower(built.abstract, experiment.abstract_batch(built))
    # The largest that stays whole is what embeds positions in all blocks, 9 M numbers of 2.2 G.
    large = [x for x in jax.tree.leaves(built.abstract.params) if x.size > 1 << 24]
    assert large and all(not x.sharding.is_fully_replicated for x in large)
