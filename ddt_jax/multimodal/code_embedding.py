"""What a model may be told about image codes beside their ids: how alike they are, and which code of its image each is.

Ids of codes say nothing of themselves, and one code means another thing at each place of an image. A transformer learns
both from data in time; small runs have no such time. With `image.code_vectors` embedding and head of a code get a
learned linear map of the vector that the image tokenizer's decoder is given for it, beside rows of their own, so that
what is learned of one code holds for its neighbours. The maps are added to the tables when weights leave training: what
generates or is exported is an ordinary transformer. With `image.code_places` the embedding of a code also says whether
it is the first, second, ... of its image; rotary positions count from the beginning of the document instead. With both,
each place has maps of its own, for the same vector means another thing at each place, and of more than its own vector:
of those of all codes of its image up to it, or of the whole image where that is given (`model.whole_prompts`). One code
says little of what is seen; sums over all codes, another one at each place, are what something nonlinear can work on.
That takes K K C D parameters, which is for images of few codes.

Legend: B batch, S sequence, D width, V vocabulary, C width of a code's vector, K codes of an image, L codes that a map
is of, I images of a row.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ddt_jax import settings
from ddt_jax.nn.params import declare

# In params: {"input" and "output" [C, D] or, with places, [K, L, C, D] and [K, C, D], "places" [K, D]}, those that the
# settings ask for.
PARAMS = "codes"
VECTORS = "code_vectors"  # in extra: float32 [V, C], zero where an id is no code
_STD = 0.02  # of what is added to an element of an embedding, as of the embeddings themselves


class Places(NamedTuple):
    """Which code of its image each is: for embeddings, and for the logits of the next one.

    Attributes:
      table_KD: what is added to the first, second, ... code.
      first_code: from this id on, ids are codes.
      input_KLCD: maps of code vectors: what the code at place k sees of the one at place l; None: there are none.
      output_KCD: maps of the vector of the code that comes next; None as they.
      vectors_VC: the vectors; None as they.
    """

    table_KD: Any
    first_code: Any
    input_KLCD: Any = None
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

    def add(self, x_BSD, tokens_BS, places_BS, given_BS=None):
        """Embeddings with their places. An image that goes on behind its K-th code has no place for it.

        Args:
          x_BSD: embeddings of rows that hold their images from the first code on.
          places_BS: of the tokens.
          given_BS: `Layout.given`: images inside of what is given see all of themselves; None: none do.
        """
        x_BSD = x_BSD + self._placed(places_BS, x_BSD.dtype) @ self.table_KD.astype(x_BSD.dtype)
        if self.input_KLCD is None:
            return x_BSD
        k, size = len(self.table_KD), tokens_BS.shape[1]
        number_S = jnp.arange(size, dtype=jnp.int32)
        most = -(-size // (k + 2))  # images stand between BOV and EOV, the last may have just begun
        first_BI = jnp.sort(jnp.where(places_BS == 1, number_S, size), axis=1)[:, :most]
        at_BIK = first_BI[..., None] + jnp.arange(k)
        vectors_BIKC, here_BIK = self._vectors(tokens_BS, places_BS, at_BIK)
        whole_BI = None if given_BS is None else _take(given_BS, first_BI) > 0
        seen_BIKD = self._mapped(vectors_BIKC.astype(x_BSD.dtype), whole_BI)
        example_B11 = jnp.arange(len(tokens_BS))[:, None, None]
        return x_BSD.at[example_B11, jnp.where(here_BIK, at_BIK, size)].add(seen_BIKD, mode="drop")

    def add_next(self, x_B1D, tokens_B1, before: "Written") -> tuple[Any, "Written"]:
        """`add` for one token more of each row: (its embedding, what is written with it)."""
        places_B1 = self.of(tokens_B1, before.place_B)
        placed_B1K = self._placed(places_B1, x_B1D.dtype)
        x_B1D = x_B1D + placed_B1K @ self.table_KD.astype(x_B1D.dtype)
        if self.input_KLCD is None:
            return x_B1D, Written(places_B1[:, 0])
        new_B1C = self.vectors_VC[tokens_B1].astype(x_B1D.dtype)
        vectors_BKC = jnp.where(placed_B1K[:, 0, :, None] > 0, new_B1C, before.vectors_BKC)
        # What an earlier image has left behind this place is seen by none of the places up to it.
        seen_BKD = self._mapped(vectors_BKC[:, None], None)[:, 0]
        return x_B1D + placed_B1K @ seen_BKD, Written(places_B1[:, 0], vectors_BKC)

    def written(self, tokens_BS, places_BS, dtype) -> "Written":
        """What rows that end here have written of the image that they end in, for `add_next`."""
        place_B = places_BS[:, -1]
        if self.input_KLCD is None:
            return Written(place_B)
        k, size = len(self.table_KD), tokens_BS.shape[1]
        at_B1K = (size - place_B[:, None] + jnp.arange(k))[:, None]
        return Written(place_B, self._vectors(tokens_BS, places_BS, at_B1K)[0][:, 0].astype(dtype))

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

    def _placed(self, places_BS, dtype):
        """[B, S, K], zeros where there is no place."""
        return jax.nn.one_hot(places_BS - 1, len(self.table_KD), dtype=dtype)

    def _vectors(self, tokens_BS, places_BS, at_BIK):
        """(vectors [B, I, K, C] of images whose codes are at these positions, zero where there is no such code;
        bool [B, I, K], where there is one).
        """
        place_K = jnp.arange(1, at_BIK.shape[-1] + 1)
        here_BIK = (at_BIK < tokens_BS.shape[1]) & (_take(places_BS, at_BIK) == place_K)
        return jnp.where(here_BIK[..., None], self.vectors_VC[_take(tokens_BS, at_BIK)], 0), here_BIK

    def _mapped(self, vectors_BIKC, whole_BI):
        """[B, I, K, D]: what each place sees of the codes up to it or, of images that are whole, of all of them."""
        maps_KLCD = self.input_KLCD.astype(vectors_BIKC.dtype)
        k, _, c, d = maps_KLCD.shape
        flat = vectors_BIKC.reshape(*vectors_BIKC.shape[:-2], k * c)

        def through(mask_KL):  # one product for all places of all images
            maps = jnp.where(mask_KL[..., None, None], maps_KLCD, 0).transpose(1, 2, 0, 3).reshape(k * c, k * d)
            return (flat @ maps).reshape(*flat.shape[:-1], k, d)

        before_KL = jnp.tril(jnp.ones((k, k), bool))
        seen_BIKD = through(before_KL)
        if whole_BI is None:
            return seen_BIKD
        return seen_BIKD + jnp.where(whole_BI[..., None, None], through(~before_KL), 0)


class Written(NamedTuple):
    """What a row has written of the image that it is in, for its next token.

    Attributes:
      place_B: int32, place of its last token, 0 outside of images.
      vectors_BKC: of the image's codes up to it; None where there are no maps.
    """

    place_B: Any
    vectors_BKC: Any = None


def _take(x_BS, at):
    """Elements of each example, [B, ...], at positions [B, ...]; any where they lie outside."""
    flat = jnp.clip(at.reshape(len(at), -1), 0, x_BS.shape[1] - 1)
    return jnp.take_along_axis(jnp.asarray(x_BS), flat, axis=1).reshape(at.shape)


def init(c: settings.Multimodal, rng) -> tuple[dict, dict]:
    """What the settings ask for: (entries of params, entries of extra), in boxes. The vectors have to be filled in."""
    image, d = c.image, c.transformer.width
    keys = dict(zip(("input", "output", "places"), jax.random.split(rng, 3), strict=True))
    params, extra = {}, {}
    if image.code_vectors:
        k = (image.num_tokens,) if image.code_places else ()
        of_head = {"reads": (-1,), "fixed_spread": True}  # its map is a part of the head, which reads hidden states
        sizes = (("input", (*k, *k, image.code_width), {}), ("output", (*k, image.code_width), of_head))
        for name, shape, how in sizes:
            # Vectors have elements of unit size (`nn.quantize`), so C of them make a sum of variance C.
            summed = math.prod(shape[1:] if k else shape)
            linear = declare(nn.initializers.normal(_STD * summed**-0.5), (*(None for _ in shape), "embed"), **how)
            params[name] = linear(keys[name], (*shape, d), jnp.float32)
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
