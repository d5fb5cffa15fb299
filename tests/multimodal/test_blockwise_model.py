"""Images block by block in sequences with text: what rows see, what the loss is, and that a cache changes nothing."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal import documents, sequence
from ddt_jax.multimodal.block_segments import BlockSegments
from ddt_jax.multimodal.documents import Image, Text
from ddt_jax.multimodal.model import make_multimodal
from tests.multimodal import test_diffusion_model as whole_images
from tests.multimodal.test_diffusion_model import TRANSFORMER, V, pictures, state
from tests.multimodal.test_segments import DIFFUSION, SEEDS

SIZE, ROWS, BLOCK, S, IMAGES = 8, 16, 4, 96, 4
BLOCKS = ROWS // BLOCK
CODER = settings.LinearCoder(places=True)  # so that a block that is taken for another shows
IMAGE = settings.DiffusionImages(patch_size=2, block_size=BLOCK, diffusion=DIFFUSION, coder=CODER)


@functools.cache
def make(block_size=BLOCK, whole_prompts=False):
    image = replace(IMAGE, block_size=block_size)
    return make_multimodal(settings.Multimodal(transformer=TRANSFORMER, image=image, whole_prompts=whole_prompts), SIZE)


def make_batch(model, chosen):
    made = []
    for row in chosen:
        layouts = [sequence.lay_out(d, V, model.form) for d in row]
        packed = sequence.pack_row(layouts, S, IMAGES, V["PAD"], model.form)
        made.append(packed | {"rows": sequence.target_rows(packed["target"], 20)})
    batch = {name: np.stack([row[name] for row in made]) for name in made[0]}
    return batch | {"slot": np.arange(len(made), dtype=np.int32)}


def documents_of(seed=0):
    """Rows with an image that is not learned before one that is, several documents, and several images in one."""
    rng = np.random.default_rng(seed)
    text, (a, b) = rng.integers(0, 30, 3), pictures(rng, 2)
    return [
        [documents.editing([a], text, b), documents.text_only(text)],
        [documents.text_to_image(text, a), documents.image_to_text(text, b)],
        [documents.interleaved([a, Text(text), b])],
    ]


@pytest.fixture(scope="module")
def batch():
    return make_batch(make(), documents_of())


@functools.cache
def compiled(model):
    return quick(lambda params, extra, batch, x, t, clean: model.forward(params, extra, batch, x, t, None, clean))


def quick(function, **how):
    return jax.jit(function, **how)


def forward(model, batch, x, t, clean, seed=0):
    params, extra = state(model, seed)
    given = {name: jnp.asarray(batch[name]) for name in model.inputs}
    _, rows, predicted = compiled(model)(params, extra, given, x, t, clean)
    return np.asarray(rows.nll), np.asarray(predicted)


def drawn(model, batch, seed=0):
    """(clean, noised, levels)"""
    rng = np.random.default_rng(seed)
    clean = np.array(model.to_blocks(model.latents({}, jnp.asarray(batch["image_content"]))))
    noised, t = rng.normal(size=clean.shape), rng.uniform(0.1, 1, clean.shape[:3])
    return clean, noised.astype(np.float32), t.astype(np.float32)


@pytest.mark.parametrize("whole_prompts", [False, True])
def test_rows_see_what_the_layout_says(batch, whole_prompts):
    model = make(whole_prompts=whole_prompts)
    found = model.visible({name: jnp.asarray(value) for name, value in batch.items()})
    for b in range(len(batch["tokens"])):
        row = {name: value[b] for name, value in batch.items()}
        start, end, start2, end2 = sequence.visible_spans(row, model.form, whole_prompts=whole_prompts)
        key = np.arange(S)
        expected = (start[:, None] <= key) & (key < end[:, None]) | (start2[:, None] <= key) & (key < end2[:, None])
        s = [np.broadcast_to(np.asarray(x), (len(batch["tokens"]), S))[b][:, None] for x in
             (found.start, found.end, found.start2, found.end2)]  # fmt: skip
        used = row["document"] >= 0
        ours = (s[0] <= key) & (key < s[1]) | (s[2] <= key) & (key < s[3])
        np.testing.assert_array_equal(ours[used], expected[used])
        if found.reach is not None:
            assert np.all(np.where(ours, key - np.arange(S)[:, None], 0) <= found.reach)


def test_a_copy_sees_clean_blocks_before_it_and_itself_and_text_sees_clean_images(batch):
    model = make()
    clean, x, t = drawn(model, batch)
    nll, before = forward(model, batch, x, t, clean)
    b, first, second = 2, 0, 1  # one document: image, text, image
    learned = batch["image_learn"]

    def moved(predicted):
        """Blocks [B, I, N] that differ at all, of images that are learned."""
        return (predicted != before).any(axis=(3, 4)) & learned[..., None]

    other = x.copy()
    other[b, first, 1] += 1
    changed_nll, predicted = forward(model, batch, other, t, clean)
    assert np.argwhere(moved(predicted)).tolist() == [[b, first, 1]]
    np.testing.assert_array_equal(changed_nll, nll)
    other = clean.copy()
    other[b, first, 1] += 1
    changed_nll, predicted = forward(model, batch, x, t, other)
    later = [[b, first, n] for n in (2, 3)] + [[b, second, n] for n in range(BLOCKS)]
    assert np.argwhere(moved(predicted)).tolist() == later
    text = batch["rows"][b] > batch["image_start"][b, first]
    assert (changed_nll != nll)[b].tolist() == text.tolist() and text.any()
    np.testing.assert_array_equal(changed_nll[:b], nll[:b])


def test_the_loss_is_over_blocks_each_at_a_level_of_its_own(batch):
    model = make()
    params, extra = state(model)
    given = {name: jnp.asarray(batch[name]) for name in model.inputs}
    sums, counts, _ = quick(model.loss_fn)(params, extra, given, jax.random.key(1))
    clean, noise, t = quick(model.draw)(extra, given, jax.random.key(1))
    learn = batch["image_learn"]
    assert float(counts["diffusion"]) == BLOCKS * learn.sum() == BLOCKS * 5
    t = np.asarray(t)
    assert np.all((t > 0) == learn[..., None]) and len(np.unique(t[learn])) > BLOCKS * 4
    assert t[learn].max() > 0.6  # images before their captions are noised as any
    _, predicted = forward(model, batch, model.process.noised(clean, noise, t), t, clean)
    error = np.mean((predicted - np.asarray(model.process.target(clean, noise, t))) ** 2, axis=(3, 4))
    assert float(sums["diffusion"] / counts["diffusion"]) == pytest.approx(error[learn].mean(), rel=1e-5)


def test_one_block_is_transfusion():
    """A copy of the whole image sees the text before it and itself, as the image in its place does there."""
    rng = np.random.default_rng(3)
    rows = [[documents.text_to_image(rng.integers(0, 30, n), *pictures(rng, 1))] for n in (2, 5)]
    model = make(ROWS)
    plain = make_multimodal(replace(model.config, image=replace(model.config.image, block_size=0)), SIZE)
    batch = make_batch(model, rows)
    clean, x, t = drawn(model, batch)
    _, predicted = forward(model, batch, x, t, clean)
    batch = make_batch(plain, rows)
    latents = np.asarray(model.from_blocks(x.reshape(-1, *x.shape[2:]))).reshape(2, IMAGES, *plain.latent_shape)
    params, extra = state(plain)
    _, _, theirs = whole_images.forward(plain, params, extra, batch, latents, t[..., 0])
    found = np.asarray(model.from_blocks(predicted[:, 0]))
    np.testing.assert_allclose(found, theirs[:, 0], atol=1e-5)
    assert np.ptp(found) > 0.1


def test_blocks_hold_squares_of_an_image_and_come_back():
    model = make()
    latents = np.arange(SIZE * SIZE * 3, dtype=np.float32).reshape(1, 1, SIZE, SIZE, 3)
    blocks = np.asarray(model.to_blocks(latents))
    assert blocks.shape == (1, 1, BLOCKS, BLOCK, 12)
    np.testing.assert_array_equal(np.sort(blocks[0, 0, 1].ravel()), np.sort(latents[0, 0, :4, 4:].ravel()))
    np.testing.assert_array_equal(model.from_blocks(blocks[:, 0]), latents[:, 0])


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_what_is_drawn_beside_the_cache_is_what_the_whole_pass_predicts(monkeypatch, guidance):
    """What is predicted of noise is taken for the block: then a pass over all of them predicts just that again."""
    model, level = make(), 0.7
    params, extra = state(model)
    segments = BlockSegments(model, params, extra, V, S)
    monkeypatch.setattr(model.process, "solve", lambda predict, noise, keys: predict(noise, jnp.float32(level)))
    rng = np.random.default_rng(2)
    source, *_ = pictures(rng, 1)
    given = [documents.editing([source], rng.integers(0, 30, n), Image()) for n in (2, 6, 4)]
    empty = prompts_of(model, [documents.image_only(Image())])
    prefill = quick(segments.prefill, static_argnums=2)
    now = prefill(segments.weights, prompts_of(model, given), S + segments.slack)
    drawing = np.array([True, True, False])
    begun, _, _ = segments._begun(segments.weights, SEEDS, np.zeros(3, np.int32), 1.0, None)
    after, latents = quick(segments.draw, static_argnums=5)(
        segments.weights, now, SEEDS, np.zeros(3, np.int32), drawing, guidance, empty if guidance != 1 else None
    )
    np.testing.assert_array_equal(after.cache.length - now.cache.length, (ROWS + 1) * drawing)
    np.testing.assert_array_equal(after.logits_BV[2], now.logits_BV[2])
    blocks = np.asarray(model.to_blocks(latents[:, None]))
    noise = np.asarray(model.to_blocks(begun[:, None]))

    def predicted(makers):
        """(of the last image of each document; how unlikely what comes behind it is)."""
        made = [make_(Image(np.zeros((SIZE, SIZE, 3), np.uint8), 9)) for make_ in makers]
        batch = make_batch(model, [[d] for d in made])
        last = [int((row >= 0).sum()) - 1 for row in batch["image_start"]]
        clean, x, t = drawn(model, batch)
        for b, i in enumerate(last):
            clean[b, i], x[b, i], t[b, i] = blocks[b, 0], noise[b, 0], level
        nll, found = forward(model, batch, x, t, clean)
        ends = [nll[b, (row >= 0).sum() - 1] for b, row in enumerate(batch["rows"])]
        return np.stack([found[b, i] for b, i in enumerate(last)]), ends

    texts = [d.segments for d in given]
    edits = [functools.partial(_edited, segments_) for segments_ in texts]
    found, ends = predicted(edits)
    if guidance != 1:
        found = guidance * found + (1 - guidance) * predicted([documents.image_only] * 3)[0]
    np.testing.assert_allclose(found[drawing], blocks[drawing, 0], atol=2e-5)
    behind = -np.asarray(jax.nn.log_softmax(after.logits_BV))[:, V["EOS"]]
    np.testing.assert_allclose(behind[drawing], np.array(ends)[drawing], atol=2e-5)
    assert np.ptp(found) > 0.1


def _edited(segments, image):
    """The same document with another image for its answer."""
    last = max(i for i, segment in enumerate(segments) if isinstance(segment, Image))
    given = (*segments[:last], replace(segments[last], content=image.content), *segments[last + 1 :])
    return documents.Document(given, learn="answer")


def prompts_of(model, given):
    layouts = [sequence.lay_out_prompt(d, V, model.form, force_image=True) for d in given]
    width = max(map(len, layouts))
    rows = [sequence.pack_row([layout], width, 1, V["PAD"], model.form) for layout in layouts]
    names = ("tokens", "position", "start", "given", "image_start", "image_copy", "image_content")
    return {name: np.stack([row[name] for row in rows]) for name in names} | {
        "length": np.array([len(layout) for layout in layouts], np.int32)
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_size": 5}, r"block_size=5 is no square that divides 4 x 4 patches; choose from 1, 4, 16"),
        ({"attention": "causal"}, r"block_size=4 needs .*attention='bidirectional', not 'linear' and 'causal'"),
        ({"coder": settings.UNetCoder(width=16, blocks=1)}, r"block_size=4 needs model.image.coder.kind='linear'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, message):
    image = replace(IMAGE, **changes)
    with pytest.raises(UserError, match=message):
        make_multimodal(settings.Multimodal(transformer=TRANSFORMER, image=image), SIZE)
