"""Checkpoints of the published Selftok tokenizer (arXiv 2505.07538): its `.pth` files into our state and back.

Every tensor of a file has one place in the state of `tokenizers/ddt.py`, so that what was read is written again with
the same names and the same bytes (of fp32 files; half precision is read too and written as fp32). Nothing is skipped:
all tensors that do not fit come in one error. What our state has no use for is kept in `extra["released"]`, as bits,
see `selftok_networks.released_buffers`, and written as it was read, also after more training. A run that was not
imported has nothing there: then flags and counts are made from our own, and the sampler's tables and the quantizer's
counters, which the published program makes anew, are left out.

Legend: D input width, H heads, R roles (of query, key, value), E head dimension, V codes, d code dimension.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import ml_dtypes
import numpy as np

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.interop import names
from ddt_jax.io import torch_file
from ddt_jax.tokenizers import selftok_networks

_FLOATS = tuple(map(np.dtype, (np.float32, np.float16, ml_dtypes.bfloat16)))
# A buffer's type is kept as its place in this list, counted from 1; 0 is for none. New ones go to the end.
_TYPES = (*_FLOATS, *map(np.dtype, (np.float64, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_)))
_CODEBOOK = "encoder.quantizer._codebook"


@dataclass(frozen=True)
class Place:
    """A leaf of our state, or one layer of it where layers are stacked.

    Attributes:
      path: from {"params", "extra"} on, steps joined by "/".
      layer: index on the leaf's first axis; None for all of it.
    """

    path: str
    layer: int | None = None

    def __truediv__(self, name: str) -> "Place":
        return replace(self, path=f"{self.path}/{name}")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a published file and the leaves of our state that it becomes.

    Attributes:
      key, shape: in the file.
      places: leaves.
      split: the file's array → one array per place; None for a place that is only read, to write the file.
      join: arrays at the places → the file's; None if it has to be left out.
      held: kept as bits, whatever its type.
      optional: there must be all tensors of this kind, or none.
    """

    key: str
    shape: tuple[int, ...]
    places: tuple[Place, ...]
    split: Callable
    join: Callable
    held: bool = False
    optional: bool = False


def layout(model: settings.SelftokTokenizer, tree) -> list[Tensor]:
    """All tensors of a published file for these settings, in the file's order.

    Args:
      model: settings.
      tree: {"params", "extra"} of the tokenizer; only shapes are used.

    Raises:
      UserError: if the settings have state that published files have not, or the other way round.
    """
    table = _table(model, tree)
    if model.quantizer.normalize_input != "none":
        raise UserError(
            f"selftok: model.quantizer.normalize_input={model.quantizer.normalize_input!r} has statistics that its "
            "files have no place for; set it to 'none'"
        )
    if not model.quantizer.diversity and model.quantizer.revive_from != "perplexity":
        raise UserError(
            "selftok: its files hold the usage of codes by position, which the quantizer keeps only with "
            "model.quantizer.diversity above 0 or revive_from='perplexity'; set one of them"
        )
    table.sampler()
    table.encoder()
    table.quantizer()
    table.decoder()
    return table.tensors


def decoder_layout(model: settings.SelftokTokenizer, tree) -> list[Tensor]:
    """As `layout`, of the decoder alone, whatever the quantizer is."""
    table = _table(model, tree)
    table.decoder()
    return table.tensors


def _table(model, tree) -> "_Table":
    if not isinstance(model, settings.SelftokTokenizer):
        raise UserError(f"selftok: the config has model.kind={model.kind!r}; its files need model.kind='selftok'")
    return _Table(model, {name: tuple(leaf.shape) for name, leaf in _leaves(tree)})


def read(path) -> dict[str, np.ndarray]:
    """The tensors in a file: a plain state dict, or a trainer's {"iter", "state_dict", "cfg"}.

    What a trainer's settings are made of (an EasyDict, a Namespace) is not looked at.

    Raises:
      UserError: if the file cannot be read or has neither.
    """
    found = torch_file.load(path, within="state_dict")
    if not isinstance(found, dict) or not any(isinstance(value, np.ndarray) for value in found.values()):
        raise UserError(f"selftok: {path} holds no tensors by name, nor a dict of them under 'state_dict'")
    return found


