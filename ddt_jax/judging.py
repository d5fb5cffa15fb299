"""The verbs that judge runs: evaluate, reconstruct, compare. They bring a run's state to what evaluates it."""

import json
import sys
import time
from typing import Any

import jax
import numpy as np
from etils import epath

from ddt_jax import experiment, settings, speaking
from ddt_jax import mesh as meshes
from ddt_jax.data import images
from ddt_jax.errors import UserError
from ddt_jax.evaluation import autoencoding, pictures, plots, reconstruction, suite, tables
from ddt_jax.io import atomic
from ddt_jax.tokenizers.base import ImageTokenizer
from ddt_jax.training import captions
from ddt_jax.training import feed as feeds
from ddt_jax.training.progress import Progress


def evaluate(workdir: str, overrides: tuple[tuple[str, str], ...] = ()) -> dict:
    """Evaluates the newest checkpoint of a model of images on the held-out source, on all devices of all processes;
    that of a multimodal run as `speaking.evaluate`.

    Process 0 writes results.json, results.md and pictures to the workdir.

    Returns:
      "results", "table" (Markdown) and "written".

    Raises:
      UserError: as `experiment.restore`, or if weights, a source or a folder cannot be used.
    """
    begun = time.perf_counter()
    saved = experiment.saved_settings(workdir, overrides)
    if isinstance(saved.model, settings.Multimodal):
        return speaking.evaluate(workdir, overrides)
    judges = suite.read_weights(saved)
    built, state = experiment.restore(workdir, overrides, jax.devices())
    s, root, first = built.settings, epath.Path(workdir), jax.process_index() == 0
    held_out = feeds.open_images(s, s.data.eval_source)
    readers = meshes.reader(built.mesh).count
    share = -(-min(s.evaluate.images, len(held_out.source)) // readers)
    stream = sys.stderr if first else None
    with Progress(share, batch_size=readers, stream=stream, unit="image") as progress:
        found = suite.evaluate(
            built.model,
            experiment.weights(state),
            state.extra,
            s,
            mesh=built.mesh,
            held_out=held_out,
            known=lambda: feeds.open_images(s, s.data.source),
            weights=judges,
            captions=captions.resolve(s, workdir) if isinstance(s.model, settings.SEED) else None,
            progress=progress,
        )
    results = {"step": int(state.step), "eval_source": s.data.eval_source, **found.results, **experiment.timing(root)}
    results["evaluate_seconds"] = round(time.perf_counter() - begun, 2)
    written = []
    if first:
        written.append(atomic.write_text(root / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n"))
        written.append(atomic.write_text(root / "results.md", found.markdown()))
        written += found.draw(root)
        written += plots.loss_curve(root / "metrics.jsonl", root / "loss.png")
    return {"results": results, "table": found.markdown(), "written": [str(p) for p in written]}


def reconstruct(
    workdir: str, files: list[str], out: str | None = None, overrides: tuple[tuple[str, str], ...] = ()
) -> dict:
    """Encodes image files and decodes them, from growing numbers of tokens where there are tokens.

    Returns:
      "codes" per file, none of an autoencoder, and "written", the picture.

    Raises:
      UserError: for a file that is missing or no image.
    """
    kind = experiment.saved_settings(workdir, overrides).model
    if isinstance(kind, settings.Multimodal):
        raise UserError(f"reconstruct: {workdir} holds a transformer; name the workdir of its image tokenizer")
    if isinstance(kind, settings.ACDiT):
        raise UserError(f"reconstruct: {workdir} holds a model that draws images and has no codes of yours to decode")
    if isinstance(kind, settings.ACDiTClassifier):
        raise UserError(f"reconstruct: {workdir} holds a classifier, which draws nothing; name a tokenizer's workdir")
    if isinstance(kind, settings.SEED) and kind.stage != "draw":
        raise UserError(
            f"reconstruct: {workdir} holds model.stage={kind.stage!r}, which draws nothing; name a run of 'draw'"
        )
    built, state = experiment.restore(workdir, overrides)
    s, params = built.settings, experiment.weights(state)
    originals = np.stack([images.read_file(file, s.data) for file in files])
    with jax.set_mesh(built.mesh):
        if isinstance(built.model, ImageTokenizer):
            how = (built.model, params, state.extra, originals, s.evaluate)
            codes, decoded = reconstruction.reconstruct_prefixes(*how)
        else:
            codes, decoded = (), {"latent": autoencoding.reconstruct(built.model, params, originals)}
    out = out or str(epath.Path(workdir) / "reconstruct.png")
    pictures.save_png(pictures.reconstruction_grid(originals, decoded), out)
    return {"codes": {f: c.tolist() for f, c in zip(files, codes, strict=False)}, "written": out}


def compare(workdirs: list[str], out: str) -> dict:
    """Puts the results of evaluated runs side by side.

    Args:
      out: where the PNG of PSNR by tokens goes.
    Returns:
      "runs": name → results, "table" (Markdown, with a line for each reason not to compare figures), "written".

    Raises:
      UserError: for a workdir that has not been evaluated, or one given twice.
    """
    runs: dict[str, dict[str, Any]] = {}
    for workdir, name in zip(workdirs, _short_names(workdirs), strict=True):
        path = epath.Path(workdir) / "results.json"
        if not path.exists():
            raise UserError(f"compare: {workdir} has no results.json; run `ddt-jax evaluate --workdir {workdir}`")
        try:
            runs[name] = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"compare: {path} is no JSON ({error}); evaluate that run again") from error
        if "psnr_by_tokens" not in runs[name]:
            raise UserError(
                f"compare: the model of {workdir} has no tokens; name runs of tokenizers only, or compare transformers "
                "with tools/compare.py"
            )
    notes = _differences(runs)
    table = tables.side_by_side(runs) + "".join(f"\n{note}" for note in notes) + ("\n" if notes else "")
    return {"runs": runs, "table": table, "written": str(plots.comparison_plot(runs, out))}


def _short_names(workdirs) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    parts = [[p for p in str(w).rstrip("/").split("/") if p not in ("", ".")] for w in workdirs]
    longest = max(map(len, parts))
    for length in range(1, longest + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(w for w in workdirs if list(workdirs).count(w) > 1)
    raise UserError(f"compare: {twice} is named twice")


def _differences(runs) -> list[str]:
    """Why figures should not be held against each other."""
    found = []
    if len({results.get("eval_source") for results in runs.values()}) > 1:
        sources = ", ".join(f"{name} {results.get('eval_source')}" for name, results in runs.items())
        found.append(f"Not the same held-out images: {sources}.")
    counts = {name: results["rfid_images"] for name, results in runs.items() if "rfid_images" in results}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {n:,}" for name, n in counts.items())
        found.append(f"rFID falls with the number of images, which differs: {listed}.")
    return found
