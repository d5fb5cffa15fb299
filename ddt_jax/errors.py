"""Errors that a user can cause, apart from our own bugs."""


class UserError(Exception):
    """Something the user can mend: one line with the thing, the value and the way out.

    The CLI prints it and exits with 2.
    """
