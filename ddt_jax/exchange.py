"""Checkpoints of other projects: what `ddt-jax import` and `ddt-jax export` do, one function and one row per kind.

It lies above `experiment`, whose runs it makes and reads: nothing there needs it. An import writes an ordinary run that
has taken no step, with a config and a checkpoint at step 0, so that all other verbs work on it; or, of a model that a
run is only a part of, weights alone (`training/weights.py`).
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath

from ddt_jax import config, experiment, settings
from ddt_jax import mesh as meshes
from ddt_jax.errors import UserError
from ddt_jax.interop import acdit, blip2, diffusers_vae, layout, llama, sd3, selftok, stable_diffusion, torch_export
from ddt_jax.io import torch_file, weights_folder
from ddt_jax.multimodal import backbone
from ddt_jax.training import checkpoint, corpus, weights
from ddt_jax.training.claim import claim
from ddt_jax.training.fingerprint import fingerprint
from ddt_jax.training.state import TrainState


@dataclass(frozen=True)
class Importer:
    """A row of `IMPORTS`.

    Attributes:
      run: (settings, file, workdir) → result; "summary" in it is what a user is told.
      default: (overrides) → settings for who names no config; None if there are none.
    """

    run: Callable[[settings.Experiment, str, str], dict[str, Any]]
    default: Callable[[tuple[tuple[str, str], ...]], settings.Experiment] | None = None


def released_settings(overrides: tuple[tuple[str, str], ...] = ()) -> settings.Experiment:
    """Settings of a run with the released Selftok tokenizer, for who has no config of their own.

    There is no weight average: nothing has been trained here. Evaluation is set to ImageNet in the data folder.
    """
    images = "parquet:${DDT_JAX_DATA}/imagenet"
    s = settings.Experiment(
        name="selftok",
        model=settings.SelftokTokenizer(),
        data=settings.Data(source=f"{images}/train-*.parquet", eval_source=f"{images}/val-*.parquet", image_size=256),
        optimizer=settings.Optimizer(name="adamw", lr=5e-5, weight_decay=0.0, clip_norm=0.0),
        train=settings.Train(ema=0.0),
    )
    return config.from_dict(config.override(config.dump(s), overrides))


def acdit_settings(overrides: tuple[tuple[str, str], ...] = ()) -> settings.Experiment:
    """The same with the published ACDiT-H for images."""
    model = settings.ACDiT(**settings.acdit_size("H"), rope="released")
    s = replace(released_settings(), name="acdit", model=model)
    return config.from_dict(config.override(config.dump(s), overrides))


def import_whole(form: layout.Format, s: settings.Experiment, file: str, workdir: str) -> dict[str, Any]:
    """Makes a run out of a published checkpoint that holds all of a model.

    Returns:
      "step", "tensors" in the file, "parameters", "workdir", "summary".

    Raises:
      UserError: if the file does not hold what the settings need, or the workdir holds a run already.
    """
    built = _on_one_device(s)
    arrays = form.read(file)
    tensors = form.tensors(s.model, _model_state(built.abstract, built.abstract.params))
    form.check(arrays, tensors, file)
    _start(built, s, workdir, lambda tree: layout.fill(arrays, tensors, tree, meshes.put_whole))
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(built.abstract.params))
    summary = f"{len(arrays):,} tensors, {count:,} parameters: {workdir} at step 0"
    return {"step": 0, "tensors": len(arrays), "parameters": count, "workdir": str(workdir), "summary": summary}


def import_sd3(s: settings.Experiment, file: str, workdir: str) -> dict[str, Any]:
    """Makes a run that starts from SD3-medium: the image stream of its decoder; the rest is as `train` would draw it.

    Returns:
      "step", "copied" (names), "not_copied" (name → why), "not_transformer" (names), "workdir", "summary".

    Raises:
      UserError: if the file does not hold the image stream that the settings have, or the workdir holds a run already.
    """
    built = _on_one_device(s)
    tensors = selftok.decoder_layout(s.model, _model_state(built.abstract, built.abstract.params))
    arrays, others = sd3.read(file)
    chosen, left = sd3.select(arrays, s.model, tensors, file)
    _start(built, s, workdir, lambda tree: layout.fill(chosen, tensors, tree, meshes.put_whole))
    summary = f"{sd3.report(chosen, left, others, tensors)}\n{workdir} at step 0"
    copied = {"copied": sorted(chosen), "not_copied": left, "not_transformer": others}
    return {"step": 0, **copied, "workdir": str(workdir), "summary": summary}


def import_llama(folder: str, workdir: str, vocab_size: int = 0) -> dict[str, Any]:
    """Writes LLaMA's weights where a multimodal run will start from them, see `interop.llama.import_folder`.

    Args:
      vocab_size: at least theirs; 0 for theirs.

    Returns:
      "tensors", "parameters", "bytes", "dtype", "vocab_size", "vocab_size_before", "workdir", "summary".

    Raises:
      UserError: if the folder holds no LLaMA, or the workdir something else already.
    """
    _check_empty(workdir, "workdir")
    try:
        c = llama.import_folder(folder, workdir, vocab_size=vocab_size)
    except OSError as error:
        raise UserError(f"import: {error.filename or workdir}: {error.strerror or error}") from error
    about, text = _sizes(llama.load(workdir)[0])
    before = llama.read_settings(folder).vocab_size
    grown = f"{before:,}" if c.vocab_size == before else f"{before:,} → {c.vocab_size:,}"
    summary = f"{text}, width {c.width:,}, depth {c.depth}, vocabulary {grown}: {workdir}"
    about |= {"vocab_size": c.vocab_size, "vocab_size_before": before}
    return {**about, "workdir": str(workdir), "summary": summary}


def export_llama(workdir: str, folder: str) -> dict[str, Any]:
    """Writes imported weights, or the newest checkpoint of a multimodal run, as a folder that transformers opens.

    Returns:
      of imported weights "tensors", "parameters", "bytes", "dtype", "written", "summary"; of a run as `export_whole`.

    Raises:
      UserError: if the workdir holds neither, or the folder something already, or it cannot be written.
    """
    _check_empty(folder, "--to")
    if not weights.holds(workdir):
        return _export_trained_llama(workdir, folder)
    arrays, c = llama.load(workdir)
    try:
        llama.export_folder(arrays, c, folder, beside=workdir)
    except OSError as error:
        raise UserError(f"export: cannot write {folder}: {error.strerror or error}") from error
    about, text = _sizes(arrays)
    return {**about, "written": str(folder), "summary": f"imported weights, {text}: {folder}"}


def _export_trained_llama(workdir, folder):
    s = experiment.saved_settings(workdir)
    model = s.model
    if model.kind != "multimodal":
        raise UserError(
            f"export: {workdir} holds a model of kind {model.kind!r}, neither 'multimodal' nor imported weights"
        )
    if model.image.kind != "codes":
        raise UserError(
            f"export: {workdir} was trained with model.image.kind={model.image.kind!r}; LLaMA's files have no place "
            "for what reads and writes such images"
        )
    options = {"model.image.code_places": model.image.code_places, "model.whole_prompts": model.whole_prompts}
    if any(options.values()):
        names = " and ".join(f"{name}=True" for name, is_on in options.items() if is_on)
        raise UserError(
            f"export: {workdir} was trained with {names}, which LLaMA's files have no place for; train without it to "
            "export"
        )

    special, beside = dict(corpus.load(workdir, s).vocabulary.special), _imported(s.init_from)

    def write(built, state, params, about):
        sizes = built.settings.model.transformer
        c, params = backbone.for_decoding(sizes, built.model.all_params(params, state.extra))
        arrays = weights.unrolled_arrays(params)
        llama.export_folder(arrays, c, folder, beside=beside, special=special, context=s.sequences.context)
        corpus.copy_text(workdir, folder)
        return {"tensors": len(arrays)}

    return _export(workdir, folder, write)


def _imported(start: str) -> str | None:
    """The folder of imported weights that a run has begun with, be it by way of other runs; None: there is none, or a
    folder on the way has gone.
    """
    seen = set()
    while start and start not in seen and not weights.holds(start):
        seen.add(start)
        found = (epath.Path(start) / "config.json").exists()
        start = checkpoint.saved_config(start, "init_from").get("init_from", "") if found else ""
    return start if start and start not in seen else None


def export_whole(form: layout.Format, workdir: str, file: str) -> dict[str, Any]:
    """Writes the newest checkpoint as a file in a published layout.

    Returns:
      "step", "tensors", "weights" ("average" where the run has one, else "parameters"), "written", "summary".

    Raises:
      UserError: if the run has no published counterpart, or the file cannot be written.
    """

    def write(built, state, params, about):
        with jax.set_mesh(built.mesh):
            arrays = form.to_arrays(_model_state(state, params), built.settings.model)
        torch_file.save(file, arrays)
        return {"tensors": len(arrays)}

    return _export(workdir, file, write)


def export_torch(workdir: str, folder: str) -> dict[str, Any]:
    """Writes the newest checkpoint for PyTorch users, see `interop.torch_export`. Returns and raises as the others."""

    def write(built, state, params, about):
        return {"tensors": len(torch_export.write(folder, built.model, params, state.extra, about))}

    return _export(workdir, folder, write)


def export_vae(workdir: str, folder: str) -> dict[str, Any]:
    """Writes the newest checkpoint of an autoencoder as a folder in diffusers' layout, its latents' scale measured.

    Returns:
      as `export_whole`, and "images" that were measured, "codec": the settings with which a tokenizer works on these
      latents.

    Raises:
      UserError: if the run holds no autoencoder, or the folder cannot be written.
    """

    def write(built, state, params, about):
        if not isinstance(built.settings.model, settings.VAE):
            raise UserError(f"export: {workdir} holds a model of kind {built.settings.model.kind!r}, not 'vae'")
        found = experiment.measure(built, state).results
        scaled = {"scaling_factor": 1 / found["latent_std"], "shift_factor": found["latent_mean"]}
        sizes = replace(built.settings.model.sizes, **scaled)
        params = jax.device_get(built.model.autoencoder_params(params))
        written = str(diffusers_vae.write(folder, params, sizes))
        codec = config.dump(settings.VAECodec(preset="custom", sizes=sizes, weights=str(folder)))
        lines = [
            f"latents measured on {found['n']:,} images; in the config of a tokenizer on them:",
            f"    c.model.codec = config.defaults(settings.VAECodec, preset='custom', weights={str(folder)!r})",
            f"    c.model.codec.sizes = {codec['sizes']}",
        ]
        count = len(jax.tree.leaves(params))
        return {"tensors": count, "images": found["n"], "codec": codec, "written": written, "lines": lines}

    return _export(workdir, folder, write)


def export_qformer(workdir: str, folder: str, names: str = "huggingface") -> dict[str, Any]:
    """Writes the Q-Former of a SEED run as a safetensors file in the names of transformers' BLIP-2.

    Args:
      names: see `interop.blip2.to_arrays`.

    Returns:
      as `export_whole`.

    Raises:
      UserError: if the run is no SEED, or its norms stand where theirs do not, or the folder cannot be written.
    """

    _check_empty(folder, "--to")

    def write(built, state, params, about):
        c = built.settings.model
        if not isinstance(c, settings.SEED) or c.qformer.norm != "post":
            raise UserError(f"export: {workdir} holds no SEED with model.qformer.norm='post', which BLIP-2 has")
        arrays = blip2.to_arrays(jax.device_get(params["qformer"]), c.qformer, names)
        weights_folder.save(folder, arrays)
        return {"tensors": len(arrays)}

    return _export(workdir, folder, write)


def export_embeddings(workdir: str, file: str, codes: str) -> dict[str, Any]:
    """Writes what Stable Diffusion draws from, of codes of a SEED run: see `interop.stable_diffusion`.

    Args:
      codes: folder of `ddt-jax tokenize`, or report of `ddt-jax generate --json`.

    Returns:
      as `export_whole`, and "images", "shape" of the embeddings.

    Raises:
      UserError: if no Stable Diffusion draws from the run's features, or the codes are another tokenizer's, or the file
        cannot be written.
    """
    stable_diffusion.check(experiment.make_model(experiment.saved_settings(workdir)), workdir)
    if not codes:
        raise UserError("export embeddings: needs --codes, a folder of `ddt-jax tokenize` or a report of `generate`")

    def write(built, state, params, about):
        model, made_by = built.model, fingerprint(built.settings, built.model, params, state.extra, "none")
        draws = stable_diffusion.check(model, workdir)
        codes_NK = stable_diffusion.read_codes(codes, made_by, built.settings.model)
        with jax.set_mesh(built.mesh):
            made_NMF = stable_diffusion.embed(model, params, state.extra, codes_NK)
        stable_diffusion.save(file, made_NMF, codes_NK, {"tokenizer": made_by, "for": draws})
        shape = [*made_NMF.shape]
        lines = [f"embeddings {' x '.join(map(str, shape))} for {draws}"]
        return {"tensors": 2, "images": len(codes_NK), "shape": shape, "lines": lines}

    return _export(workdir, file, write)


def export(kind: str, workdir: str, path: str, codes: str = "") -> dict[str, Any]:
    """What `ddt-jax export` does: a function of EXPORTS. codes: only for those that are made of codes.

    Raises:
      UserError: as the function, or for codes that it does not take.
    """
    if kind in CODE_EXPORTS:
        return CODE_EXPORTS[kind](workdir, path, codes)
    if codes:
        raise UserError(f"export {kind}: takes no --codes, only {', '.join(CODE_EXPORTS)} does; leave it out")
    return EXPORTS[kind](workdir, path)


# What the command line offers; its texts are in cli.py, which imports nothing heavy.
IMPORTS = {
    "selftok": Importer(functools.partial(import_whole, selftok.FORMAT), released_settings),
    "acdit": Importer(functools.partial(import_whole, acdit.FORMAT), acdit_settings),
    "sd3": Importer(import_sd3),
}
WEIGHT_IMPORTS = {"llama": import_llama}  # whose settings come with them
EXPORTS = {form.kind: functools.partial(export_whole, form) for form in (selftok.FORMAT, acdit.FORMAT)}
EXPORTS |= {"vae": export_vae, "torch": export_torch, "llama": export_llama}
EXPORTS |= {"qformer": export_qformer, "seed-qformer": functools.partial(export_qformer, names="seed")}
CODE_EXPORTS = {"embeddings": export_embeddings}


def _on_one_device(s: settings.Experiment) -> experiment.Built:
    return experiment.build(replace(s, mesh=settings.Mesh()), jax.devices()[:1])


def _model_state(state: TrainState, params) -> dict:
    return {"params": params, "extra": state.extra}


def _start(built: experiment.Built, s: settings.Experiment, workdir: str, fill: Callable) -> None:
    """Writes a run's config and its checkpoint at step 0.

    The optimizer is fresh, and the weight average, where the settings have one, starts at the weights.

    Args:
      fill: {"params", "extra"} of a fresh state → the same with what is imported.
    """
    tree = config.dump(s)
    claim(epath.Path(workdir), tree, built.frozen_weights)
    points = checkpoint.Checkpoints(workdir, s.train, experiment.to_stderr)
    try:
        if steps := points.steps():
            raise UserError(f"workdir: {workdir} holds a run at step {steps[-1]:,} already; use another --workdir")
        with jax.set_mesh(built.mesh):
            state = built.init()
            filled = fill(_model_state(state, state.params))
            state = state.replace(**filled, ema=None if state.ema is None else filled["params"])
            points.save(state, tree)
    finally:
        points.close()


def _check_empty(path: str, what: str) -> None:
    """Raises UserError if something is there already. what: how the user has named it."""
    folder = epath.Path(path)
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"{what}: {path} is a file; name a new folder")
    names = sorted(p.name for p in folder.iterdir())
    if names:
        what_is_there = "imported weights" if weights.holds(path) else "a run" if "checkpoints" in names else names[0]
        raise UserError(f"{what}: {path} holds {what_is_there} already; use another folder")


def _sizes(arrays: dict) -> tuple[dict[str, Any], str]:
    """What a user is told of weights, as data and as text. arrays: by name, looked at from outside only."""
    count = sum(math.prod(x.shape) for x in arrays.values())
    size = sum(x.nbytes for x in arrays.values())
    dtype = ", ".join(sorted({str(np.dtype(x.dtype)) for x in arrays.values()}))
    text = f"{len(arrays):,} tensors, {count:,} parameters in {dtype} ({size / 1e9:,.2f} GB)"
    return {"tensors": len(arrays), "parameters": count, "bytes": size, "dtype": dtype}, text


def _export(workdir: str, path: str, write: Callable) -> dict[str, Any]:
    """write: (built, state, weights, what is known of them) → "tensors", "lines" of a summary, other results."""
    built, state = experiment.restore(workdir)
    which = "parameters" if state.ema is None else "average"
    about = {"name": built.settings.name, "step": int(state.step), "weights": which}
    try:
        result = write(built, state, experiment.weights(state), about)
    except OSError as error:
        raise UserError(f"export: cannot write {path}: {error.strerror or error}") from error
    first = f"step {about['step']:,}, {which}, {result['tensors']:,} tensors: {path}"
    summary = "\n".join([first, *result.pop("lines", [])])
    return {"step": about["step"], "weights": which, "written": str(path), "summary": summary} | result
