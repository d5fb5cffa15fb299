"""What a multimodal run reads: its text tokenizer, its vocabulary, and the mixture of documents that fills its rows.

    WORKDIR/text/tokenizer.model (or .json)   the text tokenizer, byte for byte
    WORKDIR/text/vocabulary.json              what each id means

They are written when a run begins, and from then on the run needs no other file to say what its ids mean.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from etils import epath

from ddt_jax import mesh as meshes
from ddt_jax import settings
from ddt_jax.data.base import BadRecord
from ddt_jax.data.codes import CodesSource
from ddt_jax.data.pictures import PictureRecords
from ddt_jax.data.texts import TextRecords
from ddt_jax.errors import UserError
from ddt_jax.io import atomic
from ddt_jax.multimodal.batches import RowBatcher, RowLimits, RowLoader
from ddt_jax.multimodal.model import make_multimodal
from ddt_jax.multimodal.pieces import MARKS, Pieces
from ddt_jax.multimodal.records import RecordDocuments
from ddt_jax.multimodal.sequence import ImageForm
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.tokenizers.text import (
    TextTokenizer,
    holds_text_tokenizer,
    open_text_tokenizer,
    save_text_tokenizer,
    train_sentencepiece,
)
from ddt_jax.training import weights

_FOLDER, _VOCABULARY = "text", "vocabulary.json"
_TEXTS = 20_000  # of which a text tokenizer is made
Part = settings.CodesFolder | settings.Pictures | settings.Texts
Records = CodesSource | PictureRecords | TextRecords


@dataclass(frozen=True)
class Corpus:
    """What ids mean and how an image stands among them."""

    text: TextTokenizer
    vocabulary: Vocabulary
    form: ImageForm


def resolve(s: settings.Experiment, workdir: str = "") -> tuple[settings.Experiment, Corpus]:
    """The settings with every size that text and codes decide filled in, and the corpus.

    Args:
      workdir: whose text tokenizer is taken if it holds a run already.

    Raises:
      UserError: there is no source, they are of different tokenizers, or sizes that are set are not theirs.
    """
    q, image = s.sequences, s.model.image
    if not q.sources:
        raise UserError(
            "config: sequences.sources is empty; name a folder that `ddt-jax tokenize` has written, "
            "or pictures where images are not codes"
        )
    found = _open_all(s)
    decided = _decided_by_codes(image, _codes(found.values())) if image.kind == "codes" else {}
    text = _text_tokenizer(s, workdir, (found[_place(part)] for part in q.sources))
    vocabulary = Vocabulary.extend(
        text.vocab_size,
        decided.get("codebook_size", 0),
        existing=text.special,
        multiple=q.vocab_multiple,
        text_fingerprint=text.fingerprint,
    )
    size = s.model.transformer.vocab_size
    if size not in (0, vocabulary.size):
        raise UserError(
            f"config: model.transformer.vocab_size={size}, but text and codes need {vocabulary.size}; leave it 0"
        )
    transformer = replace(s.model.transformer, vocab_size=vocabulary.size)
    s = replace(s, model=replace(s.model, transformer=transformer, image=replace(image, **decided)))
    return s, Corpus(text, vocabulary, _form(s))


def _place(part: Part) -> tuple:
    """What tells the records of one part from those of another."""
    return (part.folder,) if part.kind == "codes" else (part.source, part.records, part.kind)


def open_records(s: settings.Experiment, part: Part) -> Records:
    """A part's records. Raises UserError if they cannot be opened."""
    if part.kind == "codes":
        return CodesSource(part.folder, cache_dir=s.data.cache_dir, retry_seconds=s.data.retry_seconds)
    if part.kind == "texts":
        return TextRecords(part.source, s.data.cache_dir, part.records, s.data.retry_seconds)
    return PictureRecords(part.source, s.data, part.records)


