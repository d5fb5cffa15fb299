"""Results as Markdown: one evaluation, and several runs side by side."""

from typing import Any

# Figure → how it is written.
_SINGLE = {
    "lpips": ("LPIPS", ".4f"),
    "rfid": ("rFID", ".3f"),
    "commitment_distance": ("commitment distance", ".4f"),
}
_AUTOENCODER = {
    "psnr": ("PSNR (dB)", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "lpips": ("LPIPS", ".4f"),
    "rfid": ("rFID", ".3f"),
    "latent_mean": ("latent mean", ".4f"),
    "latent_std": ("latent deviation", ".4f"),
    "kl": ("KL (nats per image)", ".1f"),
}


_DRAWING = {
    "diffusion": ("diffusion loss", ".4f"),
    "mse_t25": ("error, noise up to 0.25", ".4f"),
    "mse_t50": ("error, noise up to 0.5", ".4f"),
    "mse_t75": ("error, noise up to 0.75", ".4f"),
    "mse_t100": ("error, noise up to 1", ".4f"),
}


def reconstruction(results: dict[str, Any]) -> str:
    """What the pass over the held-out images found: by tokens, then single figures."""
    last = list(results["psnr_by_tokens"])[-1]
    ssim = results.get("ssim_by_tokens", {})
    lines = [f"Reconstruction of {results['n']:,} images.", "", "| tokens | PSNR (dB) | SSIM |", "|---:|---:|---:|"]
    for k, value in results["psnr_by_tokens"].items():
        lines.append(f"| {k} | {value:.2f} | {_number(ssim.get(k), '.4f')} |")
    lines += [
        f"| {last}, shuffled | {results['psnr_shuffled_codes']:.2f} | |",
        f"| {last}, of another image | {results['psnr_wrong_image_codes']:.2f} | |",
        "",
        "| | |",
        "|---|---:|",
        f"| codes used | {results['codebook_used']} of {results['codebook_size']} |",
        f"| codebook perplexity | {results['codebook_perplexity']:.1f} |",
    ]
    lines += _single(results, _SINGLE)
    lines += _shares(results)
    return "\n".join(lines) + "\n"


def autoencoder(results: dict[str, Any]) -> str:
    """What a pass with a model without codes found."""
    lines = [f"Reconstruction of {results['n']:,} images.", "", "| | |", "|---|---:|", *_single(results, _AUTOENCODER)]
    return _lines(lines)


def drawing(results: dict[str, Any]) -> str:
    """What a pass with a model that draws found."""
    lines = [f"Noise predicted on {results['n']:,} images.", "", "| | |", "|---|---:|", *_single(results, _DRAWING)]
    lines += _shares(results)
    lines += ["", "| block | error |", "|---:|---:|"]
    lines += [f"| {i} | {error:.4f} |" for i, error in enumerate(results["mse_by_block"])]
    if "probe_linear" in results:
        n, m, depth = (results[name] for name in ("probe_test_images", "probe_images", "probe_depth"))
        lines += [
            "",
            f"Class of {n:,} clean images after {depth} layers, learned on {m:,} others.",
            "",
            "| | |",
            "|---|---:|",
        ]
        for name, label in (("linear", "linear probe"), ("knn", "k nearest neighbours")):
            lines.append(f"| {label} | {share(results[f'probe_{name}'], results[f'probe_{name}_interval'])} |")
        lines.append(f"| commonest class | {results['probe_chance']:.1%} |")
    return _lines(lines)


def classes(results: dict[str, Any]) -> str:
    """How often a classifier is right."""
    lines = [f"Classes of {results['n']:,} images.", "", "| | |", "|---|---:|"]
    lines += [f"| right | {share(results['accuracy'], results['accuracy_interval'])} |"]
    lines += [f"| commonest class | {results['accuracy_chance']:.1%} |"]
    return _lines([*lines, f"| cross-entropy (nats) | {results['cross_entropy']:.3f} |"])


def retrieval(results: dict[str, Any]) -> str:
    """How often images and captions find each other."""
    of = f"{results['retrieval_images']:,}"
    if whole := results.get("retrieval_split_images"):  # of a published split, by whose figures less images are easier
        of += f" of {whole:,}"
    texts = f"{results['retrieval_texts']:,} captions" if "retrieval_texts" in results else "captions"
    lines = [f"Retrieval among {of} images and {texts}; chance at 1 is {results['retrieval_chance']:.2%}.", ""]
    lines += ["| | image to text at 1 / 5 / 10 | text to image at 1 / 5 / 10 | mean |", "|---|---:|---:|---:|"]
    for name, found in results["retrieval"].items():
        ways = (" / ".join(f"{x:.1%}" for x in found[way].values()) for way in ("image_to_text", "text_to_image"))
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(ways)} | {found['mean']:.1%} |")
    if "code_cosine" in results:
        used = f"{results['codebook_used']} of {results['codebook_size']} codes used"
        lines += ["", f"{used}, perplexity {results['codebook_perplexity']:.1f};"]
        lines += [f"cosine between vectors by embedding and by code {results['code_cosine']:.3f}."]
    return _lines(lines)


