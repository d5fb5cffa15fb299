"""Keys and values of earlier rows, as an explicit argument and result of a stack of decoder blocks.

Legend: L layers, B batch, G heads of keys and values, S new rows, T slots, E head dimension.
"""

from typing import Any

import flax
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Cache:
    """Slots for keys and values.

    Attributes:
      keys, values: for an unrolled stack a tuple with [B, G, T, E] of each layer; one array [L, B, G, T, E] for a
        scanned one. Inside a loop on the device the unrolled form is written and read in place; of the scanned one,
        reading copies a layer.
      length: slots in use, int32 scalar or [B]. New rows go behind them. What lies there is never read unless spans
        say so: rows that must not stay are forgotten by setting the length back.
    """

    keys: Any
    values: Any
    length: Any

    def write(self, layer, k_BGSE, v_BGSE):
        """(the cache with the new rows in one layer, all keys and all values of that layer [B, G, T, E]).

        Args:
          layer: index; of an unrolled stack a Python number.
        """
        keys, values = (self._put(x, layer, new) for x, new in ((self.keys, k_BGSE), (self.values, v_BGSE)))
        return self.replace(keys=keys, values=values), keys[layer], values[layer]

    def _put(self, slots, layer, new_BGSE):
        if isinstance(slots, tuple):
            written = _put_rows(slots[layer], new_BGSE.astype(slots[layer].dtype), self.length)
            return (*slots[:layer], written, *slots[layer + 1 :])
        new_BGSE = new_BGSE.astype(slots.dtype)
        if jnp.ndim(self.length) == 0:
            return jax.lax.dynamic_update_slice(slots, new_BGSE[None], (layer, 0, 0, self.length, 0))
        return slots.at[layer].set(_put_rows(slots[layer], new_BGSE, self.length))

    def advanced(self, rows: int):
        """With so many more slots in use."""
        return self.replace(length=self.length + rows)


@flax.struct.dataclass
class Beside:
    """A cache that new rows see and leave as it is: their keys and values stand behind all of its slots.

    So a loop that computes the same rows again and again (an image that is being denoised) carries no cache. Spans have
    two intervals, [0, length) and what is seen of the new rows, from `slots` on.

    Attributes:
      cache: of as many rows as are computed, or of one that all of them share; of an unrolled stack.
    """

    cache: Cache

    @property
    def slots(self) -> int:
        """T."""
        return self.cache.keys[0].shape[-2]

    def write(self, layer, k_BGSE, v_BGSE):
        """As `Cache.write`; nothing is written."""
        return self, *(
            self._behind(x[layer], new) for x, new in ((self.cache.keys, k_BGSE), (self.cache.values, v_BGSE))
        )

    def _behind(self, slots_BGTE, new_BGSE):
        slots_BGTE = jnp.broadcast_to(slots_BGTE, (new_BGSE.shape[0], *slots_BGTE.shape[1:]))
        return jnp.concatenate([slots_BGTE, new_BGSE.astype(slots_BGTE.dtype)], axis=2)

    def advanced(self, rows: int):
        del rows
        return self


def _put_rows(slots_BGTE, new_BGSE, length):
    put = jax.lax.dynamic_update_slice_in_dim
    if jnp.ndim(length) == 0:
        return put(slots_BGTE, new_BGSE, length, axis=2)
    return jax.vmap(lambda slots, new, at: put(slots, new, at, axis=1))(slots_BGTE, new_BGSE, length)


def empty(depth: int, shape_BGTE: tuple[int, ...], dtype, *, stacked: bool) -> Cache:
    """A cache with nothing in it. stacked: for a scanned stack."""

    def slots():
        if stacked:
            return jnp.zeros((depth, *shape_BGTE), dtype)
        return tuple(jnp.zeros(shape_BGTE, dtype) for _ in range(depth))

    return Cache(slots(), slots(), jnp.int32(0))