def _open_all(s):
    """Records of all parts by `_place`; raises UserError if images of the model are not made of them."""
    parts = (*s.sequences.sources, *s.sequences.eval_sources)
    wanted = "codes" if s.model.image.kind == "codes" else "pictures"
    for part in parts:
        if part.kind not in (wanted, "texts"):
            raise UserError(
                f"config: {_place(part)[0]} is a source of {part.kind}, but model.image.kind={s.model.image.kind!r} "
                f"reads {wanted}; name sources of kind {wanted!r} in sequences"
            )
    return {_place(part): open_records(s, part) for part in parts}


def _codes(found: Iterable[Records]) -> list[CodesSource]:
    return [records for records in found if isinstance(records, CodesSource)]


def _formats(part: Part) -> dict[str, float]:
    """Shares of formats, by name, without those that have none."""
    if part.kind == "texts":
        return {"text_only": 1.0}
    return {name: share for name, share in vars(part.formats).items() if share}


def _decided_by_codes(image: settings.CodeImages, codes: list[CodesSource]) -> dict:
    """Settings of images that their codes decide; raises UserError if codes lack or differ, or others are set."""
    if not codes:
        raise UserError("config: sequences.sources has texts alone; a folder of codes must say what images are")
    plan = codes[0].plan
    for other in codes[1:]:
        if (other.plan.tokenizer, other.plan.order) != (plan.tokenizer, plan.order):
            raise UserError(
                f"config: {other.name} and {codes[0].name} were made by different tokenizers, or in different orders; "
                "use codes of one"
            )
    decided = {name: getattr(plan, name) for name in ("num_tokens", "codebook_size", "tokenizer", "order")}
    if image.code_vectors:
        decided["code_width"] = codes[0].code_vectors().shape[1]
    for name, value in decided.items():
        if getattr(image, name) not in (0, "", value):
            raise UserError(
                f"config: model.image.{name}={getattr(image, name)}, but {codes[0].name} has {value}; leave it out"
            )
    return decided


def _form(s: settings.Experiment) -> ImageForm:
    """How an image stands in sequences of a model whose sizes are known."""
    image = s.model.image
    if image.kind == "codes":
        return ImageForm("codes", image.num_tokens)
    return make_multimodal(s.model, s.data.image_size).form


def code_vectors(s: settings.Experiment) -> np.ndarray:
    """Vectors of codes by id, float32 [V, C], zeros where an id is none: codes are the last ids of the vocabulary."""
    folder = next(part.folder for part in s.sequences.sources if part.kind == "codes")
    found = CodesSource(folder, cache_dir=s.data.cache_dir).code_vectors()
    return np.pad(found, ((s.model.transformer.vocab_size - len(found), 0), (0, 0)))


def load(workdir: str, s: settings.Experiment) -> Corpus:
    """The corpus of the run in `workdir`; its codes are not needed. Raises UserError if files are missing."""
    folder = epath.Path(workdir) / _FOLDER
    if not (folder / _VOCABULARY).exists():
        raise UserError(f"workdir: {folder} holds no {_VOCABULARY}; name the workdir of a multimodal run")
    vocabulary = Vocabulary.from_json((folder / _VOCABULARY).read_text())
    return Corpus(open_text_tokenizer(folder), vocabulary, _form(s))


def save(workdir, corpus: Corpus) -> None:
    """Writes what `load` reads."""
    folder = epath.Path(workdir) / _FOLDER
    save_text_tokenizer(corpus.text, folder)
    atomic.write_text(folder / _VOCABULARY, corpus.vocabulary.to_json())


def copy_text(workdir, folder) -> None:
    """Puts the text tokenizer and the vocabulary of a run beside weights that leave it."""
    for path in (epath.Path(workdir) / _FOLDER).iterdir():
        path.copy(epath.Path(folder) / path.name, overwrite=True)


