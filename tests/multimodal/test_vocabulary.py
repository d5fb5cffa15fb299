import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddt_jax.errors import UserError
from ddt_jax.multimodal.vocabulary import SPECIAL, Vocabulary

LLAMA = Vocabulary.extend(128_256, 65_536, existing={"BOS": 128_000, "EOS": 128_001}, multiple=128)


def test_text_ids_and_existing_special_tokens_keep_their_place():
    assert (LLAMA["BOS"], LLAMA["EOS"]) == (128_000, 128_001)
    own = [LLAMA[name] for name in SPECIAL if name not in ("BOS", "EOS")]
    assert own == list(range(128_256, 128_256 + len(own)))
    assert LLAMA.size % 128 == 0 and LLAMA.size == LLAMA.codes_start + 65_536
    assert 0 <= LLAMA.codes_start - (128_256 + len(own)) < 128


@given(st.integers(0, 300), st.integers(0, 200), st.integers(1, 64), st.integers(0, 3))
def test_every_id_means_one_thing(text_size, num_codes, multiple, more):
    names = tuple(f"X{i}" for i in range(more))
    v = Vocabulary.extend(text_size, num_codes, more=names, multiple=multiple)
    uses = list(range(text_size)) + [v[n] for n in SPECIAL + names] + v.code_to_id(np.arange(num_codes)).tolist()
    assert len(set(uses)) == len(uses) and set(uses) <= set(range(v.size))
    assert v.size % multiple == 0 and v.size - len(uses) < multiple
    assert v.is_text(np.arange(v.size)).sum() == text_size and v.is_code(np.arange(v.size)).sum() == num_codes


@given(st.lists(st.integers(0, 65_535)))
def test_codes_come_back(codes):
    ids = LLAMA.code_to_id(np.array(codes, np.int64))
    assert ids.dtype == np.int32 and LLAMA.id_to_code(ids).tolist() == codes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda v: v["BVO"], "BVO is not a special token; did you mean BOV?"),
        (lambda v: v.code_to_id([3, 65_536]), r"65536 is not an image code; they lie in \[0, 65536\)"),
        (lambda v: v.code_to_id([-1]), "-1 is not an image code"),
        (lambda v: v.id_to_code([5]), "5 is not the id of an image code"),
        (lambda v: v.id_to_code([v.size]), "is not the id of an image code"),
        (lambda v: v.check_text([128_256]), "128256 is not a text id"),
        (lambda v: v.code_to_id([0.5]), "must be whole numbers, got float64"),
        (lambda v: Vocabulary.extend(10, 4, existing={"BOS": 10}), "BOS=10 is not one of the 10 text ids"),
        (lambda v: Vocabulary.extend(10, 4, more=("BOS",)), "share a name or an id"),
        (lambda v: Vocabulary.extend(10, 4, existing={"BOS": 1, "EOS": 1}), "share a name or an id"),
        (lambda v: Vocabulary.extend(1 << 31, 4), "below 2"),
        (lambda v: Vocabulary.from_json("{}"), "not a vocabulary"),
        (lambda v: Vocabulary.from_json("[]"), "not a vocabulary"),
        (lambda v: Vocabulary.from_json(v.to_json().replace('"format": 1', '"format": 9')), "format 9"),
        (lambda v: Vocabulary.from_json(v.to_json().replace('"PAD"', '"PADDING"')), "no special token PAD"),
        (lambda v: Vocabulary.from_json(v.to_json().replace('"codes_start": 1', '"codes_start": ')), "overlap"),
    ],
)
def test_mistakes_are_one_line(call, message):
    with pytest.raises(UserError, match=message) as error:
        call(LLAMA)
    assert "\n" not in str(error.value)


def test_json_and_fingerprint_hold_the_layout():
    again = Vocabulary.from_json(LLAMA.to_json())
    assert again == LLAMA and again.fingerprint == LLAMA.fingerprint
    assert json.loads(LLAMA.to_json())["special"]["BOS"] == 128_000
    others = [
        Vocabulary.extend(128_256, 65_536, existing={"BOS": 128_000, "EOS": 128_002}, multiple=128),
        Vocabulary.extend(128_256, 65_536, existing={"BOS": 128_000, "EOS": 128_001}, multiple=256),
        Vocabulary.extend(128_256, 65_535, existing={"BOS": 128_000, "EOS": 128_001}, multiple=128),
        Vocabulary.extend(128_256, 65_536, existing={"BOS": 128_000, "EOS": 128_001}, multiple=128, more=("NEW",)),
    ]
    assert len({v.fingerprint for v in [LLAMA, *others]}) == 5


def test_ids_for_a_person():
    ids = [LLAMA["BOS"], 17, LLAMA["BOV"], *LLAMA.code_to_id([4]), LLAMA["EOV"]]
    assert LLAMA.describe(ids) == "BOS 17 BOV v4 EOV"
