"""From documents to rows of integers, and from rows to what each position may see. NumPy only.

Every array here is per position of a sequence, and `target` has one meaning throughout: target[i] says that the loss
counts how well position i - 1 predicts tokens[i]. It belongs to the token that is predicted. (So the head is needed at
the positions i - 1, `target_rows`, and the first token of a document is never a target.)

Positions that show an image hold its codes, or, where an image is not made of codes, PAD: what belongs there are
`image_...` arrays of static capacity, one entry per image, with the position at which it starts.

Legend: S positions of a row, N positions of a document, I images a row can hold, M images of a document.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np

from ddt_jax.errors import UserError
from ddt_jax.multimodal.documents import Document, Image, Mark, Text
from ddt_jax.multimodal.vocabulary import Vocabulary


@dataclass(frozen=True)
class ImageForm:
    """How an image stands in a sequence.

    Attributes:
      kind: "codes": tokens that are predicted like text, causal. "diffusion": latents in place, each sees the whole
        image. "blockwise": clean blocks in place, and noised copies behind the document, with the position ids of their
        twins: a clean position sees up to the end of its block, a noised one what is before its block and its block's
        copy.
      rows: positions between BOV and EOV: codes, or patches.
      block: positions of a block ("blockwise"); divides rows.
      shape, dtype: of an image's content where it is not codes.
    """

    kind: Literal["codes", "diffusion", "blockwise"]
    rows: int
    block: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = "float32"

    def __post_init__(self):
        if self.rows < 1 or (self.kind == "blockwise" and (self.block < 1 or self.rows % self.block)):
            raise UserError(f"sequence: blocks of {self.block} do not divide an image of {self.rows} positions")


class Slot(NamedTuple):
    """An image in a layout: where its positions start (behind BOV), how many they are, which image of its record it is,
    whether it is to be learned, whether it is an answer (else others are about it), and where its noised copy starts
    (-1: it has none)."""

    start: int
    length: int
    number: int
    learn: bool
    answer: bool
    copy: int = -1


@dataclass(frozen=True, eq=False)
class Layout:
    """One document as arrays.

    Attributes:
      tokens: int32 [N].
      target: bool [N].
      position: int32 [N], what rotary embeddings count by.
      given: int32 [N]: one behind the last position of the prompt that a position is in, that is of what stands between
        two answers or before the first; 0 in answers.
      slots: M images.
      contents: M arrays; empty where images are codes.
    """

    tokens: np.ndarray
    target: np.ndarray
    position: np.ndarray
    given: np.ndarray
    slots: tuple[Slot, ...] = ()
    contents: tuple[np.ndarray, ...] = field(default=(), repr=False)

    def __len__(self):
        return len(self.tokens)


def lay_out(document: Document, vocabulary: Vocabulary, form: ImageForm) -> Layout:
    """Lays out a document.

    Raises:
      UserError: a code or text id out of range, an unknown special token, an image of another size.
    """
    tokens, slots, contents, at = [np.zeros(0, np.int32)], [], [], 0
    pieces = []  # of each piece: its length, whether it is learned, whether it is an answer
    in_codes = form.kind == "codes"
    for segment in document.segments:
        learn = document.learns(segment)
        if isinstance(segment, Mark):
            tokens.append([vocabulary[segment.name]])
        elif isinstance(segment, Text):
            tokens.append(vocabulary.check_text(segment.ids))
        else:
            tokens += [[vocabulary["BOV"]], _image_tokens(segment, vocabulary, form), [vocabulary["EOV"]]]
            slots.append(Slot(at + 1, form.rows, segment.number, learn, segment.answer))
            pieces.append((1, learn, segment.answer))
            at += 1
            if not in_codes:
                contents.append(_content(segment, form))
                learn = False  # latents are not predicted as tokens, and the EOV behind them comes by itself
        length = form.rows + 1 if isinstance(segment, Image) else len(tokens[-1])
        pieces.append((length, learn, segment.answer))
        at += length
    lengths = [length for length, _, _ in pieces]
    target = np.repeat([learned for _, learned, _ in pieces], lengths).astype(bool)
    target[:1] = False
    given = np.repeat(_ends_of_prompts(pieces), lengths).astype(np.int32)
    position = np.arange(at, dtype=np.int32)
    if form.kind == "blockwise":
        learned = [i for i, slot in enumerate(slots) if slot.learn]
        for k, i in enumerate(learned):
            slots[i] = slots[i]._replace(copy=at + k * form.rows)
        twins = [position[s.start : s.start + s.length] for s in (slots[i] for i in learned)]
        position = np.concatenate([position, *twins])
        tokens.append(np.full(len(position) - at, vocabulary["PAD"], np.int32))
        target, given = (np.concatenate([x, np.zeros(len(position) - at, x.dtype)]) for x in (target, given))
    tokens = np.concatenate(tokens, dtype=np.int32)
    return Layout(tokens, target, position, given, tuple(slots), tuple(contents))


def _ends_of_prompts(pieces):
    """Of each piece, where the pieces in a row that are no answers end; 0 of answers."""
    ends, end = [], 0
    at = sum(length for length, _, _ in pieces)
    for length, _, answer in reversed(pieces):
        end = 0 if answer else end or at
        ends.append(end)
        at -= length
    return ends[::-1]


def _image_tokens(image, vocabulary, form):
    if form.kind != "codes" or image.content is None:
        return np.full(form.rows, vocabulary["PAD"])
    codes = np.asarray(image.content)
    if codes.shape != (form.rows,):
        raise UserError(f"sequence: an image of {codes.shape} codes among images of {form.rows}; use one tokenizer")
    return vocabulary.code_to_id(codes)


def _content(image, form):
    if image.content is None:
        return np.zeros(form.shape, form.dtype)
    content = np.asarray(image.content, form.dtype)
    if content.shape != form.shape:
        raise UserError(f"sequence: an image of shape {content.shape} among images of {form.shape}; resize it")
    return content


def sizes(counts, form: ImageForm) -> np.ndarray:
    """(positions, images, targets) that layouts will have, int [..., 3], from `documents.count` [..., 6]."""
    marks, text, images, marks_learned, text_learned, images_learned = np.moveaxis(np.asarray(counts), -1, 0)
    copies = images_learned * form.rows if form.kind == "blockwise" else 0
    positions = marks + text + images * (form.rows + 2) + copies
    targets = marks_learned + text_learned + images_learned * (form.rows + 2 if form.kind == "codes" else 1)
    return np.stack([positions, images, targets], axis=-1)


def lay_out_prompt(
    document: Document, vocabulary: Vocabulary, form: ImageForm, *, force_image: bool = False, context: int = 0
) -> Layout:
    """The prompt with which a model is to write a document's last answer.

    Args:
      force_image: end with BOV, so that what comes next is an image.
      context: positions that prompt and answer may take together; 0 = not checked here.

    Raises:
      UserError: the prompt leaves no room in the context; or as `lay_out`.
    """
    prompt = replace(document.prompt(), learn="none")  # so its images need no noised copies
    if force_image:
        prompt = replace(prompt, segments=(*prompt.segments, Mark("BOV", answer=True)))
    layout = lay_out(prompt, vocabulary, form)
    needed = form.rows + 1 if force_image else 1
    if context and len(layout) + needed > context:
        raise UserError(
            f"sequence: a prompt of {len(layout):,} positions leaves no room for an answer of {needed:,} in a context "
            f"of {context:,}; shorten it"
        )
    return layout


def pack_row(layouts: Sequence[Layout], context: int, max_images: int, pad: int, form: ImageForm) -> dict:
    """Documents side by side in one row.

    Args:
      context: S.
      max_images: I.
      pad: token of unused positions.

    Returns:
      tokens int32 [S], target bool [S], position int32 [S], given int32 [S]: see `Layout`, ends are those of the row;
      document int32 [S]: number of the document in the row, -1 behind the last;
      start int32 [S]: where the position's document starts; an unused position is its own;
      image_start, image_length, image_copy, image_number, image_document int32 [I], image_learn and image_answer bool
        [I]: see `Slot`; positions are those of the row, starts rise; unused entries have start = copy = number =
        document = -1, and are behind the others;
      image_content [I, ...], only where images are not codes.

    Raises:
      ValueError: they do not fit.
    """
    total = sum(map(len, layouts))
    slots = [(d, slot) for d, layout in enumerate(layouts) for slot in layout.slots]
    if total > context or len(slots) > max_images:
        raise ValueError(f"{total} positions and {len(slots)} images in a row of {context} and {max_images}")
    row = {
        "tokens": np.full(context, pad, np.int32),
        "target": np.zeros(context, bool),
        "position": np.zeros(context, np.int32),
        "given": np.zeros(context, np.int32),
        "document": np.full(context, -1, np.int32),
        "start": np.arange(context, dtype=np.int32),
        **{f"image_{name}": np.full(max_images, -1, np.int32) for name in ("start", "copy", "number", "document")},
        "image_length": np.zeros(max_images, np.int32),
        **{f"image_{name}": np.zeros(max_images, bool) for name in ("learn", "answer")},
    }
    starts = np.cumsum([0, *map(len, layouts)])
    for d, (layout, at) in enumerate(zip(layouts, starts, strict=False)):
        here = slice(at, at + len(layout))
        row["tokens"][here], row["target"][here] = layout.tokens, layout.target
        row["position"][here], row["document"][here], row["start"][here] = layout.position, d, at
        row["given"][here] = np.where(layout.given > 0, layout.given + at, 0)
    for i, (d, slot) in enumerate(slots):
        row["image_start"][i], row["image_length"][i] = starts[d] + slot.start, slot.length
        row["image_copy"][i] = starts[d] + slot.copy if slot.copy >= 0 else -1
        row["image_number"][i], row["image_document"][i] = slot.number, d
        row["image_learn"][i], row["image_answer"][i] = slot.learn, slot.answer
    if form.kind != "codes":
        row["image_content"] = np.zeros((max_images, *form.shape), form.dtype)
        for i, content in enumerate(c for layout in layouts for c in layout.contents):
            row["image_content"][i] = content
    return row


def unpack_row(row: dict) -> list[Layout]:
    """The documents of a row: the inverse of `pack_row`."""
    layouts = []
    for d in range(int(row["document"].max(initial=-1)) + 1):
        (here,) = np.nonzero(row["document"] == d)
        at, images = here[0], np.flatnonzero(row["image_document"] == d)
        slots = tuple(
            Slot(
                int(row["image_start"][i] - at),
                int(row["image_length"][i]),
                int(row["image_number"][i]),
                bool(row["image_learn"][i]),
                bool(row["image_answer"][i]),
                int(row["image_copy"][i] - at) if row["image_copy"][i] >= 0 else -1,
            )
            for i in images
        )
        contents = tuple(row["image_content"][i] for i in images) if "image_content" in row else ()
        given = np.where(row["given"][here] > 0, row["given"][here] - at, 0).astype(np.int32)
        layouts.append(Layout(row["tokens"][here], row["target"][here], row["position"][here], given, slots, contents))
    return layouts


def visible_spans(
    row: dict, form: ImageForm, *, whole_prompts: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What each position of a row sees: keys [start, end) and [start2, end2), int32 [S] each (`nn.spans.Spans`).

    The second interval is empty (0, 0) but for noised copies.

    Args:
      whole_prompts: positions of a prompt see all of it.
    """
    start = row["start"]
    end = np.arange(1, len(start) + 1, dtype=np.int32)
    if whole_prompts:
        end = np.maximum(end, row["given"])
    start2, end2 = np.zeros_like(start), np.zeros_like(start)
    if form.kind == "codes":
        return start, end, start2, end2
    block = form.rows if form.kind == "diffusion" else form.block
    blocks = np.arange(form.rows, dtype=np.int32) // block * block  # where the block of each position starts
    for at, copy in zip(row["image_start"], row["image_copy"], strict=True):
        if at >= 0:
            end[at : at + form.rows] = np.maximum(end[at : at + form.rows], at + blocks + block)
        if copy >= 0:
            noised = slice(copy, copy + form.rows)
            end[noised], start2[noised], end2[noised] = at + blocks, copy + blocks, copy + blocks + block
    return start, end, start2, end2


def target_rows(target, capacity: int) -> np.ndarray:
    """Positions whose logits the loss needs, int32 [capacity]: those before a target, in order, then -1.

    Raises:
      ValueError: there are more.
    """
    rows = np.flatnonzero(target) - 1
    if len(rows) > capacity:
        raise ValueError(f"{len(rows)} targets, capacity {capacity}")
    return np.concatenate([rows, np.full(capacity - len(rows), -1)]).astype(np.int32)