def open_rows(s: settings.Experiment, corpus: Corpus, parts: Iterable[Part]) -> RowLoader:
    """Batches of this process, of a mixture of sources. Raises UserError if they do not fit the settings."""
    q, parts, reader = s.sequences, tuple(parts), meshes.reader(s.mesh)
    opened = [open_records(s, part) for part in parts]
    documents, weights = {}, {}
    for number, (part, records) in enumerate(zip(parts, opened, strict=True)):
        formats = _formats(part)
        # Who sees all of a prompt has nothing to predict in it.
        answers_only = s.model.whole_prompts or q.answers_only
        found = RecordDocuments(records, corpus.text, formats, s.seed, answers_only=answers_only)
        split = part.kind == "texts" and part.split
        documents[str(number)] = Pieces(found, _piece(q)) if split else found
        weights[str(number)] = part.weight
    batcher = RowBatcher(
        documents,
        weights,
        corpus.vocabulary,
        _as_they_come(corpus.form, opened),
        RowLimits(q.context, q.images, q.targets, q.truncate),
        seed=s.seed,
        batch_size=s.train.batch_size,
        shard_index=reader.index,
        shard_count=reader.count,
    )
    return RowLoader(batcher, s.data)


def _piece(q: settings.Sequences) -> int:
    """Text tokens of the longest text that fits a row."""
    length = min(q.context - MARKS, (q.targets or q.context) - 1)
    if length < 1:
        raise UserError(
            f"config: sequences.context={q.context} with sequences.targets={q.targets} has no room for a piece of a "
            "text; raise them"
        )
    return length


def _as_they_come(form: ImageForm, opened: Iterable[Records]) -> ImageForm:
    """The form with what stands for an image in these records; raises UserError where they differ."""
    pictures = [records for records in opened if isinstance(records, PictureRecords)]
    for other in pictures[1:]:
        if other.content != pictures[0].content:
            raise UserError(
                f"config: {other.name} and {pictures[0].name} hold images in different forms; make latents of both "
                "with one codec, or of neither"
            )
    if not pictures:
        return form
    shape, kept = pictures[0].content
    return replace(form, shape=shape, dtype=kept.name)


def _text_tokenizer(s: settings.Experiment, workdir, sources: Iterable[Records]) -> TextTokenizer:
    """That of the run, of the weights that it begins with, of the settings, or one made of the sources' texts."""
    q = s.sequences
    kept = epath.Path(workdir) / _FOLDER if workdir else None
    if kept is not None and (kept / _VOCABULARY).exists():
        return open_text_tokenizer(kept)
    named, begun = open_text_tokenizer(q.text) if q.text else None, _of_weights(s.init_from)
    if named and begun and named.fingerprint != begun.fingerprint:
        raise UserError(
            f"config: sequences.text={q.text} is another text tokenizer than that of init_from={s.init_from}; "
            "leave it out"
        )
    if named or begun:
        return named or begun
    texts = list(itertools.islice(_in_turns([_texts(source) for source in sources]), _TEXTS))
    if not texts:
        raise UserError("config: the sources have no text to make a text tokenizer of; set sequences.text")
    return train_sentencepiece(texts, q.text_vocab_size)


def _of_weights(init_from: str) -> TextTokenizer | None:
    """The text tokenizer that lies with a multimodal run or with imported weights; None: there is none."""
    for name in (_FOLDER, weights.BESIDE) if init_from else ():
        folder = epath.Path(init_from) / name
        if holds_text_tokenizer(folder):
            return open_text_tokenizer(folder)
    return None


def _texts(source: Records) -> Iterator[str]:
    """Captions, and what documents of the records' own say."""
    for i in range(len(source)):
        record = {}
        with contextlib.suppress(BadRecord):  # found again, and counted, when it is read for training
            record = source.without_images(i)
        if caption := record.get("caption"):
            yield caption
        parts = (*record.get("parts", ()), *(part for _, said in record.get("turns", ()) for part in said))
        yield from (part for part in parts if isinstance(part, str))


def _in_turns(iterators: list[Iterator[str]]) -> Iterator[str]:
    """One of each, again and again, until all have ended."""
    for texts in itertools.zip_longest(*iterators):
        yield from (text for text in texts if text is not None)
