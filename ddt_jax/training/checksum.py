"""Checksums of arrays that do not depend on how they are laid out over devices.

Each element is hashed together with its index and the hashes are added modulo 2³²; addition does not care in which
order or on which device it happens. Two such sums with different constants make 64 bits. They are computed on the
devices from the live arrays, so that they cover the whole way device → disk → device, which storage formats do not: a
flipped bit in a data file is restored without a word.

Because they only add, the sums of the parts of an array make the sum of the whole: `part_sums` takes a block that was
read from a file, in NumPy, wherever in the array it lies.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax.training import offload

_SEEDS = (np.uint32(0x9E3779B9), np.uint32(0x7F4A7C15))
_PIECE = 1 << 20  # elements that `part_sums` holds indices and hashes of at once


def _mix(x):
    """A bijection of uint32 in which every input bit moves about half of the output bits (murmur3's finaliser)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
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
    words = _words(offload.fetched(x))
    index = jnp.zeros(words.shape, jnp.uint32)
    stride = 1
    for dim in reversed(range(words.ndim)):
        index += jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim) * jnp.uint32(stride % 2**32)
        stride *= words.shape[dim]
    return jnp.stack([jnp.sum(_mix(_mix(index ^ seed) + words), dtype=jnp.uint32) for seed in _SEEDS])


def checksums(tree) -> dict[str, str]:
    """One 64-bit checksum, as hex, for each array of a tree, by its path.

    Args:
      tree: arrays of any sharding and of a type of 1, 2, 4 or 8 bytes.
    """
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        sums = found[jax.tree_util.keystr(path, simple=True, separator="/")] = _array_checksum(leaf)
        # Many small programs with collectives in flight at once can wait for each other on CPUs.
        if len(sums.sharding.device_set) > 1 and jax.default_backend() == "cpu":
            sums.block_until_ready()
    return {name: as_hex(value) for name, value in jax.device_get(found).items()}


def as_hex(sums) -> str:
    """How `checksums` writes the two sums of an array."""
    return np.asarray(sums, np.uint32).tobytes().hex()


def part_sums(block: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
    """What a block adds to the two sums of its array. On the host, with a few MB beside the block.

    Args:
      block: of a type of 1, 2, 4 or 8 bytes.
      start: index of its first element in the array.
      shape: of the whole array.

    Returns:
      uint32 [2], to be added modulo 2³² to those of the other blocks.
    """
    total = np.zeros(2, np.uint32)
    strides = [int(np.prod(shape[d + 1 :], dtype=np.uint64)) for d in range(len(shape))]
    for piece, at in _pieces(block, tuple(start)):
        words = _host_words(piece)
        index = np.zeros((*piece.shape, 1), np.uint64)
        for d, (first, stride) in enumerate(zip(at, strides, strict=True)):
            along = (np.arange(first, first + piece.shape[d], dtype=np.uint64) * np.uint64(stride)).reshape(-1, 1)
            index += along.reshape([-1 if axis == d else 1 for axis in range(index.ndim)])
        index = index * np.uint64(words.shape[-1]) + np.arange(words.shape[-1], dtype=np.uint64)
        index = index.astype(np.uint32)  # modulo 2³², as on the devices
        total += np.array([np.add.reduce(_mix(_mix(index ^ s) + words), None, np.uint32) for s in _SEEDS], np.uint32)
    return total


def _pieces(block, start):
    """(piece, index of its first element) of a block, none of more than _PIECE elements."""
    if block.size <= _PIECE:
        if block.size:
            yield block, start
        return
    axis = next(d for d, n in enumerate(block.shape) if n > 1)
    step = max(1, _PIECE * block.shape[axis] // block.size)
    for first in range(0, block.shape[axis], step):
        where = (slice(None),) * axis + (slice(first, first + step),)
        yield from _pieces(block[where], (*start[:axis], start[axis] + first, *start[axis + 1 :]))


def _host_words(x):
    """`_words` of a NumPy array."""
    x = np.ascontiguousarray(x)
    size = x.dtype.itemsize
    unsigned = {1: np.uint8, 2: np.uint16}.get(size, np.uint32)
    return x.reshape(-1).view(unsigned).astype(np.uint32).reshape(*x.shape, max(1, size // 4))
