"""The whole evaluation of a model of images as its settings ask for it: one pass over the held-out images, then what
their codes tell, or what it draws. What cannot be computed is left out with a line that says why.

Legend: M images of the training half, N held-out images, K tokens.
"""

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from etils import epath

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.data import files
from ddt_jax.data.base import BadRecord
from ddt_jax.data.loader import Loader
from ddt_jax.errors import UserError
from ddt_jax.evaluation import (
    autoencoding,
    classifying,
    drawing,
    frechet,
    judges,
    pictures,
    plots,
    probes,
    reconstruction,
    retrieval,
    tables,
)
from ddt_jax.nn import inception, lpips
from ddt_jax.tokenizers.caption_ids import CaptionIds
from ddt_jax.training.progress import Progress

_FINGERPRINT_RECORDS = 8  # spread over the source; of Parquet each costs a row group
_STRIDES = (1, 2, 4)


@dataclass(frozen=True)
class Weights:
    """Networks that judge, read from the files that the settings name; None where they name none."""

    lpips: Any
    inception: Any
    inception_digest: str


def read_weights(s: settings.Experiment) -> Weights:
    """Reads them before anything long begins.

    Raises:
      UserError: if a file does not hold what it should, or the images are too small for the network.
    """
    e = s.evaluate
    found = None
    if e.lpips_backbone_file:
        least = lpips.MIN_SIZE[e.lpips_backbone]
        if s.data.image_size < least:
            raise UserError(
                f"config: evaluate.lpips_backbone={e.lpips_backbone} needs images of {least} pixels or more, "
                f"data.image_size is {s.data.image_size}; leave out evaluate.lpips_backbone_file"
            )
        found = lpips.load(e.lpips_backbone, e.lpips_backbone_file, e.lpips_heads_file)
    return Weights(found, *read_inception(e))


