"""Text tokenizers behind one interface: sentencepiece models and Hugging Face's tokenizer.json.

Text is data: nothing in it is ever read as a special token. No JAX here: data workers encode captions.
"""

import abc
import hashlib
import io
from collections.abc import Iterable

import numpy as np

from ddt_jax.errors import UserError

_SPACE = "\u2581"  # sentencepiece's stand-in for a space; as a character of the text it needs care
_STAND_INS = [chr(c) for c in range(0xF8F0, 0xF900)]  # private use: no model has pieces for them
_FILES = ("tokenizer.json", "tokenizer.model")  # by what a folder that holds one calls it
# Usual names of special tokens, by what the vocabulary calls them.
_USUAL = {
    "BOS": ("<|begin_of_text|>", "<s>", "<bos>", "[BOS]", "<|startoftext|>"),
    "EOS": ("<|end_of_text|>", "</s>", "<eos>", "<|endoftext|>", "[EOS]"),
    "PAD": ("<pad>", "<|pad|>", "[PAD]"),
}


class TextTokenizer(abc.ABC):
    """Text to ids and back. Picklable.

    Attributes:
      data: the model as its file holds it.
      vocab_size: ids lie in [0, vocab_size).
      special: id of BOS, EOS and PAD, of those that the model has; for `Vocabulary.extend(existing=...)`.
    """

    data: bytes
    vocab_size: int
    special: dict[str, int]

    def __reduce__(self):
        return (type(self), (self.data,))

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model."""
        return hashlib.sha256(self.data).hexdigest()

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids int32 [n] of a text, without special tokens."""

    def decode(self, ids) -> str:
        """The text of ids; bytes that are no UTF-8 become U+FFFD.

        Raises:
          UserError: an id lies outside the model.
        """
        ids = np.asarray(ids, np.int64)
        outside = ids[(ids < 0) | (ids >= self.vocab_size)] if ids.size else ids
        if outside.size:
            raise UserError(f"text: {outside[0]} is no id of the text tokenizer; they lie in [0, {self.vocab_size})")
        return self._decode(ids.tolist())

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str:
        """Ids that are in range."""


class SentencePiece(TextTokenizer):
    """A sentencepiece model, from the bytes of its file. Raises UserError if they are none."""

    def __init__(self, data: bytes):
        import sentencepiece

        self.data = data
        try:
            if not data:  # the package takes nothing for a model that will be loaded later
                raise TypeError
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
        except (RuntimeError, TypeError, UnicodeDecodeError):  # the last one: of bytes that its own message quotes
            raise UserError("text: this is not a sentencepiece model") from None
        self.vocab_size = self._model.vocab_size()
        ids = {"BOS": self._model.bos_id(), "EOS": self._model.eos_id(), "PAD": self._model.pad_id()}
        self.special = {name: i for name, i in ids.items() if i >= 0}
        has_bytes = self._model.is_byte(self._model.piece_to_id("<0xE2>"))
        self._space = [self._model.piece_to_id(f"<0x{b:02X}>") for b in _SPACE.encode()] if has_bytes else []

    def encode(self, text):
        stand_in = next((c for c in _STAND_INS if c not in text), "")
        if _SPACE not in text or not self._space or not stand_in:
            return np.asarray(self._model.encode(text), np.int32)
        # The model would take the character for a space. Another one is put through, and its bytes changed back.
        ids = self._model.encode(text.replace(_SPACE, stand_in))
        of_stand_in = [self._model.piece_to_id(f"<0x{b:02X}>") for b in stand_in.encode()]
        at = 0
        while at < len(ids):
            if ids[at : at + len(of_stand_in)] == of_stand_in:
                ids[at : at + len(of_stand_in)] = self._space
                at += len(self._space)
            else:
                at += 1
        return np.asarray(ids, np.int32)

    def _decode(self, ids):
        return self._model.decode(ids)


class HuggingFace(TextTokenizer):
    """A tokenizer.json, from the bytes of the file. Raises UserError if they are none."""

    def __init__(self, data: bytes):
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise UserError(
                "text: tokenizer.json needs the package tokenizers; run: pip install 'ddt-jax[tokenizers]'"
            ) from None
        self.data = data
        try:
            self._model = tokenizers.Tokenizer.from_str(data.decode())
        except Exception as error:  # the package raises bare Exceptions
            raise UserError(f"text: this is not a tokenizer.json ({str(error).splitlines()[0]})") from None
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # "<s>" in a caption is three characters
        # Ids may have gaps; a checkpoint's embedding covers them.
        self.vocab_size = 1 + max(self._model.get_vocab(with_added_tokens=True).values(), default=-1)
        found = {name: self._first_id(pieces) for name, pieces in _USUAL.items()}
        self.special = {name: i for name, i in found.items() if i is not None}

    def _first_id(self, pieces):
        return next((i for i in map(self._model.token_to_id, pieces) if i is not None), None)

    def encode(self, text):
        return np.asarray(self._model.encode(text, add_special_tokens=False).ids, np.int32)

    def _decode(self, ids):
        return self._model.decode(ids, skip_special_tokens=False)


def open_text_tokenizer(path) -> TextTokenizer:
    """A text tokenizer from its file: tokenizer.json (or the folder it is in), or a sentencepiece model.

    Raises:
      UserError: there is no such file, or it is neither.
    """
    from etils import epath

    path = epath.Path(path)
    if path.is_dir():
        path = next((path / name for name in _FILES if (path / name).exists()), path)
        if path.is_dir():
            raise UserError(f"text: {path} holds no tokenizer.json and no tokenizer.model; name the file")
    if not path.exists():
        raise UserError(f"text: {path} does not exist; give a sentencepiece model or a tokenizer.json")
    data = path.read_bytes()
    try:
        return HuggingFace(data) if data[:1] == b"{" else SentencePiece(data)
    except UserError as error:
        raise UserError(f"{error}: {path}") from None


def holds_text_tokenizer(folder) -> bool:
    """Whether `save_text_tokenizer` has been there, or someone who names files likewise."""
    from etils import epath

    return any((epath.Path(folder) / name).exists() for name in _FILES)


def save_text_tokenizer(text: TextTokenizer, folder) -> None:
    """Writes its file, byte for byte, where `open_text_tokenizer` finds it."""
    from etils import epath

    from ddt_jax.io import atomic

    folder = epath.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(folder / _FILES[text.data[:1] != b"{"], text.data)


def train_sentencepiece(texts: Iterable[str], vocab_size: int, path=None) -> SentencePiece:
    """Trains byte-pair encoding with byte fallback, so that any text comes back exactly; writes it to `path` if given.

    Args:
      vocab_size: at most so many ids, 257 of them for bytes and "unknown"; fewer if the texts have no more words.

    Raises:
      UserError: the texts are empty, or have more characters than the vocabulary has ids.
    """
    import sentencepiece

    from ddt_jax.io import atomic

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(text for text in texts if text),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            byte_fallback=True,
            # Nothing may be lost: no normalisation, every space kept. The vocabulary has special tokens of its own.
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            max_sentence_length=1 << 20,  # longer ones are left out, the default being 4192 bytes
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(_training_error(str(error), vocab_size)) from None
    if path is not None:
        atomic.write_bytes(path, model.getvalue())
    return SentencePiece(model.getvalue())


def _training_error(message, vocab_size):
    if "required_chars" in message:
        need = message.split("vs ")[-1].split(".")[0]
        return f"text: a vocabulary of {vocab_size} has no room for bytes and characters; take {need} or more"
    return f"text: cannot train on these texts ({message.splitlines()[0].split(')] ')[-1] or 'they are empty'})"
