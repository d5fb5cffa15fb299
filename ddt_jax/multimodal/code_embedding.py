"""What a model may be told about image codes beside their ids: how alike they are, and which code of its image each is.

Ids of codes say nothing of themselves, and one code means another thing at each place of an image. A transformer learns
both from data in time; small runs have no such time. With `image.code_vectors` embedding and head of a code get a
learned linear map of the vector that the image tokenizer's decoder is given for it, beside rows of their own, so that
what is learned of one code holds for its neighbours. The maps are added to the tables when weights leave training: what
generates or is exported is an ordinary transformer. With `image.code_places` the embedding of a code also says whether
it is the first, second, ... of its image; rotary positions count from the beginning of the document instead.

Legend: B batch, S sequence, D width, V vocabulary, C width of a code's vector, K codes of an image.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.nn.params import declare

PARAMS = "codes"  # in params: {"input" and "output" [C, D], "places" [K, D]}, of those that the settings ask for
VECTORS = "code_vectors"  # in extra: float32 [V, C], zero where an id is no code
_STD = 0.02  # of what is added to an element of an embedding, as of the embeddings themselves


class Places(NamedTuple):
    """Adds to embeddings of codes which of their image they are.

    Attributes:
      table_KD: what is added to the first, second, ... code.
      first_code: from this id on, ids are codes.
    """

    table_KD: Any
    first_code: Any

    def of(self, tokens_BS, before_B=0):
        """int32 [B, S]: 1 for the first of codes in a row, 2 for the second, ...; 0 for what is no code.

        Args:
          before_B: the place of the token in front of the first.
        """
        is_code_BS = tokens_BS >= self.first_code
        number_S = jnp.arange(1, tokens_BS.shape[1] + 1, dtype=jnp.int32)
        other_BS = jax.lax.cummax(jnp.where(is_code_BS, 0, number_S), axis=1)  # the last that is no code, 0: none yet
        before_BS = jnp.where(other_BS == 0, jnp.asarray(before_B, jnp.int32).reshape(-1, 1), 0)
        return jnp.where(is_code_BS, number_S - other_BS + before_BS, 0)

    def add(self, x_BSD, places_BS):
        """Embeddings with their places. An image that goes on behind its K-th code has no place for it."""
        known_BS = (places_BS > 0) & (places_BS <= len(self.table_KD))
        rows_BSD = self.table_KD[jnp.clip(places_BS - 1, 0, len(self.table_KD) - 1)]
        return x_BSD + jnp.where(known_BS[..., None], rows_BSD, 0).astype(x_BSD.dtype)


def init(c: settings.Multimodal, rng) -> tuple[dict, dict]:
    """What the settings ask for: (entries of params, entries of extra), in boxes. The vectors have to be filled in."""
    image, d = c.image, c.transformer.width
    keys = dict(zip(("input", "output", "places"), jax.random.split(rng, 3), strict=True))
    params, extra = {}, {}
    if image.code_vectors:
        # Vectors have elements of unit size (`nn.quantize`), so C of them make a sum of variance C.
        linear = declare(nn.initializers.normal(_STD * image.code_width**-0.5), (None, "embed"))
        params |= {name: linear(keys[name], (image.code_width, d), jnp.float32) for name in ("input", "output")}
        shape = (c.transformer.vocab_size, image.code_width)
        extra[VECTORS] = declare(nn.initializers.zeros, ("vocab", None), group="frozen")(rng, shape, jnp.float32)
    if image.code_places:
        places = declare(nn.initializers.normal(_STD), (None, "embed"), decay=False)
        params["places"] = places(keys["places"], (image.num_tokens, d), jnp.float32)
    return ({PARAMS: params} if params else {}), extra


def plain(transformer: dict, learned: dict, extra: dict) -> dict:
    """Parameters of the backbone with the maps of code vectors in their tables.

    Args:
      transformer: of `backbone.init`.
      learned: params[PARAMS], or {}.
    """
    if "input" not in learned:
        return transformer
    vectors_VC = extra[VECTORS]
    tables = {"embed": vectors_VC @ learned["input"]}
    if "head" in transformer:  # else it is tied to the embedding
        tables["head"] = vectors_VC @ learned["output"]
    return transformer | {name: transformer[name] + x.astype(transformer[name].dtype) for name, x in tables.items()}


def places(learned: dict, first_code: int) -> Places | None:
    """`Places` of params[PARAMS]; None where the settings do not ask for them."""
    return Places(learned["places"], first_code) if "places" in learned else None
