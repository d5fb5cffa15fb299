from dataclasses import replace

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ddt_jax import settings
from ddt_jax.data.codes import CodesWriter, Plan
from ddt_jax.data.pictures import PictureRecords
from ddt_jax.errors import UserError
from ddt_jax.experiment import build
from ddt_jax.multimodal.code_embedding import VECTORS
from ddt_jax.tokenizers.text import train_sentencepiece
from ddt_jax.training import corpus

CAPTIONS = ["a red circle", "two blue squares", "a small green cross", "one large ring"]


def write(folder, tokenizer="f" * 64, codebook=64, tokens=4, captions=CAPTIONS, **more):
    plan = Plan(tokenizer, tokens, codebook, 32, "coarse_to_fine", False, "scenes:train", 40, 40)
    writer = CodesWriter(str(folder), plan)
    rng = np.random.default_rng(0)
    records = (
        {"codes": rng.integers(0, codebook, (1, tokens)), "index": i}
        | ({"caption": captions[i % len(captions)]} if captions else {})
        | more
        for i in range(40)
    )
    writer.write(0, records)
    writer.write_vectors(np.arange(3 * codebook).reshape(codebook, 3))
    writer.complete()
    return str(folder)


def experiment(*folders, **sequences):
    parts = tuple(settings.CodesFolder(folder=folder) for folder in folders)
    s = settings.Sequences(sources=parts, context=64, text_vocab_size=320, **sequences)
    return settings.Experiment(
        model=settings.Multimodal(), sequences=s, train=settings.Train(batch_size=4), data=settings.Data()
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write(tmp_path_factory.mktemp("codes") / "a")


def test_sizes_are_filled_in_from_text_and_codes(folder):
    s, found = corpus.resolve(experiment(folder, vocab_multiple=64))
    assert s.model.image == settings.CodeImages(
        num_tokens=4, codebook_size=64, tokenizer="f" * 64, order="coarse_to_fine"
    )
    assert s.model.transformer.vocab_size == found.vocabulary.size and found.vocabulary.size % 64 == 0
    assert found.text.decode(found.text.encode(CAPTIONS[0])) == CAPTIONS[0]
    assert corpus.resolve(s)[0] == s
    batch = corpus.open_rows(s, found, s.sequences.sources).batch_at(3)
    assert batch["rows"].shape == (4, 64) and batch["tokens"].max() < found.vocabulary.size


def test_targets_are_answers_alone_where_that_is_set(folder):
    learned = {}
    for answers_only in (False, True):
        s, found = corpus.resolve(experiment(folder, answers_only=answers_only))
        batch = corpus.open_rows(s, found, s.sequences.sources).batch_at(0)
        given = np.take_along_axis(batch["given"], np.maximum(batch["rows"] + 1, 0), axis=1)[batch["rows"] >= 0]
        learned[answers_only] = (np.sum(given > 0), np.sum(given == 0))
    assert learned[True] == (0, learned[False][1]) and learned[False][0] > 0


def test_codes_stand_last_in_the_vocabulary_and_so_do_their_vectors(folder, tmp_path):
    s = experiment(folder, vocab_multiple=64)
    s, found = corpus.resolve(replace(s, model=replace(s.model, image=settings.CodeImages(code_vectors=True))))
    assert s.model.image.code_width == 3
    vectors = corpus.code_vectors(s)
    assert vectors.shape == (found.vocabulary.size, 3) and not vectors[:-64].any()
    np.testing.assert_array_equal(vectors[found.vocabulary.code_to_id(np.array([0, 63]))], [[0, 1, 2], [189, 190, 191]])
    # A new run gets them before its first step; they are no parameters.
    built = build(s, jax.devices()[:1])
    np.testing.assert_array_equal(built.init().extra[VECTORS], vectors)

    bare = write(tmp_path / "bare")
    (tmp_path / "bare" / "code_vectors.npy").unlink()
    s = experiment(bare)
    with pytest.raises(UserError, match="code_vectors.npy does not hold the vectors of codes; run the same"):
        corpus.resolve(replace(s, model=replace(s.model, image=settings.CodeImages(code_vectors=True))))


def test_a_run_keeps_the_text_tokenizer_that_it_began_with(folder, tmp_path):
    s, found = corpus.resolve(experiment(folder))
    corpus.save(tmp_path, found)
    other = tmp_path / "other.model"
    train_sentencepiece(["other words altogether, said again"], 300, other)
    again = corpus.resolve(experiment(folder, text=str(other)), str(tmp_path))[1]
    assert again.text.fingerprint == found.text.fingerprint != corpus.resolve(experiment(folder, text=str(other)))[1]
    loaded = corpus.load(str(tmp_path), s)
    assert loaded.vocabulary == found.vocabulary and loaded.text.data == found.text.data and loaded.form == found.form


@pytest.mark.parametrize("beside", ["text", "source"])
def test_a_run_that_begins_with_weights_reads_as_they_did(folder, tmp_path, beside):
    model = train_sentencepiece(["words of the weights, said before"], 300)
    (tmp_path / beside).mkdir()
    (tmp_path / beside / "tokenizer.model").write_bytes(model.data)
    s = replace(experiment(folder), init_from=str(tmp_path))
    assert corpus.resolve(s)[1].text.fingerprint == model.fingerprint
    other = tmp_path / "other.model"
    train_sentencepiece(["other words altogether, said again"], 300, other)
    s = replace(s, sequences=replace(s.sequences, text=str(other)))
    with pytest.raises(UserError, match="another text tokenizer than that of init_from"):
        corpus.resolve(s)


def test_what_documents_of_their_own_say_makes_the_text_tokenizer_too(folder, tmp_path):
    said = "recolour the pentagon"
    edits = write(tmp_path / "edits", captions=(), turns=[["USER", [0, said]], ["ASSISTANT", [0]]])
    without, with_it = (corpus.resolve(experiment(*folders))[1].text for folders in ([folder], [folder, edits]))
    assert len(with_it.encode(said)) <= 3 < len(without.encode(said))
    assert len(with_it.encode(CAPTIONS[0])) <= 8  # in bytes it would be 12: the first folder's words count too


def test_mistakes_are_one_line(folder, tmp_path):
    other = write(tmp_path / "b", tokenizer="e" * 64)
    silent = write(tmp_path / "c", captions=())
    right = experiment(folder)
    model = right.model
    for s, message in (
        (experiment(), "sequences.sources is empty"),
        (experiment(str(tmp_path / "none")), "holds no codes"),
        (experiment(folder, other), "made by different tokenizers"),
        (experiment(silent), "set sequences.text"),
        (replace(right, model=replace(model, image=settings.CodeImages(num_tokens=9))), "num_tokens=9, but codes:"),
        (
            replace(right, model=replace(model, transformer=settings.Transformer(vocab_size=7))),
            "vocab_size=7, but text and codes need",
        ),
    ):
        with pytest.raises(UserError, match=message) as error:
            corpus.resolve(s)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="name the workdir of a multimodal run"):
        corpus.load(str(tmp_path), right)


