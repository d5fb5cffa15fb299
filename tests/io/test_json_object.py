import pytest

from ddt_jax.io import json_object


def test_an_object_comes_back():
    assert json_object.loads(b'{"a": [1, {"b": null}]}') == {"a": [1, {"b": None}]}


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "3", b"\xff", "[" * 100_000, '{"a":' * 100_000])
def test_all_else_is_a_value_error(text):
    with pytest.raises(ValueError):
        json_object.loads(text)
