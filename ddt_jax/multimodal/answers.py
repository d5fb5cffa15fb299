"""Answers of a trained transformer to documents that lack one: pictures as codes, or text.

Prompts are filled up to a few lengths, so that a handful of compiled programs serve all of them.

Legend: N prompts, B prompts of a batch, P longest prompt, K codes of an image.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal import backbone, documents, generate, sequence
from ddt_jax.multimodal.documents import Document, Image
from ddt_jax.multimodal.model import Multimodal
from ddt_jax.multimodal.sequence import ImageForm
from ddt_jax.multimodal.vocabulary import Vocabulary

_STEP = 16  # prompts are as long as a multiple of this


class Call(NamedTuple):
    """A compiled program and what it is to be run with.

    Attributes:
      program: jitted.
      arguments: those that are static among them.
    """

    program: Any
    arguments: tuple

    def run(self):
        return self.program(*self.arguments)


class Answerer:
    """See the module's docstring.

    Args:
      params, extra: of the run; of an unrolled one without low-rank updates they may be ShapeDtypeStructs, and the
        calls can be compiled for devices that are not there.
      context: positions that prompt and answer may take together.
      batch: prompts that are answered at once, at most.
    """

    def __init__(
        self, model: Multimodal, params, extra, vocabulary: Vocabulary, form: ImageForm, *, context: int, batch: int
    ):
        c = model.config.transformer
        self.config, self.params = backbone.for_decoding(c, model.all_params(params, extra), computed=True)
        self.places, self.whole_prompts = model.places(params, extra), model.config.whole_prompts
        self.vocabulary, self.form = vocabulary, form
        self.context, self.batch = context, batch
        first = vocabulary.codes_start
        self._whole_images = generate.WholeImages(
            vocabulary.size, vocabulary["BOV"], vocabulary["EOV"], first, vocabulary.num_codes, form.rows
        )

    @property
    def weights(self):
        """What answers are computed with."""
        return self.params, self.places

    def images(
        self, given: Sequence[Document], s: settings.Sampling, seeds: Sequence[int], done=None, *, free: bool = False
    ) -> np.ndarray:
        """Codes int32 [N, K] of the images that answer documents, in the order in which the sequence writes them.

        With `free`, anything may be drawn behind BOV, and what is not K codes and then EOV is no image: a row of -1.

        Args:
          given: documents; what comes before the last answer is the prompt.
          seeds: N; a picture depends on its prompt and its seed alone.
          done: told how many prompts have been answered.

        Raises:
          UserError: a prompt does not fit the context, or as `sequence.lay_out`.
        """
        k, parts = self.form.rows, []
        for call in self.image_calls(given, s, seeds, free=free):
            parts.append(np.asarray(call.run().tokens_BN))
            if done is not None:
                done(min(sum(map(len, parts)), len(given)))
        ids = np.concatenate([*parts, np.zeros((0, k + free), np.int32)])[: len(given)]
        whole = self.vocabulary.is_code(ids[:, :k]).all(axis=1)
        if free:
            whole &= ids[:, k] == self.vocabulary["EOV"]
        codes = np.full((len(ids), k), -1, np.int32)
        codes[whole] = self.vocabulary.id_to_code(ids[whole, :k])
        return codes

    def image_calls(
        self, given: Sequence[Document], s: settings.Sampling, seeds: Sequence[int], *, free: bool = False
    ) -> Iterator[Call]:
        """What `images` runs for one batch after the other, each of which makes `generate.Generated`. As `images`."""
        layouts = [self._prompt(document, force_image=True) for document in given]
        empty = self._prompt(documents.image_only(Image()), force_image=True)
        unconditional = self._prompts([empty], len(empty)) if s.guidance != 1 else None
        s = replace(s, tokens=self.form.rows + free)
        constraint = None if free else self._whole_images
        for prompts, some in self._batches(layouts, seeds):
            yield self._call(prompts, some, s, constraint, (), unconditional)

    def texts(
        self, given: Sequence[Document], s: settings.Sampling, seeds: Sequence[int], decode: Callable, done=None
    ) -> list[str]:
        """Texts that answer documents, up to the end of text. decode: ids → text; the rest as `images`."""
        texts = []
        for call in self.text_calls(given, s, seeds):
            found = call.run()
            for ids, length in zip(np.asarray(found.tokens_BN), np.asarray(found.lengths_B), strict=True):
                ids = ids[:length]
                texts.append(decode(ids[self.vocabulary.is_text(ids)]))
            texts = texts[: len(given)]
            if done is not None:
                done(len(texts))
        return texts

    def text_calls(self, given: Sequence[Document], s: settings.Sampling, seeds: Sequence[int]) -> Iterator[Call]:
        """What `texts` runs for one batch after the other, each of which makes `generate.Generated`. As `texts`."""
        yield from self._writing([self._prompt(document, force_image=False) for document in given], s, seeds)

    def _writing(self, layouts, s: settings.Sampling, seeds) -> Iterator[Call]:
        """Calls that go on behind prompts up to the end of text, each row as far as it has room."""
        room = self.context - min(map(len, layouts), default=0)
        s = replace(s, guidance=1.0, tokens=min(s.tokens, room))
        for prompts, some in self._batches(layouts, seeds):
            left_B = np.minimum(self.context - prompts.lengths_B, s.tokens)
            yield self._call(prompts, some, s, self._whole_images, (self.vocabulary["EOS"],), None, left_B)

    def both(
        self,
        given: Sequence[Document],
        s: settings.Sampling,
        seeds: Sequence[int],
        decode: Callable,
        done=None,
        *,
        force_image: bool = False,
    ) -> list[list[str | np.ndarray]]:
        """What answers documents, texts and whole images in turns, images as codes int32 [K].

        Args:
          s: of texts and codes alike, without guidance; at most `tokens` of an answer, codes among them, but as many as
            an image has in any case.
          force_image: the answer begins with an image.
          The rest: as `texts`.
        """
        layouts, answers = [self._prompt(document, force_image) for document in given], []
        s = replace(s, tokens=max(s.tokens, self.form.rows + 1))
        for call in self._writing(layouts, s, seeds):
            found = call.run()
            for ids, length in zip(np.asarray(found.tokens_BN), np.asarray(found.lengths_B), strict=True):
                answers.append(self._parts(ids[:length], force_image, decode))
            answers = answers[: len(given)]
            if done is not None:
                done(len(answers))
        return answers

    def _parts(self, ids, in_image: bool, decode) -> list[str | np.ndarray]:
        """Texts and images that ids hold; an image that was cut off is left out."""
        v, parts = self.vocabulary, []
        begins = np.flatnonzero(ids == v["BOV"])
        pieces = np.split(ids, begins)  # each but the first begins with BOV
        for number, piece in enumerate(pieces):
            if number or in_image:
                codes, piece = np.split(piece[1 if number else 0 :], [self.form.rows])
                if len(codes) == self.form.rows:
                    parts.append(v.id_to_code(codes))
            if (is_text := v.is_text(piece)).any():
                parts.append(decode(piece[is_text]))
        return parts

    def _prompt(self, document, force_image):
        return sequence.lay_out_prompt(
            document, self.vocabulary, self.form, force_image=force_image, context=self.context
        )

    def _batches(self, layouts, seeds) -> Iterator[tuple]:
        """(prompts, seeds int32 [B])."""
        width = width_of(layouts)
        for some in filled_batches(len(layouts), self.batch):
            yield self._prompts([layouts[i] for i in some], width), np.array([seeds[i] for i in some], np.int32)

    def _prompts(self, layouts, width) -> generate.Prompts:
        ids = np.full((len(layouts), width), self.vocabulary["PAD"], np.int32)
        given = np.zeros_like(ids)
        for row, layout in enumerate(layouts):
            ids[row, : len(layout)], given[row, : len(layout)] = layout.tokens, layout.given
        lengths = np.array([len(layout) for layout in layouts], np.int32)
        return generate.Prompts(ids, lengths, given if self.whole_prompts else None)

    def _call(self, prompts, seeds, sampling, constraint, stop, unconditional, left_B=None) -> Call:
        if not sampling.tokens:
            raise UserError("generate: tokens=0 leaves nothing to write; set how many a text may have")
        pad = self.vocabulary["PAD"]
        program = _program(self.config, sampling, constraint, stop, pad)
        return Call(program, (self.params, self.places, prompts, seeds, unconditional, left_B))


def width_of(layouts: Sequence[sequence.Layout]) -> int:
    """What prompts are filled up to."""
    return -(-max(map(len, layouts), default=0) // _STEP) * _STEP


def filled_batches(count: int, batch: int) -> Iterator[list[int]]:
    """Numbers of the prompts of each batch, the last one filled up with its first prompt.

    Batches are of 2, 4, 8 ... up to `batch`, so that one prompt does not cost a whole batch, and a handful of programs
    serve all.
    """
    batch = min(batch, max(2, 1 << (count - 1).bit_length()))
    for at in range(0, count, batch):
        some = list(range(at, min(at + batch, count)))
        yield some + some[:1] * (batch - len(some))


@functools.lru_cache(maxsize=16)
def _program(c, sampling, constraint, stop, pad):
    """`generate` compiled for settings; jit adds the shapes."""

    def run(params, places, prompts, seeds, unconditional, left_B):
        options = {"constraint": constraint, "stop": stop, "pad": pad, "unconditional": unconditional, "places": places}
        return generate.generate(c, params, prompts, seeds, sampling, left_B=left_B, **options)

    return jax.jit(run)
