"""Text and images in turns, written behind what is in a cache (Transfusion, arXiv 2408.11039 §3).

    prefill   prompts, with images as they are                        → state
    write     text, up to a stop                                      → state, tokens
    draw      noise, denoised in place; then the image as it is, EOV  → state, latents

Each is one compiled program for a shape, and none looks at the host. Rows of a batch have their own lengths: position p
of a row lies in slot p, and a row that has nothing to do in a segment stays as it is. A row's randomness is its seed's,
the position of a token's and the number of an image's alone, so an answer does not depend on its batch.

Legend: B rows, P longest prompt, I images of a prompt, N new tokens, R rows of an image, S new rows, T slots of the
cache, V vocabulary, D width, H height, W width and C channels of latents.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax import settings
from ddt_jax.diffusion import solvers
from ddt_jax.multimodal import backbone
from ddt_jax.multimodal.diffusion_model import PARAMS, DiffusionMultimodal
from ddt_jax.multimodal.generate import Generated, sample
from ddt_jax.multimodal.image_rows import ImageRows
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.nn import kv_cache
from ddt_jax.nn.layers import compute_dtype
from ddt_jax.nn.spans import Spans

_IMAGES = 0x7FFF_FFFF  # folded into a row's key for noise; tokens fold in their position


class Weights(NamedTuple):
    """Plain arrays: of the backbone, for decoding; of the coder; `extra`, of which the codec's are used."""

    backbone: Any
    coder: Any
    extra: Any


class State(NamedTuple):
    """Attributes:
    cache: its length is int32 [B].
    logits_BV: of what comes next. Behind BOV they mean nothing.
    """

    cache: kv_cache.Cache
    logits_BV: Any