def check(arrays: dict, tensors: list[Tensor], source: str = "the arrays") -> None:
    """Raises UserError naming what is missing, left over, of another shape or no float. source: what it calls them."""
    wanted = {tensor.key: tensor for tensor in tensors}
    missing = wanted.keys() - arrays.keys()
    optional = {tensor.key for tensor in tensors if tensor.optional}
    if missing >= optional:
        missing -= optional
    problems = [f"{key} is missing" for key in sorted(missing)]
    problems += [f"{key} has no place" for key in sorted(arrays.keys() - wanted.keys(), key=str)]
    for key, tensor in wanted.items():
        if key in arrays and (wrong := misfit(arrays[key], tensor)):
            problems.append(f"{key} {wrong}")
    if problems:
        raise UserError(
            f"selftok: {source} does not fit the sizes that are set, {len(problems)} of {len(wanted)} tensors: "
            f"{'; '.join(names.folded(problems))}; a config with its sizes goes in --config"
        )


def misfit(array, tensor: Tensor) -> str:
    """What is wrong with a value of a file in the place of a tensor; "" if nothing is."""
    if not isinstance(array, np.ndarray):
        return "is no tensor"
    if array.shape != tensor.shape:
        return f"is {names.by(array.shape)}, not {names.by(tensor.shape)}"
    if array.dtype not in (_TYPES if tensor.held else _FLOATS):
        return f"is of type {array.dtype}{'' if tensor.held else ', not float32'}"
    return ""


def fill(arrays: dict, tensors: list[Tensor], tree, put: Callable[[np.ndarray, Any], Any] | None = None):
    """Our state with a file's tensors in it.

    Args:
      arrays: that `check` let pass.
      tensors: of `layout`.
      tree: {"params", "extra"} of arrays. Leaves that the file says nothing about stay: the codec, the number of codes
        that were moved.
      put: (array, leaf it replaces) → leaf; None for NumPy arrays in the leaf's type.

    Returns:
      A tree like `tree`.
    """
    put = put or (lambda value, leaf: value.astype(leaf.dtype))
    sources = defaultdict(list)
    for tensor in tensors:
        for index, place in enumerate(tensor.places):
            if tensor.key in arrays:
                sources[place.path].append((place.layer, tensor, index))

    def one(path, leaf):
        # One leaf at a time: the parts of a stack are copied once, when they are put together.
        parts = {}
        for layer, tensor, index in sources[_name(path)]:
            if (part := tensor.split(arrays[tensor.key])[index]) is not None:
                parts[layer] = part
        if not parts:
            return leaf
        return put(parts[None] if None in parts else np.stack([parts[i] for i in range(len(parts))]), leaf)

    return jax.tree_util.tree_map_with_path(one, tree)


def to_arrays(tree, model: settings.SelftokTokenizer) -> dict[str, np.ndarray]:
    """The tensors of a published file. tree: {"params", "extra"} of arrays. Raises UserError as `layout`."""
    leaves = dict(_leaves(tree))

    def at(place):
        leaf = leaves[place.path]
        return np.asarray(leaf if place.layer is None else leaf[place.layer])

    arrays = {t.key: t.join(*map(at, t.places)) for t in layout(model, tree)}
    return {key: array for key, array in arrays.items() if array is not None}


