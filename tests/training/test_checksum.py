"""Checksums see every bit and no sharding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.training import checksum
from ddt_jax.training.checksum import as_hex, checksums, part_sums


def by_hand(array):
    """The same sums with Python integers, element by element."""

    def mix(x):
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    words = (
        np.ascontiguousarray(array).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[array.dtype.itemsize]).reshape(-1)
    )
    sums = [
        sum(mix((mix(i ^ seed) + int(w)) % 2**32) for i, w in enumerate(words)) % 2**32
        for seed in (0x9E3779B9, 0x7F4A7C15)
    ]
    return np.array(sums, np.uint32).tobytes().hex()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "uint8", "bool"])
def test_equal_to_the_definition(dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 5)) * 3, dtype)
    assert checksums({"x": x})["x"] == by_hand(np.asarray(x))


def test_the_same_on_every_mesh():
    x = jax.random.normal(jax.random.key(0), (16, 24))
    seen = set()
    for sizes, spec in [
        ((8, 1), ("fsdp", None)),
        ((4, 2), ("fsdp", "tensor")),
        ((2, 4), ("tensor", "fsdp")),
        ((8, 1), ()),
    ]:
        mesh = meshes.make_mesh(settings.Mesh(fsdp=sizes[0], tensor=sizes[1]))
        placed = jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))
        seen.add(checksums({"x": placed})["x"])
    assert len(seen) == 1


def test_any_flipped_bit_and_any_swap_shows():
    x = np.random.default_rng(1).normal(size=(7, 9)).astype(np.float32)
    original = checksums({"x": x})["x"]
    rng = np.random.default_rng(2)
    for _ in range(50):
        bits = x.view(np.uint32).copy()
        bits[rng.integers(7), rng.integers(9)] ^= np.uint32(1) << np.uint32(rng.integers(32))
        assert checksums({"x": bits.view(np.float32)})["x"] != original
    swapped = x.copy()
    swapped[0, 0], swapped[3, 3] = x[3, 3], x[0, 0]
    assert checksums({"x": swapped})["x"] != original
    assert checksums({"x": x.T})["x"] != original


def cut(shape, rng):
    """Blocks that cover an array, cut at random places, as (slices) tuples."""
    edges = [sorted({0, n, *rng.integers(0, n + 1, 2).tolist()}) for n in shape]
    grid = np.stack(np.meshgrid(*(np.arange(len(e) - 1) for e in edges), indexing="ij"), -1).reshape(-1, len(shape))
    return [tuple(slice(e[i], e[i + 1]) for e, i in zip(edges, at, strict=True)) for at in grid]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64", "bool"])
def test_the_sums_of_any_parts_make_that_of_the_whole(dtype, monkeypatch):
    monkeypatch.setattr(checksum, "_PIECE", 7)  # so that blocks are cut further
    rng = np.random.default_rng(3)
    for shape in ((), (5,), (3, 4, 5), (1, 40)):
        x = (rng.normal(size=shape) * 3).astype(jnp.bfloat16 if dtype == "bfloat16" else dtype)
        parts = cut(shape, rng) if shape else [()]
        total = np.sum([part_sums(x[w], [s.start for s in w], shape) for w in parts], 0, np.uint32)
        assert as_hex(total) == (by_hand(x) if dtype != "float64" else by_hand_of_words(x)), shape


def by_hand_of_words(array):
    """A number of 8 bytes counts as two of 4."""
    return by_hand(np.ascontiguousarray(array).reshape(-1).view(np.uint32))
