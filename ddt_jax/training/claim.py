"""Whose a workdir is: a new run writes its settings there, and one with other settings is refused."""

import json
from collections.abc import Callable

import jax

from ddt_jax import config
from ddt_jax.errors import UserError
from ddt_jax.io import atomic
from ddt_jax.training import checkpoint, weights

# Settings that data fill in when they are opened.
_OF_DATA = ("model.image.", "model.transformer.vocab_size", "model.text.")


def claim(root, tree: dict, check: Callable[[], object], forced: Callable[[str], None] | None = None) -> None:
    """Writes the config of a new run; refuses to go on with another one's.

    Args:
      check: called for a new run. One that cannot begin must not keep the directory from the one with the right files.
      forced: receives a line about settings that differ, in the place of the error; what was saved stays as it is.

    Raises:
      UserError: if the directory holds a run with other settings, or cannot be written; or as `check`.
    """
    differing = _differing(root, tree)
    if differing and forced:
        forced(f"--force: goes on with other settings than {root} was trained with: {', '.join(differing)}")
        return
    _refuse(root, differing)
    if differing is None:
        check()
    if jax.process_index() == 0:
        write_config(root, tree)


def refuse_other(root, tree: dict) -> None:
    """Raises UserError as `claim` will, as far as it can be known before data are opened, which may take long."""
    differing = _differing(root, tree) or ()
    _refuse(root, [name for name in differing if not name.startswith(_OF_DATA)])


def write_config(root, tree: dict) -> None:
    """Raises UserError if it cannot."""
    try:
        atomic.write_text(root / "config.json", json.dumps(tree, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"workdir: cannot write to {root}: {error.strerror or error}") from error


def _differing(root, tree) -> list[str] | None:
    """Names of settings that differ from those of the run that is there; None: there is none."""
    if (root / "config.json").exists():
        # Through today's settings: those that came later had their default.
        return config.difference(config.dump(config.from_dict(checkpoint.saved_config(root))), tree)
    if weights.holds(root):
        raise UserError(f"workdir: {root} holds imported weights; train in another one, with init_from={root}")
    return None


def _refuse(root, differing) -> None:
    if differing:
        names = ", ".join(differing[:4]) + (", ..." if len(differing) > 4 else "")
        raise UserError(
            f"workdir: {root} holds a run with other settings ({names}); use another --workdir or its settings, or "
            "--force"
        )
