"""Text and images in turns, where images are drawn block by block (`blockwise_model`).

A block is denoised beside the cache and then goes into it as it is; with guidance the cache that knows no prompt gets
it too, since what a clean block leaves there depends on all that it saw.

Legend: as in `segments`; N blocks of an image, r rows of a block, P values of a row.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax.diffusion import solvers
from ddt_jax.multimodal.segments import Segments, State
from ddt_jax.nn import kv_cache
from ddt_jax.nn.spans import Spans


class BlockSegments(Segments):
    """As `Segments`."""

    def draw(
        self, weights, state: State, seeds_B, number_B, drawing_B, guidance: float, unconditional: dict | None
    ) -> tuple[State, Any]:
        noise_BHWC, keys_B, empty = self._begun(weights, seeds_B, number_B, guidance, unconditional)
        noise = self.model.to_blocks(noise_BHWC[:, None])[:, 0].swapaxes(0, 1)
        caches = [state.cache]
        if empty is not None:
            caches.append(self._own(empty, len(seeds_B)))

        def one(caches, given):
            noise_BRP, n = given

            def predict(x_BRP, t):
                found = [self._denoised(weights, cache, x_BRP, t, n) for cache in caches]
                return solvers.guide(*found, guidance) if guidance != 1 else found[0]

            keys = jax.vmap(lambda key: jax.random.fold_in(key, n))(keys_B)
            block_BRP = self.model.process.solve(predict, noise_BRP, keys)
            return [self._with(weights, cache, block_BRP, n) for cache in caches], block_BRP

        caches, blocks_NBRP = jax.lax.scan(one, caches, (noise, jnp.arange(self.model.blocks)))
        latents_BHWC = self.model.from_blocks(blocks_NBRP.swapaxes(0, 1))
        return self._ended(weights, state, caches[0], drawing_B), latents_BHWC

    def _own(self, cache: kv_cache.Cache, rows: int) -> kv_cache.Cache:
        """A cache of one row for each of so many, with room for an image."""

        def grown(x_BGTE):
            x_BGTE = jnp.pad(x_BGTE, ((0, 0), (0, 0), (0, self.model.form.rows), (0, 0)))
            return jnp.broadcast_to(x_BGTE, (rows, *x_BGTE.shape[1:]))

        keys, values = (tuple(map(grown, x)) for x in (cache.keys, cache.values))
        return kv_cache.Cache(keys, values, jnp.broadcast_to(cache.length, (rows,)))

    def _denoised(self, weights, cache, x_BRP, t, number):
        """What is predicted of blocks of that number, which stand behind a cache."""
        b, r = x_BRP.shape[:2]
        beside, at_B1 = kv_cache.Beside(cache), cache.length[:, None]
        own = jnp.full((1, 1), beside.slots)
        visible = Spans(jnp.zeros((1, 1), jnp.int32), at_B1, own, own + r)
        rows_BRD = self._rows(weights, x_BRP, t, number)
        h_BRD = self._apply(weights, lambda m: m(rows_BRD, at_B1 + jnp.arange(r), visible, beside)[0])
        return self.model.values_of(weights.coder, h_BRD[:, None])[:, 0, 0]

    def _with(self, weights, cache, block_BRP, number) -> kv_cache.Cache:
        """A cache with clean blocks of that number behind it."""
        at_B1, r = cache.length[:, None], block_BRP.shape[1]
        visible = Spans(jnp.zeros((1, 1), jnp.int32), at_B1 + r)
        rows_BRD = self._rows(weights, block_BRP, 0.0, number)
        return self._apply(weights, lambda m: m(rows_BRD, at_B1 + jnp.arange(r), visible, cache)[1])

    def _ended(self, weights, state: State, cache, drawing_B) -> State:
        """The state behind images that are in the cache, and EOV."""
        b, at_B1 = len(drawing_B), cache.length[:, None]
        visible = Spans(jnp.zeros((1, 1), jnp.int32), at_B1 + 1)

        def run(m):
            h_BSD, new = m(m.embed(jnp.full((b, 1), self._end)), at_B1, visible, cache)
            return m.logits(h_BSD[:, -1]), new

        return self._moved(state, *self._apply(weights, run), drawing_B, self.model.form.rows + 1)

    def _rows(self, weights, block_BRP, t, number):
        t = jnp.broadcast_to(jnp.asarray(t, np.float32), (len(block_BRP), 1, 1))
        return self._typed(weights, self.model.rows_of(weights.coder, block_BRP[:, None, None], t, number)[:, 0])
