"""A trained transformer with the image tokenizer that draws for it: `ddt-jax generate`, and `evaluate` of its run."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from etils import epath

from ddt_jax import experiment, settings
from ddt_jax.data import images as image_files
from ddt_jax.data.base import BadRecord
from ddt_jax.data.codes import CodesSource
from ddt_jax.errors import UserError
from ddt_jax.evaluation import compositional, pictures, plots, prompts, reconstruction
from ddt_jax.io import atomic
from ddt_jax.multimodal import documents
from ddt_jax.multimodal.answers import Answerer
from ddt_jax.multimodal.documents import Image
from ddt_jax.tokenizers.base import ImageTokenizer
from ddt_jax.training import corpus
from ddt_jax.training.fingerprint import fingerprint
from ddt_jax.training.progress import Progress

_BATCH = 64  # prompts that are answered at once


class Eyes:
    """The image tokenizer of a run: pictures to codes in the order of its sequences, and back.

    Raises:
      UserError: none is named, or it is not the one that made the run's codes.
    """

    def __init__(self, s: settings.Experiment, devices=None):
        workdir, image = s.sequences.tokenizer, s.model.image
        if not workdir:
            raise UserError(
                "config: sequences.tokenizer is empty; name the workdir of the image tokenizer: "
                "--config.sequences.tokenizer=DIR"
            )
        built, state = experiment.restore(workdir, devices=devices)
        self.data, self._mesh = built.settings.data, built.mesh
        if not isinstance(built.model, ImageTokenizer):
            raise UserError(f"config: sequences.tokenizer={workdir} is a run of kind {built.settings.model.kind}")
        self._arrays = experiment.weights(state), state.extra
        order = built.model.token_order
        other = {"coarse_to_fine": "fine_to_coarse", "fine_to_coarse": "coarse_to_fine"}
        order = other.get(order, order) if image.reversed else order
        found = fingerprint(built.settings, built.model, *self._arrays, order)
        if found != image.tokenizer:
            raise UserError(
                f"config: sequences.tokenizer={workdir} is tokenizer {found[:8]}…, the run's codes were made by "
                f"{image.tokenizer[:8]}…; name the workdir of that one"
            )
        self._model, self._run = built.model, reconstruction.programs(built.model)
        self._step = -1 if image.reversed else 1

    def encode(self, images) -> np.ndarray:
        """uint8 [N, H, W, 3] → int32 [N, K]."""
        with jax.set_mesh(self._mesh):
            return np.asarray(self._run.encode(*self._arrays, np.asarray(images)))[:, :: self._step]

    def decode(self, codes, seed: int, batch: int = _BATCH) -> np.ndarray:
        """int32 [N, K] → uint8 [N, H, W, 3]; the noise of image n is keyed by (seed, n)."""
        codes, found = np.asarray(codes)[:, :: self._step], []
        all_visible = np.int32(self._model.num_tokens)
        with jax.set_mesh(self._mesh):
            for at in range(0, len(codes), batch):
                some = codes[at : at + batch]
                filled = np.concatenate([some, np.repeat(some[:1], batch - len(some), axis=0)])
                index = np.arange(at, at + batch, dtype=np.int32)
                drawn = self._run.decode(*self._arrays, filled, index, np.uint32(seed), all_visible)
                found.append(np.asarray(drawn)[: len(some)])
        size = self.data.image_size
        return np.concatenate([*found, np.zeros((0, size, size, 3), np.uint8)])

    def read(self, file: str) -> np.ndarray:
        """A picture from a file, cropped and resized as in training. Raises UserError if it is none."""
        path = epath.Path(file)
        if not path.is_file():
            raise UserError(f"generate: {file} does not exist")
        try:
            return image_files.prepare(path.read_bytes(), replace(self.data, flip=False))
        except BadRecord as error:
            raise UserError(f"generate: {file} cannot be read: {error}") from error


@dataclass(frozen=True)
class Speaker:
    """A run that answers."""

    built: experiment.Built
    state: Any
    corpus: corpus.Corpus
    eyes: Eyes
    answerer: Answerer

    def draw(self, given: Sequence[documents.Document], seeds: Sequence[int], done=None) -> np.ndarray:
        """Pictures uint8 [N, H, W, 3] that answer documents; see `Answerer.images`."""
        e = self.built.settings.evaluate
        return self.eyes.decode(self.answerer.images(given, e.text_to_image, seeds, done), e.seed)

    def say(self, given: Sequence[documents.Document], seeds: Sequence[int], done=None) -> list[str]:
        """Texts that answer documents; see `Answerer.texts`."""
        e = self.built.settings.evaluate
        return self.answerer.texts(given, e.image_to_text, seeds, self.corpus.text.decode, done)

    def encode_text(self, text: str) -> np.ndarray:
        return self.corpus.text.encode(text)


def open_speaker(workdir: str, overrides: tuple[tuple[str, str], ...] = ()) -> Speaker:
    """The newest checkpoint of a multimodal run, with its tokenizer.

    Raises:
      UserError: as `experiment.restore` and `Eyes`, or it is a run of another kind.
    """
    s = experiment.saved_settings(workdir, overrides)
    if not isinstance(s.model, settings.Multimodal):
        raise UserError(f"workdir: {workdir} is a run of kind {s.model.kind}; name one of kind multimodal")
    found = corpus.load(workdir, s)
    eyes = Eyes(s)
    built, state = experiment.restore(workdir, overrides)
    answerer = Answerer(
        built.model,
        experiment.weights(state),
        state.extra,
        found.vocabulary,
        found.form,
        context=s.sequences.context,
        batch=_BATCH,
    )
    return Speaker(built, state, found, eyes, answerer)


def generate(
    workdir: str,
    *,
    prompt: Sequence[str] = (),
    prompts_file: str = "",
    caption: Sequence[str] = (),
    edit: Sequence[tuple[str, str]] = (),
    samples: int = 1,
    out: str = "",
    overrides: tuple[tuple[str, str], ...] = (),
) -> dict:
    """Draws prompts, describes pictures, changes pictures.

    Args:
      prompt: texts to draw. prompts_file: a file of them, see `evaluation.prompts`.
      caption: files of pictures to describe.
      edit: (file of a picture, what to do with it).
      samples: pictures of each prompt and edit; they differ in their seeds, evaluate.seed and those after it.
      out: PNG; "" = WORKDIR/generated.png.

    Returns:
      "drawn": prompts in the order of the picture, "captions": file → text, "written".

    Raises:
      UserError: there is nothing to do, or a file or text cannot be used.
    """
    texts = [*prompt, *(p.text for p in (prompts.open_prompts(prompts_file) if prompts_file else ()))]
    if not (texts or caption or edit):
        raise UserError("generate: there is nothing to do; give --prompt TEXT, --prompts FILE, --caption IMG or --edit")
    if samples < 1:
        raise UserError(f"generate: --samples {samples} must be at least 1")
    speaker = open_speaker(workdir, overrides)
    seed = speaker.built.settings.evaluate.seed
    encode, eyes = speaker.encode_text, speaker.eyes
    given = [documents.text_to_image(encode(text), Image()) for text in texts]
    labels = list(texts)
    for file, instruction in edit:
        (codes,) = eyes.encode(eyes.read(file)[None])
        given.append(documents.editing([Image(codes)], encode(instruction), Image()))
        labels.append(f"{file}: {instruction}")
    given = [document for document in given for _ in range(samples)]
    labels = [label for label in labels for _ in range(samples)]
    result: dict[str, Any] = {"drawn": labels, "captions": {}, "written": ""}
    with jax.set_mesh(speaker.built.mesh):
        if caption:
            codes = eyes.encode(np.stack([eyes.read(file) for file in caption]))
            asked = [documents.image_to_text([], Image(c)) for c in codes]
            said = speaker.say(asked, [seed + n for n in range(len(asked))])
            result["captions"] = dict(zip(caption, said, strict=True))
        if given:
            drawn = speaker.draw(given, [seed + n for n in range(len(given))])
            path = out or str(epath.Path(workdir) / "generated.png")
            result["written"] = str(pictures.save_png(pictures.grid(drawn, labels), path))
    return result


def evaluate(workdir: str, overrides: tuple[tuple[str, str], ...] = ()) -> dict:
    """Evaluates the newest checkpoint of a multimodal run on sequences.eval_sources.

    Writes results.json, results.md and pictures to the workdir. What its image tokenizer's own evaluation found goes
    along, as "image_tokenizer".

    Returns:
      "results", "table" (Markdown) and "written".

    Raises:
      UserError: as `open_speaker`, or there is nothing held out.
    """
    begun = time.perf_counter()
    if jax.process_count() > 1:
        raise UserError("evaluate: a transformer is evaluated by one process; leave out --num-processes")
    speaker = open_speaker(workdir, overrides)
    s, root = speaker.built.settings, epath.Path(workdir)
    if not s.sequences.eval_sources:
        raise UserError("config: sequences.eval_sources is empty; name a folder of held-out codes")
    results: dict[str, Any] = {"step": int(speaker.state.step)}
    results |= experiment.measure_rows(speaker.built, speaker.state, speaker.corpus)
    records = CodesSource(s.sequences.eval_sources[0].folder, cache_dir=s.data.cache_dir)
    chosen = [r for r in (records[i] for i in range(len(records))) if r.get("caption")][: s.evaluate.prompts]
    captions, codes = [r["caption"] for r in chosen], np.stack([r["codes"][0] for r in chosen])
    seeds = [s.evaluate.seed + n for n in range(len(chosen))]
    with jax.set_mesh(speaker.built.mesh), Progress(2 * len(chosen), stream=sys.stderr, unit="answer") as progress:
        asked = [documents.text_to_image(speaker.encode_text(text), Image()) for text in captions]
        drawn = speaker.draw(asked, seeds, progress.update)
        asked = [documents.image_to_text([], Image(c)) for c in codes]
        said = speaker.say(asked, seeds, lambda n: progress.update(len(chosen) + n))
    results["prompts"] = len(chosen)
    tables = [_language_table(results)]
    if s.evaluate.verifier:
        found = compositional.pictures(drawn, captions) | compositional.captions(said, captions)
        results |= compositional.flat(found)
        tables.append(compositional.table(results))
    theirs = epath.Path(s.sequences.tokenizer) / "results.json"
    if theirs.exists():
        results["image_tokenizer"] = json.loads(theirs.read_text())
    results |= {**experiment.timing(root), "evaluate_seconds": round(time.perf_counter() - begun, 2)}
    count = min(4 * s.evaluate.pictures, len(chosen))
    shown = speaker.eyes.decode(codes[:count], s.evaluate.seed)
    table = "\n".join(tables)
    written = [
        atomic.write_text(root / "results.json", json.dumps(results, indent=2, allow_nan=False) + "\n"),
        atomic.write_text(root / "results.md", table),
        pictures.save_png(pictures.grid(drawn[:count], captions[:count]), root / "text_to_image.png"),
        pictures.save_png(pictures.grid(shown, said[:count]), root / "image_to_text.png"),
        plots.loss_curve(root / "metrics.jsonl", root / "loss.png"),
    ]
    return {"results": results, "table": table, "written": [str(p) for p in written]}


def _language_table(results) -> str:
    lines = ["| held-out documents | |", "|---|---:|"]
    for name, value in results.items():
        if isinstance(value, float):
            lines.append(f"| {name.replace('_', ' ')} | {value:.3f} |")
    return "\n".join(lines) + "\n"
