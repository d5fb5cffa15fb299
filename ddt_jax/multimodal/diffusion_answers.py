"""Answers of a transformer whose images are denoised: pictures, texts, or both in turns.

Legend: N prompts, B prompts of a batch, S image side, I images of a prompt.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np

from ddt_jax import settings
from ddt_jax.errors import UserError
from ddt_jax.multimodal import documents, sequence
from ddt_jax.multimodal.answers import Call, filled_batches, width_of
from ddt_jax.multimodal.block_segments import BlockSegments
from ddt_jax.multimodal.diffusion_model import DiffusionMultimodal
from ddt_jax.multimodal.documents import Document, Image
from ddt_jax.multimodal.segments import Segments, State
from ddt_jax.multimodal.sequence import ImageForm, Layout
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.nn.images import to_uint8


class DiffusionAnswerer:
    """As `answers.Answerer`; images are pixels, uint8 [S, S, 3], in documents and as answers.

    Args:
      params, extra: of the run; or ShapeDtypeStructs, as `Answerer` takes them.
      context: positions that prompt and answer may take together.
      batch: prompts that are answered at once, at most.
    """

    def __init__(
        self,
        model: DiffusionMultimodal,
        params,
        extra,
        vocabulary: Vocabulary,
        form: ImageForm,
        *,
        context: int,
        batch: int,
    ):
        self.vocabulary, self.form = vocabulary, form
        self.context, self.batch = context, batch
        make = BlockSegments if form.kind == "blockwise" else Segments
        self._segments = segments = make(model, params, extra, vocabulary, context)

        def draw(weights, *arguments):
            state, latents_BHWC = segments.draw(weights, *arguments)
            return state, to_uint8(model.codec.decode(weights.extra.get("codec"), latents_BHWC))

        self._prefill = jax.jit(segments.prefill, static_argnums=2)
        self._write = jax.jit(segments.write, static_argnums=(4, 5), donate_argnums=1)
        self._draw = jax.jit(draw, static_argnums=5, donate_argnums=1)

    @property
    def weights(self):
        """What answers are computed with."""
        return self._segments.weights

    def images(
        self, given: Sequence[Document], s: settings.Sampling, seeds: Sequence[int], done=None, *, free: bool = False
    ) -> np.ndarray:
        """Images uint8 [N, S, S, 3] that answer documents.

        Args:
          given: documents; what comes before the last answer is the prompt.
          s: of which guidance counts; solver and steps are those of model.image.diffusion.
          seeds: N; a picture depends on its prompt and its seed alone.
          done: told how many prompts have been answered.
          free: as of `Answerer`; here an image is one in any case.

        Raises:
          UserError: a prompt does not fit the context, or as `sequence.lay_out`.
        """
        del free
        parts = [np.zeros((0, *self.form.shape), np.uint8)]
        for count, prefill, draw in self.image_calls(given, s, seeds):
            _, pixels = draw(prefill.run()).run()
            parts.append(np.asarray(pixels)[:count])
            if done is not None:
                done(sum(map(len, parts)))
        return np.concatenate(parts)

    def image_calls(
        self, given: Sequence[Document], s: settings.Sampling, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Call, Callable[[State], Call]]]:
        """What `images` runs for one batch after the other: (how many of it count, what makes the state behind its
        prompts, and of that state what makes the state behind images and the images). As `images`.
        """
        layouts = [self._prompt(document, force_image=True) for document in given]
        for _, count, chosen, prefill in self._prefills(layouts, seeds, 0):
            begun = (chosen, np.zeros_like(chosen), np.full(len(chosen), True), s.guidance)
            yield count, prefill, lambda state, begun=begun: self._draw_call(state, *begun)

    def texts(
        self, given: Sequence[Document], s: settings.Sampling, seeds: Sequence[int], decode: Callable, done=None
    ) -> list[str]:
        """Texts that answer documents, up to the end of text. decode: ids → text; the rest as `images`."""
        texts = []
        for count, prefill, write in self.text_calls(given, s, seeds):
            _, ids = _ids(write(prefill.run()).run())
            texts += [decode(self._text(row)) for row in ids[:count]]
            if done is not None:
                done(len(texts))
        return texts

    def text_calls(
        self, given: Sequence[Document], s: settings.Sampling, seeds: Sequence[int]
    ) -> Iterator[tuple[int, Call, Callable[[State], Call]]]:
        """As `image_calls`, of `texts`: what is made last is the state behind texts and `generate.Generated`."""
        layouts = [self._prompt(document, force_image=False) for document in given]
        for filled, count, chosen, prefill in self._prefills(layouts, seeds, s.tokens):
            left = np.array([min(s.tokens, self.context - len(layouts[i])) for i in filled], np.int32)
            begun = (chosen, left, s, False)
            yield count, prefill, lambda state, begun=begun: self._write_call(state, *begun)

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
        """What answers documents, texts and images in turns: text goes on to BOV, behind which an image is drawn.

        The host waits once for each text. Rows of a batch may be in different segments.

        Args:
          s: of texts, `tokens` of an answer at most; of its `guidance`, as for `images`.
          force_image: the answer begins with an image.
          The rest: as `texts`.
        """
        layouts = [self._prompt(document, force_image) for document in given]
        answers: list[list[str | np.ndarray]] = []
        for filled, count, chosen, prefill in self._prefills(layouts, seeds, self.context):
            state = prefill.run()
            n, parts = len(filled), [[] for _ in filled]
            length = np.array([len(layouts[i]) for i in filled], np.int32)
            left, images = np.full(n, s.tokens, np.int32), np.zeros(n, np.int32)
            draws, writes = np.full(n, force_image), np.full(n, True)
            while writes.any():
                if draws.any():
                    state, pixels = self._draw_call(state, chosen, images, draws, s.guidance).run()
                    images, length = images + draws, length + draws * (self.form.rows + 1)
                room = np.where(writes, np.minimum(left, self.context - length), 0).astype(np.int32)
                state, ids = _ids(self._write_call(state, chosen, room, s, True).run())
                for row in np.flatnonzero(draws):
                    parts[row].append(np.asarray(pixels)[row])
                for row in range(n):
                    if len(text := self._text(ids[row])):
                        parts[row].append(decode(text))
                written = np.array([len(row) for row in ids], np.int32)
                left, length = left - written, length + written
                draws = writes = np.array([len(row) > 0 and row[-1] == self.vocabulary["BOV"] for row in ids])
            answers += parts[:count]
            if done is not None:
                done(len(answers))
        return answers

    def _draw_call(self, state, seeds, numbers, drawing, guidance) -> Call:
        empty = self._arrays([self._prompt(documents.image_only(Image()), force_image=True)], 0)
        unconditional = empty if guidance != 1 else None
        weights = self._segments.weights
        return Call(self._draw, (weights, state, seeds, numbers.astype(np.int32), drawing, guidance, unconditional))

    def _write_call(self, state, seeds, left, s, images) -> Call:
        if not s.tokens:
            raise UserError("generate: tokens=0 leaves nothing to write; set how many a text may have")
        s = replace(s, guidance=1.0)  # of which images alone know
        return Call(self._write, (self._segments.weights, state, seeds, left, s, images))

    def _text(self, ids):
        return ids[self.vocabulary.is_text(ids)]

    def _prompt(self, document, force_image) -> Layout:
        return sequence.lay_out_prompt(
            document, self.vocabulary, self.form, force_image=force_image, context=self.context
        )

    def _prefills(self, layouts, seeds, more) -> Iterator[tuple[list[int], int, np.ndarray, Call]]:
        """(numbers of the prompts of a batch, filled up; how many of them count; seeds int32 [B]; what makes the state
        behind).

        Args:
          more: positions that an answer may take, but for the last image and what comes behind it.
        """
        width, all_of_them = width_of(layouts), len(layouts)
        slots = min(width + more, max(width, self.context)) + self._segments.slack
        for filled in filled_batches(all_of_them, self.batch):
            prompts = self._arrays([layouts[i] for i in filled], width)
            prefill = Call(self._prefill, (self._segments.weights, prompts, slots))
            count = min(len(filled), all_of_them - filled[0])
            yield filled, count, np.array([seeds[i] for i in filled], np.int32), prefill

    def _arrays(self, layouts, width) -> dict[str, np.ndarray]:
        """Prompts of `Segments.prefill`, filled up to a width or the longest of them."""
        width = max(width, *map(len, layouts))
        images = max(1, *(len(layout.slots) for layout in layouts))
        pad = self.vocabulary["PAD"]
        rows = [sequence.pack_row([layout], width, images, pad, self.form) for layout in layouts]
        names = ("tokens", "position", "start", "given", "image_start", "image_copy", "image_content")
        lengths = np.array([len(layout) for layout in layouts], np.int32)
        return {name: np.stack([row[name] for row in rows]) for name in names} | {"length": lengths}


def _ids(written) -> tuple[State, list[np.ndarray]]:
    """The state behind texts, and the ids of each row."""
    state, found = written
    ids, lengths = np.asarray(found.tokens_BN), np.asarray(found.lengths_B)
    return state, [row[:length] for row, length in zip(ids, lengths, strict=True)]
