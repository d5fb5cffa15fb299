"""The published objective against closed forms and loops, and that no row sees what it must not."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal import documents, sequence
from ddt_jax.multimodal.diffusion_model import PARAMS, DiffusionMultimodal
from ddt_jax.multimodal.documents import Image, Text
from ddt_jax.multimodal.model import make_multimodal
from ddt_jax.multimodal.row_model import FROZEN
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.nn.params import is_box, split
from ddt_jax.scaling import flops

V = Vocabulary.extend(30, 0)
SIZE, ROWS, S, IMAGES = 8, 4, 40, 4
TRANSFORMER = settings.Transformer(
    vocab_size=V.size, width=32, depth=2, heads=2, kv_heads=1, mlp_width=64, loss_chunk=32
)
LINEAR = settings.DiffusionImages(patch_size=4)
UNET = replace(LINEAR, coder=settings.UNetCoder(width=16, blocks=1))
CODERS = [LINEAR, pytest.param(UNET, marks=pytest.mark.slow)]


@functools.cache
def make(image=LINEAR, lora=0):
    transformer = replace(TRANSFORMER, lora=settings.LoRA(rank=lora))
    return make_multimodal(settings.Multimodal(transformer=transformer, image=image), SIZE)


@functools.cache
def compiled(model, name):
    """One of the model's methods under jit, compiled once for all tests; each runs a few times, so quickly."""
    return jax.jit(getattr(model, name))


def draw(model, extra, batch, seed=1):
    return compiled(model, "draw")(extra, given(model, batch), jax.random.key(seed))


def forward(model, params, extra, batch, x, t):
    return compiled(model, "forward")(params, extra, given(model, batch), x, t)