def evaluation(results: dict[str, Any]) -> str:
    """All that `ddt-jax evaluate` found, and what it left out."""
    firsts = {"psnr_by_tokens": reconstruction, "diffusion": drawing, "psnr": autoencoder, "accuracy": classes}
    parts = [next((first(results) for name, first in firsts.items() if name in results), "")]
    if "retrieval" in results:
        parts = [part for part in parts if part] + [retrieval(results)]
    if "probe_linear_by_tokens" in results:
        lines = ["| tokens | linear probe | k nearest neighbours |", "|---:|---:|---:|"]
        for k, value in results["probe_linear_by_tokens"].items():
            lines.append(f"| {k} | {value:.1%} | {results['probe_knn_by_tokens'][k]:.1%} |")
        n, m = results["probe_test_images"], results["probe_images"]
        parts.append(f"Class of {n:,} images from their first tokens, learned on {m:,} others.\n\n" + _lines(lines))
    if "entropy_by_stride" in results:
        lines = ["| order | nats per code |", "|---|---:|"]
        for stride, value in results["entropy_by_stride"].items():
            lines.append(f"| {'own' if stride == '1' else f'stride {stride}'} | {value:.3f} |")
        uniform = f"uniform codes: {results['entropy_uniform']:.3f}"
        parts.append(f"What a code costs when the one before it is known, by order ({uniform}).\n\n" + _lines(lines))
    if "counterfactual_nearer_b" in results:
        lines = ["| tokens of B | nearer to B |", "|---|---:|"]
        lines += [f"| {name} third | {value:.1%} |" for name, value in results["counterfactual_nearer_b"].items()]
        parts.append("Images from A's tokens with some of B's in their place.\n\n" + _lines(lines))
    if results.get("left_out"):
        parts.append("Left out:\n\n" + _lines([f"- {line}" for line in results["left_out"]]))
    return "\n".join(parts)


# Column → how it is written; those that no run has are left out.
_COLUMNS = {
    "step": ("step", ","),
    "num_tokens": ("tokens", ","),
    "codebook_size": ("codes", ","),
    "bits_per_image": ("bits", ",.0f"),
    "n": ("images", ","),
    "psnr": ("PSNR (dB)", ".2f"),
    "ssim": ("SSIM", ".4f"),
    "lpips": ("LPIPS", ".4f"),
    "rfid": ("rFID", ".3f"),
    "scenes_all_correct": ("scenes right", ".1%"),
    "probe_linear": ("linear probe", ".1%"),
    "probe_knn": ("kNN", ".1%"),
    "psnr_drop_shuffled": ("shuffled costs (dB)", ".2f"),
    "codebook_perplexity": ("perplexity", ",.1f"),
    "train_seconds": ("training (s)", ",.0f"),
}


def side_by_side(runs: dict[str, dict[str, Any]]) -> str:
    """A row for each run. Figures that only some of them have are a dash in the others.

    Args:
      runs: name → results of `ddt-jax evaluate`.
    """
    shown = [name for name in _COLUMNS if any(name in results for results in runs.values())]
    lines = [f"| run | {' | '.join(_COLUMNS[name][0] for name in shown)} |", f"|---|{'---:|' * len(shown)}"]
    for run, results in runs.items():
        cells = (_number(results.get(name), _COLUMNS[name][1]) for name in shown)
        lines.append(f"| {run} | {' | '.join(cells)} |")
    return _lines(lines)


def _single(results, how):
    return [f"| {label} | {results[name]:{form}} |" for name, (label, form) in how.items() if name in results]


def _shares(results):
    found = [name for name in results if name.startswith("scenes_") and f"{name}_interval" in results]
    return [f"| {name.replace('_', ' ')} | {share(results[name], results[f'{name}_interval'])} |" for name in found]


def _lines(lines):
    return "\n".join(lines) + "\n"


def share(value: float, interval: tuple[float, float]) -> str:
    """A share and its interval in percent."""
    return f"{value:.1%} ({interval[0]:.1%} to {interval[1]:.1%})"


def _number(value, how):
    return "–" if value is None else format(value, how)