def read_inception(e: settings.Evaluate) -> tuple[Any, str]:
    """Inception's parameters and the digest of their file; (None, "") where none is named. Raises UserError."""
    if not e.inception_file:
        return None, ""
    params = inception.load(e.inception_file)
    return params, hashlib.sha256(epath.Path(e.inception_file).read_bytes()).hexdigest()


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
      results: JSON values.
      report: of the pass.
      counterfactuals: picture, uint8 [H, W, 3]; None without one.
      probes: of `probes.probe_prefixes`; None without labels.
      entropies: of `probes.order_entropies`; None without a training half.
      moving: clips that were drawn, frame by frame, uint8 [T, H, W, 3]; None of what is no model of clips.
    """

    results: dict[str, Any]
    report: reconstruction.Report | autoencoding.Report | drawing.Report | retrieval.Report | classifying.Report
    counterfactuals: np.ndarray | None
    probes: dict[str, dict] | None
    entropies: dict[str, dict] | None
    moving: np.ndarray | None = None

    def draw(self, folder) -> list:
        """Writes the pictures and returns their paths."""
        folder = epath.Path(folder)
        written = []
        if self.report.pictured:
            written.append(pictures.save_png(self.report.picture(), folder / f"{self.report.picture_name}.png"))
        if self.moving is not None:
            written.append(pictures.save_gif(self.moving, folder / f"{self.report.picture_name}.gif"))
        if self.counterfactuals is not None:
            written.append(pictures.save_png(self.counterfactuals, folder / "counterfactuals.png"))
        if "psnr_by_tokens" in self.results:
            written.append(plots.tokens_plot(self.results["psnr_by_tokens"], folder / "psnr_by_tokens.png"))
            written.append(plots.usage_plot(self.results, folder / "codebook_usage.png"))
        if self.probes is not None:
            written.append(plots.probe_plot(self.probes, self.results["probe_chance"], folder / "probes.png"))
        if self.entropies is not None:
            written.append(plots.entropy_plot(self.entropies, self.results["codebook_size"], folder / "entropy.png"))
        return written

    def markdown(self) -> str:
        """Tables for a person, and what was left out."""
        return tables.evaluation(self.results)


def evaluate(
    model,
    params,
    extra,
    s: settings.Experiment,
    *,
    mesh,
    held_out: Loader,
    known: Callable[[], Loader],
    weights: Weights,
    progress: Progress,
    captions: CaptionIds | None = None,
) -> Evaluation:
    """Runs all of it.

    Args:
      params, extra: what is evaluated; the weight average, as a rule.
      mesh: where they lie; its devices share each batch.
      held_out: loader of data.eval_source.
      known: opens that of data.source, for what is learned from codes.
      weights: of `read_weights`.
      progress: counts the images of this process.
      captions: what reads the captions of a model that knows them.

    Raises:
      UserError: if the batch does not divide over the mesh, or the data or a folder cannot be used.
    """
    e = s.evaluate
    meshes.check_batch(e.batch_size, mesh, "evaluate.batch_size")
    left_out: list[str] = []
    if model.measured == "drawing":
        options = {"mesh": mesh, "progress": progress.update, "first_batch": progress.phase("compiling")}
        options |= {"drawing_phase": progress.phase("drawing"), "count": e.prompts if e.verifier else 0}
        report = reconstruct(model, params, extra, s, held_out, **options)
        left_out.append("FID: what a model draws from noise is not compared with other images yet")
        if not e.verifier:
            left_out.append("scenes: evaluate.verifier is False")
        probed = _probe_clean(model, params, extra, s, mesh, known, held_out, progress, left_out)
        return Evaluation(report.results | probed | {"left_out": left_out}, report, None, None, None, report.moving())
    if model.measured == "classes":
        options = {"mesh": mesh, "progress": progress.update, "first_batch": progress.phase("compiling")}
        report = reconstruct(model, params, extra, s, held_out, **options)
        return Evaluation(report.results | {"left_out": left_out}, report, None, None, None)
    found = {}
    if model.retrieves:
        options = {"mesh": mesh, "progress": progress.update, "captions": captions}
        report = _retrieve(model, params, extra, s, held_out, **options)
        found = report.results
        if model.measured == "retrieval":
            left_out.append("reconstruction: this stage has no codes")
            return Evaluation(found | {"left_out": left_out}, report, None, None, None)
        if not model.draws:
            left_out.append("reconstruction: this stage draws nothing")
            results, probed, entropies = _read_codes(
                model, params, extra, s, mesh, known, held_out.source, report, progress, left_out
            )
            return Evaluation(found | results | {"left_out": left_out}, report, None, probed, entropies)
    watching, swapping = _judges(model, params, extra, s, mesh, held_out.source, weights, left_out)
    # The pass asks for the second batch when it is done with the first, which is when all is compiled.
    compiling = progress.phase("compiling")
    options = {"mesh": mesh, "judges": watching, "progress": progress.update, "first_batch": compiling}
    report = reconstruct(model, params, extra, s, held_out, **options)
    results = found | dict(report.results)
    if model.measured != "codes":
        return Evaluation(results | {"left_out": left_out}, report, None, None, None)
    of_codes, probed, entropies = _read_codes(
        model, params, extra, s, mesh, known, held_out.source, report, progress, left_out
    )
    results |= of_codes
    picture = swapping.picture() if swapping else None
    if swapping and picture is None:
        left_out.append("counterfactuals: the first batch holds less than two images")
    return Evaluation(results | {"left_out": left_out}, report, picture, probed, entropies)


def _read_codes(model, params, extra, s, mesh, known, source, report, progress, left_out):
    """(results, probes, entropies) of what codes alone tell; see `Evaluation`."""
    e, results, probed, entropies = s.evaluate, {}, None, None
    half = _known_codes(model, params, extra, s, mesh, known, source, progress, left_out)
    if half is not None:
        codes_MK, labels_M = half
        order_K = _reading_order(model)
        codes_MK, codes_NK = codes_MK[:, order_K], report.codes[:, order_K]
        with progress.phase("comparing orders"):
            strides = [stride for stride in _STRIDES if stride <= model.num_tokens]
            entropies = probes.order_entropies(codes_MK, codes_NK, model.codebook_size, strides)
        results["entropy_by_stride"] = {stride: found["mean"] for stride, found in entropies.items()}
        results["entropy_uniform"] = math.log(model.codebook_size)
        results["entropy_by_place"] = {stride: found["by_place"] for stride, found in entropies.items()}
        labelled_M, labelled_N = labels_M >= 0, report.labels >= 0
        if reason := _no_probe(labels_M[labelled_M], report.labels[labelled_N]):
            left_out.append(f"probes: {reason}")
        else:
            with progress.phase("probing"):
                vectors_Vd = _code_vectors(model, params, extra, mesh)
                train = vectors_Vd[codes_MK[labelled_M]], labels_M[labelled_M]
                test = vectors_Vd[codes_NK[labelled_N]], report.labels[labelled_N]
                probed = probes.probe_prefixes(*train, *test, e.visible)
            results |= _probe_results(probed, train[1], test[1])
    return results, probed, entropies


def reconstruct(
    model,
    params,
    extra,
    s: settings.Experiment,
    loader: Loader,
    *,
    mesh,
    judges=(),
    progress=None,
    first_batch=contextlib.nullcontext(),  # noqa: B008  it holds no state
    drawing_phase=contextlib.nullcontext(),  # noqa: B008  nor does this
    count: int = 0,
    captions: CaptionIds | None = None,
) -> reconstruction.Report | autoencoding.Report | drawing.Report | retrieval.Report | classifying.Report:
    """The pass over the held-out images alone. Arguments as in `evaluate` and `reconstruction.evaluate_reconstruction`.

    Args:
      first_batch: context in which the first batch is judged.
      drawing_phase: of a model that draws, see `drawing.evaluate_drawing`.
      count: of a model that draws: how many pictures are judged.
      captions: what reads those of a model that knows them; of one that draws nothing yet, retrieval is the report.
    """
    e = s.evaluate
    if model.measured == "retrieval" or not getattr(model, "draws", True):
        return _retrieve(model, params, extra, s, loader, mesh=mesh, progress=progress, captions=captions)

    def batches():
        made = loader.eval_batches(e.images, e.batch_size)
        with first_batch:
            yield next(made)
        yield from made

    if model.measured == "drawing":
        verify = _reader(loader.source) if count else None
        how = {"mesh": mesh, "count": count, "class_names": loader.source.label_names, "verify": verify}
        how |= {"progress": progress, "drawing": drawing_phase}
        with jax.set_mesh(mesh):
            return drawing.evaluate_drawing(model, params, extra, batches(), e, **how)
    if model.measured == "classes":
        with jax.set_mesh(mesh):
            return classifying.evaluate_classes(model, params, extra, batches(), e, mesh=mesh, progress=progress)
    how = {"put": lambda batch: meshes.put_batch(batch, mesh), "judges": judges, "progress": progress}
    with jax.set_mesh(mesh):
        if model.measured != "codes":
            return autoencoding.evaluate_autoencoder(model, params, batches(), e, **how)
        verifier = _verifier(loader.source) if e.verifier else None
        return reconstruction.evaluate_reconstruction(model, params, extra, batches(), e, verifier=verifier, **how)


def _retrieve(model, params, extra, s, loader, *, mesh, captions, progress):
    how = {"mesh": mesh, "progress": progress}
    with jax.set_mesh(mesh):
        return retrieval.evaluate_retrieval(model, params, extra, loader.source, s.data, s.evaluate, captions, **how)


def check_source(model, e: settings.Evaluate, source) -> None:
    """Raises UserError if a source's images cannot be read back, and settings ask for it."""
    if e.verifier and model.measured in ("drawing", "codes"):
        (_reader if model.measured == "drawing" else _verifier)(source)


