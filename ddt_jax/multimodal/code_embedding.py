"""What a model may be told about image codes beside their ids: how alike they are, and which code of its image each is.

Ids of codes say nothing of themselves, and one code means another thing at each place of an image. A transformer learns
both from data in time; small runs have no such time. With `image.code_vectors` embedding and head of a code get a
learned linear map of the vector that the image tokenizer's decoder is given for it, beside rows of their own, so that
what is learned of one code holds for its neighbours. The maps are added to the tables when weights leave training: what
generates or is exported is an ordinary transformer. With `image.code_places` the embedding of a code also says whether
it is the first, second, ... of its image; rotary positions count from the beginning of the document instead. With both,
each place has maps of its own, for the same vector means another thing at each place; that holds K C numbers for each
position, which is for images of few codes.

Legend: B batch, S sequence, D width, V vocabulary, C width of a code's vector, K codes of an image.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.nn.params import declare

# In params: {"input" and "output" [C, D] or, with places, [K, C, D], "places" [K, D]}, those that the settings ask for.
PARAMS = "codes"
VECTORS = "code_vectors"  # in extra: float32 [V, C], zero where an id is no code
_STD = 0.02  # of what is added to an element of an embedding, as of the embeddings themselves


class Places(NamedTuple):
    """Which code of its image each is: for embeddings, and for the logits of the next one.

    Attributes:
      table_KD: what is added to the first, second, ... code.
      first_code: from this id on, ids are codes.
      input_KCD, output_KCD: maps of code vectors by place; None: there are none.
      vectors_VC: the vectors; None as they.
    """

    table_KD: Any
    first_code: Any
    input_KCD: Any = None
    output_KCD: Any = None
    vectors_VC: Any = None

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

    def add(self, x_BSD, tokens_BS, places_BS):
        """Embeddings with their places. An image that goes on behind its K-th code has no place for it."""
        place_BSK = jax.nn.one_hot(places_BS - 1, len(self.table_KD), dtype=x_BSD.dtype)  # zeros where there is none
        x_BSD = x_BSD + place_BSK @ self.table_KD.astype(x_BSD.dtype)
        if self.input_KCD is None:
            return x_BSD
        # One product of all maps with vectors that are zero but at their place.
        vectors_BSC = self.vectors_VC[tokens_BS].astype(x_BSD.dtype)
        spread = (place_BSK[..., None] * vectors_BSC[..., None, :]).reshape(*places_BS.shape, -1)
        return x_BSD + spread @ self.input_KCD.reshape(spread.shape[-1], -1).astype(x_BSD.dtype)

    def ahead(self, h_BSD, places_BS):
        """What hidden states see of the vectors of the code that would come next: (h [B, S, C], table [V, C]), further
        columns of hidden states and head; None without maps.

        Args:
          places_BS: of the tokens at these rows. Behind the K-th no code comes.
        """
        if self.output_KCD is None:
            return None
        k, c, d = self.output_KCD.shape
        next_BSK = jax.nn.one_hot(jnp.minimum(places_BS, k - 1), k, dtype=h_BSD.dtype)
        all_BSKC = (h_BSD @ self.output_KCD.reshape(k * c, d).T.astype(h_BSD.dtype)).reshape(*h_BSD.shape[:-1], k, c)
        return jnp.einsum("...kc,...k->...c", all_BSKC, next_BSK), self.vectors_VC


def init(c: settings.Multimodal, rng) -> tuple[dict, dict]:
    """What the settings ask for: (entries of params, entries of extra), in boxes. The vectors have to be filled in."""
    image, d = c.image, c.transformer.width
    keys = dict(zip(("input", "output", "places"), jax.random.split(rng, 3), strict=True))
    params, extra = {}, {}
    if image.code_vectors:
        # Vectors have elements of unit size (`nn.quantize`), so C of them make a sum of variance C.
        shape = (image.num_tokens, image.code_width, d) if image.code_places else (image.code_width, d)
        axes = (*(None for _ in shape[1:]), "embed")
        linear = declare(nn.initializers.normal(_STD * image.code_width**-0.5), axes)
        params |= {name: linear(keys[name], shape, jnp.float32) for name in ("input", "output")}
        shape = (c.transformer.vocab_size, image.code_width)
        extra[VECTORS] = declare(nn.initializers.zeros, ("vocab", None), group="frozen")(rng, shape, jnp.float32)
    if image.code_places:
        places = declare(nn.initializers.normal(_STD), (None, "embed"), decay=False)
        params["places"] = places(keys["places"], (image.num_tokens, d), jnp.float32)
    return ({PARAMS: params} if params else {}), extra


def plain(transformer: dict, learned: dict, extra: dict) -> dict:
    """Parameters of the backbone with the maps of code vectors in their tables, where they are the same at all places.

    Args:
      transformer: of `backbone.init`.
      learned: params[PARAMS], or {}.
    """
    if "input" not in learned or "places" in learned:
        return transformer
    vectors_VC = extra[VECTORS]
    tables = {"embed": vectors_VC @ learned["input"]}
    if "head" in transformer:  # else it is tied to the embedding
        tables["head"] = vectors_VC @ learned["output"]
    return transformer | {name: transformer[name] + x.astype(transformer[name].dtype) for name, x in tables.items()}


def places(learned: dict, extra: dict, first_code: int) -> Places | None:
    """`Places` of params[PARAMS]; None where the settings do not ask for them."""
    if "places" not in learned:
        return None
    maps = (learned["input"], learned["output"], extra[VECTORS]) if "input" in learned else ()
    return Places(learned["places"], first_code, *maps)
