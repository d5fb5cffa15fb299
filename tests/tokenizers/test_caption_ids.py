"""Captions as rows of ids, in batches and kept with a run."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ddt_jax import settings
from ddt_jax.data.base import open_source
from ddt_jax.data.loader import Loader
from ddt_jax.errors import UserError
from ddt_jax.tokenizers.caption_ids import CaptionIds
from ddt_jax.tokenizers.text import train_sentencepiece
from ddt_jax.training import captions

LONGEST = 12


@pytest.fixture(scope="module")
def ids():
    text = train_sentencepiece([f"a {x} disc at the top" for x in ("red", "green", "blue")], 280)
    return CaptionIds(text, LONGEST)


def test_case_and_spaces_do_not_count_and_long_captions_are_cut(ids):
    rows = ids(["A  red\ndisc", "a red disc", "", "a red disc at the top " * 9])
    assert rows.shape == (4, LONGEST) and rows.dtype == np.int32
    np.testing.assert_array_equal(rows[0], rows[1])
    said = rows[0][rows[0] != settings.NO_TOKEN]
    assert ids.text.decode(said) == "a red disc" and np.all(rows[0, len(said) :] == settings.NO_TOKEN)
    assert np.all(rows[2] == settings.NO_TOKEN) and np.all(rows[3] != settings.NO_TOKEN)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(ids))(["a red disc"])[0], rows[0])


def test_a_batch_has_the_ids_of_its_captions(ids):
    loader = Loader(
        open_source("scenes:train"), settings.Data(), batch_size=4, seed=0, with_captions=True, caption_ids=ids
    )
    batch = loader.batch_at(3)
    np.testing.assert_array_equal(batch["caption_ids"], ids(batch["caption"]))


def test_what_read_captions_goes_from_stage_to_stage(tmp_path, ids):
    model = settings.SEED(text=settings.TextTower(vocab_size=280, length=LONGEST))
    s = settings.Experiment(model=model)
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    captions.save(first, ids)
    for found in (captions.resolve(s, first), captions.resolve(replace(s, init_from=first), second)):
        assert (found.text.fingerprint, found.length) == (ids.text.fingerprint, LONGEST)
    later = replace(s, model=replace(model, stage="codes"))
    with pytest.raises(UserError, match="model.stage='codes' goes on from what another run has learned"):
        captions.resolve(later, second)
    small = replace(s, model=replace(model, text=settings.TextTower(vocab_size=100)))
    with pytest.raises(UserError, match="has 2[0-9]+ ids, more than model.text.vocab_size=100"):
        captions.resolve(small, first)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    without = replace(s, data=settings.Data(source=f"folder:{tmp_path}/images"))
    with pytest.raises(UserError, match="has no captions, which model.stage='align' learns from"):
        captions.resolve(without, second)