def _reader(source) -> Callable:
    """What reads drawn pictures, or clips, of a source's kind back. Raises UserError if nothing does."""
    from ddt_jax.data.moving_scenes import MovingScenesSource

    if isinstance(source, MovingScenesSource):
        return drawing.follow_objects
    _verifier(source)
    return drawing.count_objects


def _verifier(source):
    from ddt_jax.data.scenes import ScenesSource

    if not isinstance(source, ScenesSource):
        raise UserError(
            f"config: evaluate.verifier reads scenes, data.eval_source is {source.name}; set evaluate.verifier=False"
        )
    from ddt_jax.data.scenes_verifier import score

    return lambda images, indices: score(images, [source.scene(int(i)) for i in indices])


def _judges(model, params, extra, s, mesh, source, weights, left_out):
    """(all judges, the one that swaps tokens or None)."""
    e, found = s.evaluate, []
    if weights.lpips is not None:
        found.append(judges.LPIPS(weights.lpips, e.lpips_backbone, mesh))
    else:
        left_out.append("LPIPS: set evaluate.lpips_backbone_file and evaluate.lpips_heads_file")
    if weights.inception is not None:
        folder, key = files.cache_folder(s.data.cache_dir) / "fid", _originals_key(s, source, weights)
        keep = functools.partial(frechet.keep, folder, key)
        found.append(judges.RFID(weights.inception, mesh, frechet.read(folder, key), keep))
    else:
        left_out.append("rFID: set evaluate.inception_file")
    if e.save_images:
        found.append(judges.SavedImages(e.save_images))
    if model.measured != "codes":
        return found, None
    if not e.counterfactuals:
        left_out.append("counterfactuals: evaluate.counterfactuals is 0")
        return found, None
    run = reconstruction.programs(model)

    def decode(codes_BK, index_B):
        batch = meshes.put_batch({"codes": codes_BK, "index": index_B}, mesh)
        k = np.int32(model.num_tokens)
        return run.decode(params, extra, batch["codes"], batch["index"], np.uint32(e.seed), k)

    swapping = judges.Counterfactuals(decode, _reading_order(model), e.counterfactuals)
    return [*found, swapping], swapping


