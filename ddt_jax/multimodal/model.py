"""The multimodal transformer whose images are codes: next-token loss over packed rows of text and codes.

Legend: B rows, S positions, R positions before a target, D width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.mesh import CONTEXT, constrain_positions, position_axis
from ddt_jax.multimodal import code_embedding
from ddt_jax.multimodal.blockwise_model import BlockwiseMultimodal
from ddt_jax.multimodal.diffusion_model import DiffusionMultimodal
from ddt_jax.multimodal.row_model import RowModel
from ddt_jax.nn import spans


class Multimodal(RowModel):
    """Loss and state of a transformer whose images are codes."""

    def __init__(self, config: settings.Multimodal):
        image = config.image
        if not (config.transformer.vocab_size and image.num_tokens and (image.code_width or not image.code_vectors)):
            raise UserError(
                "config: the sizes of the vocabulary and of images are not known yet; name codes in sequences.sources"
            )
        super().__init__(config)
        self.first_code = config.transformer.vocab_size - image.codebook_size  # codes are the last ids

    def init_images(self, rng):
        return code_embedding.init(self.config, rng)

    def all_params(self, params, extra) -> Any:
        """The backbone's parameters, as they generate or are exported."""
        joined = self.backbone_params(params, extra, code_embedding.PARAMS)
        return code_embedding.plain(joined, params.get(code_embedding.PARAMS, {}), extra)

    def places(self, params, extra) -> code_embedding.Places | None:
        """What embeddings and logits of codes have beside the backbone's; None: nothing."""
        return code_embedding.places(params.get(code_embedding.PARAMS, {}), extra, self.first_code)

    def loss_fn(self, params, extra, batch, rng):
        """See `ImageModel.loss_fn`. The terms: those of `text_terms`, and

        image_bits: bits per image code; image_accuracy: share of codes that no other id beats.
        """
        total, rows, image_BR = self.score(params, extra, batch, self.dropout_keys(rng, batch["slot"]))
        some_BR = (batch["rows"] >= 0).astype(jnp.float32)
        image_BR = image_BR * some_BR
        sums, counts = self.text_terms(total, rows, some_BR, some_BR - image_BR)
        of_image = jnp.sum(image_BR, dtype=jnp.float32)
        more = {
            "image_bits": jnp.sum(rows.nll * image_BR) / math.log(2),
            "image_accuracy": jnp.sum(rows.right * image_BR),
        }
        return sums | more, counts | dict.fromkeys(more, of_image), {}

    def score(self, params, extra, batch, dropout_keys_B=None):
        """How likely each target is.

        Returns:
          (summed loss, z-loss included; `cross_entropy.Rows` [B, R], of which those without a target mean nothing;
          bool [B, R], whether the target is an image code).
        """
        tokens_BS = batch["tokens"]
        if self.config.whole_prompts:
            visible = spans.bidirectional(batch["given"], start=batch["start"])
        else:
            visible = spans.causal(tokens_BS.shape[1], start=batch["start"])
        at_BR, targets_BR, weights_BR = self.targets(batch)
        wanted_BR, scored, position_BS = at_BR, (targets_BR, weights_BR), batch["position"]
        if apart := position_axis(tokens_BS.shape[1]):  # hidden states stay where they are: all positions have a loss
            wanted_BR, scored, position_BS = None, self.everywhere(batch), constrain_positions(position_BS)
        places = self.places(params, extra)
        places_BS = None if places is None else places.of(tokens_BS)

        def run(module):
            x_BSD = module.embed(tokens_BS)
            if places is not None:
                x_BSD = places.add(x_BSD, tokens_BS, places_BS, batch["given"] if self.config.whole_prompts else None)
            h, _ = module(x_BSD, position_BS, visible, dropout_keys_B=dropout_keys_B, rows_BR=wanted_BR)
            more = None
            if places is not None:
                more = places.ahead(h, places_BS if apart else jnp.take_along_axis(places_BS, at_BR, axis=1))
            return module.loss(h, *scored, more)

        total, rows = self.module.apply({"params": self.all_params(params, extra)}, method=run)
        if apart:
            rows = jax.tree.map(lambda x_BS: jnp.take_along_axis(x_BS, at_BR, axis=1), rows)
        return total, rows, targets_BR >= self.first_code


def check_context(s: settings.Experiment, mesh) -> None:
    """Raises UserError unless positions of the model's rows can lie over the mesh's axis context."""
    parts, context = mesh.shape[CONTEXT], s.sequences.context
    is_splash = isinstance(s.model, settings.Multimodal) and s.model.transformer.attention == "splash"
    if is_splash and context % parts == 0 and context // parts % 128:
        of = f"sequences.context={context}" + (f" over mesh.context={parts}" if parts > 1 else "")
        raise UserError(
            f"config: model.transformer.attention=splash needs multiples of 128 positions, {of} is "
            f"{context // parts}; set attention=auto"
        )
    if parts == 1:
        return
    image = getattr(s.model, "image", None)
    if not isinstance(image, settings.CodeImages):
        kind = s.model.kind if image is None else f"{s.model.kind} with model.image.kind={image.kind}"
        raise UserError(
            f"mesh: mesh.context={parts} splits rows of text and codes, model.kind={kind} has none; set mesh.context=1"
        )
    if image.code_places and image.code_vectors:
        raise UserError(
            f"mesh: mesh.context={parts} would part the codes of an image, which model.image.code_places with "
            "code_vectors looks at together; set mesh.context=1"
        )
    if context % parts:
        raise UserError(
            f"mesh: sequences.context={context} does not divide over mesh.context={parts}; "
            f"set sequences.context={-(-context // parts) * parts}"
        )


def make_multimodal(config: settings.Multimodal, image_size: int) -> RowModel:
    """The transformer whose images are what config.image.kind says. Raises UserError for sizes that do not fit."""
    if isinstance(config.image, settings.DiffusionImages):
        return (BlockwiseMultimodal if config.image.block_size else DiffusionMultimodal)(config, image_size)
    return Multimodal(config)
