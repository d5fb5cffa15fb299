import pickle

import numpy as np
import pytest

from ddt_jax.data.base import BadRecord
from ddt_jax.errors import UserError
from ddt_jax.multimodal import documents, records
from ddt_jax.multimodal.batches import RowBatcher, RowLimits, RowLoader, utilisation
from ddt_jax.multimodal.records import FORMATS, RecordDocuments, picture_lengths, text_lengths
from ddt_jax.multimodal.sequence import ImageForm, lay_out, sizes, unpack_row
from ddt_jax.multimodal.vocabulary import Vocabulary
from ddt_jax.settings import Data

FORM = ImageForm("codes", 16)
PAIRS = {"text_to_image": 4.0, "image_to_text": 4.0, "text_only": 1.0, "image_only": 1.0}


@pytest.fixture(scope="module")
def vocabulary(text):
    return Vocabulary.extend(text.vocab_size, 512, text_fingerprint=text.fingerprint)


@pytest.fixture(scope="module")
def make(scenes_codes, own_codes, text, vocabulary):
    sources = {
        "pairs": RecordDocuments(scenes_codes, text, PAIRS, 0),
        "own": RecordDocuments(own_codes, text, {"own": 1.0}, 0),
    }

    def batcher(weights=None, limits=RowLimits(256), batch_size=12, seed=5, **host):  # noqa: B008  frozen
        weights = weights or {"pairs": 0.75, "own": 0.25}
        chosen = {name: sources[name] for name in weights}
        return RowBatcher(chosen, weights, vocabulary, FORM, limits, seed=seed, batch_size=batch_size, **host)

    return batcher


def same(batch, other):
    assert batch.keys() == other.keys()
    for name in batch:
        np.testing.assert_array_equal(batch[name], other[name], err_msg=name)
        assert batch[name].dtype == other[name].dtype


def test_answers_only_is_the_same_rows_with_fewer_targets(scenes_codes, text, vocabulary):
    def batch(answers_only):
        source = RecordDocuments(scenes_codes, text, PAIRS, 0, answers_only=answers_only)
        made, errors = RowBatcher(
            {"0": source}, {"0": 1}, vocabulary, FORM, RowLimits(256), seed=5, batch_size=12
        ).make(3)
        assert not errors  # else lengths would not be those that were planned
        return made

    everything, answers = batch(False), batch(True)
    same(*({k: v for k, v in b.items() if k not in ("target", "rows", "image_learn")} for b in (everything, answers)))
    np.testing.assert_array_equal(answers["target"], everything["target"] & (answers["given"] == 0))
    assert answers["target"].sum() < everything["target"].sum()


