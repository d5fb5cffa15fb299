"""What is said to users is one line, whatever it quotes."""

import pickle

from ddt_jax.errors import UserError


def test_line_breaks_and_control_characters_of_what_is_quoted_are_shown_by_their_escapes():
    error = UserError("config: a\nkey\tof \x1b[31m and \ud800, “ü” × 1 is none")
    assert str(error) == r"config: a\nkey\tof \x1b[31m and \ud800, “ü” × 1 is none"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