def of_pictures(tmp_path, **changes):
    part = settings.Pictures(records=60, formats=settings.Formats(text_to_image=0.5, image_to_text=0.5))
    values = {
        "model": settings.Multimodal(image=settings.DiffusionImages(patch_size=8)),
        "sequences": settings.Sequences(sources=(part,), context=160, text_vocab_size=320),
        "train": settings.Train(batch_size=4),
        "data": settings.Data(cache_dir=str(tmp_path)),
    }
    return settings.Experiment(**values | changes)


def test_pictures_fill_rows_where_images_are_no_codes(tmp_path):
    s, found = corpus.resolve(of_pictures(tmp_path))
    assert found.vocabulary.num_codes == 0 and s.model.transformer.vocab_size == found.vocabulary.size
    assert found.form.rows == 16 and found.form.shape == (32, 32, 3)
    batch = corpus.open_rows(s, found, s.sequences.sources).batch_at(3)
    model = build(s, jax.devices()[:1]).model
    assert set(model.inputs) <= set(batch)
    used = batch["image_start"] >= 0
    assert used.any() and {True, False} == set(batch["image_answer"][used].tolist())
    source = PictureRecords("scenes:train", s.data, 60)
    drawn = {record["images"][0].tobytes(): record["caption"] for record in map(source.__getitem__, range(60))}
    for row, i in zip(*np.nonzero(used), strict=True):
        here = batch["document"][row] == batch["image_document"][row, i]
        ids = batch["tokens"][row][here]
        words = found.text.decode(ids[ids < found.text.vocab_size])
        assert drawn[batch["image_content"][row, i].tobytes()] in words  # each image stands with its own caption
    corpus.save(tmp_path / "run", found)
    assert corpus.load(tmp_path / "run", s).form == found.form


