"""How much of an image its codes carry: reconstruction from all tokens, from the first few, and from wrong ones.

Everything is measured on images rounded to 8 bits, as they would be saved. The noise of a decoder is keyed by (seed,
index of the image in its source): neither batch size nor the number of devices or processes changes a figure.

Legend: B rows of a batch on this process, N images, K tokens, H height, W width, C channels.
"""

import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ddt_jax import mesh as meshes
from ddt_jax import settings as settings_lib
from ddt_jax.evaluation import gather, metrics, pictures, tables
from ddt_jax.evaluation import judge as judge_lib
from ddt_jax.io import atomic
from ddt_jax.tokenizers.base import ImageTokenizer, to_float, to_uint8

_COMMITMENT = "commitment"  # the name that tokenizers give the term in their loss


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
      results: JSON values; a figure that does not exist (SSIM of images below 11 pixels) is not among them.
      originals: the first few images, uint8 [P, H, W, C].
      reconstructions: number of tokens shown → uint8 [P, H, W, C].
      codes: of the images of all processes, int32 [N, K].
      labels: of these images, int [N]; -1 where there is none.
    """

    results: dict[str, Any]
    originals: np.ndarray
    reconstructions: dict[int, np.ndarray] = field(default_factory=dict)
    codes: np.ndarray | None = None
    labels: np.ndarray | None = None

    picture_name: ClassVar[str] = "reconstructions"

    @property
    def pictured(self) -> bool:
        return len(self.originals) > 0

    def picture(self) -> np.ndarray:
        """Originals over reconstructions from growing numbers of tokens. uint8 [H, W, 3]."""
        by_tokens = self.results["psnr_by_tokens"]
        rows = {f"{_tokens(k)}\n{by_tokens[str(k)]:.1f} dB": v for k, v in self.reconstructions.items()}
        return pictures.reconstruction_grid(self.originals, rows)

    def markdown(self) -> str:
        """Tables for a person."""
        return tables.reconstruction(self.results)

    def save(self, folder, name: str = "reconstruction") -> list:
        """Writes NAME.json, NAME.md and NAME.png and returns their paths."""
        folder = epath.Path(folder)
        return [
            atomic.write_text(folder / f"{name}.json", json.dumps(self.results, indent=2, allow_nan=False) + "\n"),
            atomic.write_text(folder / f"{name}.md", self.markdown()),
            pictures.save_png(self.picture(), folder / f"{name}.png"),
        ]


class Programs(NamedTuple):
    """The compiled parts: one program each, for any number of tokens shown."""

    encode: Callable  # (params, extra, image uint8) → codes
    decode: Callable  # (params, extra, codes, index, seed, num_visible) → image uint8
    commitment: Callable | None  # (params, extra, batch) → mean distance; None if the tokenizer has none


@functools.lru_cache(maxsize=4)
def programs(tokenizer: ImageTokenizer) -> Programs:
    """Compiled once per tokenizer, so that evaluating again during a run costs no compilation."""

    def encode(params, extra, image_BHWC):
        return tokenizer.encode(params, extra, to_float(image_BHWC))

    def decode(params, extra, codes_BK, index_B, seed, num_visible):
        key = jax.random.key(seed)
        keys_B = jax.vmap(lambda index: jax.random.fold_in(key, index))(index_B)
        return to_uint8(tokenizer.decode(params, extra, codes_BK, keys_B, num_visible=num_visible))

    def commitment(params, extra, batch):
        # All but this term is dead code to the compiler: the decoder does not run.
        sums, counts, _ = tokenizer.loss_fn(params, extra, batch, jax.random.key(0))
        return sums[_COMMITMENT] / counts[_COMMITMENT]

    has_commitment = _COMMITMENT in getattr(tokenizer, "loss_weights", {})
    return Programs(jax.jit(encode), jax.jit(decode), jax.jit(commitment) if has_commitment else None)


def visible_counts(shares: Iterable[float], num_tokens: int) -> list[int]:
    """Numbers of tokens for shares of them: rounded, at least 1, each once, rising, the whole always among them."""
    counts = {min(num_tokens, max(1, int(share * num_tokens + 0.5))) for share in shares}
    return sorted(counts | {num_tokens})


def reconstruct_prefixes(tokenizer, params, extra, images, settings: settings_lib.Evaluate, *, seed: int | None = None):
    """Encodes images and decodes them from growing numbers of tokens.

    Args:
      images: uint8 [N, H, W, C].
    Returns:
      (codes int32 [N, K], {"2 tokens": uint8 [N, H, W, C], ...}).
    """
    run = programs(tokenizer)
    seed = settings.seed if seed is None else seed
    codes_NK = np.asarray(run.encode(params, extra, jnp.asarray(images)))
    index_N = np.arange(len(images), dtype=np.int32)
    return codes_NK, {
        _tokens(k): np.asarray(run.decode(params, extra, codes_NK, index_N, np.uint32(seed), np.int32(k)))
        for k in visible_counts(settings.visible, tokenizer.num_tokens)
    }


def evaluate_reconstruction(
    tokenizer: ImageTokenizer,
    params,
    extra,
    batches: Iterable[dict],
    settings: settings_lib.Evaluate,
    *,
    seed: int | None = None,
    put: Callable[[dict], dict] | None = None,
    verifier: Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]] | None = None,
    judges: Sequence[judge_lib.Judge] = (),
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Measures a tokenizer on held-out images.

    Args:
      params, extra: what is evaluated; the weight average, as a rule.
      batches: finite; dicts of this process's rows (NumPy): `image` uint8 [B, H, W, C], and optionally `valid` bool [B]
        (False: padding), `index` int [B] (position in the source; else they are counted), `label`, `slot`. All of one
        size, and as many on every process.
      settings: `visible` (shares of the tokens), `pictures`, `seed`.
      seed: of the decoder's noise and of the shuffles; None: settings.seed.
      put: host rows → global arrays (`mesh.put_batch` on a mesh); None: the default device.
      verifier: (uint8 [n, H, W, C], index [n]) → {name: bool [n]}: what is right in each image.
      judges: what else looks at each batch.
      progress: called after each batch with the number of images that this process has seen.

    Returns:
      A report. Its figures are over the images of all processes, its pictures this process's.
      psnr_shuffled_codes: each image's codes in random order; psnr_wrong_image_codes: decoded from the codes of the
      image before it. commitment_distance is that of the training loss (its batch statistics included) on the batches
      without padding.

    Raises:
      ValueError: if there is no valid image.
    """
    run = programs(tokenizer)
    put = put or (lambda batch: {name: jnp.asarray(value) for name, value in batch.items()})
    seed = settings.seed if seed is None else seed
    k_all = tokenizer.num_tokens
    shown = visible_counts(settings.visible, k_all)
    rows, kept, counted, seen, previous_K = [], [], 0, 0, None

    for batch in batches:
        image_BHWC = batch["image"]
        b = len(image_BHWC)
        valid_B = np.asarray(batch.get("valid", np.ones(b, bool)))
        index_B = np.asarray(batch["index"] if "index" in batch else _counted(counted, b), np.int32)
        slot_B = np.asarray(batch.get("slot", np.arange(b) + b * meshes.reader().index), np.int32)
        on_device = put({"image": image_BHWC, "slot": slot_B})
        by_rows = on_device["image"].sharding
        codes_BK = gather.local_rows(run.encode(params, extra, on_device["image"]), by_rows)
        wrong_BK, previous_K = _codes_of_the_image_before(codes_BK, valid_B, previous_K)

        def start(codes_BK, k, index_B=index_B):
            arrays = put({"codes": codes_BK, "index": index_B})
            return run.decode(params, extra, arrays["codes"], arrays["index"], np.uint32(seed), np.int32(k))

        # All are dispatched before any is waited for: the host judges one while the device makes the next.
        decoded = {k: start(codes_BK, k) for k in shown}
        controls = {"shuffled": start(_shuffled(codes_BK, seed, index_B), k_all), "wrong": start(wrong_BK, k_all)}
        row = {"valid": valid_B, "codes": codes_BK, "batch": np.full(b, len(rows))}
        row["label"] = np.asarray(batch.get("label", np.full(b, -1)), np.int32)
        if run.commitment is not None:
            row["commitment"] = np.full(b, float(run.commitment(params, extra, on_device)))

        whole = on_device["image"], decoded[k_all]
        decoded = {k: gather.local_rows(image, by_rows) for k, image in decoded.items()}
        for k, image in decoded.items():
            row[f"psnr/{k}"], row[f"ssim/{k}"] = (
                metrics.psnr(image_BHWC, image),
                ssim_where_it_exists(image_BHWC, image),
            )
        for name, image in controls.items():
            row[f"psnr/{name}"] = metrics.psnr(image_BHWC, gather.local_rows(image, by_rows))
        if verifier is not None:
            row |= _verify(verifier, "original", image_BHWC, index_B, valid_B)
            row |= _verify(verifier, "decoded", decoded[k_all], index_B, valid_B)
        if judges:
            local = functools.partial(gather.local_rows, by_rows=by_rows)
            batch_seen = judge_lib.Seen(image_BHWC, decoded[k_all], whole, local, codes_BK, index_B, valid_B)
            row |= judge_lib.columns(judges, batch_seen)
        rows.append(row)
        if seen < settings.pictures or not kept:
            kept.append((image_BHWC[valid_B], {k: image[valid_B] for k, image in decoded.items()}))
        counted, seen = counted + b, seen + int(valid_B.sum())
        if progress is not None:
            progress(seen)

    table = gather.valid_rows(rows)
    results = _summary(table, shown, tokenizer.codebook_size) | judge_lib.results(judges, table)
    p = settings.pictures
    originals = np.concatenate([image for image, _ in kept])[:p]
    reconstructions = {k: np.concatenate([d[k] for _, d in kept])[:p] for k in shown}
    return Report(results, originals, reconstructions, table["codes"], table["label"])


