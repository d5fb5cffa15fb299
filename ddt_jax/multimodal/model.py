"""The multimodal transformer as the train step sees it: next-token loss over packed rows of text and image codes.

It offers what `tokenizers.base.ImageModel` asks of a model, over batches of `batches.RowBatcher`. Images that are not
codes add a term to `loss_weights` and arrays to `inputs`; nothing else in a run knows how an image enters a sequence.

Legend: B rows, S positions, R positions before a target, D width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal import backbone, code_embedding
from ddt_jax.nn import lora, spans

FROZEN = "frozen"  # in `extra`: what does not move where LoRA is trained


class Multimodal:
    """Loss and state of a transformer whose images are codes.

    Args:
      config: with every size filled in (`training.corpus.resolve`).

    Attributes:
      inputs: arrays of a batch that the step takes: tokens, position, start int32 [B, S], and given, where prompts see
        all of themselves; rows int32 [B, R], the positions before targets, -1 where there is none; slot int32 [B].
    """

    cross_example_terms = ()
    image_loss = None
    inherited = ()

    def __init__(self, config: settings.Multimodal):
        c, image = config.transformer, config.image
        if not (c.vocab_size and image.num_tokens and (image.code_width or not image.code_vectors)):
            raise UserError(
                "config: the sizes of the vocabulary and of images are not known yet; name codes in sequences.sources"
            )
        backbone.check(c)
        self.config = config
        self.inputs = ("tokens", "position", "start", "rows", "slot") + (("given",) if config.whole_prompts else ())
        self.module = backbone.Backbone(c)
        self.first_code = c.vocab_size - config.image.codebook_size  # codes are the last ids
        self.loss_weights = {"next_token": 1.0}

    def init(self, rng):
        """Fresh (params, extra): with LoRA only its updates, and what is learned about codes, are parameters."""
        params, extra = backbone.init(self.config.transformer, rng), {}
        if self.config.transformer.lora.rank:
            params, extra[FROZEN] = lora.split(params)
        of_codes, vectors = code_embedding.init(self.config, jax.random.fold_in(rng, 1))
        return params | of_codes, extra | vectors

    def all_params(self, params, extra) -> Any:
        """The backbone's parameters, as they generate or are exported."""
        own = {name: value for name, value in params.items() if name != code_embedding.PARAMS}
        joined = lora.join(own, extra[FROZEN]) if FROZEN in extra else own
        return code_embedding.plain(joined, params.get(code_embedding.PARAMS, {}), extra)

    def places(self, params, extra) -> code_embedding.Places | None:
        """What embeddings and logits of codes have beside the backbone's; None: nothing."""
        return code_embedding.places(params.get(code_embedding.PARAMS, {}), extra, self.first_code)

    def loss_fn(self, params, extra, batch, rng):
        """See `ImageModel.loss_fn`. The terms:

        next_token: nats per target, z-loss included: the loss, with one weight for every target of the global batch.
        text_nll: nats per target that is no image code, special tokens among them; image_bits: bits per image code.
        text_accuracy, image_accuracy: shares of targets that no other id beats.
        targets_used: share of the R places for targets that hold one.
        """
        slots_B = batch["slot"]
        keys_B = jax.vmap(lambda slot: jax.random.fold_in(rng, slot))(slots_B)
        total, rows, image_BR = self.score(params, extra, batch, keys_B if self.config.transformer.dropout else None)
        some_BR = (batch["rows"] >= 0).astype(jnp.float32)
        image_BR = image_BR * some_BR
        text_BR = some_BR - image_BR
        count, of_text, of_image = (jnp.sum(x, dtype=jnp.float32) for x in (some_BR, text_BR, image_BR))
        sums = {
            "next_token": total,
            "text_nll": jnp.sum(rows.nll * text_BR),
            "image_bits": jnp.sum(rows.nll * image_BR) / math.log(2),
            "text_accuracy": jnp.sum(rows.right * text_BR),
            "image_accuracy": jnp.sum(rows.right * image_BR),
            "targets_used": count,
        }
        places = jnp.float32(image_BR.size)
        counts = dict(zip(sums, (count, of_text, of_image, of_text, of_image, places), strict=True))
        return sums, counts, {}

    def score(self, params, extra, batch, dropout_keys_B=None):
        """How likely each target is.

        Returns:
          (summed loss, z-loss included; `cross_entropy.Rows` [B, R], of which those without a target mean nothing;
          bool [B, R], whether the target is an image code).
        """
        rows_BR, tokens_BS = batch["rows"], batch["tokens"]
        if self.config.whole_prompts:
            visible = spans.bidirectional(batch["given"], start=batch["start"])
        else:
            visible = spans.causal(tokens_BS.shape[1], start=batch["start"])
        at_BR = jnp.maximum(rows_BR, 0)
        targets_BR = jnp.take_along_axis(tokens_BS, at_BR + 1, axis=1)
        weights_BR = (rows_BR >= 0).astype(jnp.float32)

        places = self.places(params, extra)
        places_BS = None if places is None else places.of(tokens_BS)

        def run(module):
            x_BSD = module.embed(tokens_BS)
            if places is not None:
                x_BSD = places.add(x_BSD, tokens_BS, places_BS, batch["given"] if self.config.whole_prompts else None)
            h_BSD, _ = module(x_BSD, batch["position"], visible, dropout_keys_B=dropout_keys_B)
            h_BRD = jnp.take_along_axis(h_BSD, at_BR[..., None], axis=1)
            more = None
            if places is not None:
                more = places.ahead(h_BRD, jnp.take_along_axis(places_BS, at_BR, axis=1))
            return module.loss(h_BRD, targets_BR, weights_BR, more)

        total, rows = self.module.apply({"params": self.all_params(params, extra)}, method=run)
        return total, rows, targets_BR >= self.first_code

    def update_extra(self, extra, stats, rng):
        del stats, rng
        return extra

    def extra_metrics(self, extra):
        del extra
        return {}
