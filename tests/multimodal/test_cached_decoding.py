"""A cache changes nothing: each kind of document, prompt at once and then token by token, against the whole at once.

In fp64: these networks amplify rounding, in fp32 by other amounts on other processors.
"""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.multimodal import backbone, documents
from ddt_jax.multimodal.documents import Image, Text
from ddt_jax.multimodal.model import Multimodal
from ddt_jax.multimodal.sequence import ImageForm, lay_out, lay_out_prompt
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.nn import spans
from ddt_jax.nn.params import split

FORM = ImageForm("codes", 4)
VOCABULARY = Vocabulary.extend(40, 16)
SLOTS = 48  # of the cache and of the sequences, which are filled up, so that one program serves all kinds
WORDS, ANSWER = np.arange(5), np.array([9, 3, 7])
A, B = Image(np.array([1, 7, 7, 2])), Image(np.array([15, 0, 4, 4]), 1)
KINDS = {
    "text_to_image": documents.text_to_image(WORDS, A),
    "image_to_text": documents.image_to_text(WORDS, A),
    "text_only": documents.text_only(WORDS),
    "image_only": documents.image_only(A),
    "interleaved": documents.interleaved([Text(WORDS), A, Text(ANSWER), B]),
    "editing": documents.editing([A], WORDS, B),
    "question_answering": documents.question_answering([A], WORDS, ANSWER),
    "conversation": documents.chat(
        [("USER", [Text(WORDS)]), ("ASSISTANT", [A]), ("USER", [Text(ANSWER)]), ("ASSISTANT", [B, Text(WORDS)])]
    ),
}


@pytest.fixture(scope="module", params=[False, True], ids=["causal", "whole_prompts"])
def run(request):
    with jax.enable_x64(True):
        yield made(request.param)


def made(whole_prompts):
    """(logits of a whole document, logits through the cache), both [N, V]; every option of codes is on."""
    sizes = settings.Transformer(vocab_size=VOCABULARY.size, width=32, depth=2, heads=4, kv_heads=2, mlp_width=64)
    image = settings.CodeImages(
        num_tokens=FORM.rows, codebook_size=16, code_width=3, code_vectors=True, code_places=True
    )
    model = Multimodal(settings.Multimodal(transformer=sizes, image=image, whole_prompts=whole_prompts))
    params, extra = (split(tree)[0] for tree in model.init(jax.random.key(1)))
    params = jax.tree.map(lambda x: 4 * x.astype(jnp.float64), params)  # so that what is seen matters
    extra = jax.tree.map(lambda x: jnp.asarray(np.random.default_rng(0).normal(size=x.shape)), extra)
    c, plain = backbone.for_decoding(sizes, model.all_params(params, extra))
    places, module, empty = model.places(params, extra), backbone.Backbone(c), backbone.empty_cache(c, 1, SLOTS)

    @jax.jit
    def forward(tokens_1S, position_1S, given_1S, end_1S, cache, before):
        at_1S = places.of(tokens_1S, 0 if before is None else before.place_B)
        visible = spans.Spans(jnp.zeros_like(end_1S), end_1S)

        def go(m):
            x = m.embed(tokens_1S)
            if before is None:
                x = places.add(x, tokens_1S, at_1S, given_1S if whole_prompts else None)
                written = places.written(tokens_1S, at_1S, x.dtype)
            else:
                x, written = places.add_next(x, tokens_1S, before)
            h, new = m(x, position_1S, visible, cache)
            return m.logits(h, places.ahead(h, at_1S)), new, written

        return module.apply({"params": plain}, method=go)

    def ends(layout):
        causal = np.arange(1, len(layout) + 1)
        return np.maximum(causal, layout.given) if whole_prompts else causal

    def arrays(layout):
        return layout.tokens, layout.position, layout.given, ends(layout)

    def whole(layout):
        fill = SLOTS - len(layout)
        filled = (np.pad(x, (0, fill))[None].astype(np.int32) for x in arrays(layout))
        return np.asarray(forward(*filled, None, None)[0])[0, : len(layout)]

    def cached(layout, prompt):
        cache = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, empty)
        before, found = None, []
        for low, high in ((0, prompt), *((i, i + 1) for i in range(prompt, len(layout)))):
            some = (x[None, low:high].astype(np.int32) for x in arrays(layout))
            logits, cache, before = forward(*some, cache, before)
            found.append(np.asarray(logits)[0])
        return np.concatenate(found)

    return whole, cached


@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_changes_no_logit_of_any_position(kind, run):
    whole, cached = run
    layout = lay_out(KINDS[kind], VOCABULARY, FORM)
    prompt = len(lay_out_prompt(KINDS[kind], VOCABULARY, FORM))
    expected = whole(layout)
    assert 0 < prompt < len(layout) and np.ptp(expected) > 1
    np.testing.assert_allclose(cached(layout, prompt), expected, atol=1e-12 * np.abs(expected).max(), rtol=0)
    # Another prompt does change them: what is compared is not blind to what stands before.
    other = replace(layout, tokens=np.where(np.arange(len(layout)) < prompt, 3, layout.tokens))
    assert np.abs(whole(other) - expected)[prompt:].max() > 1e-3
