"""Validation: one line that names the key, what was expected, and the nearest valid key."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterable
from typing import Any, TypeVar

from pydantic import (
    BaseModel,
    ValidationError,
)

from erde.common.errors import UserError, nearest
from erde.common.yaml_reader import shorten

Model = TypeVar("Model", bound=BaseModel)


def validate(model: type[Model], value: Any, prefix: str = "") -> Model:
    """``value`` as ``model``; :class:`UserError` with the key, what was expected and the nearest valid key."""
    try:
        return model.model_validate(value)
    except ValidationError as error:
        located = [
            ([str(part) for part in entry["loc"] if not _is_branch(part)], entry) for entry in error.errors()
        ]
        # A misspelt key explains a missing one.
        keys, first = next((pair for pair in located if pair[1]["type"] == "extra_forbidden"), located[0])
        # A union reports every branch: the deepest location is in the intended branch.
        keys, first = max(
            (pair for pair in located if pair[0][: len(keys)] == keys), key=lambda pair: len(pair[0])
        )
        where = prefix + ".".join(keys)
        if first["type"] == "extra_forbidden":
            fields = _fields_at(model, keys[:-1])
            group = where.removesuffix(keys[-1])
            # Compared without the group, which would make every key look alike; shown with it.
            hint = nearest(keys[-1], fields).replace("'", f"'{group}", 1)
            raise UserError(f"unknown key '{where}'{hint}") from error
        if first["type"] == "missing":
            raise UserError(
                f"the key '{where}' is missing; give it in the recipe or as {where}=..."
            ) from error
        if first["type"] == "value_error":
            raise UserError(_own_words(first["ctx"]["error"], where.rstrip("."))) from error
        alternatives = {
            entry["msg"].removeprefix("Input should be ") for path, entry in located if path == keys
        }
        expected = " or ".join(sorted(alternatives))
        raise UserError(f"{where or 'recipe'}: expected {expected}, got {shorten(first['input'])}") from error


def first_difference(old: Any, new: Any, key: str = "") -> tuple[str, Any, Any] | None:
    """Where two trees of a recipe differ first: the dotted key and both values; None if they are alike."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return None if old == new else (key, old, new)
    for name in [*old, *(name for name in new if name not in old)]:
        inner = f"{key}.{name}" if key else str(name)
        if difference := first_difference(old.get(name), new.get(name), inner):
            return difference
    return None


def _own_words(error: ValueError, where: str) -> str:
    """The message of a validator of erde, with the full dotted path of the invalid node."""
    message = str(error)
    if not where:
        return message
    if isinstance(error, UserError) and where.endswith("loss"):
        # resolve_loss does not know where it stands and calls that place "loss".
        return re.sub(r"(?<![\w.])loss(?=[.:])", lambda _: where, message)
    return f"{where}: {message}"


def _is_branch(part: str | int) -> bool:
    text = str(part)
    return "[" in text or text in {"int", "float", "str", "constrained-int", "constrained-float"}


def _fields_at(model: type[BaseModel], keys: Iterable[str]) -> list[str]:
    current: Any = model
    for key in keys:
        if isinstance(current, type) and issubclass(current, BaseModel):
            current = current.model_fields[key].annotation if key in current.model_fields else None
        elif typing.get_origin(current) is dict:
            current = typing.get_args(current)[1]
        if typing.get_origin(current) in (typing.Union, types.UnionType):
            current = next((member for member in typing.get_args(current) if isinstance(member, type)), None)
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []
