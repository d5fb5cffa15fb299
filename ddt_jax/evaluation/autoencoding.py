"""How well an autoencoder keeps images, and what its latents are like: their mean and deviation set the scale on which
latent models work.

Measured on images rounded to 8 bits, decoded from the mode of the posterior, which is what a frozen codec gives.

Legend: B rows of a batch on this process, P images in the picture; H, W, C an image, h, w, c its latent.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ddt_jax import settings as settings_lib
from ddt_jax.evaluation import gather, metrics, pictures, tables
from ddt_jax.evaluation import judge as judge_lib
from ddt_jax.evaluation.reconstruction import mean_of, ssim_where_it_exists
from ddt_jax.nn.autoencoder import kl_divergence
from ddt_jax.tokenizers.base import to_float, to_uint8
from ddt_jax.tokenizers.vae import VAE


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
      results: JSON values; a figure that does not exist (SSIM of images below 11 pixels) is not among them.
      originals, reconstructions: the first few images, uint8 [P, H, W, C].
    """

    results: dict[str, Any]
    originals: np.ndarray
    reconstructions: np.ndarray

    picture_name: ClassVar[str] = "reconstructions"

    @property
    def pictured(self) -> bool:
        return len(self.originals) > 0

    def picture(self) -> np.ndarray:
        """Originals over reconstructions. uint8 [H, W, 3]."""
        label = f"latent\n{self.results['psnr']:.1f} dB"
        return pictures.reconstruction_grid(self.originals, {label: self.reconstructions})

    def markdown(self) -> str:
        """A table for a person."""
        return tables.autoencoder(self.results)


@functools.lru_cache(maxsize=4)
def program(vae: VAE) -> Callable:
    """(params, image uint8) → decoded uint8 [B, H, W, C], KL [B], and the latents' mean and mean square [B, c].

    Compiled once per model, so that evaluating again during a run costs no compilation.
    """

    def run(params, image_BHWC):
        posterior = vae.encode(params, to_float(image_BHWC))
        decoded_BHWC = to_uint8(vae.decode(params, posterior.mode()))
        # Of draws from the posterior, without drawing: E z² = mean² + variance.
        square_Bhwc = jnp.square(posterior.mean) + jnp.exp(posterior.logvar)
        average = functools.partial(jnp.mean, axis=(1, 2))
        return decoded_BHWC, kl_divergence(posterior), average(posterior.mean), average(square_Bhwc)

    return jax.jit(run)


def reconstruct(vae: VAE, params, images) -> np.ndarray:
    """Images uint8 [N, H, W, C] through the mode of their latents."""
    return np.asarray(program(vae)(params, jnp.asarray(images))[0])


def evaluate_autoencoder(
    vae: VAE,
    params,
    batches: Iterable[dict],
    settings: settings_lib.Evaluate,
    *,
    put: Callable[[dict], dict] | None = None,
    judges: Sequence[judge_lib.Judge] = (),
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Measures an autoencoder on held-out images. Arguments as `reconstruction.evaluate_reconstruction`.

    Returns:
      A report. latent_mean and latent_std are over all elements of draws from the posterior; latent_mean_by_channel and
      latent_std_by_channel show how far one shift and one scale can go.

    Raises:
      ValueError: if there is no valid image.
    """
    run = program(vae)
    put = put or (lambda batch: {name: jnp.asarray(value) for name, value in batch.items()})
    rows, kept, seen = [], [], 0
    for batch in batches:
        image_BHWC = batch["image"]
        b = len(image_BHWC)
        valid_B = np.asarray(batch.get("valid", np.ones(b, bool)))
        on_device = put({"image": image_BHWC})["image"]
        local = functools.partial(gather.local_rows, by_rows=on_device.sharding)
        decoded, *found = run(params, on_device)
        decoded_BHWC, *found = map(local, (decoded, *found))
        rows.append(
            {
                "valid": valid_B,
                "psnr": metrics.psnr(image_BHWC, decoded_BHWC),
                "ssim": ssim_where_it_exists(image_BHWC, decoded_BHWC),
                **{name: x.astype(np.float64) for name, x in zip(("kl", "mean", "square"), found, strict=True)},
            }
        )
        if judges:
            index_B, no_codes = np.asarray(batch["index"], np.int32), np.zeros((b, 0), np.int32)
            whole = (on_device, decoded)
            batch_seen = judge_lib.Seen(image_BHWC, decoded_BHWC, whole, local, no_codes, index_B, valid_B)
            rows[-1] |= judge_lib.columns(judges, batch_seen)
        if seen < settings.pictures or not kept:
            kept.append((image_BHWC[valid_B], decoded_BHWC[valid_B]))
        seen += int(valid_B.sum())
        if progress is not None:
            progress(seen)

    table = gather.valid_rows(rows)
    n, mean_c, square_c = len(table["psnr"]), table["mean"].mean(0), table["square"].mean(0)
    results = {
        "n": n,
        "psnr": mean_of(table["psnr"]),
        "psnr_standard_error": judge_lib.standard_error(table["psnr"]),
        "ssim": mean_of(table["ssim"]),
        "kl": float(table["kl"].mean()),
        "latent_mean": float(mean_c.mean()),
        "latent_std": float(np.sqrt(square_c.mean() - mean_c.mean() ** 2)),
        "latent_mean_by_channel": mean_c.tolist(),
        "latent_std_by_channel": np.sqrt(square_c - mean_c**2).tolist(),
    }
    results = {name: value for name, value in results.items() if value is not None} | judge_lib.results(judges, table)
    originals, decoded = (np.concatenate(images)[: settings.pictures] for images in zip(*kept, strict=True))
    return Report(results, originals, decoded)
