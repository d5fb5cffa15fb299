"""Errors that a user can cause, apart from our own bugs."""


class UserError(Exception):
    """Something the user can mend: one line with the thing, the value and the way out.

    The CLI prints it and exits with 2. What files say and messages quote, a key, a name, may hold line breaks and
    control characters: these are shown by their escapes.
    """

    def __init__(self, text: str = ""):
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in text))


class Away(UserError):
    """Something that the run needs stays away: its other processes, its data, its storage.

    Unlike after other mistakes, a scheduler does well to start the same command once more: the CLI exits with 76.
    """
