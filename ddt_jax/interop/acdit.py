"""Checkpoints of ACDiT (arXiv 2412.07720), of images and of clips: its `.pt` files into our state and back.

They hold the network alone; latents are those of Stable Diffusion's autoencoder. Published ones were trained with
`model.rope="released"`, which their files do not say.
"""

from dataclasses import replace

import numpy as np

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.interop import layout as layouts
from ddt_jax.interop.layout import Place, Tensor


def layout(model: settings.ACDiT, tree) -> list[Tensor]:
    """All tensors of a published file for these settings, in the file's order.

    Args:
      model: settings.
      tree: {"params", ...} of the network; only shapes are used.

    Raises:
      UserError: if the settings have state that published files have not.
    """
    if not isinstance(model, settings.ACDiT):
        raise UserError(f"acdit: the config has model.kind={model.kind!r}; its files need model.kind='acdit'")
    if not model.classes or model.caption_bytes:
        raise UserError(
            f"acdit: model.classes={model.classes}, model.caption_bytes={model.caption_bytes}: published files have "
            "classes and no captions; set them to their number and to 0"
        )
    if model.places:
        raise UserError("acdit: model.places=True: published files have no vectors of places; set it to False")
    table, ours = _Table(tree), Place("params")
    table.pair("t_embedder.mlp", ours / "time", "0", "2")
    table.reshaped("y_embedder.embedding_table.weight", (model.classes + 1, model.width), ours / "label")
    table.dense("x_embedder", ours / "into", bias=False)
    for i in range(model.depth):
        scanned = replace(ours / "stack/scanned/block", index=(i,))
        table.block(f"blocks.{i}", scanned if model.scan_layers else ours / f"stack/block_{i}")
    table.norm("final_layer.norm_final", ours / "norm", bias=False)
    table.dense("final_layer.linear", ours / "out")
    table.dense("final_layer.adaLN_modulation.1", ours / "adaln/modulate")
    return table.tensors


class _Table(layouts.Table):
    def block(self, theirs, ours):
        self.norm(f"{theirs}.norm1", ours / "attention_norm", bias=False)
        self.heads(f"{theirs}.attn.qkv", ours / "project")
        for role, name in enumerate(("q_norm", "k_norm")):
            norms = ours / "project/qk_norm/scale"
            one = replace(norms, index=(*norms.index, role))
            self.reshaped(f"{theirs}.attn.{name}.weight", (int(np.prod(self.shape(one))),), one)
        self.dense(f"{theirs}.attn.proj", ours / "output/merge", inputs=2)
        self.norm(f"{theirs}.norm2", ours / "mlp_norm", bias=False)
        self.pair(f"{theirs}.mlp", ours / "mlp", "fc1", "fc2")
        self.dense(f"{theirs}.adaLN_modulation.1", ours / "adaln/modulate")


FORMAT = layouts.Format("acdit", "model", layout)  # a trainer's file is {"model", "args", ...}
