"""What runs of the multimodal transformer cost and saw: rows of a comparison from finished workdirs, and how many steps
a planned run may take. docs/comparison.md has the protocol, `evaluation/comparison.py` keeps it.

Operations are those of matrix products and convolutions of the traced step (`scaling/flops.py`), times the steps; the
transformer's attention counts with every pair of a row and a key, whichever kernel computes it.
What a run's input cost is counted as well: the training of its image tokenizer, encoding every image once, the training
of what it begins with and of a codec beneath it. Held-out data, evaluation, and other learning rates tried are not.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from ddt_jax import config, experiment, settings
from ddt_jax.errors import UserError
from ddt_jax.evaluation.comparison import Row
from ddt_jax.multimodal.batches import RowLoader
from ddt_jax.multimodal.vocabulary import SPECIAL
from ddt_jax.scaling import flops, model_flops, outcome
from ddt_jax.scaling.points import Point
from ddt_jax.tokenizers.base import ImageTokenizer
from ddt_jax.tokenizers.text import open_text_tokenizer
from ddt_jax.training import checkpoint, corpus

SAMPLING = "sampling"  # folder of a workdir with one `evaluate --json` for each choice of sampling settings
_ROWS = 4096  # whose contents are counted; further rows of a run are taken to be like them
# Settings of the transformer that decide how it is computed, or that images decide.
_FREE = ("vocab_size", "scan_layers", "remat", "attention", "loss_chunk")


@dataclass(frozen=True)
class Planned:
    """A run that has not begun.

    Attributes:
      settings: with the sizes that its data will have.
      step: operations of a step.
      before: name → operations of what has to be there before it begins.
      uncounted: as in `comparison.Row`.
    """

    settings: settings.Experiment
    step: float
    before: dict[str, float]
    uncounted: tuple[str, ...] = ()

    def total(self, steps: int) -> float:
        return sum(self.before.values()) + steps * self.step

    def steps_within(self, total: float) -> int:
        """How many steps come nearest to a total. Raises UserError if there is no room for one."""
        steps = round((total - sum(self.before.values())) / self.step)
        if steps < 1:
            raise UserError(
                f"compare: what {self.settings.name} reads costs {sum(self.before.values()):.3e} FLOPs, and "
                f"{total:.3e} are allowed in all; raise `total`, or take a cheaper tokenizer"
            )
        return steps


def rows(arm: str, workdir: str, codecs: Mapping[str, str] | None = None) -> list[Row]:
    """A finished run of an arm, once for each choice of sampling settings that it was evaluated with.

    Those are the files of WORKDIR/sampling; without that folder, WORKDIR/results.json. Figures of its image tokenizer
    go along, as tokenizer_NAME.

    Args:
      codecs: file of frozen weights → workdir of the run of kind "vae" that made it.

    Raises:
      UserError: there is no multimodal run, it was not evaluated, or its data are not there.
    """
    s = experiment.saved_settings(workdir)
    if not isinstance(s.model, settings.Multimodal):
        raise UserError(f"compare: {workdir} is a run of kind {s.model.kind}; name workdirs of transformers")
    evaluated = evaluations(workdir)
    found = corpus.load(workdir, s)
    loader = corpus.open_rows(s, found, s.sequences.sources)
    step = evaluated[0]["step"]
    before, uncounted = _before(s, codecs or {})
    cost = {"training": step * step_flops(s), **before}
    shared = {
        "arm": arm,
        "run": str(workdir),
        "seed": s.seed,
        "lr": s.optimizer.lr,
        "steps": s.train.steps,
        "flops": cost,
        "seen": _seen(loader, step * s.train.batch_size) | _seen_by_tokenizer(s),
        "uncounted": tuple(uncounted),
    }
    alike = _alike(s, found, loader)
    theirs = {f"tokenizer_{name}": value for name, value in _of_tokenizer(s).items()}
    return [
        Row(
            **shared,
            step=results["step"],
            alike=alike | {"evaluate.prompts": results["prompts"]},
            sampling=results["drawn_with"],
            results={k: v for k, v in results.items() if isinstance(v, int | float) or k == "marks"} | theirs,
        )
        for results in evaluated
    ]


def plan(
    s: settings.Experiment,
    tokenizer: settings.Experiment | None = None,
    records: int = 0,
    earlier: Sequence[settings.Experiment] = (),
) -> Planned:
    """What a run will cost whose codes need not be there yet.

    Args:
      s: of the transformer.
      tokenizer: settings of its image tokenizer's run; None: images are not codes.
      records: images that are made into codes.
      earlier: settings of the tokenizer's stages before that run.

    Raises:
      UserError: `s` is of no transformer, or reads codes and there is no tokenizer.
    """
    if not isinstance(s.model, settings.Multimodal):
        raise UserError(f"compare: {s.name} is of kind {s.model.kind}; name configs of transformers")
    before, uncounted = {}, []
    if s.model.image.kind == "codes":
        if tokenizer is None or isinstance(tokenizer.model, settings.Multimodal):
            raise UserError(f"compare: {s.name} reads codes; name the tokenizer of that arm, which makes them")
        before = {"tokenizer": sum(stage.train.steps * step_flops(stage) for stage in (*earlier, tokenizer))}
        before["encoding"] = records * encode_flops(tokenizer)
        uncounted += _beneath_of(tokenizer, {}, before, "tokenizer")
    uncounted += _beneath_of(s, {}, before, "")
    s = _with_sizes(s, tokenizer)
    return Planned(s, step_flops(s), before, tuple(uncounted))


def sized(s: settings.Experiment) -> settings.Experiment:
    """Settings with the sizes that text and codes decide, before there are any data; the tokenizer's run must be there.

    Raises:
      UserError: it reads codes, and sequences.tokenizer holds no run.
    """
    if not isinstance(s.model, settings.Multimodal):
        return s
    tokenizer = experiment.saved_settings(s.sequences.tokenizer) if s.model.image.kind == "codes" else None
    return _with_sizes(s, tokenizer)


def point(family: str, workdir: str) -> Point:
    """A run as a point of a scaling study: its own training alone, whatever its input cost.

    What it learned from is text tokens and positions of images, or images where it is no transformer.

    Raises:
      UserError: there is no run, or its data are not there.
    """
    s = experiment.saved_settings(workdir)
    found = outcome.read(workdir, s)
    if isinstance(s.model, settings.Multimodal):
        loader = corpus.open_rows(s, corpus.load(workdir, s), s.sequences.sources)
        seen = _seen(loader, found.step * s.train.batch_size)
        tokens = seen["text tokens"] + seen["image positions"]
    else:
        tokens = float(found.step * s.train.batch_size)
    cost = found.step * step_flops(s)
    name = str(workdir).rstrip("/")
    size = getattr(s.model, "transformer", s.model)
    more = {"lr": s.optimizer.lr, "width": getattr(size, "width", None)}
    return Point(family, name, parameters(s), tokens, cost, found.metrics, found.status, found.why, **more)


def step_flops(s: settings.Experiment) -> float:
    """Operations of one train step over the global batch. Sizes that data decide must be filled in."""
    return _step(_bare(s))[0]


def parameters(s: settings.Experiment) -> float:
    """How many a model has, embeddings included. Sizes that data decide must be filled in."""
    return _step(_bare(s))[1]


def _bare(s):
    """The settings less what decides neither the step nor the parameters, as they are counted."""
    # Of the sources, what decides the step: whether it has to make latents itself.
    sources = (settings.Pictures(source="latents:"),) if s.sequences.latents else ()
    bare = replace(s.sequences, sources=sources, eval_sources=(), tokenizer="")
    rate = replace(s.optimizer, lr=1.0)
    long = replace(s.train, steps=1_000_000)
    s = replace(s, name="", seed=0, init_from="", mesh=settings.Mesh(), sequences=bare, optimizer=rate, train=long)
    return model_flops.every_pair(s)


@functools.lru_cache(maxsize=64)
def _step(s) -> tuple[float, float]:
    """(operations of a step, parameters)."""
    built = experiment.build(s, jax.devices()[:1], to_train=False)
    with jax.set_mesh(built.mesh):
        operations = flops.count(built.step, built.abstract, experiment.abstract_batch(built))
    return operations, float(sum(leaf.size for leaf in jax.tree.leaves(built.abstract.params)))


@functools.lru_cache(maxsize=64)
def encode_flops(s: settings.Experiment) -> float:
    """Operations of encoding one image. Raises UserError if the settings are of no tokenizer."""
    built = experiment.build(replace(s, mesh=settings.Mesh()), jax.devices()[:1], to_train=False)
    if not isinstance(built.model, ImageTokenizer):
        raise UserError(f"compare: {s.name} is of kind {s.model.kind}, which makes no codes")
    image = jax.ShapeDtypeStruct((1, s.data.image_size, s.data.image_size, 3), jnp.float32)
    with jax.set_mesh(built.mesh):
        return flops.count(built.model.encode, built.abstract.params, built.abstract.extra, image)


def _before(s, codecs) -> tuple[dict[str, float], list[str]]:
    """(name → operations of what a finished run reads and begins with; what of it is not counted)."""
    cost: dict[str, float] = {}
    uncounted = _beneath_of(s, codecs, cost, "")
    if s.model.image.kind == "codes":
        workdir = s.sequences.tokenizer
        cost["tokenizer"], more = _training(workdir, codecs)
        uncounted += more
        if cost["tokenizer"]:
            images = sum(_images(corpus.open_records(s, part)) for part in s.sequences.sources if part.kind == "codes")
            cost["encoding"] = images * encode_flops(experiment.saved_settings(workdir))
    return cost, uncounted


def _training(workdir: str, codecs) -> tuple[float, list[str]]:
    """(operations of a finished run and of what it began with, what is not counted)."""
    if not workdir or not (epath.Path(workdir) / "config.json").exists():
        return 0.0, [f"the training of {workdir or 'its tokenizer'} is not counted: there is no run in that place"]
    steps = max(checkpoint.saved_steps(workdir), default=0)
    if not steps:
        return 0.0, [f"the training of {workdir} is not counted: it has no checkpoint of a training"]
    s = experiment.saved_settings(workdir)
    cost = {"": steps * step_flops(s)}
    uncounted = _beneath_of(s, codecs, cost, "")
    return sum(cost.values()), uncounted


def _beneath_of(s, codecs, cost: dict[str, float], name: str) -> list[str]:
    """Adds to `cost`, under `name` or its own, what a run begins with and the codec beneath it; says what it cannot."""
    uncounted = []
    for own, workdir in _beneath(s, codecs):
        operations, more = _training(workdir, codecs)
        if operations:
            cost[name or own] = cost.get(name or own, 0.0) + operations
        uncounted += more
    of_rows = isinstance(s.model, settings.Multimodal)
    for source in [part.source for part in s.sequences.latents] if of_rows else [s.data.source]:
        if source.startswith("latents:"):
            uncounted.append(f"{s.name} learned from {source}: making these latents is not counted")
    return uncounted


def _beneath(s, codecs) -> Iterator[tuple[str, str]]:
    if s.init_from:
        yield "begins with", s.init_from
    codec = getattr(getattr(s.model, "image", s.model), "codec", settings.IdentityCodec())
    if codec.kind == "vae" and codec.weights:
        yield "codec", codecs.get(codec.weights, codec.weights)


def _images(records) -> int:
    """How many images records hold; each has as many as the first."""
    return len(records) * len(records[0]["codes"])


def evaluations(workdir: str) -> list[dict[str, Any]]:
    """What `evaluate` has found of a run, once for each choice of sampling settings. Raises UserError as `rows`."""
    root = epath.Path(workdir)
    paths = sorted((root / SAMPLING).glob("*.json")) if (root / SAMPLING).exists() else []
    paths = paths or [root / "results.json"]
    found = []
    for path in paths:
        if not path.exists():
            raise UserError(f"compare: {workdir} has no results.json; run `ddt-jax evaluate --workdir {workdir}`")
        try:
            found.append(json.loads(path.read_text()))
        except ValueError as error:
            raise UserError(f"compare: {path} is no JSON ({error}); evaluate that run again") from error
        if not {"step", "prompts", "drawn_with"} <= found[-1].keys():
            raise UserError(
                f"compare: {path} does not say how its answers were drawn, as results of earlier versions; evaluate "
                "that run again"
            )
    return found


def _seen(loader: RowLoader, count: int) -> dict[str, float]:
    """What `count` rows hold, from the first _ROWS of them: exact where there are no more."""
    some = min(count, _ROWS)
    planned = np.sum([loader.batcher.contents(row) for row in range(some)], axis=0) * (count / max(some, 1))
    _, text, images = planned.tolist()
    return {"images": images, "text tokens": text, "image positions": images * loader.batcher.form.rows}


def _seen_by_tokenizer(s) -> dict[str, float]:
    steps = max(checkpoint.saved_steps(s.sequences.tokenizer), default=0) if s.sequences.tokenizer else 0
    if s.model.image.kind != "codes" or not steps:
        return {}
    return {"images by the tokenizer": float(steps * experiment.saved_settings(s.sequences.tokenizer).train.batch_size)}


def _of_tokenizer(s) -> dict[str, float]:
    """The figures of its image tokenizer, {} where that was not evaluated: the pictures that no run can better."""
    place = s.sequences.tokenizer
    return outcome.results(place, max(checkpoint.saved_steps(place), default=0)) if place else {}


def _alike(s: settings.Experiment, found: corpus.Corpus, loader: RowLoader) -> dict[str, Any]:
    """What has to be the same in all arms, by name; seeds are looked at by themselves."""

    def described(part):
        records = corpus.open_records(s, part)
        split = ["split"] if getattr(part, "split", False) else []
        return [records.origin, len(records), part.weight, config.dump(getattr(part, "formats", None)), *split]

    q = s.sequences
    transformer, optimizer = config.dump(s.model.transformer), config.dump(s.optimizer)
    alike = {f"model.transformer.{name}": value for name, value in transformer.items() if name not in _FREE}
    # Parts are named where there are any: rows that were made before there were some stay alike.
    free = {"lr", "offload"} | ({"parts"} if not optimizer["parts"] else set())
    alike |= {f"optimizer.{name}": value for name, value in optimizer.items() if name not in free}
    return alike | {
        "model.whole_prompts": s.model.whole_prompts,
        "sequences.sources": [described(part) for part in q.sources],
        "sequences.eval_sources": [described(part) for part in q.eval_sources],
        "text tokenizer": found.text.fingerprint,
        "documents packed together": list(loader.batcher.blocks),
        "train.batch_size": s.train.batch_size,
        "train.ema": s.train.ema,
        "evaluate.images": s.evaluate.images,
    }


def _with_sizes(s: settings.Experiment, tokenizer: settings.Experiment | None) -> settings.Experiment:
    """The settings with the sizes that text and codes will decide: a text tokenizer that is made has as many ids as it
    may have.
    """
    q, image, codebook = s.sequences, s.model.image, 0
    if image.kind == "codes" and tokenizer:
        model = experiment.make_model(tokenizer)
        codebook, width = model.codebook_size, tokenizer.model.quantizer.code_dim if image.code_vectors else 0
        image = replace(image, num_tokens=model.num_tokens, codebook_size=codebook, code_width=width)
    text = open_text_tokenizer(q.text).vocab_size if q.text else q.text_vocab_size
    size = -(-(text + len(SPECIAL) + codebook) // q.vocab_multiple) * q.vocab_multiple
    transformer = replace(s.model.transformer, vocab_size=s.model.transformer.vocab_size or size)
    return replace(s, model=replace(s.model, transformer=transformer, image=image))