class _Table:
    """Collects the tensors. leaves: shapes of our leaves by path."""

    def __init__(self, model: settings.SelftokTokenizer, leaves: dict[str, tuple[int, ...]]):
        self.model = model
        self.leaves = leaves
        self.tensors: list[Tensor] = []

    def sampler(self):
        for name in selftok_networks.SAMPLER_BUFFERS:
            self._held(f"diffusion.{name}", name, optional=True)

    def encoder(self):
        m, ours = self.model.encoder, Place("params/encoder")
        self._reshaped("encoder.pos_embed", (1, m.position_grid**2, m.image_width), ours / "positions")
        self._reshaped("encoder.query_tokens", (1, self.model.num_tokens, m.width), ours / "queries")
        self._convolution("encoder.x_embedder.proj", ours / "embed")
        for i, block in self._blocks(ours, m.depth):
            theirs = f"encoder.blocks.{i}"
            self._heads(f"{theirs}.attn.qkv", block / "image_project")
            self._heads(f"{theirs}.attn.to_query_kv", block / "image_to_query")
            self._heads(f"{theirs}.attn.query_linear", block / "query_project")
            self._dense(f"{theirs}.attn.proj", block / "image_output/merge", inputs=2)
            self._dense(f"{theirs}.attn.query_proj", block / "query_output/merge", inputs=2)
            self._pair(f"{theirs}.mlp", block / "image_mlp", "fc1", "fc2")
            self._pair(f"{theirs}.q_mlp", block / "query_mlp", "fc1", "fc2")
            self._dense(f"{theirs}.adaLN_modulation.1", block / "adaln/modulate")
            self._pair(f"{theirs}.t_embedder.mlp", block / "position", "0", "2")
        self._norm("encoder.final_layer_norm", ours / "unused_norm_1")
        self._norm("encoder.final_layer_norm2", ours / "unused_norm_2")
        self._norm("encoder.final_layer_norm3", Place("params/code_norm"))

    def quantizer(self):
        c, k, ours = self.model.quantizer, self.model.num_tokens, Place("extra/codebook")
        v = c.codebook_size
        for name in selftok_networks.QUANTIZER_BUFFERS:
            self._held(f"encoder.quantizer.{name}", name, optional=True)
        self._dense("encoder.quantizer.project_in", Place("params/encoder/to_code"))
        self._flag("initted", ours / "initialized")
        self._reshaped(f"{_CODEBOOK}.cluster_size", (1, v), ours / "count")
        # Ours has no count without revival; a run that was not imported gives the one with it.
        self._held(f"{_CODEBOOK}.cluster_size_wo_react", "cluster_size_wo_react", instead=ours / "count")
        self._reshaped(f"{_CODEBOOK}.embed_avg", (1, v, c.code_dim), ours / "sum")
        self._reshaped(f"{_CODEBOOK}.embed", (1, v, c.code_dim), ours / "codes")
        self._reshaped(f"{_CODEBOOK}.timestep_p_over_c", (1, k, v), ours / "usage")
        self._flag("tpc_initted", ours / "usage_started")

    def decoder(self):
        m, k, ours = self.model.decoder, self.model.num_tokens, Place("params/decoder")
        self._reshaped("model.pos_embed", (1, m.position_grid**2, m.width), ours / "positions")
        self._reshaped("model.context_pos_embed", (1, k, m.width), ours / "token_positions")
        if isinstance(self.model.decoder, settings.Renderer):
            mask, canvas = ours / "mask_token", ours / "canvas_positions"
            self._reshaped("model.mask_token", (1, *self.leaves[mask.path]), mask)
            self._reshaped("model.positional_embedding", self.leaves[canvas.path], canvas)
        else:
            self._convolution("model.x_embedder.proj", ours / "embed")
        self._pair("model.t_embedder.mlp", ours / "time", "0", "2")
        self._pair("model.y_embedder.mlp", ours / "unused_pooled", "0", "2")
        self._dense("model.context_embedder", ours / "token_embed")
        for i, block in self._blocks(ours, m.depth):
            context, joint, last = f"model.joint_blocks.{i}.context_block", block / "joint", i == m.depth - 1
            # In the last block nothing reads the tokens' queries: with us they are apart from keys and values.
            query = [block / "token_query"] if last else []
            self._heads(f"{context}.attn.qkv", *query, joint / "token_project")
            if not last:
                self._dense(f"{context}.attn.proj", joint / "token_output/merge", inputs=2)
                self._pair(f"{context}.mlp", joint / "token_mlp", "fc1", "fc2")
            self._dense(f"{context}.adaLN_modulation.1", joint / "token_adaln/modulate")
            self._pair(f"{context}.t_embedder.mlp", block / "position", "0", "2")
            image = f"model.joint_blocks.{i}.x_block"
            self._heads(f"{image}.attn.qkv", joint / "project")
            self._dense(f"{image}.attn.proj", joint / "output/merge", inputs=2)
            self._pair(f"{image}.mlp", joint / "mlp", "fc1", "fc2")
            self._dense(f"{image}.adaLN_modulation.1", joint / "adaln/modulate")
        self._dense("model.final_layer.linear", ours / "final")
        self._dense("model.final_layer.adaLN_modulation.1", ours / "final_adaln/modulate")

    def _blocks(self, ours: Place, depth: int):
        """Each block's index and place, in a stack that is scanned or not, see `blocks.Stack`."""
        for i in range(depth - 1):
            stack = ours / "blocks"
            yield i, replace(stack / "scanned/block", layer=i) if self.model.scan_layers else stack / f"block_{i}"
        yield depth - 1, ours / "last_block"

    def _shape(self, place: Place) -> tuple[int, ...]:
        shape = self.leaves[place.path]
        return shape if place.layer is None else shape[1:]

    def _add(self, key, shape, place, split, join):
        self.tensors.append(Tensor(key, shape, (place,), lambda y: (split(y),), join))

    def _reshaped(self, key, shape, place):
        ours = self._shape(place)
        self._add(key, shape, place, lambda y: y.reshape(ours), lambda x: x.reshape(shape))

    def _dense(self, name, place, inputs=1):
        """inputs: leading dimensions that our kernel reads. Theirs is (out, in)."""
        ours = self._shape(place / "kernel")
        read, write = prod(ours[:inputs]), prod(ours[inputs:])
        self._add(
            f"{name}.weight",
            (write, read),
            place / "kernel",
            lambda y: y.T.reshape(ours),
            lambda x: x.reshape(read, write).T,
        )
        self._reshaped(f"{name}.bias", (write,), place / "bias")

    def _pair(self, name, place, first, second):
        self._dense(f"{name}.{first}", place / "up")
        self._dense(f"{name}.{second}", place / "down")

    def _norm(self, name, place):
        self._reshaped(f"{name}.weight", self._shape(place / "scale"), place / "scale")
        self._reshaped(f"{name}.bias", self._shape(place / "bias"), place / "bias")

    def _convolution(self, name, place):
        """Ours reads patches with values in the order (row, column, channel); theirs is (out, channel, row, column)."""
        ours, size = self._shape(place / "kernel"), self.model.patch_size
        channels, write = ours[0] // size**2, ours[1]
        self._add(
            f"{name}.weight",
            (write, channels, size, size),
            place / "kernel",
            lambda y: y.transpose(2, 3, 1, 0).reshape(ours),
            lambda x: x.reshape(size, size, channels, write).transpose(3, 2, 0, 1),
        )
        self._reshaped(f"{name}.bias", (write,), place / "bias")

    def _heads(self, name, *places):
        """Ours [D, H, R, E], perhaps in several arrays that share the roles; theirs packs (R, H, E) by D."""
        kernels = tuple(place / "heads/kernel" for place in places)
        biases = tuple(place / "heads/bias" for place in places)
        roles = [self._shape(kernel)[2] for kernel in kernels]
        d, h, _, e = self._shape(kernels[0])
        r, cuts = sum(roles), np.cumsum(roles)[:-1]
        self.tensors.append(
            Tensor(
                f"{name}.weight",
                (r * h * e, d),
                kernels,
                lambda y: np.split(y.reshape(r, h, e, d).transpose(3, 1, 0, 2), cuts, axis=2),
                lambda *xs: np.concatenate(xs, axis=2).transpose(2, 1, 3, 0).reshape(r * h * e, d),
            )
        )
        self.tensors.append(
            Tensor(
                f"{name}.bias",
                (r * h * e,),
                biases,
                lambda y: np.split(y.reshape(r, h, e).transpose(1, 0, 2), cuts, axis=1),
                lambda *xs: np.concatenate(xs, axis=1).transpose(1, 0, 2).reshape(-1),
            )
        )

    def _held(self, key, name, *, optional=False, instead: Place | None = None):
        """instead: float32 values for a run that has none held."""
        shape = selftok_networks.released_buffers(self.model)[name]
        places = _held_places(name) + ((instead,) if instead else ())

        def join(bits, kind, *values):
            found = _from_bits(bits, kind)
            return values[0].reshape(shape) if found is None and values else found

        self.tensors.append(Tensor(key, shape, places, lambda y: (*_to_bits(y), None), join, True, optional))

    def _flag(self, name, place):
        """A flag of ours that they keep as a number: theirs is written again as it was unless ours has changed."""

        def join(bits, kind, flag):
            found = _from_bits(bits, kind)
            if found is not None and bool(found.any()) == bool(flag):
                return found
            return np.full((1,), bool(flag), np.float32 if found is None else found.dtype)

        places = (*_held_places(name), place)
        self.tensors.append(
            Tensor(f"{_CODEBOOK}.{name}", (1,), places, lambda y: (*_to_bits(y), np.asarray(y.any())), join, held=True)
        )


def _held_places(name) -> tuple[Place, Place]:
    ours = Place("extra/released") / name
    return ours / "bits", ours / "type"


def _to_bits(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """8 bytes per element as uint32 [..., 2], and the type: shapes may not depend on a file's types."""
    raw = np.zeros((array.size, 8), np.uint8)
    raw[:, : array.itemsize] = np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(array.size, -1)
    return raw.view("<u4").reshape(*array.shape, 2), np.array(1 + _TYPES.index(array.dtype), np.int32)


def _from_bits(bits: np.ndarray, kind) -> np.ndarray | None:
    if not kind:
        return None
    dtype, shape = _TYPES[int(kind) - 1], bits.shape[:-1]
    raw = np.ascontiguousarray(bits).view(np.uint8).reshape(-1, 8)[:, : dtype.itemsize]
    return np.ascontiguousarray(raw).view(dtype).reshape(shape)


def _leaves(tree):
    return [(_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)]


def _name(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
