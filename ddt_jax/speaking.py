"""A trained transformer that draws and describes: `Speaker`, and `ddt-jax evaluate` of its run.

Where images are codes, their image tokenizer goes along.
"""

import collections
import functools
import itertools
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from ddt_jax import config, experiment, settings
from ddt_jax.data import images
from ddt_jax.data.base import open_source
from ddt_jax.errors import UserError
from ddt_jax.evaluation import (
    asked,
    classifying,
    clip_score,
    compositional,
    drawn_fid,
    named_classes,
    pictures,
    plots,
    reconstruction,
    samples,
    suite,
)
from ddt_jax.interop import hf_clip
from ddt_jax.io import atomic
from ddt_jax.multimodal import documents
from ddt_jax.multimodal.answers import Answerer, filled_batches
from ddt_jax.multimodal.diffusion_answers import DiffusionAnswerer
from ddt_jax.multimodal.documents import Image
from ddt_jax.multimodal.records import images_of
from ddt_jax.tokenizers.acdit_classifier import ACDiTClassifier
from ddt_jax.tokenizers.text import open_text_tokenizer
from ddt_jax.training import corpus
from ddt_jax.training.progress import Progress

BATCH = 64  # prompts that are answered at once
AHEAD = 1024  # pictures that are held at once, for FID or to be described
_NO_IMAGE = 128  # grey, where an answer is no image


class Sight:
    """How pictures become what documents hold of them, and back: as pixels, as they are.

    Attributes:
      data: how pictures are prepared.
    """

    def __init__(self, data: settings.Data):
        self.data = data

    def encode(self, images_BHWC) -> np.ndarray:
        """uint8 [N, H, W, 3] → what documents hold of each."""
        return np.asarray(images_BHWC)

    def decode(self, held, seeds: Sequence[int]) -> np.ndarray:
        """What documents hold of images, or a model answers, → uint8 [N, H, W, 3]; noise is keyed by seeds."""
        del seeds
        return np.asarray(held)

    def are_images(self, answers) -> np.ndarray:
        """bool [N]: which answers are images."""
        return np.ones(len(answers), bool)

    def blank(self, n: int) -> np.ndarray:
        """uint8 [n, H, W, 3] that show nothing."""
        size = self.data.image_size
        return np.full((n, size, size, 3), _NO_IMAGE, np.uint8)

    def read(self, file: str) -> np.ndarray:
        """A picture from a file, cropped and resized as in training. Raises UserError if it is none."""
        return images.read_file(file, self.data)


class Eyes(Sight):
    """The image tokenizer of a run: pictures to codes in the order of its sequences, and back.

    Raises:
      UserError: none is named, or as `experiment.open_tokenizer`.
    """

    def __init__(self, s: settings.Experiment):
        workdir, image = s.sequences.tokenizer, s.model.image
        if not workdir:
            raise UserError(
                "config: sequences.tokenizer is empty; name the workdir of the image tokenizer: "
                "--config.sequences.tokenizer=DIR"
            )
        built, state = experiment.open_tokenizer(workdir, image)
        super().__init__(built.settings.data)
        self._mesh = built.mesh
        self._arrays = experiment.weights(state), state.extra
        self._model, self._run = built.model, reconstruction.programs(built.model)
        self._step = 1 if image.order == built.model.token_order else -1

    def encode(self, images_BHWC) -> np.ndarray:
        """uint8 [N, H, W, 3] → int32 [N, K]."""
        images_BHWC, found = np.asarray(images_BHWC), []
        with jax.set_mesh(self._mesh):
            for some in filled_batches(len(images_BHWC), BATCH):
                found.append(np.asarray(self._run.encode(*self._arrays, images_BHWC[some])))
        return np.concatenate(found)[: len(images_BHWC), :: self._step]

    def decode(self, codes, seeds: Sequence[int], batch: int = BATCH) -> np.ndarray:
        """int32 [N, K] → uint8 [N, H, W, 3]; an image's noise is keyed by its own seed."""
        codes, seeds, found = np.asarray(codes)[:, :: self._step], np.asarray(seeds, np.int32), []
        all_visible = np.int32(self._model.num_tokens)
        with jax.set_mesh(self._mesh):
            for some in filled_batches(len(codes), batch):
                drawn = self._run.decode(*self._arrays, codes[some], seeds[some], np.uint32(0), all_visible)
                found.append(np.asarray(drawn))
        return np.concatenate([*found, self.blank(0)])[: len(codes)]

    def are_images(self, answers):
        return (answers >= 0).all(axis=1)


