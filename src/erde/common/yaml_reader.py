"""YAML from unknown sources: plain values only, within limits, and errors of one line."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

import yaml

from erde.common.errors import UserError

# A recipe has some hundred values, in five levels; a list of class names may have some ten thousand.
MAX_BYTES = 1_000_000
MAX_DEPTH = 30
MAX_VALUES = 100_000
MAX_CHARACTERS = 10_000
MAX_DIGITS = 40

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def read_yaml_file(path: Path, where: str) -> Any:
    """The value in a file; ``where`` names it in errors.

    Raises:
        UserError: as :func:`read_yaml`, and for a file that cannot be read.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{where} cannot be read: {error.strerror}") from error
    return read_yaml(text.decode("utf-8", errors="replace"), where)


def read_yaml(text: str, where: str) -> Any:
    """The value of ``text``.

    Raises:
        UserError: not YAML, a key that occurs twice, more than the limits above, aliases that multiply or
            contain themselves.
    """
    if len(text) > MAX_BYTES:
        raise UserError(f"{where} is longer than {MAX_BYTES:,} bytes: it is not a recipe")
    try:
        loader = _Loader(text)
    except yaml.YAMLError as error:  # characters that YAML does not know
        raise UserError(f"{where} is not valid YAML: {shorten(error)}") from error
    try:
        return loader.get_single_data()
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not valid YAML: {shorten(error)}") from error
    except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
        # Constructors raise these for a tag or a date that does not fit its value.
        raise UserError(f"{where} has a value that does not fit its type: {shorten(error)}") from error
    finally:
        loader.dispose()


def shorten(value: object) -> str:
    """A value as text for a message, at most one line."""
    if isinstance(value, Exception):
        text = " ".join(str(value).split())
        return text if len(text) <= 300 else f"{text[:300]}..."
    return _short.repr(value)


class _Loader(yaml.SafeLoader):
    """SafeLoader within the limits."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        # The number of values per node, with aliases expanded.
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        is_alias = self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels", self.get_mark())
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if is_alias and id(node) not in self._sizes:
            raise yaml.composer.ComposerError(None, None, "an alias within its own anchor", node.start_mark)
        if not is_alias:
            self._sizes[id(node)] = self._size(node)
        return node

    def _size(self, node: yaml.Node) -> int:
        if isinstance(node, yaml.ScalarNode):
            if len(node.value) > MAX_CHARACTERS:
                raise yaml.composer.ComposerError(
                    None, None, f"a value of more than {MAX_CHARACTERS:,} characters", node.start_mark
                )
            return 1
        children = node.value
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        size = 1 + sum(self._sizes[id(child)] for child in children)
        if size > MAX_VALUES:
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_VALUES:,} values, aliases written out", node.start_mark
            )
        return size

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        # Checked before merge keys (<<) are expanded: their values may be overridden.
        seen = set()
        for key_node, _ in node.value:
            key = (key_node.tag, key_node.value) if isinstance(key_node, yaml.ScalarNode) else None
            if key is not None and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key '{key_node.value}' occurs twice", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MAX_DIGITS:
            raise yaml.constructor.ConstructorError(
                None, None, f"a number of more than {MAX_DIGITS} digits", node.start_mark
            )
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
