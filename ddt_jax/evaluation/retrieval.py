"""Which caption belongs to an image, and which image to a caption, among a gallery of them: recall at 1, 5 and 10.

By embedding, and by what an image's codes give: the second row is what a language model that reads codes has.

Legend: I images, T captions, e dimensions of the space in which they are compared, B rows of a batch, R rows of images,
N tokens.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax import mesh as meshes
from ddt_jax import settings as settings_lib
from ddt_jax.data import images
from ddt_jax.data.base import BadRecord, Source
from ddt_jax.errors import UserError
from ddt_jax.evaluation import gather, metrics, tables
from ddt_jax.tokenizers.base import to_float
from ddt_jax.tokenizers.caption_ids import CaptionIds
from ddt_jax.tokenizers.seed import SEED, Aligner

AT = (1, 5, 10)
_WITHOUT = 1000  # records without a caption, after which none is looked for
_ROWS = 256  # images whose order of captions is looked at together


def recall(similarity_IT, image_T=None, at: tuple[int, ...] = AT) -> dict[str, Any]:
    """Shares of images and captions that find their own among the first few.

    What is as near as the right answer counts as nearer, so that equal vectors find nothing; so does what is no number.

    Args:
      similarity_IT: float; larger is nearer.
      image_T: int, the image that each caption is of; None: caption i is of image i. An image without captions has
        found nothing.
      at: how many of the nearest are looked at.

    Returns:
      {"image_to_text": {"1": ..., ...}, "text_to_image": {...}, "mean": over both and all of `at`}. An image has found
      its captions when any of them is among the first.
    """
    similarity_IT = np.asarray(similarity_IT)
    i, t = similarity_IT.shape
    image_T = np.arange(t) if image_T is None else np.asarray(image_T)
    own_T = similarity_IT[image_T, np.arange(t)].astype(np.float64)
    own_T = np.where(np.isnan(own_T), -np.inf, own_T)
    best_I, before_I, before_T = np.full(i, -np.inf), np.zeros(i, np.int64), np.zeros(t, np.int64)
    for start in range(0, i, _ROWS):  # copies of COCO's whole table, 5,000 by 25,000, would take gigabytes
        rows = slice(start, start + _ROWS)
        some_RT = similarity_IT[rows].astype(np.float64)
        own_RT = np.arange(i)[rows, None] == image_T[None]
        unknown_RT = np.isnan(some_RT)
        best_I[rows] = best_R = np.where(own_RT & ~unknown_RT, some_RT, -np.inf).max(axis=1, initial=-np.inf)
        before_I[rows] = np.sum(~own_RT & (unknown_RT | (some_RT >= best_R[:, None])), axis=1)
        before_T += np.sum(~own_RT & (unknown_RT | (some_RT >= own_T[None])), axis=0)
    never = max(at)
    before_I = np.where(np.isneginf(best_I), never, before_I)
    before_T = np.where(np.isneginf(own_T), never, before_T)
    found = {
        "image_to_text": {str(k): float(np.mean(before_I < k)) for k in at},
        "text_to_image": {str(k): float(np.mean(before_T < k)) for k in at},
    }
    return found | {"mean": float(np.mean([share for by_k in found.values() for share in by_k.values()]))}


def gallery(source: Source, count: int) -> list[int]:
    """Indices of the first records of a source whose captions say different things, in its order; [] if none of the
    first 1,000 has one. Of a source whose images have several captions each, its first images as they come: the
    protocol of Karpathy's splits compares all of them, also those that are described alike.

    Scenes are compared by their sets of objects, whatever the captions' words; others by their captions.
    """
    if _several(source):
        return list(range(min(count, len(source))))
    seen, found = set(), []
    for index in range(len(source)):
        if len(found) == count or (not found and index >= _WITHOUT):
            break
        try:
            record = source[index]
        except BadRecord:
            continue
        scene = record.get("meta", {}).get("scene")
        says = " ".join(record.get("caption", "").lower().split()) if scene is None else scene.keys
        if says and says not in seen:
            seen.add(says)
            found.append(index)
    return found


def _several(source: Source) -> bool:
    return getattr(source, "each", "") == "image"


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
      results: JSON values.
      codes: of the gallery's images, int32 [I, N]; None of a model without codes.
      labels: of these images, -1 where there is none.
    """

    results: dict[str, Any]
    codes: np.ndarray | None
    labels: np.ndarray
    pictured: ClassVar[bool] = False

    def markdown(self) -> str:
        """Tables for a person."""
        return tables.retrieval(self.results)


@functools.lru_cache(maxsize=4)
def program(model: Aligner) -> Callable:
    """(params, extra, batch) → vectors of images and captions [B, e]; of a tokenizer also codes, and vectors of them
    and of their positions' other order.

    Compiled once per model, so that evaluating again during a run costs no compilation.
    """

    def run(params, extra, batch):
        image_BHWC = to_float(batch["image"])
        found = {"image": model.embed_images(params, extra, image_BHWC)}
        found["text"] = model.embed_texts(params, batch["caption_ids"])
        if isinstance(model, SEED):
            found["codes"] = codes_BN = model.encode(params, extra, image_BHWC)
            found["code"] = model.embed_codes(params, extra, codes_BN)
            shuffled_BN = jnp.take_along_axis(codes_BN, batch["order"], axis=1)
            found["shuffled"] = model.embed_codes(params, extra, shuffled_BN)
        return found

    return jax.jit(run)


@functools.lru_cache(maxsize=4)
def text_program(model: Aligner) -> Callable:
    """(params, caption_ids [B, L]) → vectors of captions [B, e]; compiled once per model."""
    return jax.jit(model.embed_texts)