def test_lengths_of_captions_are_measured_once(tmp_path, monkeypatch):
    s, found = corpus.resolve(of_pictures(tmp_path))
    first = corpus.open_rows(s, found, s.sequences.sources).batch_at(0)
    monkeypatch.setattr("ddt_jax.multimodal.records._lengths", None)  # measuring again would call it
    again = corpus.open_rows(s, found, s.sequences.sources).batch_at(0)
    np.testing.assert_array_equal(first["tokens"], again["tokens"])


def test_sources_that_images_are_not_made_of_are_one_line(folder, tmp_path):
    s = of_pictures(tmp_path)
    with pytest.raises(
        UserError, match="scenes:train is a source of pictures, but model.image.kind='codes' reads codes"
    ):
        corpus.resolve(replace(s, model=settings.Multimodal()))
    codes = replace(s.sequences, sources=(settings.CodesFolder(folder=folder),))
    with pytest.raises(UserError, match="is a source of codes, but model.image.kind='diffusion' reads pictures"):
        corpus.resolve(replace(s, sequences=codes))


SAID = ["a red circle, said at length", "", "two squares"]


def test_texts_alone_stand_beside_codes(folder, tmp_path):
    pq.write_table(pa.table({"text": SAID * 20}), tmp_path / "a.parquet")
    s = experiment(folder)
    texts = settings.Texts(source=f"parquet:{tmp_path}/a.parquet")
    both = replace(s, sequences=replace(s.sequences, sources=(texts, *s.sequences.sources)))
    both = replace(both, data=settings.Data(cache_dir=str(tmp_path), max_bad_fraction=0.5))
    both, found = corpus.resolve(both)
    assert both.model.image.num_tokens == 4 and both.model.image.tokenizer == "f" * 64
    batch = corpus.open_rows(both, found, both.sequences.sources).batch_at(0)
    of_text = batch["source"] == 0
    assert of_text.sum() == 2 and not (batch["tokens"][of_text] >= found.vocabulary.codes_start).any()
    assert (batch["tokens"][~of_text] >= found.vocabulary.codes_start).any()
    said = set()
    for step in range(6):
        batch = corpus.open_rows(both, found, both.sequences.sources).batch_at(step)
        rows = zip(*(batch[name][batch["source"] == 0] for name in ("tokens", "document")), strict=True)
        said |= {found.text.decode(ids[at == n][1:-1]) for ids, at in rows for n in range(at.max() + 1)}
    assert said == {"a red circle, said at length", "two squares"}  # what has no text is left out
    # Longer than a row, they go on in further ones.
    rows = replace(s.sequences, sources=(replace(texts, split=True), *s.sequences.sources), context=8, truncate=False)
    loader = corpus.open_rows(replace(both, sequences=rows), found, rows.sources[:1])
    _, length = loader.batcher.records[0]
    assert length == sum(max(1, -(-len(found.text.encode(t)) // 6)) for t in SAID) * 20
    with pytest.raises(UserError, match="context=8 with sequences.targets=1 has no room for a piece of a text"):
        corpus.open_rows(replace(both, sequences=replace(rows, targets=1)), found, rows.sources[:1])
    alone = replace(s, sequences=replace(s.sequences, sources=(texts,)))
    with pytest.raises(UserError, match="sequences.sources has texts alone; a folder of codes must say"):
        corpus.resolve(alone)
