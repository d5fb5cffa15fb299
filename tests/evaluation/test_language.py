from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.evaluation import language
from ddt_jax.multimodal import documents, sequence
from ddt_jax.multimodal.documents import Image, Text
from ddt_jax.multimodal.sequence import ImageForm
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.nn.cross_entropy import Rows

K = 4
FORM, VOCABULARY = ImageForm("codes", K), Vocabulary.extend(20, 8)


class Knowing:
    """Predicts code c at place p of an image right if c == p, with p + 1 nats; text costs 1 nat, after an image 2."""

    inputs = ("tokens", "position", "start", "rows", "slot")
    config = SimpleNamespace(image=settings.CodeImages(num_tokens=K, codebook_size=8))

    def score(self, params, extra, batch):
        at = jnp.maximum(batch["rows"], 0) + 1
        token = jnp.take_along_axis(batch["tokens"], at, axis=1)
        code = token - VOCABULARY.codes_start
        seen = jnp.cumsum(batch["tokens"] == VOCABULARY["EOV"], axis=1)
        seen -= jnp.take_along_axis(seen, batch["start"], axis=1)
        after = jnp.take_along_axis(seen, at - 1, axis=1) > 0
        nll = jnp.where(code >= 0, code + 1.0, 1.0 + after)
        return 0.0, Rows(nll, code == 2), code >= 0


@pytest.fixture(scope="module")
def batch():
    text, codes = np.arange(3), np.arange(K)
    rows = [
        [documents.text_to_image(text, Image(codes)), documents.image_to_text(text, Image(codes))],
        [documents.text_only(text), documents.interleaved([Text(text), Image(codes), Text(text), Image(codes)])],
    ]
    packed = []
    for row in rows:
        layouts = [sequence.lay_out(d, VOCABULARY, FORM) for d in row]
        one = sequence.pack_row(layouts, 40, 4, VOCABULARY["PAD"], FORM)
        packed.append(one | {"rows": sequence.target_rows(one["target"], 40)})
    batch = {name: np.stack([row[name] for row in packed]) for name in packed[0]}
    return batch | {"slot": np.arange(2, dtype=np.int32)}


def test_text_is_told_apart_by_images_before_it_and_codes_by_their_place(batch):
    mesh = meshes.make_mesh(settings.Mesh(data=2, fsdp=1), jax.devices()[:2])
    found = language.held_out(Knowing(), {}, {}, [batch, batch], mesh=mesh)
    # After an image: EOS of the first; text and EOS of the second; in the last text, BOV, EOV and EOS. EOV itself is
    # predicted from inside its image.
    assert found["text_perplexity_after_image"] == pytest.approx(np.exp(2.0), rel=0.2)
    assert found["text_perplexity_without_image"] == pytest.approx(np.exp(1.0))
    assert found["text_perplexity_without_image"] < found["text_perplexity"] < found["text_perplexity_after_image"]
    np.testing.assert_allclose(found["image_bits_by_position"], np.arange(1, K + 1) / np.log(2), rtol=1e-6)
    assert found["image_accuracy_by_position"] == [0, 0, 1, 0]
    assert found["image_bits"] == pytest.approx(np.arange(1, K + 1).mean() / np.log(2))
    # This model looks at the code alone: an order tells it nothing, and the mean stays.
    assert found["image_bits_lost_by_shuffling"] == pytest.approx(0, abs=1e-6)
    assert found["tokens"] == 2 * batch["target"].sum()


class Marking(Knowing):
    """As `Knowing`, but a mark costs 5 nats."""

    def score(self, params, extra, batch):
        total, rows, image = super().score(params, extra, batch)
        token = jnp.take_along_axis(batch["tokens"], jnp.maximum(batch["rows"], 0) + 1, axis=1)
        is_mark = (token >= VOCABULARY.text_size) & ~image
        return total, Rows(jnp.where(is_mark, 5.0, rows.nll), rows.right), image


def test_plain_text_is_that_without_marks(batch):
    mesh = meshes.make_mesh(settings.Mesh(data=1, fsdp=1), jax.devices()[:1])
    marks = [id_ for _, id_ in VOCABULARY.special]
    found = language.held_out(Marking(), {}, {}, [batch], mesh=mesh, marks=marks)
    # Three tokens each: in the first document, the third and the first text of the last; in the second and the last's
    # second text.
    assert found["plain_perplexity_without_image"] == pytest.approx(np.exp(1.0))
    assert found["plain_perplexity_after_image"] == pytest.approx(np.exp(2.0))
    assert found["plain_perplexity"] == pytest.approx(np.exp((9 * 1 + 6 * 2) / 15))
    assert found["text_perplexity"] > found["plain_perplexity"] + 1


def test_figures_of_what_is_not_there_are_left_out(batch):
    only = {name: value[1:] for name, value in batch.items()}
    only["rows"] = np.where(only["rows"] < 4, only["rows"], -1)  # the document of text alone
    mesh = meshes.make_mesh(settings.Mesh(data=1, fsdp=1), jax.devices()[:1])
    found = language.held_out(Knowing(), {}, {}, [only], mesh=mesh)
    assert "image_bits" not in found and "text_perplexity_after_image" not in found
    assert found["text_perplexity"] == pytest.approx(np.exp(1.0))


class Denoising(Knowing):
    """Errs by 1 at each image of a batch's first row and by 4 at those of others, half of it in the third quarter."""

    config = SimpleNamespace(image=settings.DiffusionImages())
    form = ImageForm("diffusion", K, shape=(2,))

    def score(self, params, extra, batch):
        found = super().score(params, extra, batch)
        return found[0], Rows(jnp.ones_like(found[1].nll), found[1].right), found[2]

    def terms(self, params, extra, batch, key):
        error = jnp.where(batch["slot"] == 0, 1.0, 4.0).sum() + 0.5 * jax.random.uniform(key)
        sums = {"next_token": 9.0, "diffusion": error, "mse_t50": 0.0, "mse_t75": error / 2, "images_used": 1.0}
        count = jnp.float32(batch["slot"].size)
        return sums, dict(zip(sums, (1.0, count, 0.0, count, 1.0), strict=True))


def test_what_is_noised_takes_the_place_of_codes(batch):
    """Sums over batches are divided by counts over batches; what was at no image is left out."""
    mesh = meshes.make_mesh(settings.Mesh(data=1, fsdp=1), jax.devices()[:1])
    codes = batch["tokens"] >= VOCABULARY.codes_start
    latents = batch | {"tokens": np.where(codes, VOCABULARY["PAD"], batch["tokens"])}
    last = {name: value[1:] for name, value in latents.items()}
    found = language.held_out(Denoising(), {}, {}, [latents, last], mesh=mesh)
    noise = sum(0.5 * float(jax.random.uniform(jax.random.fold_in(jax.random.key(0), i))) for i in range(2))
    assert found["diffusion"] == pytest.approx((1 + 4 + 4 + noise) / 3)
    assert found["mse_t75"] == pytest.approx(found["diffusion"] / 2) and "mse_t50" not in found
    assert found["text_perplexity"] == pytest.approx(np.e, rel=1e-5)
    assert not {name for name in found if name.startswith("image")} and "next_token" not in found
    assert found == language.held_out(Denoising(), {}, {}, [latents, last], mesh=mesh)