class Drawn(NamedTuple):
    """Pictures that were asked for.

    Attributes:
      pictures: uint8 [N, H, W, 3], grey where the answer is no image.
      valid: bool [N], whether it is one; always with the constraint, see `settings.Evaluate.free_images`.
      answers: what documents hold of each picture: of a run on codes int32 [N, K].
    """

    pictures: np.ndarray
    valid: np.ndarray
    answers: np.ndarray

    def labels(self, texts: Sequence[str]) -> list[str]:
        """Texts for the pictures, which also say what is none."""
        return [text if valid else f"(no image) {text}" for text, valid in zip(texts, self.valid, strict=True)]


@dataclass
class Speaker:
    """A run that answers.

    Attributes:
      state: as it was restored; None once there is an answerer, whose weights have another form: both would be too much
        of a large model.
    """

    built: experiment.Built
    state: Any
    corpus: corpus.Corpus
    eyes: Sight

    @functools.cached_property
    def answerer(self) -> Answerer | DiffusionAnswerer:
        """What answers. It takes the state."""
        s, (state, self.state) = self.built.settings, (self.state, None)
        return (Answerer if s.model.image.kind == "codes" else DiffusionAnswerer)(
            self.built.model,
            experiment.weights(state),
            state.extra,
            self.corpus.vocabulary,
            self.corpus.form,
            context=s.sequences.context,
            batch=BATCH,
        )

    def draw(self, given: Sequence[documents.Document], seeds: Sequence[int], done=None) -> Drawn:
        """Pictures that answer documents; see `Answerer.images`."""
        e = self.built.settings.evaluate
        answers = self.answerer.images(given, e.text_to_image, seeds, done, free=e.free_images)
        valid = self.eyes.are_images(answers)
        drawn = self.eyes.blank(len(answers))
        drawn[valid] = self.eyes.decode(answers[valid], np.asarray(seeds)[valid])
        return Drawn(drawn, valid, answers)

    def say(self, given: Sequence[documents.Document], seeds: Sequence[int], done=None) -> list[str]:
        """Texts that answer documents; see `Answerer.texts`."""
        e = self.built.settings.evaluate
        return self.answerer.texts(given, e.image_to_text, seeds, self.corpus.text.decode, done)

    def tell(
        self, given: Sequence[documents.Document], seeds: Sequence[int], done=None, *, force_image: bool = False
    ) -> list[list[str | np.ndarray]]:
        """Texts and pictures uint8 [H, W, 3] in turns that answer documents; see `both` of the answerer."""
        e = self.built.settings.evaluate
        s = replace(e.image_to_text, guidance=e.text_to_image.guidance)
        told = self.answerer.both(given, s, seeds, self.corpus.text.decode, done, force_image=force_image)
        held = [(row, i) for row, parts in enumerate(told) for i, part in enumerate(parts) if not isinstance(part, str)]
        if held:
            seen = self.eyes.decode(np.stack([told[row][i] for row, i in held]), [seeds[row] for row, _ in held])
            for (row, i), picture in zip(held, seen, strict=True):
                told[row][i] = picture
        return told

    def encode_text(self, text: str) -> np.ndarray:
        return self.corpus.text.encode(text)


def open_speaker(workdir: str, overrides: tuple[tuple[str, str], ...] = ()) -> Speaker:
    """The newest checkpoint of a multimodal run, with the image tokenizer of its codes.

    Raises:
      UserError: as `experiment.restore` and `Eyes`, or it is a run of another kind.
    """
    s = experiment.saved_settings(workdir, overrides)
    if not isinstance(s.model, settings.Multimodal):
        raise UserError(f"workdir: {workdir} is a run of kind {s.model.kind}; name one of kind multimodal")
    found = corpus.load(workdir, s)
    eyes = Eyes(s) if s.model.image.kind == "codes" else Sight(s.data)
    return Speaker(*experiment.restore(workdir, overrides), found, eyes)


