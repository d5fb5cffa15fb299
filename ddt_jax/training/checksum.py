"""Checksums of arrays that do not depend on how they are laid out over devices.

Each element is hashed together with its index and the hashes are added modulo 2³²; addition does not care in which
order or on which device it happens. Two such sums with different constants make 64 bits. They are computed on the
devices from the live arrays, so that they cover the whole way device → disk → device, which storage formats do not: a
flipped bit in a data file is restored without a word.
"""

import jax
import jax.numpy as jnp
import numpy as np


def _mix(x):
    """A bijection of uint32 in which every input bit moves about half of the output bits (murmur3's finaliser)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(x):
    """The bits of an array as uint32 [..., words per element]."""
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    size = x.dtype.itemsize
    if size > 4:
        return jax.lax.bitcast_convert_type(x, jnp.uint32)
    unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[size]
    return jax.lax.bitcast_convert_type(x, unsigned).astype(jnp.uint32)[..., None]


@jax.jit  # once per shape: one program of all arrays of a small model took half a minute to compile
def _array_checksum(x):
    words = _words(x)
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= words.shape[dim]
    return jnp.stack(
        [jnp.sum(_mix(_mix(index ^ jnp.uint32(seed)) + words), dtype=jnp.uint32) for seed in (0x9E3779B9, 0x7F4A7C15)]
    )


def checksums(tree) -> dict[str, str]:
    """One 64-bit checksum, as hex, for each array of a tree, by its path.

    Args:
      tree: arrays of any sharding and of a type of 1, 2, 4 or 8 bytes.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        # Fetched one by one: many small programs with collectives in flight at once can wait for each other on CPUs.
        value = np.asarray(jax.device_get(_array_checksum(leaf)), np.uint32)
        found[jax.tree_util.keystr(path, simple=True, separator="/")] = value.tobytes().hex()
    return found