@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_hosts_together_make_the_rows_of_one_from_any_step(make, hosts):
    alone = make()
    shards = [make(shard_index=i, shard_count=hosts) for i in range(hosts)]
    for step in (7, 0, 40):
        parts = [shard.make(step)[0] for shard in shards]
        same(alone.make(step)[0], {name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def test_a_copy_in_another_process_makes_the_same_and_brings_its_index(make):
    batcher = make()
    batcher.prepare(12 * 30)
    copy = pickle.loads(pickle.dumps(batcher))
    assert copy._streams[0]._epoch_ends == batcher._streams[0]._epoch_ends != []
    same(copy.make(29)[0], make().make(29)[0])


@pytest.mark.parametrize("context", [256, 512])
def test_rows_of_the_scenes_mixture_are_full(make, context):
    """The promise is 95 % of positions, padding at the end of blocks included."""
    batcher = make({"pairs": 1.0}, RowLimits(context))
    rows = batcher._streams[0].epoch_rows(0)
    order = np.concatenate([np.stack(batcher._streams[0].row(n)) for n in range(rows)], axis=1)
    positions = sizes(batcher._sources[0].counts(*order), FORM)[:, 0].sum()
    assert sorted(order[0]) == list(range(6000)) and positions / (rows * context) >= 0.95
    # What is planned is what the batches hold: the first rows of an epoch, of which few lie at the end of a block.
    assert utilisation([batcher.make(step)[0] for step in range(4)]) >= 0.95


def test_rows_hold_the_documents_of_the_plan_in_their_formats(make, scenes_codes, text, vocabulary):
    batcher = make({"pairs": 1.0}, batch_size=1)
    source = batcher._sources[0]
    for n in (0, 1, 500, 5000):
        row = {name: value[0] for name, value in batcher.make(n)[0].items()}
        indices, numbers = batcher._streams[0].row(n)
        layouts = unpack_row(row)
        assert len(layouts) == len(indices)
        for layout, index, number in zip(layouts, indices, numbers, strict=True):
            record = scenes_codes[index]
            build = documents.PAIR_FORMATS[FORMATS[int(source.format_of(index, number))]]
            expected = lay_out(
                build(text.encode(record["caption"]), documents.Image(record["codes"][0])), vocabulary, FORM
            )
            assert layout.tokens.tolist() == expected.tokens.tolist()


def test_contents_of_rows_are_known_without_reading_them(make, vocabulary):
    """Truncated texts included: 24 positions hold an image and less than most captions."""
    for limits in (RowLimits(256), RowLimits(24, truncate=True)):
        batcher = make({"pairs": 1.0}, limits, batch_size=8)
        batch, errors = batcher.make(2)
        ids, special = batch["tokens"], [id_ for _, id_ in vocabulary.special]
        used = batch["document"] >= 0
        is_mark, is_code = np.isin(ids, special), ids >= vocabulary.codes_start
        images = (batch["image_start"] >= 0).sum(axis=1)
        marks = (used & is_mark).sum(axis=1) - 2 * images  # BOV and EOV are an image's own
        expected = np.stack([marks, (used & ~is_mark & ~is_code).sum(axis=1), images], axis=1)
        assert not errors and batcher.blocks == (2048,) == (batcher._streams[0].packing.block,)
        np.testing.assert_array_equal([batcher.contents(16 + n) for n in range(8)], expected)


def test_formats_and_sources_keep_their_shares(make):
    batcher = make()
    numbers = np.arange(6000)
    formats = batcher._sources[0].format_of(numbers, numbers)
    assert np.abs(np.bincount(formats, minlength=4) - np.array([2400, 2400, 600, 600])).max() <= 2
    sources = np.concatenate([batcher.make(step)[0]["source"] for step in range(10)])
    assert np.abs(np.bincount(sources) - [90, 30]).max() <= 1


def test_documents_of_their_own_are_read_and_measured(own_codes, text, vocabulary):
    source = RecordDocuments(own_codes, text, {"own": 1.0}, 0)
    for index in range(12):
        document = source.document(index, index)
        assert documents.count(document) == tuple(source.counts(np.array([index]), np.array([index]))[0])
    answers = [s for s in source.document(0, 0).segments if s.answer]
    assert [type(s).__name__ for s in answers] == ["Image", "Mark", "Text", "Mark"]
    assert answers[0].content.tolist() == own_codes[0]["codes"][1].tolist()
    assert source.document(1, 1).learn == "all" and len(source.document(1, 1).segments) == 7


def test_a_record_without_what_its_format_needs_shows_its_image_only(own_codes, text):
    pairs = RecordDocuments(own_codes, text, {"text_to_image": 1.0}, 0)
    every = np.arange(60)
    named = [FORMATS[i] for i in pairs.format_of(every, every)]
    assert named == ["text_to_image" if i % 4 else "image_only" for i in range(60)]
    own = RecordDocuments(own_codes, text, {"own": 1.0}, 0)
    assert [FORMATS[i] for i in own.format_of(every, every)] == [
        "image_only" if i % 3 == 2 else "own" for i in range(60)
    ]


def test_lengths_are_measured_once_and_kept_beside_the_shards(own_codes, text, monkeypatch):
    first = text_lengths(own_codes, text)
    assert first[1, 0] == len(text.encode(own_codes[1]["caption"])) and not first[0, 0]
    monkeypatch.setattr(records, "_lengths", None)  # a second measurement would call it
    np.testing.assert_array_equal(text_lengths(own_codes, text), first)


def test_what_cannot_be_read_leaves_its_place_empty(make, scenes_codes, text, monkeypatch):
    intact = make({"pairs": 1.0}).make(3)[0]
    broken = make({"pairs": 1.0})
    source = broken._sources[0]
    victims = set(broken._streams[0].row(36)[0][:2].tolist())

    def document(index, number, read=source.document):
        if index in victims:
            raise BadRecord("corrupt record")
        return read(index, number)

    monkeypatch.setattr(source, "document", document)
    batch, errors = broken.make(3)
    assert [why for _, why in errors] == ["corrupt record"] * 2
    assert batch["document"][0].max() == intact["document"][0].max() - 2
    for name in batch:
        np.testing.assert_array_equal(batch[name][1:], intact[name][1:])
    with pytest.raises(UserError, match="documents could not be used"):
        RowLoader(broken, Data(max_bad_fraction=0.02)).batch_at(3)


def test_another_length_than_was_stored_is_a_bad_record(make, monkeypatch):
    batcher = make({"pairs": 1.0})
    source = batcher._sources[0]
    monkeypatch.setattr(source, "document", lambda index, number: documents.text_only([1, 2, 3]))
    layouts, errors = batcher.row(0)
    assert not layouts and {why for _, why in errors} == {"it has not the length that was stored"}


def test_batches_made_ahead_are_those_of_their_steps(make):
    loader = RowLoader(make(), Data(threads=2, prefetch=3))
    with loader.iterate(5, 9) as batches:
        for step, batch in enumerate(batches, start=5):
            same(batch, loader.batch_at(step))
    assert loader.stats.bad == 0 and loader.report() is None


def test_limits_on_images_and_targets_are_kept(make):
    batcher = make({"pairs": 1.0}, RowLimits(256, images=3, targets=170))
    batch = batcher.make(0)[0]
    assert batch["image_start"].shape == (12, 3) and (batch["target"].sum(axis=1) <= 170).all()
    assert batcher.max_targets == 170 and make().max_images == 256 // 18


def test_a_document_longer_than_a_row_is_refused_or_its_text_is_cut(make):
    with pytest.raises(UserError, match="of codes:.* a row holds .40.; take a longer context, or let text be cut"):
        make({"pairs": 1.0}, RowLimits(40)).make(0)
    batch, errors = make({"pairs": 1.0}, RowLimits(40, truncate=True)).make(0)
    assert not errors and (batch["image_length"] % 16 == 0).all() and batch["image_length"].any()
    with pytest.raises(UserError, match="a row holds .19."):
        make({"pairs": 1.0}, RowLimits(19, truncate=True)).make(0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, c, o, t, v: RecordDocuments(c, t, {"text_to_video": 1}, 0), "did you mean text_to_image?"),
        (lambda m, c, o, t, v: RecordDocuments(c, t, {"own": 1}, 0), "has a document of its own; leave out"),
        (lambda m, c, o, t, v: m(batch_size=10, shard_count=4), "does not divide among 4 hosts"),
        (
            lambda m, c, o, t, v: RowBatcher(
                {"a": RecordDocuments(c, t, PAIRS, 0)}, {"a": 1}, v[0], FORM, RowLimits(256), seed=0, batch_size=1
            ),
            "has 512 image codes, the vocabulary 100",
        ),
        (
            lambda m, c, o, t, v: RowBatcher(
                {"a": RecordDocuments(c, t, PAIRS, 0)}, {"a": 1}, v[1], FORM, RowLimits(256), seed=0, batch_size=1
            ),
            "use one text tokenizer",
        ),
    ],
)
def test_mistakes_are_one_line(make, scenes_codes, own_codes, text, call, message):
    wrong = [Vocabulary.extend(512, 100, text_fingerprint=text.fingerprint), Vocabulary.extend(512, 512)]
    with pytest.raises(UserError, match=message) as error:
        call(make, scenes_codes, own_codes, text, wrong)
    assert "\n" not in str(error.value)


