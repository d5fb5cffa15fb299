import dataclasses

import numpy as np
import pytest

from ddt_jax import settings
from ddt_jax.data.codes import CodesWriter, Plan
from ddt_jax.evaluation import asked
from ddt_jax.multimodal import sequence
from ddt_jax.multimodal.vocabulary import Vocabulary

EDIT = [["USER", [0, "make it red"]], ["ASSISTANT", [1]]]
OTHERS = {
    "a question": [["USER", [0, "what is it?"]], ["ASSISTANT", ["a disc"]]],
    "two turns": [*EDIT, ["USER", ["again"]], ["ASSISTANT", [0]]],
    "two sources": [["USER", [0, 1, "join them"]], ["ASSISTANT", [1]]],
    "an image that is not there": [["USER", [0, "make it red"]], ["ASSISTANT", [2]]],
}
RECORDS = [{"caption": "one", "turns": EDIT}, *({"turns": turns} for turns in OTHERS.values()), {}]
RECORDS += [{"caption": "two", "turns": [["USER", ["make it red", 1]], ["ASSISTANT", [0]]]}, {"caption": "three"}]


def encode(text):
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("codes"))
    plan = Plan("f" * 64, 4, 64, 32, "none", False, "scenes:train", len(RECORDS), len(RECORDS))
    writer = CodesWriter(folder, plan)
    writer.write(0, ({"codes": np.arange(8).reshape(2, 4) + i, "index": i} | r for i, r in enumerate(RECORDS)))
    writer.complete()
    return folder


def experiment(*parts):
    return settings.Experiment(sequences=settings.Sequences(eval_sources=parts))


def test_captions_come_in_the_order_of_folders_and_records(folder):
    s = experiment(settings.CodesFolder(folder=folder), settings.CodesFolder(folder=folder))
    captions = [record["caption"] for record in asked.captioned(s, 5)]
    assert captions == ["one", "two", "three", "one", "two"]
    assert len(asked.captioned(s, 99)) == 6


def test_nobody_is_asked_to_draw_texts_without_images(folder):
    s = experiment(settings.Texts(source="parquet:/nowhere/*.parquet"), settings.CodesFolder(folder=folder))
    assert [record["caption"] for record in asked.captioned(s, 9)] == ["one", "two", "three"]
    assert asked.edits(s, 9, encode) == [] and asked.has_pictures(s)
    assert not asked.has_pictures(experiment(settings.Texts(source="parquet:/nowhere/*.parquet")))


def test_edits_are_conversations_of_one_picture_and_its_change(folder):
    own = settings.CodesFolder(folder=folder, formats=settings.Formats(own=1.0))
    first, second = asked.edits(experiment(own), 99, encode)
    assert (first.instruction, first.caption) == ("make it red", "one")
    np.testing.assert_array_equal([first.source, first.target], np.arange(8).reshape(2, 4))
    assert second.caption == ""  # which is of image 0, and this is an edit of image 1
    assert len(asked.edits(experiment(own), 1, encode)) == 1
    assert asked.edits(experiment(settings.CodesFolder(folder=folder)), 99, encode) == []  # not read as such


def test_an_edit_is_asked_as_it_was_learned(folder):
    own = settings.CodesFolder(folder=folder, formats=settings.Formats(own=1.0))
    vocabulary, form = Vocabulary.extend(256, 64), sequence.ImageForm("codes", 4)
    for edit in asked.edits(experiment(own), 99, encode):
        learned = sequence.lay_out(edit.document, vocabulary, form)
        prompt = sequence.lay_out_prompt(edit.document, vocabulary, form, force_image=True)
        np.testing.assert_array_equal(prompt.tokens, learned.tokens[: len(prompt)])
        answer = learned.tokens[len(prompt) :]
        assert vocabulary.id_to_code(answer[:4]).tolist() == edit.target.tolist()
        assert answer[4:].tolist() == [vocabulary["EOV"], vocabulary["EOS"]]


def test_pictures_are_asked_about_as_codes_are(tmp_path):
    scenes, edited = (settings.Pictures(source=f"{x}:heldout", records=3) for x in ("scenes", "scenes_edits"))
    data = settings.Data(image_size=32, cache_dir=str(tmp_path))
    s = settings.Experiment(data=data, sequences=settings.Sequences(eval_sources=(scenes,)))
    found = asked.captioned(s, 9)
    assert len(found) == 3 and all(record["caption"] and record["images"][0].shape == (32, 32, 3) for record in found)
    assert asked.edits(s, 9, encode) == []
    edited = dataclasses.replace(edited, formats=settings.Formats(own=1.0))
    s = dataclasses.replace(s, sequences=settings.Sequences(eval_sources=(edited,)))
    for edit in asked.edits(s, 9, encode):
        assert edit.source.shape == edit.target.shape == (32, 32, 3) and (edit.source != edit.target).any()
        assert edit.instruction and edit.caption
    assert len(asked.edits(s, 9, encode)) == 3
