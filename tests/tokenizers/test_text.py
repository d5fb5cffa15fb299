import io
import pickle

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from ddt_jax.data import scenes
from ddt_jax.errors import UserError
from ddt_jax.tokenizers.text import HuggingFace, SentencePiece, open_text_tokenizer, train_sentencepiece

CAPTIONS = [scenes.phrase(scenes.sample_scene("train", i).objects, i % scenes.NUM_PHRASINGS) for i in range(600)]
AWKWARD = ["", " ", "  a  b ", "\u2581", "a\u2581 \u2581b\uf8f0", "\n\t\0\r\n", "é\u200d😀\ufeff", "<s></s><unk><0x41>"]
AWKWARD += ["".join(map(chr, range(0xF8F0, 0xF900)))]


def hugging_face():
    """A small byte-level BPE, as LLaMA-3 has it, with special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    model.train_from_iterator(CAPTIONS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    model.add_special_tokens([AddedToken(t, special=True) for t in ("<|begin_of_text|>", "<|end_of_text|>")])
    model.enable_padding(length=64)
    return HuggingFace(model.to_str().encode())


@pytest.fixture(scope="module", params=["sentencepiece", "tokenizer.json"])
def tokenizer(request):
    return train_sentencepiece(CAPTIONS, 400) if request.param == "sentencepiece" else hugging_face()


def test_captions_come_back_in_few_tokens(tokenizer):
    ids = [tokenizer.encode(text) for text in CAPTIONS]
    assert all(i.dtype == np.int32 for i in ids)
    assert [tokenizer.decode(i) for i in ids] == CAPTIONS
    assert np.mean([len(i) for i in ids]) < np.mean([len(text) for text in CAPTIONS]) / 3


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(deadline=None, max_examples=60)
@given(text=st.text())
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not ids.size or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


def test_text_never_makes_special_tokens():
    tokenizer = hugging_face()
    assert set(tokenizer.special) == {"BOS", "EOS"}
    ids = tokenizer.encode("a <|begin_of_text|> b<|end_of_text|>")
    assert not set(ids.tolist()) & set(tokenizer.special.values())
    assert tokenizer.decode(ids) == "a <|begin_of_text|> b<|end_of_text|>"


def test_broken_characters_are_marked(tokenizer):
    ids = tokenizer.encode("😀")
    assert "\ufffd" in tokenizer.decode(ids[:-1])


def test_files_and_copies_are_the_same_tokenizer(tokenizer, tmp_path):
    name = "tokenizer.json" if isinstance(tokenizer, HuggingFace) else "tokenizer.model"
    (tmp_path / name).write_bytes(tokenizer.data)
    copy = pickle.loads(pickle.dumps(tokenizer))
    for other in (open_text_tokenizer(tmp_path / name), open_text_tokenizer(tmp_path), copy):
        assert type(other) is type(tokenizer) and other.fingerprint == tokenizer.fingerprint
        assert other.encode("a red circle").tolist() == tokenizer.encode("a red circle").tolist()


def test_training_gives_the_same_model_each_time_and_writes_it(tmp_path):
    one, other = train_sentencepiece(CAPTIONS, 300, tmp_path / "m" / "text.model"), train_sentencepiece(CAPTIONS, 300)
    assert one.data == other.data == (tmp_path / "m" / "text.model").read_bytes()
    assert one.vocab_size == 300 and one.special == {}
    assert train_sentencepiece(CAPTIONS, 10_000).vocab_size < 600  # as many as there are words


def test_a_model_with_pieces_that_are_no_text_is_none(tmp_path):
    """The package complains of a piece that is there twice, and its complaint cannot be decoded."""
    data = train_sentencepiece(CAPTIONS, 300).data
    for letter in (b"e", b"r"):
        assert b"\n\x01" + letter in data
        data = data.replace(b"\n\x01" + letter, b"\n\x01\x80")
    (tmp_path / "twice.model").write_bytes(data)
    with pytest.raises(UserError, match="not a sentencepiece model.*twice"):
        open_text_tokenizer(tmp_path / "twice.model")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda tmp: open_text_tokenizer(tmp / "none.model"), "none.model does not exist"),
        (lambda tmp: open_text_tokenizer(tmp), "holds no tokenizer.json"),
        (lambda tmp: open_text_tokenizer(tmp / "junk"), "not a sentencepiece model.*junk"),
        (lambda tmp: open_text_tokenizer(tmp / "empty"), "not a sentencepiece model.*empty"),
        (lambda tmp: open_text_tokenizer(tmp / "junk.json"), "not a tokenizer.json.*junk.json"),
        (lambda tmp: train_sentencepiece(CAPTIONS, 100), "a vocabulary of 100 has no room .* take 28"),
        (lambda tmp: train_sentencepiece([], 300), "cannot train on these texts"),
        (lambda tmp: train_sentencepiece(CAPTIONS, 300).decode([300]), r"300 is no id .* \[0, 300\)"),
        (lambda tmp: train_sentencepiece(CAPTIONS, 300).decode([-1]), "-1 is no id"),
    ],
)
def test_mistakes_are_one_line(tmp_path, call, message):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "junk").write_bytes(b"\x00\x01junk")
    (tmp_path / "sub" / "empty").touch()
    (tmp_path / "sub" / "junk.json").write_text('{"a": 1}')
    with pytest.raises(UserError, match=message) as error:
        call(tmp_path / "sub")
    assert "\n" not in str(error.value)


def test_a_model_without_bytes_is_still_read():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    tokenizer = SentencePiece(model.getvalue())
    assert set(tokenizer.special) == {"BOS", "EOS"}
    assert tokenizer.decode(tokenizer.encode(CAPTIONS[0])) == CAPTIONS[0]
