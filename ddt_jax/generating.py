"""`ddt-jax generate` of a transformer: pictures of texts, texts of pictures, and both in turns."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from ddt_jax.errors import UserError
from ddt_jax.evaluation import pictures, prompts
from ddt_jax.multimodal import documents
from ddt_jax.multimodal.documents import Image
from ddt_jax.speaking import AHEAD, Speaker, open_speaker


def generate(
    workdir: str,
    *,
    prompt: Sequence[str] = (),
    prompts_file: str = "",
    caption: Sequence[str] = (),
    ask: Sequence[tuple[str, str]] = (),
    edit: Sequence[tuple[str, str]] = (),
    go_on: Sequence[str] = (),
    force_image: bool = False,
    samples: int = 1,
    out: str = "",
    overrides: tuple[tuple[str, str], ...] = (),
) -> dict:
    """Draws prompts, describes pictures, answers questions about them, changes them, goes on with texts in text and
    pictures.

    Args:
      prompt: texts to draw. prompts_file: a file of them, see `evaluation.prompts`.
      caption: files of pictures to describe.
      ask: (file of a picture, a question about it).
      edit: (file of a picture, what to do with it).
      go_on: texts to go on with; force_image: with a picture first.
      samples: answers to each prompt, edit and text to go on with; they differ in their seeds, evaluate.seed and those
        after it.
      out: PNG; "" = WORKDIR/generated.png.

    Returns:
      "drawn": what was asked for, in the order of the pictures, "no_image": how many answers are none, "captions": file
      → text, "answers": of each question its "image", "question" and "answer", "told": of each text to go on with what
      came, texts and numbers of pictures, "written"; of a run on codes also "codes" of each picture of a prompt or an
      edit, in the order of its sequences, None where the answer is no image, and "tokenizer", the fingerprint of what
      makes them.

    Raises:
      UserError: there is nothing to do, or a file or text cannot be used.
    """
    texts = [*prompt, *(_to_draw(prompts_file) if prompts_file else ())]
    if not (texts or caption or ask or edit or go_on):
        raise UserError(
            "generate: there is nothing to do; give --prompt TEXT, --prompts FILE, --caption IMG, --ask, --edit or "
            "--continue"
        )
    if samples < 1:
        raise UserError(f"generate: --samples {samples} must be at least 1")
    if force_image and not go_on:
        raise UserError("generate: --force-image says how --continue begins; give --continue TEXT, or leave it out")
    speaker = open_speaker(workdir, overrides)
    seed = speaker.built.settings.evaluate.seed
    encode, eyes = speaker.encode_text, speaker.eyes
    given = [documents.text_to_image(encode(text), Image()) for text in texts]
    labels = list(texts)
    for file, instruction in edit:
        (held,) = eyes.encode(eyes.read(file)[None])
        given.append(documents.editing([Image(held)], encode(instruction), Image()))
        labels.append(f"{file}: {instruction}")
    given = [document for document in given for _ in range(samples)]
    labels = [label for label in labels for _ in range(samples)]
    result: dict[str, Any] = {"drawn": labels, "no_image": 0, "captions": {}, "answers": [], "told": [], "written": ""}
    told: list[list[str | np.ndarray]] = []
    with jax.set_mesh(speaker.built.mesh):
        if go_on := [text for text in go_on for _ in range(samples)]:
            begun = [documents.text_to_image(encode(text), Image()) for text in go_on]
            told = speaker.tell(begun, [seed + n for n in range(len(begun))], force_image=force_image)
        result["captions"] = _described(speaker, caption, seed)
        result["answers"] = _answered(speaker, ask, seed)
        drawn = speaker.draw(given, [seed + n for n in range(len(given))])
    shown, labels = list(drawn.pictures), drawn.labels(labels)
    for text, parts in zip(go_on, told, strict=True):
        result["told"].append([])
        for part in parts:
            if not isinstance(part, str):
                result["drawn"].append(text)
                labels.append(text)
                shown.append(part)
                part = len(shown)
            result["told"][-1].append(part)
    if shown:
        path = out or str(epath.Path(workdir) / "generated.png")
        written = pictures.save_png(pictures.grid(np.stack(shown), labels), path)
        result |= {"no_image": int((~drawn.valid).sum()), "written": str(written)}
    image = speaker.built.settings.model.image
    if image.kind == "codes":
        codes = [row.tolist() if valid else None for row, valid in zip(drawn.answers, drawn.valid, strict=True)]
        result |= {"tokenizer": image.tokenizer, "codes": codes}
    return result


def _to_draw(file: str) -> list[str]:
    found = prompts.open_prompts(file)
    if any(p.task == "vqa" for p in found):
        raise UserError(f"generate: {file} holds questions about pictures, which are asked by --ask IMAGE QUESTION")
    return [p.text for p in found]


def _described(speaker: Speaker, every: Sequence[str], seed: int) -> dict[str, str]:
    """File of a picture → what is said of it."""
    for file in every[AHEAD:]:  # those before them are read before anything is said
        if not epath.Path(file).exists():
            speaker.eyes.read(file)
    found = {}
    for at in range(0, len(every), AHEAD):
        some = every[at : at + AHEAD]
        held = speaker.eyes.encode(np.stack([speaker.eyes.read(file) for file in some]))
        shown = [documents.image_to_text([], Image(h)) for h in held]
        found |= dict(zip(some, speaker.say(shown, [seed + at + n for n in range(len(shown))]), strict=True))
    return found


def _answered(speaker: Speaker, asked: Sequence[tuple[str, str]], seed: int) -> list[dict[str, str]]:
    if not asked:
        return []
    held = speaker.eyes.encode(np.stack([speaker.eyes.read(file) for file, _ in asked]))
    given = [
        documents.question_answering([Image(h)], speaker.encode_text(question), [])
        for h, (_, question) in zip(held, asked, strict=True)
    ]
    said = speaker.say(given, [seed + n for n in range(len(given))])
    return [{"image": file, "question": q, "answer": a} for (file, q), a in zip(asked, said, strict=True)]
