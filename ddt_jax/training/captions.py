"""What reads the captions of a run on images: its text tokenizer, which is kept with it.

WORKDIR/text/tokenizer.model (or .json)   the text tokenizer, byte for byte
"""

import contextlib
import itertools
from collections.abc import Iterator

from etils import epath

from ddt_jax import settings
from ddt_jax.data.base import BadRecord, Source, open_source
from ddt_jax.errors import UserError
from ddt_jax.tokenizers import text as texts
from ddt_jax.tokenizers.caption_ids import CaptionIds, MarkedIds

_FOLDER = "text"
_TEXTS = 5_000  # of which a text tokenizer is made


def resolve(s: settings.Experiment, workdir: str = "") -> CaptionIds:
    """That of the run, of the one it begins with, of the settings, or one made of the source's captions.

    Raises:
      UserError: there are no captions to make one of, it has more ids than the model, or a later stage has none to go
        on with.
    """
    c = s.model.text
    places = [epath.Path(place) / _FOLDER for place in (workdir, s.init_from) if place]
    found = next((texts.open_text_tokenizer(place) for place in places if texts.holds_text_tokenizer(place)), None)
    if found is None and s.model.stage != "align":
        raise UserError(
            f"config: model.stage={s.model.stage!r} goes on from what another run has learned; set init_from to the "
            f"workdir of that run{f', {s.init_from} has no text tokenizer' if s.init_from else ''}"
        )
    if found is None and c.tokenizer:
        found = texts.open_text_tokenizer(c.tokenizer)
    if found is None:
        source = open_source(s.data.source, image_size=s.data.image_size, cache_dir=s.data.cache_dir)
        said = list(itertools.islice(_captions(source), _TEXTS))
        if not said:
            raise UserError(f"config: {source.name} has no captions, which model.stage='align' learns from")
        found = texts.train_sentencepiece(said, c.vocab_size)
    if found.vocab_size > c.vocab_size:
        raise UserError(
            f"config: the text tokenizer has {found.vocab_size} ids, more than model.text.vocab_size={c.vocab_size}; "
            "set it to as many"
        )
    return CaptionIds(found, c.length)


def of_clip(s: settings.Experiment) -> MarkedIds | None:
    """What reads captions for the features that model.stage="codes" learns; None where it learns them without.

    Raises:
      UserError: the text tokenizer is missing, or not that of model.clip.
    """
    c = s.model.clip
    if s.model.stage != "codes" or s.model.features != "clip" or not isinstance(c, settings.CLIPText):
        return None
    name = "config: the text tokenizer in model.clip.weights"
    return MarkedIds(texts.open_text_tokenizer(c.weights), c.length, c.vocab_size, name)


def save(workdir, captions: CaptionIds) -> None:
    """Keeps it with a run, where `resolve` finds it."""
    texts.save_text_tokenizer(captions.text, epath.Path(workdir) / _FOLDER)


def _captions(source: Source) -> Iterator[str]:
    for index in range(len(source)):
        with contextlib.suppress(BadRecord):  # found again, and counted, when it is read for training
            if caption := source[index].get("caption"):
                yield " ".join(caption.lower().split())
