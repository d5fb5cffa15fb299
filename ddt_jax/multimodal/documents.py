"""Kinds of documents, before they are laid out: who says what, in which order, and what is to be learned.

A document is a tuple of segments. `answer` marks what a model would write when it is given the rest: the loss may be
confined to it, and a prompt is the document cut before the last of it. docs/sequences.md draws every kind.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ddt_jax.data.base import nearest
from ddt_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class Mark:
    """A special token by its name in the vocabulary. learned: False where the loss is not to count it in any case."""

    name: str
    answer: bool = False
    learned: bool = True


@dataclass(frozen=True, eq=False)
class Text:
    """Ids of the text tokenizer, int [n]; may be empty."""

    ids: Any
    answer: bool = False


@dataclass(frozen=True, eq=False)
class Image:
    """An image, written between BOV and EOV.

    Attributes:
      content: its codes, int [K], in the order in which they are to be written: that order is the tokenizer's, and is
        recorded with the codes. Where images are not made of codes (`sequence.ImageForm`), an array of the form's
        shape. None: only its place is wanted, to measure.
      number: which image of its record it is.
    """

    content: Any = None
    number: int = 0
    answer: bool = False


Segment = Mark | Text | Image


@dataclass(frozen=True, eq=False)
class Document:
    """Segments in reading order.

    Attributes:
      learn: "all": the loss counts every token after the first; "answer": those of answers only; "none": a prompt.
    """

    segments: tuple[Segment, ...]
    learn: Literal["all", "answer", "none"] = "all"

    def learns(self, segment: Segment) -> bool:
        """Whether the loss counts what a segment holds."""
        if isinstance(segment, Mark) and not segment.learned:
            return False
        return self.learn == "all" or (self.learn == "answer" and segment.answer)

    def prompt(self) -> "Document":
        """What comes before the last answer."""
        end = len(self.segments)
        while end and not self.segments[end - 1].answer:
            end -= 1
        while end and self.segments[end - 1].answer:
            end -= 1
        return replace(self, segments=self.segments[:end])


def _answer(*segments):
    return tuple(replace(s, answer=True) for s in segments)


def text_to_image(text, image: Image) -> Document:
    """BOS text BOV codes EOV EOS."""
    return Document((Mark("BOS"), Text(text), *_answer(image, Mark("EOS"))))


def image_to_text(text, image: Image) -> Document:
    """BOS BOV codes EOV text EOS."""
    return Document((Mark("BOS"), image, *_answer(Text(text), Mark("EOS"))))


def text_only(text) -> Document:
    """BOS text EOS."""
    return Document((Mark("BOS"), *_answer(Text(text), Mark("EOS"))))


def image_only(image: Image) -> Document:
    """BOS BOV codes EOV EOS: also what a caption that was dropped leaves, which guidance needs."""
    return Document((Mark("BOS"), *_answer(image, Mark("EOS"))))


def interleaved(parts: Iterable[Text | Image]) -> Document:
    """BOS, then texts and images in any order, EOS."""
    return Document((Mark("BOS"), *_answer(*parts, Mark("EOS"))))


def chat(turns: Sequence[tuple[str, Iterable[Text | Image]]]) -> Document:
    """BOS, then turns: USER parts, or ASSISTANT parts EOS. The answers are what the assistant says, EOS included.

    Raises:
      UserError: for a role that is neither, or turns that do not alternate from USER on.
    """
    segments = [Mark("BOS")]
    expected = "USER"
    for role, parts in turns:
        if role not in ("USER", "ASSISTANT"):
            raise UserError(f"documents: {role} is not a role{nearest(role, ('USER', 'ASSISTANT'))}")
        if role != expected:
            raise UserError(f"documents: a turn of {role} stands where {expected} is due; join or leave out turns")
        segments += [Mark(role), *(_answer(*parts, Mark("EOS")) if role == "ASSISTANT" else parts)]
        expected = "USER" if role == "ASSISTANT" else "ASSISTANT"
    return Document(tuple(segments), learn="answer")


def editing(sources: Sequence[Image], instruction, target: Image) -> Document:
    """A chat of one turn: the images and what to do with them, answered by an image."""
    return chat([("USER", [*sources, Text(instruction)]), ("ASSISTANT", [target])])


def question_answering(images: Sequence[Image], question, answer) -> Document:
    """A chat of one turn: images and a question, answered by text."""
    return chat([("USER", [*images, Text(question)]), ("ASSISTANT", [Text(answer)])])


# What a record of an image with a caption can become, by the names that a mixture uses.
PAIR_FORMATS = {
    "text_to_image": text_to_image,
    "image_to_text": image_to_text,
    "text_only": lambda text, image: text_only(text),
    "image_only": lambda text, image: image_only(image),
}


def count(document: Document) -> tuple[int, int, int, int, int, int]:
    """(marks, text tokens, images), and how many of each the loss looks at; from these its size in any form follows."""
    counts = [0] * 6
    for n, segment in enumerate(document.segments):
        kind = (Mark, Text, Image).index(type(segment))
        amount = len(segment.ids) if isinstance(segment, Text) else 1
        counts[kind] += amount
        # The mark that a document begins with has nothing before it that could predict it.
        counts[3 + kind] += amount if n and document.learns(segment) else 0
    return tuple(counts)


def text_length(document: Document) -> int:
    """How many text tokens it has."""
    return sum(len(s.ids) for s in document.segments if isinstance(s, Text))


def truncate_text(document: Document, excess: int) -> Document:
    """The document without its last `excess` text tokens; marks and images stay as they are, but a mark behind a text
    that was cut is not learned: the text did not end there.

    Raises:
      UserError: it has no so much text.
    """
    if excess > text_length(document):
        raise UserError(f"documents: {excess} positions too many, and images are never cut; take a longer context")
    kept = []
    for segment in reversed(document.segments):
        if isinstance(segment, Text) and (cut := min(excess, len(segment.ids))):
            segment = replace(segment, ids=np.asarray(segment.ids)[: len(segment.ids) - cut])
            excess -= cut
            if kept and isinstance(kept[-1], Mark):
                kept[-1] = replace(kept[-1], learned=False)
        kept.append(segment)
    return replace(document, segments=tuple(reversed(kept)))
