"""Checkpoints of the published Selftok tokenizer (arXiv 2505.07538): its `.pth` files into our state and back.

Every tensor of a file has one place in the state of `tokenizers/ddt.py` (`interop/layout.py`). What our state has no
use for is kept in `extra["released"]`, as bits, see `selftok_networks.released_buffers`, and written as it was read,
also after more training. A run that was not imported has nothing there: then flags and counts are made from our own,
and the sampler's tables and the quantizer's counters, which the published program makes anew, are left out.
"""

from dataclasses import replace

import numpy as np

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.interop import layout as layouts
from ddt_jax.interop.layout import Place, Tensor
from ddt_jax.tokenizers import selftok_networks

# A buffer's type is kept as its place in this list, counted from 1; 0 is for none. New ones go to the end.
_TYPES = (*layouts.FLOATS, *map(np.dtype, (np.float64, np.int64, np.int32, np.int16, np.int8, np.uint8, np.bool_)))
_CODEBOOK = "encoder.quantizer._codebook"


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
    return _Table(model, tree)


class _Table(layouts.Table):
    """The parts of a published file."""

    def __init__(self, model: settings.SelftokTokenizer, tree):
        super().__init__(tree)
        self.model = model

    def sampler(self):
        for name in selftok_networks.SAMPLER_BUFFERS:
            self._held(f"diffusion.{name}", name, optional=True)

    def encoder(self):
        m, ours = self.model.encoder, Place("params/encoder")
        self.reshaped("encoder.pos_embed", (1, m.position_grid**2, m.image_width), ours / "positions")
        self.reshaped("encoder.query_tokens", (1, self.model.num_tokens, m.width), ours / "queries")
        self._convolution("encoder.x_embedder.proj", ours / "embed")
        for i, block in self._blocks(ours, m.depth):
            theirs = f"encoder.blocks.{i}"
            self.heads(f"{theirs}.attn.qkv", block / "image_project")
            self.heads(f"{theirs}.attn.to_query_kv", block / "image_to_query")
            self.heads(f"{theirs}.attn.query_linear", block / "query_project")
            self.dense(f"{theirs}.attn.proj", block / "image_output/merge", inputs=2)
            self.dense(f"{theirs}.attn.query_proj", block / "query_output/merge", inputs=2)
            self.pair(f"{theirs}.mlp", block / "image_mlp", "fc1", "fc2")
            self.pair(f"{theirs}.q_mlp", block / "query_mlp", "fc1", "fc2")
            self.dense(f"{theirs}.adaLN_modulation.1", block / "adaln/modulate")
            self.pair(f"{theirs}.t_embedder.mlp", block / "position", "0", "2")
        self.norm("encoder.final_layer_norm", ours / "unused_norm_1")
        self.norm("encoder.final_layer_norm2", ours / "unused_norm_2")
        self.norm("encoder.final_layer_norm3", Place("params/code_norm"))

    def quantizer(self):
        c, k, ours = self.model.quantizer, self.model.num_tokens, Place("extra/codebook")
        v = c.codebook_size
        for name in selftok_networks.QUANTIZER_BUFFERS:
            self._held(f"encoder.quantizer.{name}", name, optional=True)
        self.dense("encoder.quantizer.project_in", Place("params/encoder/to_code"))
        self._flag("initted", ours / "initialized")
        self.reshaped(f"{_CODEBOOK}.cluster_size", (1, v), ours / "count")
        # Ours has no count without revival; a run that was not imported gives the one with it.
        self._held(f"{_CODEBOOK}.cluster_size_wo_react", "cluster_size_wo_react", instead=ours / "count")
        self.reshaped(f"{_CODEBOOK}.embed_avg", (1, v, c.code_dim), ours / "sum")
        self.reshaped(f"{_CODEBOOK}.embed", (1, v, c.code_dim), ours / "codes")
        self.reshaped(f"{_CODEBOOK}.timestep_p_over_c", (1, k, v), ours / "usage")
        self._flag("tpc_initted", ours / "usage_started")

    def decoder(self):
        m, k, ours = self.model.decoder, self.model.num_tokens, Place("params/decoder")
        self.reshaped("model.pos_embed", (1, m.position_grid**2, m.width), ours / "positions")
        self.reshaped("model.context_pos_embed", (1, k, m.width), ours / "token_positions")
        if isinstance(self.model.decoder, settings.Renderer):
            mask, canvas = ours / "mask_token", ours / "canvas_positions"
            self.reshaped("model.mask_token", (1, *self.leaves[mask.path]), mask)
            self.reshaped("model.positional_embedding", self.leaves[canvas.path], canvas)
        else:
            self._convolution("model.x_embedder.proj", ours / "embed")
        self.pair("model.t_embedder.mlp", ours / "time", "0", "2")
        self.pair("model.y_embedder.mlp", ours / "unused_pooled", "0", "2")
        self.dense("model.context_embedder", ours / "token_embed")
        for i, block in self._blocks(ours, m.depth):
            context, joint, last = f"model.joint_blocks.{i}.context_block", block / "joint", i == m.depth - 1
            # In the last block nothing reads the tokens' queries: with us they are apart from keys and values.
            query = [block / "token_query"] if last else []
            self.heads(f"{context}.attn.qkv", *query, joint / "token_project")
            if not last:
                self.dense(f"{context}.attn.proj", joint / "token_output/merge", inputs=2)
                self.pair(f"{context}.mlp", joint / "token_mlp", "fc1", "fc2")
            self.dense(f"{context}.adaLN_modulation.1", joint / "token_adaln/modulate")
            self.pair(f"{context}.t_embedder.mlp", block / "position", "0", "2")
            image = f"model.joint_blocks.{i}.x_block"
            self.heads(f"{image}.attn.qkv", joint / "project")
            self.dense(f"{image}.attn.proj", joint / "output/merge", inputs=2)
            self.pair(f"{image}.mlp", joint / "mlp", "fc1", "fc2")
            self.dense(f"{image}.adaLN_modulation.1", joint / "adaln/modulate")
        self.dense("model.final_layer.linear", ours / "final")
        self.dense("model.final_layer.adaLN_modulation.1", ours / "final_adaln/modulate")

    def _blocks(self, ours: Place, depth: int):
        """Each block's index and place, in a stack that is scanned or not, see `blocks.Stack`."""
        for i in range(depth - 1):
            stack = ours / "blocks"
            yield i, replace(stack / "scanned/block", index=(i,)) if self.model.scan_layers else stack / f"block_{i}"
        yield depth - 1, ours / "last_block"

    def _convolution(self, name, place):
        """Ours reads patches with values in the order (row, column, channel); theirs is (out, channel, row, column)."""
        ours, size = self.shape(place / "kernel"), self.model.patch_size
        channels, write = ours[0] // size**2, ours[1]
        self.add(
            f"{name}.weight",
            (write, channels, size, size),
            place / "kernel",
            lambda y: y.transpose(2, 3, 1, 0).reshape(ours),
            lambda x: x.reshape(size, size, channels, write).transpose(3, 2, 0, 1),
        )
        self.reshaped(f"{name}.bias", (write,), place / "bias")

    def _held(self, key, name, *, optional=False, instead: Place | None = None):
        """instead: float32 values for a run that has none held."""
        shape = selftok_networks.released_buffers(self.model)[name]
        places = _held_places(name) + ((instead,) if instead else ())

        def join(bits, kind, *values):
            found = _from_bits(bits, kind)
            return values[0].reshape(shape) if found is None and values else found

        self.tensors.append(Tensor(key, shape, places, lambda y: (*_to_bits(y), None), join, _TYPES, optional))

    def _flag(self, name, place):
        """A flag of ours that they keep as a number: theirs is written again as it was unless ours has changed."""

        def join(bits, kind, flag):
            found = _from_bits(bits, kind)
            if found is not None and bool(found.any()) == bool(flag):
                return found
            return np.full((1,), bool(flag), np.float32 if found is None else found.dtype)

        def split(y):
            return *_to_bits(y), np.asarray(y.any())

        self.tensors.append(Tensor(f"{_CODEBOOK}.{name}", (1,), (*_held_places(name), place), split, join, _TYPES))


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


# A trainer's file is {"iter", "state_dict", "cfg"}; its settings (an EasyDict, a Namespace) are not read.
FORMAT = layouts.Format("selftok", "state_dict", layout)
