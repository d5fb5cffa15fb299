"""Masks, loss and text through a cache against PyPI's transfusion-pytorch 0.19.4, in an environment of its own.

There t = 1 is the image and the flow is image - noise; here t = 1 is noise and the velocity noise - image.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.multimodal import backbone, sequence
from ddt_jax.multimodal.diffusion_model import DiffusionMultimodal
from ddt_jax.multimodal.documents import Document, Image, Text
from ddt_jax.multimodal.image_rows import ImageRows
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.nn import spans
from ddt_jax.nn.attention import visible
from ddt_jax.nn.cross_entropy import cross_entropy
from ddt_jax.nn.params import split

# That package is annotated as Python 3.8 was, which beartype remarks on.
pytestmark = [pytest.mark.transfusion, pytest.mark.filterwarnings("ignore:.*PEP 484 type hint")]

TEXT, SIDE, WIDTH = 30, 3, 24  # ids of text, pixels of an image, width of the toy
FLOW = settings.DiffusionImages(patch_size=1, diffusion=settings.RectifiedFlow())
SIZES = settings.Transformer(vocab_size=TEXT, width=32, depth=3, heads=4, kv_heads=2, mlp_width=64)
IMAGES = SIDE * SIDE  # rows of an image
MOST = 70  # positions of six images or texts


@pytest.fixture(scope="module")
def theirs(oracle):
    return oracle("transfusion_pytorch.transfusion")


@pytest.fixture(scope="module")
def torch(oracle, theirs):
    return oracle("torch")


def shuffled(torch, model, seed=0):
    """Random parameters, none of them zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.2)
    return model.eval()


@pytest.fixture(scope="module")
def toy(theirs, torch):
    """Their whole model around a linear map in the transformer's place, which keeps what it was called with."""

    class Linear(theirs.Transformer):
        def __init__(self):
            super().__init__(WIDTH, depth=1, dim_head=8, heads=1)
            self.map = torch.nn.Linear(WIDTH, WIDTH, bias=False)
            self.of_time = torch.nn.Parameter(torch.zeros(WIDTH))

        def forward(self, x, times=None, modality_positions=None, **_):
            self.called_with = modality_positions
            x = self.map(x) + (0 if times is None else times[..., None] * self.of_time)
            return x, [x]

    made = theirs.Transfusion(
        num_text_tokens=TEXT,
        transformer=Linear(),
        dim_latent=3,
        modality_num_dim=2,
        modality_processing="grouped",  # "naive" noises all images of a sample at the level of the first
        prob_uncond=0.0,
    )
    return shuffled(torch, made)


class Toy(DiffusionMultimodal):
    """Our loss around the same map. Its parameters are the weights of the other."""

    noise, levels = None, None

    def draw(self, extra, batch, rng):
        return self.latents(extra, batch["image_content"]), self.noise, self.levels

    def forward(self, params, extra, batch, x_BIHWC, t_BI, dropout_keys_B=None, clean_BIHWC=None):
        b, i = t_BI.shape
        images = ImageRows(batch["image_start"], self.form.rows)
        rows_BIRD = x_BIHWC.reshape(b, i, self.form.rows, 3) @ params["in"].T + params["in_bias"]
        x_BSD = images.put(params["embed"][batch["tokens"]], rows_BIRD)
        time_BSD = images.put(jnp.zeros_like(x_BSD), (1 - t_BI)[..., None, None] * jnp.ones((rows_BIRD.shape[2], 1)))
        h_BSD = x_BSD @ params["map"].T + time_BSD * params["of_time"]
        at_BR, targets_BR, weights_BR = self.targets(batch)
        h_BRD = jnp.take_along_axis(h_BSD, at_BR[..., None], axis=1)
        total, rows = cross_entropy(h_BRD, params["head"], targets_BR, weights_BR, chunk=32)
        flow_BIRC = images.take(h_BSD) @ params["out"].T
        return total, rows, -flow_BIRC.reshape(x_BIHWC.shape)


def weights(toy):
    named = {
        "embed": toy.text_embed.weight,
        "in": toy.latent_to_model_projs[0].weight,
        "in_bias": toy.latent_to_model_projs[0].bias,
        "map": toy.transformer.map.weight,
        "of_time": toy.transformer.of_time,
        "out": toy.model_to_latent_projs[0].weight,
        "head": toy.to_text_logits.weight,
    }
    return {name: p.detach().numpy().copy() for name, p in named.items()}, named