class Segments:
    """See the module's docstring. Its methods are pure, to be jitted with all but arrays fixed.

    Args:
      context: positions that a row may have; no image begins that would not fit.

    Attributes:
      weights: of the run, first argument of all methods.
      slack: see `prefill`.
    """

    def __init__(self, model: DiffusionMultimodal, params, extra, vocabulary: Vocabulary, context: int):
        self.model, self.context = model, context
        c, all_params = model.config.transformer, model.all_params(params, extra)
        self.config, plain = backbone.for_decoding(c, all_params, computed=True)
        self.weights = Weights(plain, params[PARAMS], {k: v for k, v in extra.items() if k == "codec"})
        self._begin, self._end, self._stop, self._pad = (vocabulary[name] for name in ("BOV", "EOV", "EOS", "PAD"))
        self.slack = model.form.rows + 1
        self._module = backbone.Backbone(self.config)

    def prefill(self, weights: Weights, prompts: dict, slots: int) -> State:
        """Prompts through the model at once.

        Args:
          prompts: tokens, position, start, given, image_start, image_content of `sequence.pack_row`, one document in
            each row of P; and length int32 [B].
          slots: T: what a row may come to have, and `slack` more, where rows write that have nothing to do.
        """
        images = ImageRows(prompts["image_start"], self.model.form.rows)
        latents_BIHWC = self.model.latents(weights.extra, prompts["image_content"])
        rows_BIRD = self.model.clean_rows(weights.coder, latents_BIHWC)
        empty = backbone.empty_cache(self.config, len(prompts["tokens"]), slots)
        visible, length_B = self.model.visible(prompts), jnp.asarray(prompts["length"])

        def run(m):
            x_BSD = images.put(m.embed(prompts["tokens"]), rows_BIRD)
            h_BSD, cache = m(x_BSD, prompts["position"], visible, empty)
            last_BD = jnp.take_along_axis(h_BSD, (length_B - 1)[:, None, None], axis=1)[:, 0]
            return m.logits(last_BD), cache

        logits_BV, cache = self._apply(weights, run)
        return State(cache.replace(length=length_B), logits_BV)

    def write(
        self, weights: Weights, state: State, seeds_B, left_B, s: settings.Sampling, images: bool
    ) -> tuple[State, Generated]:
        """Text of each row up to EOS or, where there may be images, BOV, both included.

        Args:
          left_B: int32, how many tokens a row may still have; 0: it is not written to.
          s: how they are drawn; `tokens` is N.
          images: whether there may be any.
        """
        keys_B = jax.vmap(jax.random.key)(jnp.asarray(seeds_B))
        ids_V = np.arange(self.config.vocab_size)
        never_V = (ids_V == self._end) | (ids_V == self._begin) & (not images)
        whole = self.model.form.rows + 2  # of an image with its marks

        def unfinished(carry):
            n, *_, open_B = carry
            return (n < s.tokens) & jnp.any(open_B)

        def step(carry):
            n, (cache, logits_BV), tokens_BN, count_B, open_B = carry
            at_B = cache.length
            full_B1 = (at_B + whole > self.context)[:, None]
            hidden_BV = never_V | full_B1 & (ids_V == self._begin)
            token_B = sample(jnp.where(hidden_BV, -jnp.inf, logits_BV), jax.vmap(jax.random.fold_in)(keys_B, at_B), s)
            token_B = jnp.where(open_B, token_B, self._pad)
            tokens_BN = jax.lax.dynamic_update_slice(tokens_BN, token_B[:, None], (0, n))
            visible = Spans(jnp.zeros((1, 1), jnp.int32), at_B[:, None] + 1)

            def run(m):
                h_BSD, new = m(m.embed(token_B[:, None]), at_B[:, None], visible, cache)
                return m.logits(h_BSD[:, -1]), new

            state = self._moved(State(cache, logits_BV), *self._apply(weights, run), open_B, 1)
            count_B = count_B + open_B
            open_B = open_B & (token_B != self._stop) & (token_B != self._begin) & (count_B < left_B)
            return n + 1, state, tokens_BN, count_B, open_B

        blank = jnp.full((len(left_B), s.tokens), self._pad, jnp.int32)
        first = (jnp.int32(0), state, blank, jnp.zeros_like(left_B), left_B > 0)
        _, state, tokens_BN, count_B, _ = jax.lax.while_loop(unfinished, step, first)
        return state, Generated(tokens_BN, count_B)

    def draw(
        self, weights: Weights, state: State, seeds_B, number_B, drawing_B, guidance: float, unconditional: dict | None
    ) -> tuple[State, Any]:
        """An image of each row that ends with BOV, and EOV behind it.

        The image is denoised beside the cache, and then goes into it as it is, at noise level 0.

        Args:
          number_B: int32, how many images the row has drawn before.
          drawing_B: bool; other rows stay as they are, and what is drawn for them means nothing.
          guidance: g: u + g (c - u) of what is predicted without and with what stands before the image; 1 = none.
          unconditional: one row of prompts, as for `prefill`, that all rows share; for guidance.

        Returns:
          (state, latents [B, H, W, C]).
        """
        noise_BHWC, keys_B, empty = self._begun(weights, seeds_B, number_B, guidance, unconditional)
        before = [state.cache] if empty is None else [state.cache, empty]

        def predict(x_BHWC, t):
            found = [self._predict(weights, cache, x_BHWC, t) for cache in before]
            return solvers.guide(*found, guidance) if guidance != 1 else found[0]

        latents_BHWC = self.model.process.solve(predict, noise_BHWC, keys_B)
        return self._commit(weights, state, latents_BHWC, drawing_B), latents_BHWC

    def _begun(self, weights, seeds_B, number_B, guidance, unconditional):
        """(noise [B, H, W, C]; keys [B] of what solvers draw; the cache of the unconditional prompt, None without
        guidance)."""
        if guidance != 1 and unconditional is None:
            raise ValueError("guidance needs an unconditional prompt")

        def keys(seed, number):
            return jax.random.split(jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _IMAGES), number))

        keys_B2 = jax.vmap(keys)(jnp.asarray(seeds_B), number_B)
        noise_BHWC = jax.vmap(lambda key: jax.random.normal(key, self.model.latent_shape))(keys_B2[:, 0])
        empty = None
        if guidance != 1:
            empty = self.prefill(weights, unconditional, unconditional["tokens"].shape[1]).cache
        return noise_BHWC, keys_B2[:, 1], empty

    def _predict(self, weights, cache, x_BHWC, t):
        """What is predicted of images that stand behind a cache, which one row or each has of its own."""
        b, r = len(x_BHWC), self.model.form.rows
        rows_B1RD, way = self._coder(weights, x_BHWC[:, None], jnp.broadcast_to(t, (b, 1)), method="encode")
        beside, at_B1 = kv_cache.Beside(cache), cache.length[:, None]
        visible = Spans(
            jnp.zeros((1, 1), jnp.int32), at_B1, jnp.full((1, 1), beside.slots), beside.slots + self._seen()
        )
        position_BR = jnp.broadcast_to(at_B1 + jnp.arange(r), (b, r))

        def run(m):
            return m(self._typed(weights, rows_B1RD[:, 0]), position_BR, visible, beside)[0]

        h_BRD = self._apply(weights, run)
        shape = self.model.latent_shape[:2]
        return self._coder(weights, h_BRD[:, None], way, shape, method="decode")[:, 0]

    def _commit(self, weights, state, latents_BHWC, drawing_B):
        """The state behind images as they are, and EOV."""
        b, r, at_B1 = len(latents_BHWC), self.model.form.rows, state.cache.length[:, None]
        rows_B1RD = self.model.clean_rows(weights.coder, latents_BHWC[:, None])
        seen_S = np.append(self._seen(), np.int32(r + 1))
        visible = Spans(jnp.zeros((1, 1), jnp.int32), at_B1 + seen_S)

        def run(m):
            end_B1D = m.embed(jnp.full((b, 1), self._end))
            x_BSD = jnp.concatenate([self._typed(weights, rows_B1RD[:, 0]), end_B1D], axis=1)
            h_BSD, cache = m(x_BSD, at_B1 + jnp.arange(r + 1), visible, state.cache)
            return m.logits(h_BSD[:, -1]), cache

        return self._moved(state, *self._apply(weights, run), drawing_B, r + 1)

    def _moved(self, state, logits_BV, cache, chosen_B, rows):
        """The state with new rows where they are chosen; elsewhere they lie behind what is in use."""
        length_B = state.cache.length + rows * chosen_B
        return State(cache.replace(length=length_B), jnp.where(chosen_B[:, None], logits_BV, state.logits_BV))

    def _seen(self):
        """How many rows of its image each of them sees, int32 [1, R]."""
        r = self.model.form.rows
        causal = self.model.config.image.attention == "causal"
        return (np.arange(1, r + 1) if causal else np.full(r, r)).astype(np.int32)[None]

    def _apply(self, weights, run):
        return self._module.apply({"params": weights.backbone}, method=run)

    def _coder(self, weights, *arguments, method):
        return self.model.coder.apply({"params": weights.coder}, *arguments, method=method)

    def _typed(self, weights, rows):
        """Rows of an image in the type of those of text."""
        return rows.astype(compute_dtype(self.config.dtype) or weights.backbone["embed"].dtype)
