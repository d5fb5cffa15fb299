"""Lists of tensors in one line."""

from ddt_jax.interop import names


def test_lines_that_differ_in_one_number_are_folded_in_the_order_of_their_first():
    lines = [f"m.blocks.{i}.w is missing" for i in (0, 1, 2, 11, 4)] + ["pos_embed has no place"]
    lines += ["m.blocks.7.b is missing", "m.0.w is 1.5 x 2"]
    assert names.folded(lines) == [
        "m.blocks.{0..2,4,11}.w is missing",
        "pos_embed has no place",
        "m.blocks.7.b is missing",
        "m.0.w is 1.5 x 2",
    ]
    assert names.folded([]) == []


def test_a_shape_is_told_in_words():
    assert names.by((3, 4)) == "3 x 4" and names.by(()) == "a single number"
