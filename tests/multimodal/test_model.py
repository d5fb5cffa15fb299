from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal.batches import RowBatcher, RowLimits
from ddt_jax.multimodal.model import Multimodal
from ddt_jax.multimodal.records import RecordDocuments
from ddt_jax.multimodal.row_model import FROZEN
from ddt_jax.multimodal.sequence import ImageForm
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.nn import spans
from ddt_jax.nn.params import split

SIZES = settings.Transformer(vocab_size=0, width=32, depth=2, heads=2, kv_heads=1, mlp_width=64, loss_chunk=64)


@pytest.fixture(scope="module")
def vocabulary(text):
    return Vocabulary.extend(text.vocab_size, 512, text_fingerprint=text.fingerprint)


@pytest.fixture(scope="module")
def batch(scenes_codes, text, vocabulary):
    shares = {"text_to_image": 1.0, "image_to_text": 1.0}
    source = {"0": RecordDocuments(scenes_codes, text, shares, 0)}
    form = ImageForm("codes", 16)
    made, errors = RowBatcher(source, {"0": 1.0}, vocabulary, form, RowLimits(128), seed=0, batch_size=8).make(0)
    assert not errors
    return made


def make(vocabulary, **changes):
    image = settings.CodeImages(num_tokens=16, codebook_size=512)
    transformer = replace(SIZES, vocab_size=vocabulary.size, **changes)
    return Multimodal(settings.Multimodal(transformer=transformer, image=image))


def state(model):
    def init():
        params, extra = model.init(jax.random.key(0))
        return split(params)[0], {k: split(v)[0] for k, v in extra.items()}

    return jax.jit(init)()


def given(model, batch):
    return {name: jnp.asarray(batch[name]) for name in model.inputs}


def test_terms_are_those_of_logits_over_every_target(vocabulary, batch):
    model = make(vocabulary)
    params, extra = state(model)
    sums, counts, stats = jax.jit(model.loss_fn)(params, extra, given(model, batch), jax.random.key(1))
    # Document by document, so that nothing of packing is shared with what is tested.
    nll, right, codes, logits = [], [], [], plain_logits(model, params)
    for row in range(8):
        for document in range(batch["document"][row].max() + 1):
            here = batch["document"][row] == document
            ids = batch["tokens"][row][here]
            logp = np.asarray(jax.nn.log_softmax(logits(ids), axis=-1))
            for i in np.flatnonzero(batch["target"][row][here]):
                nll.append(-logp[i - 1, ids[i]])
                right.append(logp[i - 1].argmax() == ids[i])
                codes.append(ids[i] >= vocabulary.codes_start)
    nll, right, codes = map(np.array, (nll, right, codes))
    assert codes.sum() > 100 and (~codes).sum() > 100 and stats == {}
    ratio = {name: float(sums[name] / counts[name]) for name in sums}
    np.testing.assert_allclose(ratio["next_token"], nll.mean(), rtol=1e-5)
    np.testing.assert_allclose(ratio["text_nll"], nll[~codes].mean(), rtol=1e-5)
    np.testing.assert_allclose(ratio["image_bits"], nll[codes].mean() / np.log(2), rtol=1e-5)
    np.testing.assert_allclose(ratio["text_accuracy"], right[~codes].mean(), rtol=1e-6)
    np.testing.assert_allclose(ratio["image_accuracy"], right[codes].mean(), rtol=1e-6)
    np.testing.assert_allclose(ratio["targets_used"], len(nll) / (8 * 128), rtol=1e-6)


def plain_logits(model, params, length=64):
    """ids [N] → logits [N, V] without packing: positions from 0, causal."""

    @jax.jit
    def run(ids):
        positions = jnp.arange(length, dtype=jnp.int32)[None]
        return model.module.apply({"params": params}, ids, positions, spans.causal(length), method="everything")[0]

    return lambda ids: np.asarray(run(np.pad(ids, (0, length - len(ids)))[None]))[: len(ids)]


def test_parts_of_a_batch_add_up_to_it(vocabulary, batch):
    model = make(vocabulary)
    params, extra = state(model)
    whole = given(model, batch)
    loss = jax.jit(model.loss_fn)
    all_sums, all_counts, _ = loss(params, extra, whole, jax.random.key(1))
    parts = [loss(params, extra, {k: v[i::2] for k, v in whole.items()}, jax.random.key(1)) for i in range(2)]
    for name in all_sums:
        np.testing.assert_allclose(sum(p[0][name] for p in parts), all_sums[name], rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(sum(p[1][name] for p in parts), all_counts[name], rtol=1e-6, err_msg=name)


def test_with_lora_only_the_updates_and_what_is_named_are_parameters(vocabulary, batch):
    model = make(vocabulary, lora=settings.LoRA(rank=2, dropout=0.1, whole=("embed", "norms")))
    params, extra = state(model)
    names = {p[-1].key for p, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert names == {"lora_a", "lora_b", "embed", "scale"} and extra[FROZEN].keys() == {"blocks", "head"}

    def loss(params):
        return model.loss_fn(params, extra, given(model, batch), jax.random.key(1))[0]["next_token"]

    grads = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(grads))
    moved = {p[-1].key for p, x in jax.tree_util.tree_leaves_with_path(grads) if jnp.abs(x).max() > 0}
    assert moved == {"lora_b", "embed", "scale"}  # updates begin at zero, so at first a alone moves nothing


def test_sizes_that_are_not_known_are_one_line(vocabulary):
    with pytest.raises(UserError, match="name codes in sequences.sources"):
        Multimodal(settings.Multimodal())
    image = settings.CodeImages(num_tokens=16, codebook_size=512, code_vectors=True)
    with pytest.raises(UserError, match="name codes in sequences.sources"):
        Multimodal(settings.Multimodal(transformer=replace(SIZES, vocab_size=vocabulary.size), image=image))


def test_where_prompts_are_whole_their_words_see_each_other_and_answers_stay_causal(vocabulary, batch):
    model = make(vocabulary)
    whole = Multimodal(replace(model.config, whole_prompts=True))
    params, extra = state(model)
    # A row that begins with a caption, whose image begins behind it at `image`.
    row = next(r for r in range(8) if batch["image_start"][r, 0] == batch["given"][r, 0] + 1 > 5)
    image, rows = batch["image_start"][row, 0], batch["rows"][row]

    def moved(model, at, token):
        """Which positions predict their targets differently once another token stands at one."""
        changed = batch["tokens"].copy()
        assert changed[row, at] != token
        changed[row, at] = token
        nll = [
            model.score(params, extra, given(whole, batch | {"tokens": tokens}))[1].nll[row]
            for tokens in (batch["tokens"], changed)
        ]
        return set(rows[(nll[0] != nll[1]) & (rows >= 0)].tolist())

    word, code = image - 2, image + 2  # the last word before BOV, the third code
    other_word = 5 + int(batch["tokens"][row, word] == 5)
    other_code = vocabulary.codes_start + (batch["tokens"][row, code] - vocabulary.codes_start + 1) % 512
    assert min(moved(model, word, other_word)) == word - 1  # whose target it is
    assert min(moved(whole, word, other_word)) == 0
    assert min(moved(whole, code, other_code)) == code - 1