def evaluate_retrieval(
    model: Aligner,
    params,
    extra,
    source: Source,
    data: settings_lib.Data,
    settings: settings_lib.Evaluate,
    captions: CaptionIds,
    *,
    mesh,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Measures a model on the first settings.images records of a source whose captions say different things, or on its
    first images and all of their captions if it has several of each; see `gallery`. Of a source without captions a
    tokenizer's codes alone are measured, on as many records.

    Args:
      params, extra: what is evaluated; the weight average, as a rule.
      data: how images are prepared.
      settings: `images`, `batch_size`, `seed` of the order in which codes are shuffled.
      progress: told how many images this process has seen.

    Returns:
      A report. retrieval: "by_embedding", and of a tokenizer "by_code" and "by_shuffled_codes" (each image's codes in
      another order), as `recall` gives them; recall_...: figures at 1 and means again, for the log; retrieval_images,
      and retrieval_texts where captions are more or less; of a source with several captions of each image
      retrieval_split_images, where it has more images; codebook_used and codebook_perplexity over the gallery.

    Raises:
      UserError: if no record has a caption, and the model no codes; if several records are of the same image.
    """
    if getattr(source, "each", "") == "caption":
        raise UserError(
            f"data: {source.name} has a record of each caption, images are retrieved; leave out each=caption"
        )
    chosen, several = gallery(source, settings.images), _several(source)
    retrieves = bool(chosen)
    if not retrieves and not isinstance(model, SEED):
        raise UserError(f"data: {source.name} has no captions, which images are retrieved by; name a source with some")
    chosen = chosen or list(range(min(settings.images, len(source))))
    size = data.image_size
    reader = meshes.reader(mesh)
    share = settings.batch_size // reader.count  # of each batch
    run, rows, said, seen = program(model), [], [], 0
    for start in range(0, len(chosen), settings.batch_size):
        first = start + reader.index * share
        here = chosen[first : min(first + share, start + settings.batch_size)]
        image_BHWC, texts, label_B = np.zeros((share, size, size, 3), np.uint8), [""] * share, np.full(share, -1)
        order = np.zeros((share, model.config.num_tokens), np.int32)
        valid = np.zeros(share, bool)
        for row, index in enumerate(here):
            try:
                record = source[index]
                image_BHWC[row] = images.prepare(record["image"], data, None)
            except BadRecord:
                continue
            texts[row], label_B[row] = record.get("caption", ""), record.get("label", -1)
            valid[row] = True
            said += [(first + row, caption) for caption in record.get("captions", ())] if several else []
            order[row] = np.random.default_rng((settings.seed, index)).permutation(order.shape[1])
        batch = {"image": image_BHWC, "caption_ids": captions(texts), "order": order}
        on_device = meshes.put_batch(batch, mesh)
        by_rows = on_device["image"].sharding
        found = {name: gather.local_rows(x, by_rows) for name, x in run(params, extra, on_device).items()}
        place = {"valid": valid, "place": first + np.arange(share), "label": label_B}
        rows.append(place | found)
        seen += len(here)
        if progress is not None:
            progress(seen)
    table = gather.valid_rows(rows)
    in_order = np.argsort(table["place"])
    table = {name: column[in_order] for name, column in table.items()}
    text_Te, image_T, results = table["text"], None, {}
    if several:
        text_Te, place_T = _embed(model, params, captions, said, settings.batch_size, mesh)
        image_T = np.searchsorted(table["place"], place_T)
        if not len(text_Te):
            raise UserError(f"data: none of the first {len(chosen):,} images of {source.name} has a caption")
    if retrieves:
        n = len(table["place"])
        results |= {"retrieval_images": n, "retrieval_chance": 1 / n, "retrieval": {}}
        results |= {"retrieval_texts": len(text_Te)} if len(text_Te) != n else {}
        results |= {"retrieval_split_images": len(source)} if several and n < len(source) else {}
    for name, of in {"by_embedding": "image", "by_code": "code", "by_shuffled_codes": "shuffled"}.items():
        if retrieves and of in table:
            found = recall(table[of] @ text_Te.T, image_T)
            results["retrieval"][name] = found
            results |= {f"recall_{way}_1_{name}": found[way]["1"] for way in ("image_to_text", "text_to_image")}
            results[f"recall_mean_{name}"] = found["mean"]
    codes = table.get("codes")
    if codes is not None:
        usage = metrics.codebook_usage(codes, model.codebook_size)
        results |= {"num_tokens": model.num_tokens, "codebook_size": model.codebook_size}
        results |= {"codebook_used": usage["used"], "codebook_perplexity": usage["perplexity"]}
        results["code_cosine"] = float(np.mean(np.sum(table["image"] * table["code"], axis=1)))
    return Report(results, codes, table["label"])


def _embed(model, params, captions, said, batch_size, mesh) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of all captions of all processes, and the places of their images: ([T, e], [T]).

    Args:
      said: (place, caption) of the images of this process.
    """
    share = batch_size // meshes.reader(mesh).count
    most = gather.columns({"captions": np.array([len(said)])})["captions"].max()
    run, rows = text_program(model), []
    for start in range(0, int(most), share):  # as often on every process, however many captions its images have
        here = said[start : start + share]
        padding = [(-1, "")] * (share - len(here))
        places, texts = zip(*here, *padding, strict=True)
        ids = meshes.put_batch({"caption_ids": captions(texts)}, mesh)["caption_ids"]
        vectors = gather.local_rows(run(params, ids), ids.sharding)
        rows.append({"valid": np.arange(share) < len(here), "place": np.array(places), "text": vectors})
    table = gather.valid_rows(rows) if rows else {"text": np.zeros((0, 1)), "place": np.zeros(0, int)}
    return table["text"], table["place"]
