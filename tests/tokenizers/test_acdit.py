"""ACDiT as a model to train and to draw with: its loss, its randomness, its sampler against one without a cache."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.diffusion import solvers
from ddt_jax.errors import UserError
from ddt_jax.nn import square_blocks
from ddt_jax.nn.images import patchify, unpatchify
from ddt_jax.nn.params import split
from ddt_jax.tokenizers.acdit import ACDiT
from ddt_jax.tokenizers.base import example_keys, make_tokenizer
from tests.tokenizers.acdit_small import SIZE, random_state, small

CLASSES, B = 3, 4
CONFIG = small()
FLOW = settings.RectifiedFlow(solver_steps=4)


@functools.cache
def made(frames=0, **changes):
    """(model, random parameters, extra)."""
    model = make_tokenizer(replace(CONFIG, **changes), SIZE, B, frames)
    assert isinstance(model, ACDiT)
    return model, *random_state(model)


def batch(rows=B, seed=1):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (rows, SIZE, SIZE, 3)).astype(np.uint8)
    label = np.resize(np.array([0, 2, -1, 1], np.int32), rows)
    return {"image": images, "slot": np.arange(rows, dtype=np.int32), "label": label}


@functools.cache
def compiled(model, name):
    return jax.jit(getattr(model, name))


@pytest.mark.parametrize(
    ("size", "count"), [("B", 130_305_028), ("L", 457_851_908), ("XL", 674_856_708), ("H", 950_959_620)]
)
def test_published_sizes_have_the_parameters_of_the_released_code(size, count):
    """ImageNet at 256 px: 32 x 32 latents with 4 channels, four blocks of 16 x 16, 1,000 labels and none."""
    config = settings.ACDiT(**settings.acdit_size(size), codec=settings.VAECodec(preset="sd", random_weights=True))
    model = ACDiT(config, 256, 1)
    assert (model.tokens, model.blocks) == (1024, 4) and config.width // config.heads == 64
    params = split(jax.eval_shape(model.init, jax.random.key(0))[0])[0]
    assert sum(x.size for x in jax.tree.leaves(params)) == count


def test_an_unknown_size_is_named():
    with pytest.raises(UserError, match="'XXL' is no size of ACDiT; choose from B, L, XL, H"):
        settings.acdit_size("XXL")


@pytest.mark.parametrize("diffusion", [CONFIG.diffusion, FLOW], ids=["ddpm", "flow"])
def test_loss_is_the_mean_over_all_noised_blocks(diffusion):
    model, params, extra = made(diffusion=diffusion, label_drop=0.0)
    key = jax.random.key(3)
    sums, counts, stats = compiled(model, "loss_fn")(params, extra, batch(), key)
    clean, noise, t, label, _ = compiled(model, "draw")(extra, batch(), example_keys(key, batch()["slot"]))
    assert clean.shape == noise.shape == (B, 16, 12) and t.shape == (B, 4)
    np.testing.assert_array_equal(label, [0, 2, CLASSES, 1])
    raster = patchify(batch()["image"] / 127.5 - 1, 2)
    np.testing.assert_allclose(clean, raster[:, square_blocks.order(4, 4)], atol=1e-6)
    # By formula: sqrt(ᾱ) x0 + sqrt(1 - ᾱ) ε, and ε; or the straight path, and ε - x0.
    level = np.asarray(t, np.float64).repeat(4, axis=1)[..., None]
    if diffusion.kind == "ddpm":
        kept = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[np.round(level * 1000).astype(int) - 1]
        noised, target = np.sqrt(kept) * clean + np.sqrt(1 - kept) * noise, noise
    else:
        noised, target = (1 - level) * clean + level * noise, noise - clean
    forward = jax.jit(model.network.apply)
    predicted = forward({"params": params}, clean, noised.astype(np.float32), t, label)
    error = np.square(predicted - target)
    assert float(counts["diffusion"]) == B * 4 and stats == {}
    np.testing.assert_allclose(sums["diffusion"] / counts["diffusion"], error.mean(), rtol=1e-4)
    error_BN = error.reshape(B, 4, -1).mean(-1)
    for low, high in ((0, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1)):
        here, name = (low < np.asarray(t)) & (np.asarray(t) <= high), f"mse_t{round(100 * high)}"
        assert float(counts[name]) == here.sum()
        np.testing.assert_allclose(sums[name], error_BN[here].sum(), rtol=1e-4)


def test_every_block_has_a_noise_level_of_its_own():
    model, _, extra = made()
    many = batch(256)
    t = np.asarray(compiled(model, "draw")(extra, many, example_keys(jax.random.key(0), many["slot"]))[2])
    assert t.min() > 0 and t.max() <= 1 and np.abs(np.corrcoef(t.T) - np.eye(4)).max() < 0.25
    counts = np.histogram(t, 4, (0, 1))[0]
    assert (np.abs(counts - t.size / 4) < 5 * np.sqrt(t.size / 4)).all()


def test_what_is_drawn_is_that_of_the_row_of_the_global_batch():
    model, params, extra = made()
    key, whole = jax.random.key(3), batch()
    draw = compiled(model, "draw")
    keys = example_keys(key, whole["slot"])
    part = {name: rows[2:3] for name, rows in whole.items()}
    for a, b in zip(draw(extra, whole, keys)[:4], draw(extra, part, keys[2:3])[:4], strict=True):
        np.testing.assert_array_equal(a[2:3], b)
    first, second = (np.asarray(draw(extra, whole, example_keys(jax.random.key(k), whole["slot"]))[1]) for k in (3, 4))
    assert (first != second).all()
    noise = first.reshape(B, -1)
    assert np.abs(np.corrcoef(noise) - np.eye(B)).max() < 0.4  # 192 values each


def test_labels_are_dropped_as_often_as_the_settings_say():
    model, _, extra = made()
    many = batch(2000) | {"label": np.zeros(2000, np.int32)}
    keys = example_keys(jax.random.key(0), many["slot"])
    label, t = (np.asarray(compiled(model, "draw")(extra, many, keys, drop)[3]) for drop in (0.1, 0.0))
    assert set(label) == {0, CLASSES} and abs((label == CLASSES).mean() - 0.1) < 0.03
    assert not t.any()


def without_cache(model, params, label, keys, total=0, text=None):
    """Tokens by the whole sequence at every step: block i is denoised with those before it in their clean places.

    Beyond the N that were learned it is the last block of a sequence whose others are the N - 1 before it.
    """
    c, r, b = model.config, model.config.block_size, len(label)
    p, drawn = model.network.values, []
    for i in range(total or model.blocks):
        at = min(i, model.blocks - 1)
        here = slice(at * r, (at + 1) * r)
        clean = jnp.zeros((b, model.tokens, p))
        if at:
            clean = clean.at[:, : at * r].set(jnp.concatenate(drawn[i - at :], axis=1))
        mine = [jax.random.split(jax.random.fold_in(key, i)) for key in keys]
        noise = jnp.stack([jax.random.normal(pair[0], (r, p)) for pair in mine])

        def predict(x, t, here=here, clean=clean):
            noised = jnp.full_like(clean, 3.0).at[:, here].set(x)
            levels = jnp.full((b, model.blocks), t)
            of = lambda *told: model.network.apply({"params": params}, clean, noised, levels, *told)[:, here]  # noqa: E731
            nothing = jnp.full_like(label, CLASSES), None if text is None else np.zeros_like(text)
            return solvers.guide(of(label, text), of(*nothing), c.guidance)

        drawn.append(model.process.solve(predict, noise, jnp.stack([pair[1] for pair in mine])))
    return jnp.concatenate(drawn, axis=1)


SAMPLERS = {
    "dpmpp_2m": replace(CONFIG.diffusion, solver_steps=4, clip=1.0),
    "ddpm": replace(CONFIG.diffusion, solver="ddpm", solver_steps=4, clip=1.0),
    "flow": FLOW,
}


@pytest.mark.parametrize(
    "name", ["dpmpp_2m", pytest.param("ddpm", marks=pytest.mark.slow), pytest.param("flow", marks=pytest.mark.slow)]
)
def test_drawing_behind_a_cache_equals_drawing_by_whole_sequences(name):
    model, params, extra = made(diffusion=SAMPLERS[name], guidance=2.0)
    label, keys = jnp.array([1, 0]), jax.random.split(jax.random.key(5), 2)
    found = compiled(model, "sample")(params, extra, label, keys)
    naive = jax.jit(functools.partial(without_cache, model))
    assert found.shape == (2, SIZE, SIZE, 3) and 0.1 < float(jnp.abs(found).mean()) <= 1
    raster = naive(params, label, keys)[:, square_blocks.inverse(square_blocks.order(4, 4))]
    np.testing.assert_allclose(found, jnp.clip(unpatchify(raster, 2, SIZE), -1, 1), atol=1e-4)


CLIPS = {"patch_size": 4, "block_size": 4, "heads": 1}  # frames of 2 x 2 tokens, one of them a block


@pytest.mark.parametrize("frames", [5, pytest.param(3, marks=pytest.mark.slow)])
def test_clips_longer_than_those_that_were_learned_are_drawn_through_a_window_of_them(frames):
    model, params, extra = made(3, diffusion=SAMPLERS["dpmpp_2m"], guidance=2.0, **CLIPS)
    label, keys = jnp.array([1, 0]), jax.random.split(jax.random.key(5), 2)
    sample = jax.jit(functools.partial(model.sample, frames=frames))
    found = sample(params, extra, label, keys)
    naive = jax.jit(functools.partial(without_cache, model, total=frames))
    tokens = naive(params, label, keys)  # one frame follows the other, and in it the raster
    frame_by_frame = unpatchify(tokens.reshape(2 * frames, 4, 48), 4, SIZE).reshape(2, frames, SIZE, SIZE, 3)
    assert found.shape == (2, frames, SIZE, SIZE, 3)
    # Each frame is drawn behind others that were rounded otherwise; behind the wrong ones it is off by 0.01 and more.
    np.testing.assert_allclose(found, jnp.clip(frame_by_frame, -1, 1), atol=5e-4)


def captions(*texts):
    return np.array([list(text.encode().ljust(6, b"\0")) for text in texts], np.uint8)


def test_labels_and_captions_are_dropped_together():
    model, params, extra = made(caption_bytes=6, caption_depth=1)
    many = batch(400) | {"label": np.zeros(400, np.int32), "caption_ids": np.repeat(captions("ab"), 400, axis=0)}
    keys = example_keys(jax.random.key(0), many["slot"])
    *_, label, text = (np.asarray(x) for x in compiled(model, "draw")(extra, many, keys, 0.3))
    dropped = label == CLASSES
    assert 0.2 < dropped.mean() < 0.4
    np.testing.assert_array_equal(text, np.where(dropped[:, None], 0, many["caption_ids"]))


@pytest.mark.slow
def test_drawing_of_captions_with_guidance_equals_drawing_by_whole_sequences():
    model, params, extra = made(
        classes=0, caption_bytes=6, caption_depth=1, diffusion=SAMPLERS["dpmpp_2m"], guidance=2.0
    )
    nothing, keys = jnp.zeros((2,), jnp.int32), jax.random.split(jax.random.key(5), 2)
    sample = jax.jit(lambda text: model.sample(params, extra, nothing, keys, text_BZ=text))
    found = sample(captions("ab", "ba"))
    naive = jax.jit(functools.partial(without_cache, model, text=captions("ab", "ba")))
    raster = naive(params, nothing, keys)[:, square_blocks.inverse(square_blocks.order(4, 4))]
    np.testing.assert_allclose(found, jnp.clip(unpatchify(raster, 2, SIZE), -1, 1), atol=1e-4)
    assert float(jnp.abs(sample(captions("ab", "ab")) - found)[1].max()) > 0.01


def test_a_clip_is_learned_as_its_frames_one_after_the_other():
    model, params, extra = made(4, **CLIPS | {"block_size": 8})
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (2, 4, SIZE, SIZE, 3)).astype(np.uint8)
    given = {"video": video, "slot": np.arange(2, dtype=np.int32), "label": np.zeros(2, np.int32)}
    clean, _, t, _, _ = compiled(model, "draw")(extra, given, example_keys(jax.random.key(3), given["slot"]))
    assert clean.shape == (2, 16, 48) and t.shape == (2, 2)
    frames = [np.asarray(patchify(video[:, i] / np.float32(127.5) - 1, 4)) for i in range(4)]
    np.testing.assert_allclose(clean, np.concatenate(frames, axis=1), atol=1e-6)


@pytest.mark.parametrize(
    ("frames", "changes", "length", "message"),
    [
        (0, {}, 3, "data.frames=0, so it draws images, not clips of 3 frames"),
        (4, CLIPS | {"block_size": 8}, 5, "5 frames are no whole number of blocks of 2 frames"),
        (4, CLIPS | {"block_size": 16}, 8, "need blocks of whole frames and more than one of them"),
        (4, CLIPS | {"block_size": 1}, 8, "model.block_size=1 with 4 tokens in a frame gives 16; draw 4 frames"),
    ],
)
def test_lengths_that_cannot_be_drawn_are_named(frames, changes, length, message):
    model = ACDiT(replace(CONFIG, **changes), SIZE, B, frames)
    with pytest.raises(UserError, match=message):
        model.check_length(length)
    if frames:
        model.check_length(frames)


def test_a_picture_depends_on_its_label_and_key_alone():
    model, params, extra = made(diffusion=SAMPLERS["ddpm"], guidance=2.0)
    keys = jax.random.split(jax.random.key(5), 3)
    sample = compiled(model, "sample")
    whole = sample(params, extra, jnp.array([1, 0, 0]), keys)
    # One row is summed in another order than three; steps of a network with random weights enlarge the difference.
    np.testing.assert_allclose(sample(params, extra, jnp.array([0]), keys[1:2])[0], whole[1], atol=1e-4)
    assert float(jnp.abs(whole[1] - whole[2]).max()) > 0.01
    assert float(jnp.abs(sample(params, extra, jnp.array([0, 0, 0]), keys)[0] - whole[0]).max()) > 0.01


def test_the_program_that_draws_does_not_grow_with_the_number_of_blocks():
    label, keys = jnp.array([1]), jax.random.split(jax.random.key(5), 1)

    def equations(jaxpr):
        inner = [x for eqn in jaxpr.eqns for x in jax.tree.leaves(list(eqn.params.values())) if hasattr(x, "jaxpr")]
        return len(jaxpr.eqns) + sum(equations(getattr(x.jaxpr, "jaxpr", x.jaxpr)) for x in inner)

    sizes = []
    for size in (1, 4):
        model, params, extra = made(diffusion=SAMPLERS["dpmpp_2m"], block_size=size)
        sizes.append(equations(jax.make_jaxpr(model.sample)(params, extra, label, keys).jaxpr))
    assert sizes[0] == sizes[1] > 100


def test_latents_that_were_kept_are_learned_like_those_of_images():
    sizes = settings.Autoencoder(block_out_channels=(8,), layers_per_block=1, latent_channels=2, norm_groups=4)
    codec = settings.VAECodec(preset="custom", sizes=sizes, random_weights=True, sample=False)
    model, params, extra = made(codec=codec, diffusion=FLOW)
    given, key = batch(), jax.random.key(3)
    images = compiled(model, "loss_fn")(params, extra, given, key)
    mean, logvar = jax.jit(model.codec.posterior)(extra["codec"], given["image"] / np.float32(127.5) - 1)
    kept = {name: given[name] for name in ("slot", "label")} | {"latent_mean": mean, "latent_logvar": logvar}
    for a, b in zip(images[:2], compiled(model, "loss_fn")(params, extra, kept, key)[:2], strict=True):
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4), a, b)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 3}, "model.patch_size=3 does not divide data.image_size=8"),
        ({"block_size": 2}, r"model.block_size=2 is no square that divides 4 x 4 tokens; choose from 1, 4, 16"),
        ({"block_size": 256}, "model.block_size=256"),
        ({"heads": 3}, "model.width=16 is not a multiple of model.heads=3"),
        ({"width": 12}, "a head of 6 does not divide among 2 axes; take a multiple of 4"),
        ({"caption_bytes": -1}, "model.caption_bytes=-1 must not be negative"),
        ({"classes": -1}, "model.classes=-1 must not be negative"),
        ({"label_drop": 1.5}, "model.label_drop=1.5 lie in"),
    ],
)
def test_settings_that_do_not_go_together_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        ACDiT(replace(CONFIG, **changes), SIZE, B)


def test_clips_need_blocks_and_heads_that_suit_them_and_a_model_that_learns_them():
    with pytest.raises(UserError, match="2 x 2 tokens, nor whole frames that divide 6; choose from 1, 4, 8, 12, 24"):
        ACDiT(replace(CONFIG, **CLIPS | {"block_size": 16}), SIZE, B, 6)
    with pytest.raises(UserError, match="a head of 8 does not divide among 3 axes; take a multiple of 16"):
        ACDiT(replace(CONFIG, **CLIPS | {"heads": 2}), SIZE, B, 4)
    with pytest.raises(UserError, match="model.kind='vae' learns images, not data.frames=4; set data.frames=0"):
        make_tokenizer(settings.VAE(), SIZE, B, 4)
