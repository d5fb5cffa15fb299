"""What the train step sees of a multimodal transformer, whatever an image is in its sequences.

It offers what `tokenizers.base.ImageModel` asks of a model, over batches of `batches.RowBatcher`. Images are codes in
`model.Multimodal` and noised latents in `diffusion_model.DiffusionMultimodal`; the train step does not tell them apart.

Legend: B rows, S positions, R positions before a target, D width.
"""

import abc
from typing import Any

import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal import backbone
from ddt_jax.nn import lora

FROZEN = "frozen"  # in `extra`: what does not move where LoRA is trained


class RowModel(abc.ABC):
    """Backbone, next-token terms, and what else all of them share.

    Args:
      config: with every size filled in (`training.corpus.resolve`).

    Attributes:
      inputs: arrays of a batch that the step takes: tokens, position, start int32 [B, S], and given, where prompts see
        all of themselves; rows int32 [B, R], the positions before targets, -1 where there is none; slot int32 [B];
        and those of images.
    """

    cross_example_terms = ()
    image_loss = None
    inherited = ()

    def __init__(self, config: settings.Multimodal):
        if not config.transformer.vocab_size:
            raise UserError("config: the size of the vocabulary is not known yet; name sequences.sources")
        backbone.check(config.transformer)
        self.config = config
        self.inputs = ("tokens", "position", "start", "rows", "slot") + (("given",) if config.whole_prompts else ())
        self.module = backbone.Backbone(config.transformer)
        self.loss_weights = {"next_token": 1.0}

    def init(self, rng):
        """Fresh (params, extra): with LoRA its updates, what `lora.whole` names and what is learned of images."""
        params, extra = backbone.init(self.config.transformer, rng), {}
        if self.config.transformer.lora.rank:
            params, extra[FROZEN] = lora.split(params, self.config.transformer.lora.whole)
        of_images, more = self.init_images(jax.random.fold_in(rng, 1))
        return params | of_images, extra | more

    @abc.abstractmethod
    def init_images(self, rng) -> tuple[dict, dict]:
        """What images add to (params, extra)."""

    def backbone_params(self, params, extra, beside: str) -> Any:
        """The backbone's parameters. beside: the entry of params that is of images."""
        own = {name: value for name, value in params.items() if name != beside}
        return lora.join(own, extra[FROZEN]) if FROZEN in extra else own

    def shapes(self, q: settings.Sequences) -> dict[str, tuple]:
        """(shape, dtype) of one row of each of `inputs` but slot. Needs no data."""
        lengths = {"rows": q.targets or q.context}
        names = ("tokens", "position", "start", "rows", "given")
        return {name: ((lengths.get(name, q.context),), jnp.int32) for name in names if name in self.inputs}

    def dropout_keys(self, rng, slot_B):
        """A key for each row, or None where nothing is dropped."""
        c = self.config.transformer
        if not (c.dropout or (c.lora.rank and c.lora.dropout)):
            return None
        return jax.vmap(lambda slot: jax.random.fold_in(rng, slot))(slot_B)

    def targets(self, batch):
        """(positions before targets, at least 0; targets; 1.0 where there is one, else 0.0), each [B, R]."""
        rows_BR = batch["rows"]
        at_BR = jnp.maximum(rows_BR, 0)
        targets_BR = jnp.take_along_axis(batch["tokens"], at_BR + 1, axis=1)
        return at_BR, targets_BR, (rows_BR >= 0).astype(jnp.float32)

    def everywhere(self, batch):
        """`targets` for a loss of all positions: (what comes next; 1.0 where it is a target, else 0.0), each [B, S]."""
        tokens_BS, rows_BR = batch["tokens"], batch["rows"]
        size = tokens_BS.shape[1]
        at_BR = jnp.where(rows_BR < 0, size, rows_BR)
        weights_BS = jax.vmap(lambda at: jnp.zeros((size,), jnp.float32).at[at].set(1.0, mode="drop"))(at_BR)
        return jnp.roll(tokens_BS, -1, axis=1), weights_BS

    def text_terms(self, total, rows, some_BR, text_BR):
        """Sums and counts of what every kind of images has:

        next_token: nats per target, z-loss included: the loss, with one weight for every target of the global batch.
        text_nll: nats per target that is no image code, special tokens among them; text_accuracy: their share that no
          other id beats.
        targets_used: share of the R places for targets that hold one.

        Args:
          total, rows: of `cross_entropy`.
          some_BR, text_BR: 1.0 where there is a target, and where it is text.
        """
        count, of_text = (jnp.sum(x, dtype=jnp.float32) for x in (some_BR, text_BR))
        sums = {
            "next_token": total,
            "text_nll": jnp.sum(rows.nll * text_BR),
            "text_accuracy": jnp.sum(rows.right * text_BR),
            "targets_used": count,
        }
        places = jnp.float32(some_BR.size)
        return sums, dict(zip(sums, (count, of_text, of_text, places), strict=True))

    def update_extra(self, extra, stats, rng):
        del stats, rng
        return extra

    def extra_metrics(self, extra):
        del extra
        return {}
