"""The composition root: from settings to data, model, step, evaluators and hooks. All else is given what it needs.

Each function here is what one verb of the command line does, and can be called from a notebook just as well; the verbs
that judge runs are in `judging`.
"""

import json
import sys
import time
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath

from ddt_jax import config, monitoring, peers, settings
from ddt_jax import mesh as meshes
from ddt_jax.errors import UserError
from ddt_jax.interop import blip2, diffusers_vae, hf_clip, hf_vision
from ddt_jax.io import atomic, weights_folder
from ddt_jax.multimodal.code_embedding import VECTORS
from ddt_jax.multimodal.model import Multimodal, check_context, make_multimodal
from ddt_jax.tokenizers.base import ImageTokenizer, make_tokenizer
from ddt_jax.tokenizers.image_loss import LPIPS
from ddt_jax.tokenizers.seed import TARGET, VISION
from ddt_jax.training import checkpoint, corpus, latents, loop, same_data, warm_start, writers
from ddt_jax.training import feed as feeds
from ddt_jax.training import optimizer as optimizers
from ddt_jax.training.bad_batches import BadBatches
from ddt_jax.training.claim import claim, refuse_other, write_config
from ddt_jax.training.fingerprint import fingerprint
from ddt_jax.training.notices import Notices
from ddt_jax.training.progress import Progress
from ddt_jax.training.recheck import Recheck
from ddt_jax.training.state import TrainState, abstract_state, init_state
from ddt_jax.training.step_log import StepLog
from ddt_jax.training.tokenizer_step import STOP, compile_step, make_step


@dataclass(frozen=True)
class Built:
    """A model over a mesh, abstract: no array exists yet."""

    settings: settings.Experiment
    mesh: Any
    model: Any
    abstract: TrainState  # ShapeDtypeStructs with shardings
    shardings: TrainState
    declarations: Any
    step: Any  # jitted (state, batch) → (state, metrics)
    pure_step: Any  # the same, not yet jitted
    fallbacks: list

    def frozen_weights(self) -> dict[str, Any]:
        """What `extra` holds from files that the settings name: its key → NumPy arrays.

        Raises:
          UserError: if a file does not hold them.
        """
        found = {}
        codec, image_loss = getattr(self.model, "codec", None), self.model.image_loss
        if file := getattr(codec, "weights", ""):
            found["codec"] = diffusers_vae.read(file, codec.sizes)
        if image_loss and image_loss.has_lpips:
            found[LPIPS] = image_loss.read_lpips()
        if folder := getattr(self.model, "vision_weights", ""):
            found[VISION] = hf_vision.read(folder, self.settings.model.vision, self.settings.data.image_size)
        if getattr(self.model, "target_weights", ""):
            found[TARGET] = hf_clip.read_target(self.settings.model.clip)
        if isinstance(self.model, Multimodal) and self.settings.model.image.code_vectors:
            found[VECTORS] = corpus.code_vectors(self.settings)
        return found

    def starting_weights(self) -> dict[str, Any]:
        """Parameters that training starts from in files that the settings name: part → NumPy arrays. Raises as
        `frozen_weights`.
        """
        m = self.settings.model
        if not (folder := getattr(self.model, "qformer_weights", "")):
            return {}
        found = weights_folder.load(folder)
        return {"qformer": blip2.from_arrays(found, m.qformer, m.num_tokens, m.vision.width, f"qformer: {folder}")}

    def init(self) -> TrainState:
        """A fresh state, made on the devices where it belongs. Raises UserError as `frozen_weights`."""
        weights, started = self.frozen_weights(), self.starting_weights()
        with jax.set_mesh(self.mesh):
            state = self._run(self._init, self.shardings)
            state = state.replace(extra=state.extra | {name: self._placed(name, v) for name, v in weights.items()})
            if not started:
                return state
            abstract = self.abstract.params
            placed = {name: jax.tree.map(meshes.put_whole, v, abstract[name]) for name, v in started.items()}
            ema = None if state.ema is None else state.ema | jax.tree.map(jax.numpy.copy, placed)
            return state.replace(params=state.params | placed, ema=ema)

    def init_codec(self):
        """What `init` puts into `extra["codec"]`, without the rest; None for a codec without arrays."""
        weights = self.frozen_weights().get("codec")
        with jax.set_mesh(self.mesh):
            if weights is not None:
                return self._placed("codec", weights)
            return self._run(lambda: self._init().extra.get("codec"), self.shardings.extra.get("codec"))

    def _run(self, function, shardings):
        # Runs once: on CPU, optimizing its code takes longer than the code itself.
        options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
        return jax.jit(function, out_shardings=shardings, compiler_options=options)()

    def _placed(self, name, weights):
        return jax.tree.map(meshes.put_whole, weights, self.abstract.extra[name])

    def _init(self):
        s = self.settings
        made = optimizers.make_optimizer(s.optimizer, s.train.steps, self.declarations)
        return init_state(self.model, made, self.declarations, seed=s.seed, use_ema=s.train.ema > 0, guard=s.optimizer)


