"""Where rows of images lie among those of text, on the device: put in, taken out, and seen by each other.

A batch says where each image starts; everything else follows from that. No array here is as large as S x S or S x I.

Legend: B batch, S positions, I images of an example, R rows of an image, D width.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ddt_jax.mesh import constrain_batch
from ddt_jax.nn import spans


class ImageRows(NamedTuple):
    """Attributes:
    start_BI: int32, where images start, rising, and behind those -1 for unused entries.
    rows: R.
    """

    start_BI: Any
    rows: int

    def of(self, length: int):
        """For each of so many positions: (number of the last image that has started, how far behind its start, whether
        the position is in it), each [B, S]."""
        at_BI = jnp.where(self.start_BI < 0, length, self.start_BI)
        begins_BS = jax.vmap(lambda at: jnp.zeros((length + 1,), jnp.int32).at[at].add(1))(at_BI)[:, :length]
        begun_BS = jnp.cumsum(begins_BS, axis=1)
        number_BS = jnp.maximum(begun_BS - 1, 0)
        offset_BS = jnp.arange(length, dtype=jnp.int32) - jnp.take_along_axis(at_BI, number_BS, axis=1)
        return number_BS, offset_BS, (begun_BS > 0) & (offset_BS < self.rows)

    def put(self, x_BSD, images_BIRD):
        """x with the rows of images in their places."""
        number_BS, offset_BS, inside_BS = self.of(x_BSD.shape[1])
        from_BS = jnp.where(inside_BS, number_BS * self.rows + offset_BS, 0)
        images = images_BIRD.reshape(images_BIRD.shape[0], -1, images_BIRD.shape[-1])
        own_BSD = jnp.take_along_axis(images, from_BS[..., None], axis=1).astype(x_BSD.dtype)
        return constrain_batch(jnp.where(inside_BS[..., None], own_BSD, x_BSD))

    def take(self, h_BSD):
        """[B, I, R, D]: what stands in the places of images; of unused entries anything."""
        at_BIR = jnp.maximum(self.start_BI, 0)[..., None] + jnp.arange(self.rows, dtype=jnp.int32)
        at_BN = jnp.minimum(at_BIR, h_BSD.shape[1] - 1).reshape(at_BIR.shape[0], -1)
        taken = jnp.take_along_axis(h_BSD, at_BN[..., None], axis=1)
        return constrain_batch(taken.reshape(*at_BIR.shape, h_BSD.shape[-1]))

    def visible(self, start_BS, given_BS=None) -> spans.Spans:
        """Causal rows, of which those of an image see all of it.

        Args:
          start_BS: where the document of each position starts.
          given_BS: one behind the end of the prompt that a position is in, which then sees all of it; None: they
            don't.
        """
        _, offset_BS, inside_BS = self.of(start_BS.shape[1])
        here_S = jnp.arange(start_BS.shape[1], dtype=jnp.int32)
        end_BS = jnp.where(inside_BS, here_S - offset_BS + self.rows, 0)
        if given_BS is not None:
            end_BS = jnp.maximum(end_BS, given_BS)
        longest = self.rows if given_BS is None else None
        return spans.bidirectional(end_BS, start=start_BS, longest=longest)