def codes_of(tokenizer, params, extra, batches, *, put: Callable[[dict], dict], progress=None):
    """Codes and labels of images, as `evaluate_reconstruction` reports them; arguments as there.

    Returns:
      (codes int32 [N, K], labels int32 [N]), of the valid rows of all processes.

    Raises:
      ValueError: if there is no valid image.
    """
    run, rows, seen = programs(tokenizer), [], 0
    for batch in batches:
        on_device = put({"image": batch["image"]})["image"]
        codes_BK = gather.local_rows(run.encode(params, extra, on_device), on_device.sharding)
        rows.append({"valid": batch["valid"], "codes": codes_BK, "label": batch["label"]})
        seen += int(batch["valid"].sum())
        if progress is not None:
            progress(seen)
    table = gather.valid_rows(rows)
    return table["codes"], table["label"]


def _tokens(k):
    return f"{k} token" if k == 1 else f"{k} tokens"


def _counted(start, b):
    """Indices of rows that have none: unique over all processes."""
    reader = meshes.reader()
    return (start + np.arange(b)) * reader.count + reader.index


def _shuffled(codes_BK, seed, index_B):
    """Each row's codes in a random order of its own."""
    # Padding may have the index -1, which the generator refuses as a seed.
    orders = [np.random.default_rng((seed, int(i) % 2**32)).permutation(codes_BK.shape[1]) for i in index_B]
    return np.take_along_axis(codes_BK, np.stack(orders), axis=1)


