"""How well a transformer predicts held-out documents: text with and without images before it; codes by position, or
what is noised by its level.

Legend: B rows, S positions, R places for targets, K codes of an image, or its rows where it is not made of codes.
"""

import functools
import math
from collections.abc import Collection, Iterable
from typing import Any

import jax
import numpy as np

from ddt_jax import mesh as meshes
from ddt_jax.data.permutation import keyed_generator
from ddt_jax.evaluation import gather
from ddt_jax.multimodal.row_model import RowModel

_SEED = 0  # of the noise of held-out images


def held_out(
    model: RowModel, params, extra, batches: Iterable[dict], *, mesh, marks: Collection[int] = ()
) -> dict[str, Any]:
    """Figures over the documents of batches.

    Args:
      batches: finite, of `RowBatcher`, this process's rows; as many on every process.
      mesh: over which rows are put.
      marks: ids of special tokens.

    Returns:
      text_perplexity, text_perplexity_after_image and text_perplexity_without_image (targets with and without an image
      earlier in their document; special tokens are text: where captions are only given, as with `whole_prompts`, hardly
      more than BOV is left of those without); image_bits (per code), image_bits_by_position and
      image_accuracy_by_position [K]; image_bits_shuffled: the same documents, the codes of each image in a random
      order, and the difference to image_bits as image_bits_lost_by_shuffling: how much the order of codes tells. A
      figure of which there is no target is left out. tokens: how many targets were counted.
      Where images are denoised, text is predicted from images as they are, and in place of figures of codes there are
      diffusion, mse_t25, mse_t50, mse_t75 and mse_t100, the terms of `DiffusionMultimodal.loss_fn`, of one draw of
      noise, which is the same for the same batches.
    """
    program, in_codes = _program(model), model.config.image.kind == "codes"
    by_rows = meshes.batch_sharding(mesh)
    num_tokens = model.config.image.num_tokens if in_codes else model.form.rows
    sums: dict[str, np.ndarray] = {}
    denoising: list[dict[str, tuple]] = []

    def put(batch):
        return meshes.put_batch({name: batch[name] for name in model.inputs}, mesh)

    def score(arrays):
        return [gather.local_rows(x, by_rows) for x in program(params, extra, arrays)]

    def add(name, values):
        sums[name] = sums.get(name, 0) + np.asarray(values, np.float64)

    for number, batch in enumerate(batches):
        arrays = put(batch)
        nll_BR, right_BR = score(arrays)
        place_BR, after_BR = _kinds(batch, num_tokens)
        text = (batch["rows"] >= 0) & (place_BR < 0)
        target_BR = np.take_along_axis(batch["tokens"], np.maximum(batch["rows"], 0) + 1, axis=1)
        for kind, some in (("text", text), ("plain", text & ~np.isin(target_BR, list(marks)))):
            for name, chosen in (("", some), ("_after_image", some & after_BR), ("_without_image", some & ~after_BR)):
                add(f"{kind}_perplexity{name}", (nll_BR[chosen].sum(), chosen.sum()))
        if not in_codes:
            key = jax.random.fold_in(jax.random.key(_SEED), number)
            denoising.append(_denoising_program(model)(params, extra, arrays, key))
            continue
        add("codes", _by_place(place_BR, nll_BR, right_BR, num_tokens))
        nll_BR, right_BR = score(put(batch | {"tokens": _shuffled(batch, num_tokens, number)}))
        add("shuffled", _by_place(place_BR, nll_BR, right_BR, num_tokens))
    sums = gather.added(sums)

    codes_K = sums["codes"][2] if in_codes else np.zeros(num_tokens)
    results: dict[str, Any] = {"tokens": int(sums["text_perplexity"][1] + codes_K.sum())}
    for name in (name for name in sums if "_perplexity" in name):
        nll, count = sums[name]
        if count:
            results[name] = math.exp(nll / count)
    for name in denoising[0] if denoising else ():
        total, count = np.sum([np.asarray(part[name], np.float64) for part in denoising], axis=0)
        if count:
            results[name] = float(total / count)
    if codes_K.sum():
        nll_K, right_K, count_K = sums["codes"]
        results["image_bits"] = float(nll_K.sum() / count_K.sum() / math.log(2))
        results["image_bits_by_position"] = (nll_K / count_K / math.log(2)).tolist()
        results["image_accuracy_by_position"] = (right_K / count_K).tolist()
        shuffled = sums["shuffled"][0].sum() / count_K.sum() / math.log(2)
        results["image_bits_shuffled"] = float(shuffled)
        results["image_bits_lost_by_shuffling"] = float(shuffled - results["image_bits"])
    return results


@functools.lru_cache(maxsize=4)
def _program(model):
    """Compiled once per model, so that evaluating again during a run costs no compilation."""

    def rows(params, extra, batch):
        _, found, _ = model.score(params, extra, batch)
        return found.nll, found.right

    return jax.jit(rows)


@functools.lru_cache(maxsize=4)
def _denoising_program(model):
    """(sum, count) of each diffusion term, over all rows of all processes."""

    def terms(params, extra, batch, key):
        sums, counts = model.terms(params, extra, batch, key)
        names = [name for name in sums if name == "diffusion" or name.startswith("mse_")]
        return {name: (sums[name], counts[name]) for name in names}

    return jax.jit(terms)


def _kinds(batch, num_tokens):
    """Of each target: which code of its image it is (-1: none, or no target), and whether an image is before it in its
    document."""
    place_BS = np.full(batch["tokens"].shape, -1)
    after_BS = np.zeros(batch["tokens"].shape, bool)
    for row, starts in enumerate(batch["image_start"]):
        for at, document in zip(starts, batch["image_document"][row], strict=True):
            if at < 0:
                continue
            place_BS[row, at : at + num_tokens] = np.arange(num_tokens)
            after_BS[row, at + num_tokens :] |= batch["document"][row, at + num_tokens :] == document
    at_BR = np.maximum(batch["rows"], 0) + 1
    real_BR = batch["rows"] >= 0
    return (
        np.where(real_BR, np.take_along_axis(place_BS, at_BR, axis=1), -1),
        real_BR & np.take_along_axis(after_BS, at_BR, axis=1),
    )


def _by_place(place_BR, nll_BR, right_BR, num_tokens):
    """Sums of nll and of right answers, and counts, by place. [3, K]"""
    chosen = place_BR >= 0
    weights = (np.asarray(nll_BR)[chosen], np.asarray(right_BR)[chosen], None)
    return [np.bincount(place_BR[chosen], w, minlength=num_tokens) for w in weights]


def _shuffled(batch, num_tokens, number):
    """Tokens with the codes of each image in a random order."""
    tokens_BS = batch["tokens"].copy()
    for row, starts in enumerate(batch["image_start"]):
        for at in starts[starts >= 0]:
            rng = keyed_generator("language", number, int(batch["slot"][row]), int(at))
            tokens_BS[row, at : at + num_tokens] = rng.permutation(tokens_BS[row, at : at + num_tokens])
    return tokens_BS