def test_worker_processes_get_the_index_of_the_epochs_before(make):
    there = make()
    epochs = [there._streams[0].epoch_rows(epoch) for epoch in (0, 1)]
    step = int(sum(epochs) / 0.75) // 12 + 10  # pairs are in their third epoch
    loader = RowLoader(make(), Data(threads=1))
    with loader.iterate(step, step + 1) as batches:
        copy = pickle.loads(pickle.dumps(batches._loader.batcher))  # no batch has been asked for
        assert copy._streams[0]._epoch_ends[:2] == np.cumsum(epochs).tolist()
        same(next(batches), there.make(step)[0])
    too_long = RowLoader(make({"pairs": 1.0}, RowLimits(40)), Data(threads=1))
    with too_long.iterate(step) as batches, pytest.raises(UserError, match="take a longer context"):
        next(batches)  # and not before: a run closes what it has opened


class Texts:
    """Records of texts alone; a record's text is what `read` says."""

    num_codes, origin, name = 0, "o", "parquet:x"

    def __init__(self, identity, cache_dir, read):
        self.identity, self.cache_dir, self.without_images = identity, str(cache_dir), read

    def __len__(self):
        return 9


def test_kept_lengths_are_found_again_only_by_the_same_source_with_the_same_texts(text, tmp_path, monkeypatch):
    def lengths(identity, caption):
        read = lambda index: {"caption": caption * (index + 1), "images": []}  # noqa: E731
        return picture_lengths(Texts(identity, tmp_path, read), text)[:, 0].tolist()

    def wanted(caption):
        return [len(text.encode(caption * n)) for n in range(1, 10)]

    assert wanted("a red disc") != wanted("disc")
    assert lengths("one", "a red disc") == wanted("a red disc")
    assert lengths("one", "disc") == wanted("disc")
    measured = []
    real = records._lengths
    monkeypatch.setattr(records, "_lengths", lambda *args: measured.append(args[1]) or real(*args))
    assert lengths("one", "a red disc") == wanted("a red disc") and not measured
    assert lengths("two", "a red disc") == wanted("a red disc") and len(measured) == 9