def _codes_of_the_image_before(codes_BK, valid_B, previous_K):
    """For each valid row the codes of the valid row before it, over batches; the very first takes its batch's last."""
    wrong_BK = codes_BK.copy()
    own = codes_BK[valid_B]
    if len(own):
        first = own[-1] if previous_K is None else previous_K
        wrong_BK[valid_B] = np.concatenate([first[None], own[:-1]])
        previous_K = own[-1]
    return wrong_BK, previous_K


def ssim_where_it_exists(a_BHWC, b_BHWC):
    """SSIM [B]; NaN for images that are smaller than its window."""
    if min(a_BHWC.shape[1:3]) < metrics.SSIM_WINDOW:
        return np.full(len(a_BHWC), np.nan)
    return metrics.ssim(a_BHWC, b_BHWC)


def _verify(verifier, of, image_BHWC, index_B, valid_B):
    """The verifier's findings about the valid rows, spread over all rows."""
    columns = {}
    for name, right in verifier(image_BHWC[valid_B], index_B[valid_B]).items():
        columns[f"{of}/{name}"] = column = np.zeros(len(valid_B), bool)
        column[valid_B] = right
    return columns


def _summary(table, shown, codebook_size) -> dict[str, Any]:
    n, all_tokens = len(table["codes"]), shown[-1]
    usage = metrics.codebook_usage(table["codes"], codebook_size)
    results = {
        "n": n,
        "psnr": mean_of(table[f"psnr/{all_tokens}"]),
        "psnr_standard_error": judge_lib.standard_error(table[f"psnr/{all_tokens}"]),
        "ssim": mean_of(table[f"ssim/{all_tokens}"]),
        "psnr_by_tokens": {str(k): mean_of(table[f"psnr/{k}"]) for k in shown},
        "ssim_by_tokens": {str(k): mean_of(table[f"ssim/{k}"]) for k in shown},
        "psnr_shuffled_codes": mean_of(table["psnr/shuffled"]),
        "psnr_wrong_image_codes": mean_of(table["psnr/wrong"]),
    }
    results["psnr_drop_shuffled"] = results["psnr"] - results["psnr_shuffled_codes"]
    results |= {
        "num_tokens": all_tokens,
        "codebook_size": codebook_size,
        "bits_per_image": all_tokens * math.log2(codebook_size),
        "codebook_used": usage["used"],
        "codebook_perplexity": usage["perplexity"],
        "codebook_used_by_position": usage["used_by_position"],
        "codebook_perplexity_by_position": usage["perplexity_by_position"],
        "commitment_distance": mean_of(table["commitment"]) if "commitment" in table else None,
    }
    for of, suffix in (("decoded", ""), ("original", "_originals")):
        for column in [name for name in table if name.startswith(f"{of}/")]:
            name = f"scenes_{column.partition('/')[2]}{suffix}"
            right = int(table[column].sum())
            results[name] = right / n
            results[f"{name}_interval"] = list(metrics.binomial_interval(right, n))
    if results["ssim"] is None:  # images below its window
        del results["ssim_by_tokens"]
    return {name: value for name, value in results.items() if value is not None}


def mean_of(column):
    """Mean over the values that exist; None if there are none."""
    exists = column[~np.isnan(column)]
    return float(exists.mean()) if len(exists) else None
