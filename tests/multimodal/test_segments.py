"""Text and images in turns through a cache, against the whole forward pass without one."""

import functools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.multimodal import documents, sequence
from ddt_jax.multimodal.diffusion_model import DiffusionMultimodal
from ddt_jax.multimodal.documents import Image, Text
from ddt_jax.multimodal.segments import Segments
from tests.multimodal.test_diffusion_model import IMAGES, ROWS, TRANSFORMER, S, V, pictures, state

SEEDS = np.array([3, 4, 5], np.int32)
GREEDY = settings.Sampling(tokens=1, temperature=0.0)
DIFFUSION = settings.DDPM(prediction="velocity", solver="ddim", solver_steps=3)
KINDS = {
    "bidirectional": {},
    "causal": {"attention": "causal"},
    "whole_prompts": {},
    "flow": {"diffusion": settings.RectifiedFlow(solver="heun", solver_steps=2)},
    "unet": {"coder": settings.UNetCoder(width=16, blocks=1)},
}
EMPTY = documents.image_only(Image())


def named(*quick, slow):
    return [*quick, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


class Run:
    """A model with random weights, its segments compiled, and its forward pass without a cache."""

    def __init__(self, name):
        image = settings.DiffusionImages(patch_size=4, diffusion=DIFFUSION)
        config = settings.Multimodal(
            transformer=TRANSFORMER, image=replace(image, **KINDS[name]), whole_prompts=name == "whole_prompts"
        )
        self.model = model = DiffusionMultimodal(config, 8)
        self.params, self.extra = state(model, 1)
        self.segments = segments = Segments(model, self.params, self.extra, V, S)
        self.weights, self.slots = segments.weights, S + segments.slack
        self.prefill = jax.jit(segments.prefill, static_argnums=2)
        self.write = jax.jit(segments.write, static_argnums=(4, 5))
        self.draw = jax.jit(segments.draw, static_argnums=5)
        self.forward = jax.jit(model.forward)

    def prompts(self, given, force_image, width=S):
        """Arrays of prompts, and their layouts."""
        layouts = [sequence.lay_out_prompt(d, V, self.model.form, force_image=force_image) for d in given]
        packed = [sequence.pack_row([x], width, IMAGES, V["PAD"], self.model.form) for x in layouts]
        names = ("tokens", "position", "start", "given", "image_start", "image_content")
        arrays = {name: np.stack([row[name] for row in packed]) for name in names}
        return arrays | {"length": np.array([len(x) for x in layouts], np.int32)}, layouts

    def empty(self):
        prompts, _ = self.prompts([EMPTY], True, 2)
        return prompts | {name: prompts[name][:, :1] for name in ("image_start", "image_content")}


run = functools.cache(Run)


def whole(run, layout, ids, latents, levels):
    """(nll of the ids behind the prompt, what is predicted of each image), by one forward pass over all of a row.

    Args:
      layout: of the prompt.
      ids: behind it, PAD where an image lies.
      latents, levels: of all images of the row.
    """
    tokens = np.concatenate([layout.tokens, ids]).astype(np.int32)
    n = len(tokens)
    starts = np.flatnonzero(tokens == V["BOV"]) + 1
    row = {
        "tokens": np.pad(tokens, (0, S - n), constant_values=V["PAD"]),
        "position": np.arange(S, dtype=np.int32),
        "start": np.zeros(S, np.int32),
        "given": np.pad(layout.given, (0, S - len(layout))),
        "rows": np.pad(np.arange(len(layout) - 1, n - 1), (0, S - n + len(layout)), constant_values=-1),
        "image_start": np.pad(starts, (0, IMAGES - len(starts)), constant_values=-1),
    }
    batch = {name: value[None].astype(np.int32) for name, value in row.items()}
    x = np.zeros((1, IMAGES, *run.model.latent_shape), np.float32)
    x[0, : len(latents)] = latents
    t = np.zeros((1, IMAGES), np.float32)
    t[0, : len(levels)] = levels
    _, rows, predicted = run.forward(run.params, run.extra, batch, x, t)
    return np.asarray(rows.nll)[0, : len(ids)], np.asarray(predicted)[0]


def clean(picture):
    return picture.content / np.float32(127.5) - 1


@pytest.mark.parametrize("name", named("bidirectional", "whole_prompts", slow=("causal", "flow", "unet")))
def test_text_before_between_and_behind_images_is_as_likely_as_without_a_cache(name):
    """An edit is asked for: an image in the prompt, one that is drawn, text, one more that is drawn, text."""
    model, rng = run(name), np.random.default_rng(0)
    source, *_ = pictures(rng, 1)
    given = [documents.editing([source], rng.integers(0, 30, n), Image()) for n in (2, 6, 4)]
    prompts, layouts = model.prompts(given, True)
    now = model.prefill(model.weights, prompts, model.slots)
    ids, nll, latents = ([[] for _ in given] for _ in range(3))
    every, one = np.full(3, True), np.ones(3, np.int32)
    for number in range(2):
        now, drawn = model.draw(model.weights, now, SEEDS, number * one, every, 1.0, None)
        for row in range(3):
            ids[row] += [V["PAD"]] * ROWS + [V["EOV"]]
            nll[row] += [np.nan] * (ROWS + 1)
            latents[row].append(np.asarray(drawn)[row])
        for word in range(3):
            logits = np.asarray(now.logits_BV, np.float64)
            image = number == 0 and word == 2  # the next one
            if image:
                now = now._replace(logits_BV=jnp.where(np.arange(V.size) == V["BOV"], 1e3, now.logits_BV))
            now, out = model.write(model.weights, now, SEEDS, one, GREEDY, image)
            tokens = np.asarray(out.tokens_BN)[:, 0]
            for row in range(3):
                ids[row].append(tokens[row])
                nll[row].append(np.log(np.exp(logits[row]).sum()) - logits[row, tokens[row]])
    assert all(row[ROWS + 3] == V["BOV"] for row in ids)
    for row, layout in enumerate(layouts):
        assert int(now.cache.length[row]) == len(layout) + len(ids[row])
        expected, _ = whole(model, layout, ids[row], [clean(source), *latents[row]], [0, 0, 0])
        known = ~np.isnan(nll[row])
        assert known.sum() == 6 and np.ptp(expected[known]) > 0.1
        np.testing.assert_allclose(np.array(nll[row])[known], expected[known], atol=1e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("name", named("bidirectional", slow=("causal", "unet")))
def test_an_image_is_what_a_loop_of_whole_forward_passes_draws(name, guidance):
    """DDIM (arXiv 2010.02502 eq. 12, η = 0) on the cosine schedule, from the formulas."""
    model, rng = run(name), np.random.default_rng(1)
    given = [documents.text_to_image(rng.integers(0, 30, n), Image()) for n in (3, 5, 2)]
    prompts, layouts = model.prompts(given, True)
    empty, (nothing,) = model.empty(), model.prompts([EMPTY], True, 2)[1]
    now = model.prefill(model.weights, prompts, model.slots)
    found = model.draw(model.weights, now, SEEDS, np.zeros(3, np.int32), np.full(3, True), guidance, empty)[1]

    def kept(t):
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2

    for row, layout in enumerate(layouts):
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(SEEDS[row]), 0x7FFFFFFF), 0)
        x = np.asarray(jax.random.normal(jax.random.split(key)[0], model.model.latent_shape))
        for n, after in ((1000, 667), (667, 333), (333, 0)):
            v = whole(model, layout, [V["PAD"]] * ROWS, [x], [n / 1000])[1][0]
            if guidance != 1:
                alone = whole(model, nothing, [V["PAD"]] * ROWS, [x], [n / 1000])[1][0]
                v = alone + guidance * (v - alone)
            a, a_after = (model.model.process.kept[m] if m > 900 else kept(m / 1000) for m in (n, after))
            x0 = np.sqrt(a) * x - np.sqrt(1 - a) * v
            x = np.sqrt(a_after) * x0 + np.sqrt(1 - a_after) * (x - np.sqrt(a) * x0) / np.sqrt(1 - a)
        assert 0.1 < np.std(x) < 100
        np.testing.assert_allclose(found[row], x, atol=1e-4 * np.abs(x).max())