def _mesh(s: settings.Experiment, devices, to_train: bool):
    mesh = meshes.make_mesh(s.mesh, devices)
    check_context(s, mesh)
    if to_train:
        meshes.check_batch(s.train.batch_size // s.train.accumulate, mesh, "train.batch_size / train.accumulate")
    return mesh


def build(s: settings.Experiment, devices=None, *, to_train: bool = True) -> Built:
    """Model, abstract state, shardings and compiled step (compiled when first called) for some devices.

    Args:
      to_train: whether the step will be used, so that its batch must fit the devices.

    Raises:
      UserError: if mesh, batch, devices and model do not fit, accumulation and loss do not, or as `abstract_state`.
    """
    mesh = _mesh(s, devices, to_train)
    model = make_model(s)
    if s.train.accumulate > 1 and model.cross_example_terms:
        raise UserError(
            f"config: train.accumulate={s.train.accumulate} would change {', '.join(model.cross_example_terms)}, "
            "which looks at the whole batch at once; set train.accumulate=1"
        )
    optimizer, declarations, abstract, fallbacks = abstract_state(s, model, mesh, make_model)
    shardings = jax.tree.map(lambda a: a.sharding, abstract)
    schedule = optimizers.learning_rate(s.optimizer, s.train.steps)
    limits = {"spike_skip": s.optimizer.spike_skip, "clip_update": s.optimizer.clip_update}
    pure = make_step(model, optimizer, schedule, accumulate=s.train.accumulate, ema=s.train.ema, **limits)
    step = compile_step(pure, shardings, mesh)
    return Built(s, mesh, model, abstract, shardings, declarations, step, pure, fallbacks)


def make_model(s: settings.Experiment):
    """The model of a run, no arrays. Raises UserError if its settings do not go together."""
    if isinstance(s.model, settings.Multimodal):
        return make_multimodal(s.model, s.data.image_size)
    return make_tokenizer(s.model, s.data.image_size, s.train.batch_size, s.data.frames)


def abstract_batch(built: Built) -> dict:
    """A batch of the train step as ShapeDtypeStructs, for ahead-of-time compilation."""
    sharding = meshes.batch_sharding(built.mesh)
    shapes = feeds.batch_shapes(built.settings, built.model)
    rows = {k: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for k, (shape, dtype) in shapes.items()}
    return rows | {STOP: meshes.flag_shape(built.mesh)}


def train(s: settings.Experiment, workdir: str, *, force: bool = False) -> dict:
    """Trains, or goes on with the run in `workdir`.

    Args:
      force: go on although settings differ that decide what is learned, or from which examples; they are noted.

    Returns:
      "finished" (else it was asked to stop, and has saved), "step", "train_seconds".

    Raises:
      UserError: if the workdir holds another run, settings cannot train the model, or as data, mesh and checkpoints.
    """
    begun = time.perf_counter()
    if not isinstance(s.model, settings.Multimodal):  # whose sizes its data decides
        make_model(s).check_trainable()
    # What needs no data comes before they are opened, which may take long.
    _mesh(s, None, to_train=True)
    if not force:
        refuse_other(epath.Path(workdir), config.dump(s))
    feed = feeds.open_feed(s, workdir)
    s, loader = feed.settings, feed.loader
    same_data.check(feed)
    built, tree = build(s), config.dump(s)
    first, root = jax.process_index() == 0, epath.Path(workdir)
    new = not (root / "config.json").exists()
    note = to_stderr if first else lambda line: None
    if new:
        feed.check(built.model, built.init_codec)
        check_tokenizer(s, note)
        _check_held_out(built)
    wanted = lambda: (built.frozen_weights(), built.starting_weights(), _first_stage(built))  # noqa: E731
    claim(root, tree, wanted, note if force else None)
    feeds.check_records(root, feed, note if force else None)
    if first and not feeds.is_saved(root):  # of a new run, an imported one, and one that was killed right here
        feed.save(root)
    points = checkpoint.Checkpoints(workdir, s.train, note)
    with jax.set_mesh(built.mesh):
        state = points.restore(built.abstract)
        start = 0 if state is None else int(state.step)
        if state is None:
            note(_opening(built, feed.description))
            state = fresh(built, note)
        elif start >= s.train.steps:
            points.close()
            return {"finished": True, "step": start, **timing(root)}
        else:
            feed.check(built.model, lambda: state.extra["codec"])
            note(f"goes on from step {start:,} of {s.train.steps:,} in {workdir}")
        speed, stream = monitoring.speed(s, built.mesh.size, build, abstract_batch), sys.stderr if first else None
        progress = Progress(s.train.steps, start, s.train.batch_size, stream, speed=speed.figures)
        if first and force:
            write_config(root, tree)  # not before something could be restored with it
        writer = writers.for_run(root, s.train, tree) if first else writers.MultiWriter([])
        steps = StepLog(root) if first else None
        watch = loop.Watch(
            keep_bad=BadBatches(root, s.seed).keep,
            record=steps.put if steps else loop.Watch.record,
            flush=steps.flush if steps else loop.Watch.flush,
            recheck=Recheck(built.pure_step, built.shardings, built.mesh) if s.train.recheck_every else None,
            notices=Notices() if s.train.maintenance == "gce" else None,
        )
        writer.truncate_after(start)  # an earlier try may have come further than its last checkpoint
        batches = loader.iterate(start, s.train.steps)
        try:
            with monitoring.watching(root, s.train, progress, speed, begun, watch) as watch:
                state, finished = loop.train(
                    state,
                    built.step,
                    feeds.step_inputs(batches, feeds.batch_shapes(s, built.model)),
                    mesh=built.mesh,
                    train=s.train,
                    checkpoints=points,
                    config=tree,
                    progress=progress,
                    writer=writer,
                    hooks=_hooks(built, feed, writer, progress),
                    watch=watch,
                )
        except Exception as error:
            if peers.is_lost(error):
                points.abandon()
            raise
        finally:
            progress.close()
            batches.close()
            writer.close()
            if steps:
                steps.close()
            points.close()
    if loader.report():
        note(loader.report())
    if first:
        seconds = timing(root).get("train_seconds", 0.0) + time.perf_counter() - begun
        atomic.write_text(root / "timing.json", json.dumps({"train_seconds": round(seconds, 2)}) + "\n")
    return {"finished": finished, "step": int(state.step), **timing(root)}


def fresh(built: Built, note) -> TrainState:
    """The state before the first step of a run. note: told what `init_from` has given. Raises as `Built.init`."""
    begin = _first_stage(built)
    return built.init() if begin is None else begin.give(built.init(), note)


def _first_stage(built: Built):
    return warm_start.find(built.settings, built.model, built.mesh, built.abstract, make_model)


def saved_settings(workdir: str, overrides: tuple[tuple[str, str], ...] = ()) -> settings.Experiment:
    """The settings of the run in `workdir`, with others laid over them. Raises UserError if there is no run."""
    return config.from_dict(config.override(checkpoint.saved_config(workdir), overrides))


def restore(
    workdir: str,
    overrides: tuple[tuple[str, str], ...] = (),
    devices=None,
    at_most: int | None = None,
    *,
    whole: bool = False,
) -> tuple[Built, TrainState]:
    """The run in `workdir` with the newest state that verifies, whatever mesh it was trained on.

    Args:
      devices: over which it is spread; None: the first one.
      at_most: the newest step to look at.
      whole: with all that training goes on from, else `evaluated` of it.

    Raises:
      UserError: if there is no run, or no checkpoint of it yet.
    """
    s = saved_settings(workdir, overrides)
    built = build(replace(s, mesh=settings.Mesh()), devices or jax.devices()[:1], to_train=False)
    note = to_stderr if jax.process_index() == 0 else lambda line: None
    points = checkpoint.Checkpoints(workdir, s.train, note, read_only=True)
    with jax.set_mesh(built.mesh):
        state = points.restore(built.abstract if whole else evaluated(built.abstract), at_most, partial=not whole)
    points.close()
    if state is None:
        raise UserError(
            f"workdir: {workdir} has no checkpoint yet; `ddt-jax train` writes one every train.checkpoint_every steps"
        )
    return built, state


def open_tokenizer(workdir: str, image: settings.CodeImages, devices=None) -> tuple[Built, TrainState]:
    """The run in `workdir`, which must be the tokenizer that made the codes of a multimodal run.

    Args:
      image: of that run, sizes filled in.
      devices: as `restore`.

    Raises:
      UserError: as `restore`, it is a run of another kind, or it makes other codes.
    """
    built, state = restore(workdir, devices=devices)
    if not isinstance(built.model, ImageTokenizer):
        raise UserError(f"config: sequences.tokenizer={workdir} is a run of kind {built.settings.model.kind}")
    found = fingerprint(built.settings, built.model, weights(state), state.extra, image.order)
    if found != image.tokenizer:
        raise UserError(
            f"config: sequences.tokenizer={workdir} is tokenizer {found[:8]}…, the run's codes were made by "
            f"{image.tokenizer[:8]}…; name the workdir of that one"
        )
    return built, state


def check_tokenizer(s: settings.Experiment, note) -> None:
    """Refuses a new multimodal run whose sequences.tokenizer did not make its codes; nothing of it stays in memory.

    Training itself does without the tokenizer. So one that has no checkpoint yet, or is on another machine, is only
    noted, and refused by what draws.

    Raises:
      UserError: as `open_tokenizer`.
    """
    if not (isinstance(s.model, settings.Multimodal) and s.model.image.kind == "codes" and s.sequences.tokenizer):
        return
    workdir = epath.Path(s.sequences.tokenizer)
    if (workdir / "config.json").exists() and checkpoint.saved_steps(workdir):
        open_tokenizer(str(workdir), s.model.image, jax.devices())
    else:
        note(f"sequences.tokenizer: {workdir} has no checkpoint, so nobody has checked that it made the codes")


def weights(state: TrainState):
    """What is evaluated: the weight average where there is one."""
    return state.params if state.ema is None else state.ema


def evaluated(state: TrainState) -> TrainState:
    """A state without what only training needs, in memory a part of it: no optimizer, and where there is a weight
    average no other weights.
    """
    return state.replace(opt_state=None, params=state.params if state.ema is None else None)


def digest(workdir: str) -> str:
    """SHA-256 over step, parameters, optimizer, average and codebook of the newest checkpoint."""
    return checkpoint.digest(restore(workdir, whole=True)[1])


def write_latents(s: settings.Experiment, folder: str, spec: str = "", *, per_shard: int = 4096) -> dict:
    """Writes what the codec makes of images, or of all frames of clips, to train on latents:FOLDER instead of them.

    What is there already of an earlier call stays. Returns and raises as `training.latents.write`.
    spec: of the source of the images; "": data.source, or of a transformer its only source of pictures.
    """
    spec = spec or feeds.images_of(s)
    if isinstance(s.model, settings.Multimodal):  # of whose transformer nothing is made here
        s = replace(s, model=replace(s.model, transformer=replace(s.model.transformer, vocab_size=1)))
    built, size = build(s, to_train=False), s.evaluate.batch_size
    meshes.check_batch(size, built.mesh, "evaluate.batch_size")
    latents.identity(built.model, s.data)  # refuses before weights are read
    source, params = feeds.open_images(s, spec).source, built.init_codec()
    options = {"mesh": built.mesh, "batch_size": size, "per_shard": per_shard}
    with jax.set_mesh(built.mesh):
        return latents.write(epath.Path(folder), source, s.data, built.model, params, **options)


def measure(built: Built, state: TrainState, progress=None, captions=None):
    """The report of a state's weights on the held-out source. progress, captions: see `suite.reconstruct`."""
    from ddt_jax.evaluation import suite

    s = built.settings
    held_out = feeds.open_images(s, s.data.eval_source)
    options = {"mesh": built.mesh, "progress": progress, "captions": captions}
    return suite.reconstruct(built.model, weights(state), state.extra, s, held_out, **options)


def _check_held_out(built: Built) -> None:
    """Raises UserError for what a training would find out when it is first measured. Rows look at their own."""
    from ddt_jax.evaluation import suite

    s = built.settings
    if s.train.eval_every and not isinstance(s.model, settings.Multimodal):
        suite.check_source(built.model, s.evaluate, feeds.open_images(s, s.data.eval_source).source)


def measure_rows(built: Built, state: TrainState, found: corpus.Corpus) -> dict[str, Any]:
    """`language.held_out` of a state's weights on sequences.eval_sources: evaluate.images documents, or a few more."""
    from ddt_jax.evaluation import gather, language

    s = built.settings
    loader = corpus.open_rows(s, found, s.sequences.eval_sources)
    batches, seen = [], 0
    while seen < s.evaluate.images:
        batches.append(loader.batch_at(len(batches)))
        seen += int((batches[-1]["document"].max(axis=1) + 1).sum()) * meshes.reader(built.mesh).count
    count = gather.agreed(len(batches))  # rows of other processes may hold more documents, or fewer
    batches = [*batches[:count], *(loader.batch_at(i) for i in range(len(batches), count))]
    marks = [id_ for _, id_ in found.vocabulary.special]
    with jax.set_mesh(built.mesh):
        return language.held_out(built.model, weights(state), state.extra, batches, mesh=built.mesh, marks=marks)


def _hooks(built: Built, feed: feeds.Feed, writer, progress) -> tuple[loop.Hook, ...]:
    s = built.settings

    def evaluate_images(step, state):
        with progress.phase("evaluating") as detail:
            report = measure(built, state, lambda seen: detail(f"{seen:,} images"), feed.captions)
        if report.pictured:
            writer.image(step, report.picture_name, report.picture())
        return report.results

    def evaluate_rows(step, state):
        return measure_rows(built, state, feed.corpus)

    rows = isinstance(feed, feeds.RowFeed)
    if not s.train.eval_every or (rows and not s.sequences.eval_sources):
        return ()
    evaluate = evaluate_rows if rows else evaluate_images

    def scalars(step, state):
        return {f"eval/{k}": v for k, v in evaluate(step, state).items() if isinstance(v, int | float)}

    return (loop.Hook("evaluating", s.train.eval_every, scalars),)


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _opening(built: Built, data: str) -> str:
    s = built.settings
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(built.abstract.params))
    lines = [
        optimizers.table(built.abstract.params, built.declarations, built.shardings.params, s.optimizer),
        f"{s.name}: {count:,} parameters, {data}, "
        f"{s.train.steps:,} steps of {s.train.batch_size} on {built.mesh.size} x {jax.devices()[0].device_kind}",
        *(f"mesh: {f}" for f in built.fallbacks),
        *(built.model.image_loss.notes if built.model.image_loss else ()),
    ]
    return "\n".join(lines)


def timing(root) -> dict:
    """Seconds of training so far, compilation included, over all restarts that ended in good order."""
    path = root / "timing.json"
    return json.loads(path.read_text()) if path.exists() else {}