def _originals_key(s: settings.Experiment, source, weights: Weights) -> dict:
    """All on which Inception's features of the originals depend; of a source its name, length and a few records."""
    n, records = min(s.evaluate.images, len(source)), hashlib.sha256()
    for index in np.linspace(0, len(source) - 1, min(_FINGERPRINT_RECORDS, len(source))).astype(int):
        with contextlib.suppress(BadRecord):
            image = source[int(index)]["image"]
            records.update(image if isinstance(image, bytes) else np.ascontiguousarray(image).tobytes())
    names = ("image_size", "crop", "background", "min_image_size", "max_pixels")
    return {
        "source": source.name,
        "length": len(source),
        "records": records.hexdigest(),
        "images": n,
        "seed": s.seed if n < len(source) else 0,  # which images they are, where they are not all
        "data": {name: getattr(s.data, name) for name in names},
        "weights": weights.inception_digest,
    }


def _known_codes(model, params, extra, s, mesh, known, source, progress, left_out):
    """(codes, labels) of the training half; None where there is none, and why goes to `left_out`."""
    e, loader = s.evaluate, _known_loader(s, known, "probes and entropies", left_out)
    if loader is None:
        return None
    with jax.set_mesh(mesh), progress.phase("encoding images of data.source") as detail:
        codes, labels = reconstruction.codes_of(
            model,
            params,
            extra,
            loader.eval_batches(e.probe_images, e.batch_size),
            put=lambda batch: meshes.put_batch(batch, mesh),
            progress=lambda seen: detail(f"{seen:,}"),
        )
    return codes, _same_classes(labels, loader.source, source)