def evaluate(workdir: str, overrides: tuple[tuple[str, str], ...] = ()) -> dict:
    """Evaluates the newest checkpoint of a multimodal run on sequences.eval_sources.

    Writes results.json, results.md and pictures to the workdir. What its image tokenizer's own evaluation found goes
    along, as "image_tokenizer".

    Returns:
      "results", "table" (Markdown) and "written".

    Raises:
      UserError: as `open_speaker` and `DrawnFID`, or there is nothing held out.
    """
    begun = time.perf_counter()
    if jax.process_count() > 1:
        raise UserError(
            "evaluate: a transformer is evaluated by one process, on one device; start one, without --coordinator"
        )
    speaker = open_speaker(workdir, overrides)
    s, root = speaker.built.settings, epath.Path(workdir)
    if not s.sequences.eval_sources:
        raise UserError("config: sequences.eval_sources is empty; name held-out ones, of the kind of sequences.sources")
    e, seed = s.evaluate, s.evaluate.seed
    chosen, edits = asked.captioned(s, e.prompts), asked.edits(s, e.prompts, speaker.encode_text)
    if not chosen and not edits and asked.has_pictures(s):
        raise UserError("evaluate: no record of sequences.eval_sources has a caption; name one of which some have")
    captions = [r["caption"] for r in chosen]
    told, orders = [e.caption for e in edits], [e.instruction for e in edits]
    verifier = _verifier(s, speaker.eyes) if chosen or edits else None
    if verifier:  # both raise for what they cannot judge, before anything is drawn
        verifier.captions(captions, captions)
        wanted = compositional.edited(told, orders) if e.verifier else ()
    real: list[np.ndarray] = []
    if isinstance(verifier, named_classes.NamedClasses):
        real = [picture for _, picture in asked.with_pictures(s, speaker.eyes.data, len(chosen))]
    fid = None
    if e.inception_file and e.fid_images and chosen:
        fid = drawn_fid.DrawnFID(*suite.read_inception(e), s, speaker.eyes.data, speaker.built.mesh)
    clip = _clip(s, speaker.built.mesh) if e.clip_folder and chosen else None
    further = fid.captions[len(chosen) :] if fid else []
    seeds, edit_seeds = ([seed + n for n in range(len(x))] for x in (chosen, edits))
    results: dict[str, Any] = {"step": int(speaker.state.step)}
    results |= experiment.measure_rows(speaker.built, speaker.state, speaker.corpus)
    asked_first = 2 * len(chosen) + len(edits)
    total = asked_first + len(further)
    with jax.set_mesh(speaker.built.mesh), Progress(total, stream=sys.stderr, unit="answer") as progress:
        given = [documents.text_to_image(speaker.encode_text(text), Image()) for text in captions]
        drawn = speaker.draw(given, seeds, progress.update)
        given = [documents.image_to_text([], Image(images_of(r)[0])) for r in chosen]
        said = speaker.say(given, seeds, lambda n: progress.update(len(chosen) + n))
        given = [edit.document for edit in edits]
        changed = speaker.draw(given, edit_seeds, lambda n: progress.update(2 * len(chosen) + n))
        more = _drawn_on(speaker, further, seed + len(chosen), lambda n: progress.update(asked_first + n))
        judged: dict[str, Any] = {}
        all_drawn = itertools.chain(drawn.pictures, more)
        if clip:
            all_drawn = clip.watch(all_drawn, [*captions, *further])
        if fid:
            judged |= fid.results(itertools.islice(all_drawn, len(fid.captions)))
        if clip:
            collections.deque(all_drawn, maxlen=0)
            judged |= clip.results()
    tables = [_language_table(results)]
    results |= {"prompts": len(chosen)} | ({"edits": len(edits)} if edits else {}) | judged
    results["drawn_with"] = drawn_with(s)
    if fid:
        tables.append(f"FID of {judged['t2i_fid_images']:,} pictures drawn from captions: {judged['t2i_fid']:.3f}\n")
    if clip:
        tables.append(f"CLIP score of {judged['t2i_clip_images']:,} drawn pictures: {judged['t2i_clip_score']:.2f}\n")
    found: compositional.Figures = {}
    if e.free_images and (chosen or edits):
        found |= compositional.valid("t2i", drawn.valid) | compositional.valid("edit", changed.valid)
    marks: dict[str, list[bool]] = {}
    if verifier:
        found |= verifier.pictures(drawn.pictures, captions, drawn.valid) | verifier.captions(said, captions)
        marks["t2i"] = verifier.right_pictures(drawn.pictures, captions, drawn.valid)
        marks["caption"] = verifier.right_captions(said, captions)
        # Of each prompt: by which two runs can be compared that were asked the same.
        results["marks"] = {name: "".join("01"[right] for right in of) for name, of in marks.items()}
    if isinstance(verifier, named_classes.NamedClasses):
        found |= verifier.real(real, captions)
    elif verifier:
        found |= compositional.editing(changed.pictures, told, wanted, changed.valid)
    results |= compositional.flat(found)
    if found:
        tables.append(compositional.table(results))
    theirs = epath.Path(s.sequences.tokenizer) / "results.json"
    if s.sequences.tokenizer and theirs.exists():
        results["image_tokenizer"] = json.loads(theirs.read_text())
    results |= {**experiment.timing(root), "evaluate_seconds": round(time.perf_counter() - begun, 2)}
    table, grids, singly = "\n".join(tables), {}, {}
    if count := min(4 * e.pictures, len(chosen)):
        shown = speaker.eyes.decode([images_of(r)[0] for r in chosen[:count]], seeds[:count])
        grids["text_to_image"] = pictures.grid(drawn.pictures[:count], drawn.labels(captions)[:count])
        grids["image_to_text"] = pictures.grid(shown, said[:count])
        right = {name: of[:count] for name, of in marks.items()}
        singly["text_to_image"] = samples.of(drawn.pictures[:count], captions[:count], right.get("t2i"))
        singly["image_to_text"] = samples.of(shown, said[:count], right.get("caption"))
    if count := min(4 * e.pictures, len(edits)):
        before, after = (
            speaker.eyes.decode(side[:count], edit_seeds[:count])
            for side in ([edit.source for edit in edits], [edit.target for edit in edits])
        )
        tiles = pictures.side_by_side(before, changed.pictures[:count], after)
        grids["editing"] = pictures.grid(tiles, changed.labels(orders)[:count])
    written = [
        atomic.write_text(root / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n"),
        atomic.write_text(root / "results.md", table),
        *(pictures.save_png(grid, root / f"{name}.png") for name, grid in grids.items()),
        *([samples.write(root / samples.FILE, singly)] if singly else []),
    ]
    written += plots.loss_curve(root / "metrics.jsonl", root / "loss.png")
    return {"results": results, "table": table, "written": [str(p) for p in written]}


def _verifier(s: settings.Experiment, eyes: Sight) -> Any:
    """What judges pictures and captions: `compositional`, a `NamedClasses`, or None. Raises UserError for a classifier
    that cannot.
    """
    folder = s.evaluate.classifier
    if not folder:
        return compositional if s.evaluate.verifier else None
    built, state = experiment.restore(folder)
    data, size = built.settings.data, eyes.data.image_size
    if not isinstance(built.model, ACDiTClassifier) or built.model.frames:
        raise UserError(f"config: evaluate.classifier={folder} is no run of kind acdit_classifier on images")
    if data.image_size != size:
        raise UserError(
            f"config: evaluate.classifier={folder} reads {data.image_size} px, pictures here have {size}; name another"
        )
    names = open_source(data.source, image_size=size, cache_dir=data.cache_dir).label_names
    if not names:
        raise UserError(f"config: evaluate.classifier={folder} has learned from {data.source}, which names no classes")
    weights, run = (experiment.weights(state), state.extra), classifying.program(built.model)

    def classify(pictures):
        found, blank = [], eyes.blank(BATCH)
        for at in range(0, len(pictures), BATCH):
            some = pictures[at : at + BATCH]
            batch = {"image": np.concatenate([some, blank[len(some) :]]), "slot": np.arange(BATCH)}
            found.append(np.asarray(run(*weights, batch, np.uint32(0)).argmax(-1))[: len(some)])
        return np.concatenate(found)

    return named_classes.NamedClasses(names, classify)


def _clip(s: settings.Experiment, mesh) -> clip_score.ClipScore:
    folder = s.evaluate.clip_folder
    sizes = hf_clip.read_sizes(folder)
    params, tokenizer = hf_clip.read(folder, sizes), open_text_tokenizer(folder)
    return clip_score.ClipScore(sizes, params, tokenizer, s.evaluate.batch_size, mesh)


def _drawn_on(speaker: Speaker, texts: Sequence[str], seed: int, done) -> Iterator[np.ndarray]:
    """Pictures of texts, some at a time, drawn when they are asked for.

    Args:
      seed: of the first; the others' are those after it.
      done: told how many are drawn.
    """
    for at in range(0, len(texts), AHEAD):
        given = [documents.text_to_image(speaker.encode_text(text), Image()) for text in texts[at : at + AHEAD]]
        seeds = [seed + at + n for n in range(len(given))]
        yield from speaker.draw(given, seeds, lambda n, at=at: done(at + n)).pictures


def drawn_with(s: settings.Experiment) -> dict[str, Any]:
    """The settings by which answers are drawn, as they stand in results.json: a run can be evaluated with others than
    those that it was trained with.
    """
    image, e = s.model.image, s.evaluate
    text_to_image = config.dump(e.text_to_image)
    if image.kind == "diffusion":  # of which nothing but guidance counts
        names = ("solver", "solver_steps", "clip")
        text_to_image = {"guidance": e.text_to_image.guidance} | {n: getattr(image.diffusion, n) for n in names}
    return {
        "text_to_image": text_to_image,
        "image_to_text": config.dump(e.image_to_text),
        "free_images": e.free_images,
        "seed": e.seed,
    }


def _language_table(results) -> str:
    lines = ["| held-out documents | |", "|---|---:|"]
    for name, value in results.items():
        if isinstance(value, float):
            lines.append(f"| {name.replace('_', ' ')} | {value:.3f} |")
    return "\n".join(lines) + "\n"