def test_a_row_that_has_nothing_to_do_stays_as_it_is():
    model, rng = run("bidirectional"), np.random.default_rng(2)
    given = [documents.text_to_image(rng.integers(0, 30, n), Image()) for n in (3, 5, 2)]
    prompts, _ = model.prompts(given, True)
    before = model.prefill(model.weights, prompts, model.slots)
    some, one = np.array([True, False, True]), np.ones(3, np.int32)
    drawn, _ = model.draw(model.weights, before, SEEDS, 0 * one, some, 1.0, None)
    written, out = model.write(model.weights, drawn, SEEDS, np.array([0, 0, 1], np.int32), GREEDY, True)
    np.testing.assert_array_equal(drawn.cache.length - before.cache.length, [ROWS + 1, 0, ROWS + 1])
    np.testing.assert_array_equal(written.cache.length - drawn.cache.length, [0, 0, 1])
    np.testing.assert_array_equal(out.lengths_B, [0, 0, 1])
    np.testing.assert_array_equal(written.logits_BV[:2], [drawn.logits_BV[0], before.logits_BV[1]])
    length = int(before.cache.length[1])
    for new, old in zip(written.cache.keys, before.cache.keys, strict=True):
        np.testing.assert_array_equal(new[1, :, :length], old[1, :, :length])