def _known_loader(s, known, what: str, left_out) -> Loader | None:
    """The loader of the training half; None where there is none, and why goes to `left_out`."""
    reason, loader = "", None
    if not s.evaluate.probe_images:
        reason = "evaluate.probe_images is 0"
    elif s.data.source == s.data.eval_source:
        reason = "data.source and data.eval_source are the same images"
    else:
        try:
            loader = known()
        except UserError as error:  # a run may be evaluated where its training data are not
            reason = str(error)
        if getattr(getattr(loader, "source", None), "arrays", None):
            reason = f"{loader.source.name} holds no pictures"
    if not reason:
        return loader
    left_out.append(f"{what}: {reason}")
    return None


def _same_classes(labels, source, held_out):
    """Labels of a source, -1 where the same numbers mean other classes in the held-out one."""
    names = source.label_names, held_out.label_names
    return np.full_like(labels, -1) if None not in names and names[0] != names[1] else labels


def _probe_clean(model, params, extra, s, mesh, known, held_out, progress, left_out) -> dict[str, Any]:
    """Classes from what a model that draws makes of clean images; why there are none goes to `left_out`."""
    e, loader = s.evaluate, _known_loader(s, known, "probes", left_out)
    if loader is None:
        return {}
    parts = (loader, e.probe_images), (held_out, e.images)
    with jax.set_mesh(mesh), progress.phase("probing clean images"):
        (train_MD, labels_M), (test_ND, labels_N) = (
            drawing.clean_features(model, params, extra, half.eval_batches(n, e.batch_size), e.seed, mesh=mesh)
            for half, n in parts
        )
        labels_M = _same_classes(labels_M, loader.source, held_out.source)
        train = train_MD[labels_M >= 0, None], labels_M[labels_M >= 0]
        test = test_ND[labels_N >= 0, None], labels_N[labels_N >= 0]
        if reason := _no_probe(train[1], test[1]):
            left_out.append(f"probes: {reason}")
            return {}
        found = _probe_results(probes.probe_prefixes(*train, *test, (1.0,)), train[1], test[1])
    return {k: v for k, v in found.items() if not k.endswith("_by_tokens")} | {"probe_depth": model.probe_depth}


def _reading_order(model) -> np.ndarray:
    """Positions of the tokens from the coarsest to the finest; their own order where none is coarser."""
    order_K = np.arange(model.num_tokens)
    return order_K[::-1] if model.token_order == "fine_to_coarse" else order_K


def _no_probe(train_M, test_N) -> str:
    """Why classes cannot be learned from these labels, or nothing."""
    if not len(train_M) or not len(test_N):
        return "data.source and data.eval_source have no labels of the same classes"
    if len(set(train_M)) < 2:
        return "the images of data.source are all of one class"
    return ""


def _code_vectors(model, params, extra, mesh) -> np.ndarray:
    """[V, d]."""
    codes_1V = np.arange(model.codebook_size, dtype=np.int32)[None]
    with jax.set_mesh(mesh):
        look_up = jax.jit(model.code_vectors, out_shardings=meshes.replicated(mesh))
        return np.asarray(look_up(params, extra, codes_1V))[0]


def _probe_results(probed, train_M, test_N) -> dict[str, Any]:
    results = {
        "probe_images": len(train_M),
        "probe_test_images": len(test_N),
        "probe_chance": float(np.bincount(test_N).max() / len(test_N)),  # of who always says the commonest class
    }
    for kind in ("linear", "knn"):
        by_tokens = {k: found[kind] for k, found in probed.items()}
        last = list(by_tokens.values())[-1]
        results |= {
            f"probe_{kind}": last["accuracy"],
            f"probe_{kind}_interval": last["interval"],
            f"probe_{kind}_by_tokens": {k: found["accuracy"] for k, found in by_tokens.items()},
        }
    return results
