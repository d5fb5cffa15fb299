"""The multimodal transformer whose images are denoised block by block: ACDiT (arXiv 2412.07720) in sequences with text.

An image stands in its place as it is, in blocks that see themselves and what is before them; so what comes behind it
reads the clean image, and no limit of noise is needed for captions. At its document's end stand noised copies of all
blocks, each at a noise level of its own, with the positions of their twins: a copy sees what is before its block, and
itself (`sequence.ImageForm`, "blockwise"). One block is a whole image that is denoised beside the text before it.

Legend: B rows, S positions, R rows of an image, I images of a row, N blocks of an image, r = R / N, P values of a row,
D width.
"""

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal.diffusion_model import PARAMS, DiffusionMultimodal
from ddt_jax.multimodal.image_rows import ImageRows
from ddt_jax.multimodal.sequence import ImageForm
from ddt_jax.nn import spans, square_blocks
from ddt_jax.nn.images import patchify, unpatchify


class BlockwiseMultimodal(DiffusionMultimodal):
    """See the module's docstring. What is noised and predicted are patches in the order of blocks, [B, I, N, r, P].

    Attributes:
      inputs: as of `DiffusionMultimodal`, and image_copy int32 [B, I].
      blocks: N.
    """

    def __init__(self, config: settings.Multimodal, image_size: int):
        super().__init__(config, image_size)
        image = config.image
        if image.coder.kind != "linear" or image.attention != "bidirectional":
            raise UserError(
                f"config: model.image.block_size={image.block_size} needs model.image.coder.kind='linear' and "
                f"model.image.attention='bidirectional', not {image.coder.kind!r} and {image.attention!r}"
            )
        side = self.latent_shape[0] // image.patch_size
        if image.block_size not in (sizes := square_blocks.sizes(side)):
            raise UserError(
                f"config: model.image.block_size={image.block_size} is no square that divides {side} x {side} patches; "
                f"choose from {', '.join(map(str, sizes))}"
            )
        self._order = square_blocks.order(side, image.block_size)
        self._raster = square_blocks.inverse(self._order)
        self.blocks = self.form.rows // image.block_size
        self.form = ImageForm("blockwise", self.form.rows, image.block_size, self.form.shape, self.form.dtype)
        self.inputs += ("image_copy",)

    def shapes(self, q):
        found = super().shapes(q)
        return found | {"image_copy": found["image_start"]}

    def draw(self, extra, batch, rng):
        """What a step trains at: (patches, noise) [B, I, N, r, P] and noise levels [B, I, N]."""
        latents_BIHWC, noise_BIHWC, uniform_BIN = self._drawn(extra, batch, rng, self.blocks)
        # A caption reads the clean image, so that no image needs to be held to less noise.
        t_BIN = self._levels(batch, uniform_BIN, limit=1.0)
        return self.to_blocks(latents_BIHWC), self.to_blocks(noise_BIHWC), t_BIN

    def to_blocks(self, latents_BIHWC):
        """Patches [B, I, N, r, P] of latents."""
        b, i = latents_BIHWC.shape[:2]
        flat = latents_BIHWC.reshape(b * i, *self.latent_shape)
        patches = patchify(flat, self.config.image.patch_size)[:, self._order]
        return patches.reshape(b, i, self.blocks, self.form.block, -1)

    def from_blocks(self, patches_BNRP):
        """Latents [B, H, W, C] of an image each."""
        patches = patches_BNRP.reshape(len(patches_BNRP), self.form.rows, -1)[:, self._raster]
        return unpatchify(patches, self.config.image.patch_size, self.latent_shape[0])

    def clean_rows(self, coder, latents_BIHWC):
        return self.rows_of(coder, self.to_blocks(latents_BIHWC), 0.0)

    def rows_of(self, coder, patches, t, first=0):
        """Rows [B, I, n r, D] of some blocks.

        Args:
          coder: its parameters.
          patches: [B, I, n, r, P].
          t: noise levels, [B, I, n] or a scalar.
          first: number of the first of these blocks in its image, int32 scalar.
        """
        b, i, n, r = patches.shape[:4]
        t_M = jnp.broadcast_to(t, (b, i, n)).reshape(-1)
        at_NR = jnp.asarray(self._order).reshape(self.blocks, r)
        at_MR = jnp.tile(jax.lax.dynamic_slice_in_dim(at_NR, first, n), (b * i, 1))
        rows = self.coder.apply({"params": coder}, patches.reshape(b * i * n, r, -1), t_M, at_MR, method="read")
        return rows.reshape(b, i, n * r, -1)

    def values_of(self, coder, h_BIRD):
        """Patches [B, I, N, r, P], at least fp32, that rows of the transformer stand for."""
        b, i = h_BIRD.shape[:2]
        values = self.coder.apply({"params": coder}, h_BIRD.reshape(b * i, *h_BIRD.shape[2:]), method="write")
        return values.reshape(b, i, -1, self.form.block, values.shape[-1])

    def forward(self, params, extra, batch, x, t_BIN, dropout_keys_B=None, clean=None):
        """As `DiffusionMultimodal.forward`, of patches [B, I, N, r, P], the clean ones among them."""
        at_BR, targets_BR, weights_BR = self.targets(batch)
        clean_BIRD = self.rows_of(params[PARAMS], clean, 0.0)
        noised_BIRD = self.rows_of(params[PARAMS], x, t_BIN)
        images, copies, order_BI = self._places(batch)
        visible = self.visible(batch)

        def run(module):
            x_BSD = images.put(module.embed(batch["tokens"]), clean_BIRD)
            x_BSD = copies.put(x_BSD, _chosen(noised_BIRD, order_BI))
            h_BSD, _ = module(x_BSD, batch["position"], visible, dropout_keys_B=dropout_keys_B)
            h_BRD = jnp.take_along_axis(h_BSD, at_BR[..., None], axis=1)
            return *module.loss(h_BRD, targets_BR, weights_BR), copies.take(h_BSD)

        total, rows, h_BIRD = self.module.apply({"params": self.all_params(params, extra)}, method=run)
        return total, rows, self.values_of(params[PARAMS], _chosen(h_BIRD, jnp.argsort(order_BI, axis=1)))

    def score(self, params, extra, batch, dropout_keys_B=None):
        """As `DiffusionMultimodal.score`; copies, which no text sees, are there and mean nothing."""
        patches = self.to_blocks(self.latents(extra, batch["image_content"]))
        total, rows, _ = self.forward(params, extra, batch, patches, 0.0, dropout_keys_B, patches)
        return total, rows, jnp.zeros(batch["rows"].shape, bool)

    def visible(self, batch) -> spans.Spans:
        images, copies, order_BI = self._places(batch)
        length, block = batch["tokens"].shape[1], self.form.block
        here_S = jnp.arange(length, dtype=jnp.int32)
        _, offset_BS, inside_BS = images.of(length)
        end_BS = jnp.where(inside_BS, here_S - offset_BS + (offset_BS // block + 1) * block, here_S + 1)
        given_BS = batch["given"] if self.config.whole_prompts else None
        if given_BS is not None:
            end_BS = jnp.maximum(end_BS, given_BS)
        number_BS, offset_BS, inside_BS = copies.of(length)
        twin_BS = jnp.take_along_axis(_chosen(images.start_BI, order_BI), number_BS, axis=1)
        before_BS = offset_BS // block * block  # rows of the image before the block
        own_BS = jnp.where(inside_BS, here_S - offset_BS + before_BS, 0)
        return spans.Spans(
            batch["start"],
            jnp.where(inside_BS, twin_BS + before_BS, end_BS),
            own_BS,
            own_BS + block * inside_BS,
            reach=block - 1 if given_BS is None else None,
            second=block,
        )

    def _places(self, batch) -> tuple[ImageRows, ImageRows, jnp.ndarray]:
        """(images; copies, those that there are first; which image each of those is of, int32 [B, I])."""
        copy_BI, start_BI = batch["image_copy"], batch["image_start"]
        order_BI = jnp.argsort(jnp.where(copy_BI < 0, jnp.iinfo(jnp.int32).max, copy_BI), axis=1)
        rows = self.form.rows
        return ImageRows(start_BI, rows), ImageRows(_chosen(copy_BI, order_BI), rows), order_BI


def _chosen(x_BI, order_BI):
    """x [B, I, ...] in another order of images."""
    return jnp.take_along_axis(x_BI, order_BI.reshape(*order_BI.shape, *[1] * (x_BI.ndim - 2)), axis=1)