def samples(rng):
    """Texts and images (uint8) in turns, of several lengths and numbers of images."""
    text = lambda n: rng.integers(0, TEXT, n)  # noqa: E731
    image = lambda: rng.integers(0, 256, (SIDE, SIDE, 3)).astype(np.uint8)  # noqa: E731
    return [[text(4), image(), text(2), image()], [image(), text(7)], [text(3), image(), image(), text(1)], [text(5)]]


def to_float(image):
    return image.astype(np.float32) / np.float32(127.5) - 1


def spelled(sample, toy):
    """A sample in their grammar: (ids, where images start). Around an image: mark, shape, begin; end."""
    ids, starts = [toy.sos_id], []
    for part in sample:
        if part.dtype == np.uint8:
            ids += [toy.meta_id, *(toy.meta_id + 1 + ord(c) for c in f"{SIDE},{SIDE}"), toy.som_ids[0]]
            starts.append(len(ids))
            ids += [0] * IMAGES + [toy.eom_ids[0]]
        else:
            ids += part.tolist()
    return np.array([*ids, toy.eos_id], np.int32), starts


def batch_of(rows, places):
    """Spelled samples as the step takes them: all is learned but images and what follows their last position."""
    longest = max(len(ids) for ids, _ in rows)
    batch = {"tokens": np.zeros((len(rows), longest), np.int32)}
    batch["rows"] = np.full((len(rows), longest), -1, np.int32)
    batch["image_start"] = np.full((len(rows), places), -1, np.int32)
    for b, (ids, starts) in enumerate(rows):
        inside = np.zeros(len(ids) + 1, bool)
        for at in starts:
            inside[at : at + IMAGES] = True
        learned = np.flatnonzero(~inside[: len(ids) - 1] & ~inside[1 : len(ids)])
        batch["tokens"][b, : len(ids)], batch["rows"][b, : len(learned)] = ids, learned
        batch["image_start"][b, : len(starts)] = starts
    return batch


def test_masks_are_those_of_both_builders(theirs, torch):
    """A document in a row: that package packs none."""
    vocabulary, rng = Vocabulary.extend(TEXT, 0), np.random.default_rng(0)
    for rows in (1, 4, 9):
        dense = jax.jit(lambda at, start, rows=rows: visible(ImageRows(at, rows).visible(start), MOST))
        form = sequence.ImageForm("diffusion", rows, shape=(1,))
        for _ in range(8):
            number, segments = 0, []
            for _ in range(rng.integers(1, 7)):
                if rng.random() < 0.5:
                    segments.append(Image(np.zeros(1), number))
                    number += 1
                else:
                    segments.append(Text(rng.integers(0, TEXT, rng.integers(1, 9))))
            layout = sequence.lay_out(Document(tuple(segments)), vocabulary, form)
            s = len(layout)
            row = sequence.pack_row([layout], MOST, 6, vocabulary["PAD"], form)
            ours = dense(row["image_start"][None], row["start"][None])[0, :s, :s]
            places = torch.tensor([[(0, slot.start, slot.length) for slot in layout.slots] or [(0, 0, 0)]])
            q, k = torch.arange(s)[:, None], torch.arange(s)[None]
            np.testing.assert_array_equal(ours, theirs.naive_attn_mask(s, places)[0])
            np.testing.assert_array_equal(ours, theirs.transfusion_attn_mask(places)(0, 0, q, k))