def test_no_image_begins_that_would_not_fit_and_none_ends_by_a_token():
    model = run("bidirectional")
    sure = lambda name: jnp.where(np.arange(V.size) == V[name], 1e3, 0.0)  # noqa: E731
    for length, fits in ((S - ROWS - 2, True), (S - ROWS - 1, False)):
        text = Text(np.ones(length - 1, int))
        document = documents.Document((documents.Mark("BOS"), text, documents.Mark("EOS", answer=True)))
        prompts, _ = model.prompts([document] * 3, False)
        assert (prompts["length"] == length).all()
        now = model.prefill(model.weights, prompts, model.slots)
        now = now._replace(logits_BV=jnp.broadcast_to(sure("BOV"), (3, V.size)))
        _, out = model.write(model.weights, now, SEEDS, np.ones(3, np.int32), GREEDY, True)
        assert (np.asarray(out.tokens_BN)[:, 0] == V["BOV"]).all() == fits
        _, out = model.write(model.weights, now, SEEDS, np.ones(3, np.int32), GREEDY, False)
        assert (np.asarray(out.tokens_BN) != V["BOV"]).all()
    now = now._replace(logits_BV=jnp.broadcast_to(sure("EOV"), (3, V.size)))
    _, out = model.write(model.weights, now, SEEDS, np.ones(3, np.int32), GREEDY, True)
    assert (np.asarray(out.tokens_BN) != V["EOV"]).all()


def test_guidance_needs_an_unconditional_prompt():
    model = run("bidirectional")
    with pytest.raises(ValueError, match="unconditional"):
        model.segments.draw(model.weights, None, SEEDS, None, None, 2.0, None)


@pytest.mark.parametrize("segment", ["draw", "write"])
def test_no_loop_copies_the_cache(segment):
    """Nor writes to it where an image is denoised: that loop only reads it."""
    model, one = run("bidirectional"), np.ones(3, np.int32)
    prompts, _ = model.prompts([documents.text_to_image([1, 2], Image())] * 3, True)
    now = model.prefill(model.weights, prompts, model.slots)
    if segment == "draw":
        lowered = model.draw.lower(model.weights, now, SEEDS, one, one > 0, 3.0, model.empty())
    else:
        lowered = model.write.lower(model.weights, now, SEEDS, one, GREEDY, True)
    text, found = lowered.compile().as_text(), 0
    computations = dict(re.findall(r"^%?([\w.-]+) (\(.*?^})", text, re.MULTILINE | re.DOTALL))

    def multiplies(name):
        called = re.findall(r"(?:calls|to_apply)=%?([\w.-]+)", computations[name])
        return " dot(" in computations[name] or any(map(multiplies, called))

    cache = rf"f32\[3,1,{model.slots},16\]"
    for body in filter(multiplies, set(re.findall(r"body=%?([\w.-]+)", text))):  # others put rows into the cache
        inside = computations[body]
        found += bool(re.search(rf"{cache}\S* get-tuple-element\(", inside))
        made_here = re.findall(rf"= {cache}\S* ([\w-]+)\(", inside)
        assert set(made_here) <= {"get-tuple-element"} | ({"fusion"} if segment == "write" else set())
    assert found
