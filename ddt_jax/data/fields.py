"""Fields of JSON that others wrote."""

from typing import Any

from ddt_jax.data.base import did_you_mean
from ddt_jax.errors import UserError

_TYPES = {str: "a text", int: "a whole number", list: "a list"}


def field(record: Any, name: str, kind: type, where: str) -> Any:
    """A field that is there, of type str, int or list.

    Args:
      where: what the record is, as a message begins: "data: FILE images[3]".

    Raises:
      UserError: it is not there, or of another type.
    """
    if not isinstance(record, dict):
        raise UserError(f"{where} is not an object with the field {name}")
    if name not in record:
        raise UserError(f"{where} has no field {name}{did_you_mean(name, filter(str.isprintable, record))}")
    value = record[name]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f"{where}: field {name} is not {_TYPES[kind]} but {str(value)[:40]!r}")
    return value