def state(model, seed=0):
    """Random parameters, none of them zero: a fresh coder puts out zeros, which would hide every leak."""
    boxed, extra = jax.eval_shape(model.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    fill = lambda x: rng.normal(size=x.shape, scale=0.2).astype(np.float32)  # noqa: E731
    extra = jax.tree.map(lambda x: x.value if is_box(x) else x, extra, is_leaf=is_box)
    return jax.tree.map(fill, split(boxed)[0]), jax.tree.map(fill, extra)


def pictures(rng, count):
    return [Image(rng.integers(0, 256, (SIZE, SIZE, 3)).astype(np.uint8), number) for number in range(count)]


def kinds(rng):
    """Documents of every kind, with how far each of their images may be noised, as shares; 0: it is only given."""
    text, (a, b, c) = rng.integers(0, 30, 3), pictures(rng, 3)
    return [
        (documents.text_to_image(text, a), [1.0]),
        (documents.image_to_text(text, a), [0.5]),
        (documents.text_only(text), []),
        (documents.interleaved([a, Text(text), b, c]), [1.0, 1.0, 1.0]),
        (documents.editing([a], text, b), [0.0, 1.0]),
    ]


def make_batch(model, chosen):
    """Rows of documents [[document, ...], ...] as the step takes them."""
    made = []
    for row in chosen:
        packed = sequence.pack_row([sequence.lay_out(d, V, model.form) for d in row], S, IMAGES, V["PAD"], model.form)
        made.append(packed | {"rows": sequence.target_rows(packed["target"], 20)})
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    return batch | {"slot": np.arange(len(made), dtype=np.int32)}


def given(model, batch):
    return {name: jnp.asarray(batch[name]) for name in model.inputs}


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    k = [[d for d, _ in kinds(rng)] for _ in range(4)]
    rows = [[k[0][0], k[0][1]], [k[1][3]], [k[2][4], k[2][2]], [k[3][1], k[3][1], k[3][2]]]
    return make_batch(make(), rows)


def step(model, params, extra, batch, seed=1):
    return compiled(model, "loss_fn")(params, extra, given(model, batch), jax.random.key(seed))


def test_what_a_batch_says_is_what_the_step_takes(batch):
    model = make()
    shapes = model.shapes(settings.Sequences(context=S, images=IMAGES, targets=20)) | {"slot": ((), jnp.int32)}
    assert set(shapes) == set(model.inputs)
    for name, (shape, dtype) in shapes.items():
        assert batch[name].shape[1:] == shape and batch[name].dtype == dtype, name
    assert make().shapes(settings.Sequences(context=S))["image_start"][0] == (S // (ROWS + 2),)


@pytest.mark.parametrize("image", CODERS, ids=["linear", "unet"])
def test_terms_are_the_published_objective(batch, image):
    """ε target, mean over the values of each image, then over images; nats per text target; λ = 5 (§2.2, §3, §4.1)."""
    model = make(image)
    params, extra = state(model)
    assert model.loss_weights == {"next_token": 1.0, "diffusion": 5.0}
    sums, counts, stats = step(model, params, extra, batch)
    latents, noise, t = draw(model, extra, batch)
    np.testing.assert_allclose(latents, batch["image_content"] / 127.5 - 1, atol=1e-6)
    # The schedule by its formula: x_t = sqrt(ᾱ) x0 + sqrt(1 - ᾱ) ε.
    kept = np.cos((np.asarray(t, np.float64) + 0.008) / 1.008 * np.pi / 2) ** 2
    kept = (kept / np.cos(0.008 / 1.008 * np.pi / 2) ** 2)[..., None, None, None]
    x_t = (np.sqrt(kept) * latents + np.sqrt(1 - kept) * noise).astype(np.float32)
    total, rows, predicted = forward(model, params, extra, batch, x_t, t)
    errors = {(b, i): np.mean((predicted[b, i] - noise[b, i]) ** 2) for b in range(4) for i in range(IMAGES)}
    learned = [(b, i) for b, i in errors if batch["image_learn"][b, i]]
    assert len(learned) == 2 + 3 + 1 + 2 and float(counts["diffusion"]) == len(learned)
    ratio = {name: float(sums[name] / max(counts[name], 1)) for name in sums}
    assert ratio["diffusion"] == pytest.approx(np.mean([errors[x] for x in learned]), rel=1e-4)
    quarters = {25: [], 50: [], 75: [], 100: []}
    for at in learned:
        quarters[next(q for q in quarters if t[at] <= q / 100)].append(errors[at])
    for q, values in quarters.items():
        assert float(counts[f"mse_t{q}"]) == len(values)
        assert ratio[f"mse_t{q}"] == pytest.approx(np.mean(values) if values else 0, rel=1e-4)
    some = batch["rows"] >= 0
    assert float(counts["next_token"]) == float(counts["text_nll"]) == some.sum() == batch["target"].sum()
    nll = np.asarray(rows.nll)[some]
    assert ratio["next_token"] == pytest.approx(nll.mean(), rel=1e-4) == ratio["text_nll"]
    assert ratio["images_used"] == pytest.approx((batch["image_start"] >= 0).mean())
    assert stats == {}


def test_next_token_loss_stands_where_the_paper_puts_it(batch):
    """Not where the input is BOV, nor on patches; EOV is no target, and predicts the next token."""
    before = np.take_along_axis(batch["tokens"], np.maximum(batch["rows"], 0), axis=1)[batch["rows"] >= 0]
    after = np.take_along_axis(batch["tokens"], np.maximum(batch["rows"], 0) + 1, axis=1)[batch["rows"] >= 0]
    assert not np.isin(before, [V["BOV"], V["PAD"]]).any() and (before == V["EOV"]).sum() == 2 + 3 + 1 + 2
    assert not np.isin(after, [V["EOV"], V["PAD"]]).any() and (after == V["BOV"]).sum() == 2 + 3 + 1 + 2


def test_noise_is_limited_where_an_image_is_described_and_absent_where_it_is_given():
    rng = np.random.default_rng(0)
    model = make()
    for number in range(5):
        document, limits = kinds(rng)[number]
        batch = make_batch(model, [[document]] * 64)
        t = np.asarray(draw(model, {}, batch, 3)[2])
        for i in range(IMAGES):
            limit = limits[i] if i < len(limits) else 0.0
            assert t[:, i].max() <= limit and (t[:, i].max() > 0.9 * limit or not limit), (number, i)
            assert len(np.unique(t[:, i])) > (40 if limit else 0)  # each row its own
    free = make(replace(LINEAR, noise_limit=1.0))
    batch = make_batch(free, [[kinds(rng)[1][0]]] * 64)
    assert np.asarray(draw(free, {}, batch, 3)[2])[:, 0].max() > 0.9


def test_noise_is_that_of_the_row_of_the_global_batch_and_the_image_in_it(batch):
    model = make()
    whole = draw(model, {}, batch)
    part = draw(model, {}, {k: v[2:3] for k, v in batch.items()})
    for a, b in zip(whole, part, strict=True):
        np.testing.assert_array_equal(a[2:3], b)
    noise = np.asarray(whole[1]).reshape(4 * IMAGES, -1)
    assert np.abs(np.corrcoef(noise) - np.eye(4 * IMAGES)).max() < 0.4  # 192 values each
    other = draw(model, {}, batch, 2)
    assert (np.asarray(whole[1]) != np.asarray(other[1])).all()


def test_an_image_that_is_only_given_is_not_learned_and_seen_as_it_is(batch):
    model = make()
    params, extra = state(model)
    latents, noise, t = draw(model, extra, batch)
    assert batch["image_learn"][2, :2].tolist() == [False, True] and t[2, 0] == 0
    x_t = model.process.noised(latents, noise, t)
    np.testing.assert_array_equal(x_t[2, 0], latents[2, 0])
    changed = batch | {"image_content": batch["image_content"].copy()}
    changed["image_content"][2, 0] ^= 255
    before, after = (step(model, params, extra, b)[0] for b in (batch, changed))
    assert float(before["diffusion"]) != float(after["diffusion"])  # it is seen by the image that is learned
    assert float(before["next_token"]) != float(after["next_token"])


@pytest.fixture(scope="module")
def one_row():
    """BOS t t t BOV □□□□ EOV t t t BOV □□□□ EOV EOS, then BOS t t t EOS, and what a model makes of it."""
    rng = np.random.default_rng(5)
    a, b = pictures(rng, 2)
    words = lambda: Text(rng.integers(0, 30, 3))  # noqa: E731
    return [documents.interleaved([words(), a, words(), b]), documents.text_only(rng.integers(0, 30, 3))]


def outputs(model, params, batch, x, t):
    total, rows, predicted = forward(model, params, {}, batch, x, t)
    nll = {int(at): float(v) for at, v in zip(batch["rows"][0], rows.nll[0], strict=True) if at >= 0}
    return nll, np.asarray(predicted)[0]


def changed_by(model, one_row, what):
    """(positions whose prediction of the next token moves, images whose prediction moves) when an input is changed."""
    params, extra = state(model)
    batch = make_batch(model, [one_row])
    latents, noise, t = draw(model, extra, batch)
    x = np.array(model.process.noised(latents, noise, t))
    before = outputs(model, params, batch, x, t)
    other = {k: v.copy() for k, v in batch.items()}
    moved_x, moved_t = x.copy(), np.array(t)
    at = what(other, moved_x, moved_t)
    after = outputs(model, params, other, moved_x, moved_t)
    # The target of the position before a changed token is another one: that says nothing of what it sees.
    positions = {p for p in before[0] if before[0][p] != after[0][p] and p + 1 != at}
    images = {i for i in range(2) if (before[1][i] != after[1][i]).any()}
    return positions, images, set(before[0]) - {at if at is None else at - 1}


FIRST, SECOND = 5, 14  # where the images start


def token(position):
    def change(batch, x, t):
        batch["tokens"][0, position] = (batch["tokens"][0, position] + 1) % 30
        return position

    return change


def patch(image, column):
    def change(batch, x, t):
        x[0, image, :4, column : column + 4] += 1.0

    return change


def level(image):
    def change(batch, x, t):
        t[0, image] = 0.77

    return change


@pytest.mark.parametrize("image", CODERS, ids=["linear", "unet"])
def test_no_row_sees_later_text_or_later_images_or_another_document(one_row, image):
    """Differences that must not be are exactly 0, and those that must be are not."""
    model = make(image)
    assert [s.start for s in sequence.lay_out(one_row[0], V, model.form).slots] == [FIRST, SECOND]
    document = len(sequence.lay_out(one_row[0], V, model.form))
    for position, images in ((1, {0, 1}), (FIRST + ROWS + 2, {1})):  # a word before both images, one between them
        moved, seen, asked = changed_by(model, one_row, token(position))
        assert moved == {p for p in asked if position <= p < document} and seen == images
    for number, begin in ((0, FIRST), (1, SECOND)):
        for change in (patch(number, 0), patch(number, 4), level(number)):
            moved, seen, asked = changed_by(model, one_row, change)
            assert moved == {p for p in asked if begin <= p < document} and moved
            assert seen == set(range(number, 2))
    moved, seen, asked = changed_by(model, one_row, token(document + 1))
    assert moved == {p for p in asked if p > document} and seen == set()


def test_patches_see_their_whole_image_or_what_is_before_them_in_the_ablation(one_row):
    """The first patch of an image and the last: who moves whom."""
    for attention, backwards in (("bidirectional", True), ("causal", False)):
        model = make(replace(LINEAR, attention=attention))
        params, extra = state(model)
        batch = make_batch(model, [one_row])
        latents, noise, t = draw(model, extra, batch)
        x = np.array(model.process.noised(latents, noise, t))
        last, first = x.copy(), x.copy()
        last[0, 0, 4:, 4:] += 1.0
        first[0, 0, :4, :4] += 1.0
        before, by_last, by_first = (outputs(model, params, batch, y, t)[1][0] for y in (x, last, first))
        window = (slice(0, 4), slice(0, 4)), (slice(4, 8), slice(4, 8))
        assert (before[window[0]] != by_last[window[0]]).any() == backwards
        assert (before[window[1]] != by_first[window[1]]).any()


def test_parts_of_a_batch_add_up_to_it(batch):
    model = make()
    params, extra = state(model)
    whole = given(model, batch)
    loss = compiled(model, "loss_fn")
    all_sums, all_counts, _ = loss(params, extra, whole, jax.random.key(1))
    parts = [loss(params, extra, {k: v[i::2] for k, v in whole.items()}, jax.random.key(1)) for i in range(2)]
    for name in all_sums:
        np.testing.assert_allclose(sum(p[0][name] for p in parts), all_sums[name], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(sum(p[1][name] for p in parts), all_counts[name], rtol=1e-6, err_msg=name)


@pytest.mark.slow
def test_gradients_reach_every_parameter_and_are_finite_without_images(batch):
    model = make(UNET)
    params, extra = state(model)
    rng = np.random.default_rng(2)
    textual = make_batch(model, [[documents.text_only(rng.integers(0, 30, 5))]] * 4)

    @jax.jit
    def grads(params, inputs):
        def loss(params):
            sums, counts, _ = model.loss_fn(params, extra, inputs, jax.random.key(1))
            return sum(w * sums[n] / jnp.maximum(counts[n], 1) for n, w in model.loss_weights.items())

        return jax.grad(loss)(params)

    for path, g in jax.tree_util.tree_leaves_with_path(grads(params, given(model, batch))):
        assert np.isfinite(g).all() and np.abs(g).max() > 0, jax.tree_util.keystr(path)
    alone = grads(params, given(model, textual))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(alone))
    assert not any(np.abs(g).max() for g in jax.tree.leaves(alone[PARAMS]))


@pytest.mark.slow
@pytest.mark.parametrize("diffusion", [settings.RectifiedFlow(), settings.DDPM(prediction="velocity", min_snr=5.0)])
def test_other_paths_and_weights_take_the_place_of_the_published_one(batch, diffusion):
    model = make(replace(LINEAR, diffusion=diffusion))
    params, extra = state(model)
    sums, counts, _ = step(model, params, extra, batch)
    latents, noise, t = (np.asarray(x) for x in draw(model, extra, batch))
    if diffusion.kind == "flow":
        a, s = 1 - t, t
        target, weight = noise - latents, np.ones_like(t)
    else:
        a, s = (np.asarray(x) for x in model.process.scales(t))
        target = a[..., None, None, None] * noise - s[..., None, None, None] * latents
        with np.errstate(divide="ignore"):
            snr = (a / s) ** 2
        weight = np.minimum(snr, 5.0) / (snr + 1)
    x_t = a[..., None, None, None] * latents + s[..., None, None, None] * noise
    predicted = np.asarray(forward(model, params, extra, batch, x_t, t)[2])
    error = weight * ((predicted - target) ** 2).mean((2, 3, 4))
    assert float(sums["diffusion"]) == pytest.approx(error[batch["image_learn"]].sum(), rel=1e-4)


def test_operations_are_those_of_the_backbone_the_head_on_targets_and_the_coder_on_images(batch):
    """Within 5 %: nothing is computed at rows that need it not. Attention is dense at this length."""
    model = make()
    params, extra = state(model)
    found = flops.count(model.loss_fn, params, extra, given(model, batch), jax.random.key(1))
    c, (b, r) = TRANSFORMER, batch["rows"].shape
    kv = c.width * c.kv_heads // c.heads
    layer = 2 * b * S * (2 * c.width**2 + 2 * c.width * kv + 3 * c.width * c.mlp_width) + 4 * b * S * S * c.width
    head = 2 * b * r * c.width * V.size
    images, values = b * IMAGES, 48  # 4 x 4 x 3 of a patch
    coder = 2 * images * (2 * ROWS * values * c.width + 256 * c.width + c.width**2)
    assert found == pytest.approx(c.depth * layer + head + coder, rel=0.05)


def test_scoring_shows_images_as_they_are(batch):
    model = make()
    params, extra = state(model)
    total, rows, is_code = compiled(model, "score")(params, extra, given(model, batch))
    clean = (batch["image_content"] / 127.5 - 1).astype(np.float32)
    expected = forward(model, params, extra, batch, clean, np.zeros((4, IMAGES), np.float32))
    np.testing.assert_allclose(total, expected[0], rtol=1e-5)
    np.testing.assert_allclose(rows.nll, expected[1].nll, rtol=1e-4, atol=1e-5)
    assert not is_code.any() and is_code.shape == batch["rows"].shape


@pytest.mark.slow
def test_latents_of_an_autoencoder_take_the_place_of_pixels(batch):
    sizes = settings.Autoencoder(block_out_channels=(4, 4), layers_per_block=1, latent_channels=2, norm_groups=2)
    codec = settings.VAECodec(preset="custom", sizes=sizes, random_weights=True)
    model = make(replace(LINEAR, codec=codec, patch_size=2))
    assert model.latent_shape == (4, 4, 2) and model.form.rows == ROWS
    params, extra = state(model)
    assert set(extra) == {"codec"}
    sums, counts, _ = step(model, params, extra, batch)
    assert all(np.isfinite(x) for x in jax.tree.leaves(sums)) and float(sums["diffusion"]) > 0
    mode = compiled(model, "latents")(extra, batch["image_content"])
    drawn = draw(model, extra, batch)[0]
    assert mode.shape == drawn.shape == (4, IMAGES, 4, 4, 2) and np.abs(mode - drawn).max() > 1e-3


@pytest.mark.slow
def test_with_lora_the_updates_and_the_coder_are_parameters(batch):
    model = make(lora=2)
    params, extra = state(model)
    names = {
        p[-1].key for p, _ in jax.tree_util.tree_leaves_with_path({k: v for k, v in params.items() if k != PARAMS})
    }
    assert names == {"lora_a", "lora_b"} and "embed" in extra[FROZEN] and "into" in params[PARAMS]
    assert np.isfinite(step(model, params, extra, batch)[0]["diffusion"])


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (replace(LINEAR, patch_size=3), "patch_size=3 does not divide data.image_size=8"),
        (replace(LINEAR, noise_limit=0.0), r"noise_limit=0.0 must lie in \(0, 1\]"),
        (replace(LINEAR, weight=-1.0), "weight=-1.0 must not be negative"),
        (replace(LINEAR, codec=settings.VAECodec()), "config: model.image.codec.weights is empty"),
    ],
)
def test_settings_that_cannot_work_are_one_line(image, message):
    with pytest.raises(UserError, match=message) as error:
        make(image)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="size of the vocabulary is not known"):
        DiffusionMultimodal(settings.Multimodal(image=LINEAR), SIZE)