def test_loss_and_gradients_are_composed_alike_for_the_same_times_and_noise(theirs, torch, toy, monkeypatch):
    """Text: mean over targets. Flow: mean over values, which with images of one size is that over images. There both
    are weighted by their share of all positions; here they are added with `loss_weights`."""
    rng = np.random.default_rng(1)
    batch, places = samples(rng), 2
    levels = rng.uniform(0.05, 0.95, (len(batch), places)).astype(np.float32)
    noise = rng.normal(size=(len(batch), places, SIDE, SIDE, 3)).astype(np.float32)
    counted = [sum(part.dtype == np.uint8 for part in sample) for sample in batch]
    drawn = iter([np.concatenate([noise[b, :n] for b, n in enumerate(counted)])])  # for all images at once
    monkeypatch.setattr(torch, "randn_like", lambda like: torch.tensor(next(drawn)).view(like.shape))
    given = [[torch.tensor(to_float(x) if x.dtype == np.uint8 else x) for x in sample] for sample in batch]
    seen = []
    hook = toy.text_embed.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    total, parts = toy(given, times=torch.tensor(1 - levels), return_breakdown=True)
    total.backward()
    hook.remove()
    assert next(drawn, None) is None

    rows = [spelled(sample, toy) for sample in batch]
    arrays = batch_of(rows, places)
    for b, (ids, starts) in enumerate(rows):  # the sequences are the same but for what stands in the place of images
        n = len(ids) - 1
        inside = np.isin(np.arange(n), [at + r for at in starts for r in range(IMAGES)])
        np.testing.assert_array_equal(np.where(inside, 0, seen[0][b][:n]), ids[:-1][:n])
        assert toy.transformer.called_with[b, : len(starts), 1].tolist() == starts
    arrays["image_content"] = np.zeros((len(batch), places, SIDE, SIDE, 3), np.uint8)
    for b, sample in enumerate(batch):
        for i, image in enumerate(x for x in sample if x.dtype == np.uint8):
            arrays["image_content"][b, i] = image
    arrays["image_learn"] = arrays["image_start"] >= 0
    transformer = replace(SIZES, vocab_size=len(toy.text_embed.weight))
    model = Toy(settings.Multimodal(transformer=transformer, image=FLOW), SIDE)
    model.noise, model.levels = noise, levels
    params, named = weights(toy)
    positions = sum(len(ids) for ids, _ in rows)

    @jax.jit
    def composed(params):
        sums, counts = model.terms(params, {}, arrays, None)
        flow = sums["diffusion"] / counts["diffusion"]
        return (sums["next_token"] + flow * counts["diffusion"] * IMAGES) / positions, (sums, counts, flow)

    (ours, (sums, counts, flow)), gradient = jax.value_and_grad(composed, has_aux=True)(params)
    assert int(counts["diffusion"]) == sum(counted) == 5
    np.testing.assert_allclose(sums["next_token"] / counts["next_token"], parts.text.item(), rtol=1e-6)
    np.testing.assert_allclose(flow, parts.flow[0].item(), rtol=1e-6)
    np.testing.assert_allclose(ours, total.item(), rtol=1e-6)
    for name, p in named.items():
        expected = p.grad.numpy()
        assert np.abs(expected).max() > 1e-3
        np.testing.assert_allclose(gradient[name], expected, atol=1e-6, err_msg=name)


def test_a_text_alone_has_the_loss_over_ids_of_text(torch, toy):
    ids = np.random.default_rng(2).integers(0, TEXT, (3, 12))
    params, _ = weights(toy)
    with torch.no_grad():
        expected = toy.forward_text(torch.tensor(ids)).item()
    h_BRD = params["embed"][ids[:, :-1]] @ params["map"].T
    total, _ = cross_entropy(h_BRD, params["head"][:TEXT], ids[:, 1:], np.ones(ids[:, 1:].shape), chunk=16)
    np.testing.assert_allclose(total / ids[:, 1:].size, expected, rtol=1e-6)


def test_text_id_by_id_through_a_cache_is_the_whole_text_at_once(theirs, torch):
    """In either package: the networks between are not the same."""
    ids = np.random.default_rng(3).integers(0, TEXT, (2, 14)).astype(np.int32)
    other = theirs.Transfusion(num_text_tokens=TEXT, transformer={"dim": 32, "depth": 3, "dim_head": 8, "heads": 4})
    shuffled(torch, other)
    with torch.no_grad():
        whole = other.forward_text(torch.tensor(ids, dtype=torch.long), return_loss=False).numpy()
        cache, steps = None, []
        for column in torch.tensor(ids, dtype=torch.long).split(1, dim=1):
            out, cache = other.forward_text(column, return_loss=False, cache=cache, return_kv_cache=True)
            steps.append(out.numpy())
    assert np.ptp(whole) > 0.5
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, atol=1e-5)

    boxed = jax.eval_shape(lambda: backbone.init(SIZES, jax.random.key(0)))
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape, scale=0.2).astype(np.float32), split(boxed)[0])
    position = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    module = backbone.Backbone(SIZES)
    whole = module.apply({"params": params}, ids, position, spans.causal(ids.shape[1]), method="everything")
    c, decoding = backbone.for_decoding(SIZES, params)

    @jax.jit
    def step(column_B1, at, cache):
        def run(m):
            h_B1D, new = m(m.embed(column_B1), jnp.full_like(column_B1, at), spans.causal(1, offset=at), cache)
            return m.logits(h_B1D), new

        return backbone.Backbone(c).apply({"params": decoding}, method=run)

    cache, steps = backbone.empty_cache(c, *ids.shape), []
    for at in range(ids.shape[1]):
        out, cache = step(ids[:, at : at + 1], at, cache)
        steps.append(out)
    assert np.ptp(whole) > 0.5
    np.testing.assert_allclose(np.concatenate(steps, axis=1), whole, atol=1e-5)
