"""Recipes from files, shipped names and overrides."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any

from erde.common.errors import UserError, nearest
from erde.common.yaml_reader import read_yaml, read_yaml_file
from erde.recipe.schema import Config
from erde.recipe.validation import validate


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = resources.files("erde.recipe") / "shipped"
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def load_config(recipe: str | Path, overrides: Iterable[str] = ()) -> Config:
    """A recipe by shipped name or file, with ``KEY=VALUE`` overrides (dotted keys, YAML values)."""
    path, where = Path(recipe), f"recipe {recipe}"
    if str(recipe) in shipped_recipes():
        text = (resources.files("erde.recipe") / "shipped" / f"{recipe}.yaml").read_text(encoding="utf-8")
    elif path.is_file():
        return _with_overrides(read_yaml_file(path, where), where, overrides)
    else:
        raise UserError(
            f"no recipe '{recipe}': neither a file nor a shipped name{nearest(str(recipe), shipped_recipes())}"
        )
    return _with_overrides(read_yaml(text, where), where, overrides)


def _with_overrides(value: Any, where: str, overrides: Iterable[str]) -> Config:
    tree = _as_tree(value, where)
    for override in overrides:
        _apply_override(tree, override)
    return validate(Config, tree)


def load_saved_config(path: Path) -> Config:
    """The recipe in a run's folder. A key that came after the run's version has its default.

    Raises:
        UserError: a file that is damaged, or of a later version.
    """
    where = str(path)
    tree = _as_tree(read_yaml_file(path, where), where)
    try:
        return validate(Config, tree)
    except UserError as error:
        raise UserError(f"{where} is not a recipe of this version of erde: {error}") from error


def _as_tree(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected keys and values, got {type(value).__name__}")
    return value


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"'{override}' is not an override: expected KEY=VALUE, for example train.epochs=30")
    *parents, last = key.split(".")
    node = tree
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        elif isinstance(child, str) and parent == "loss":
            child = node[parent] = {"name": child}
        if not isinstance(child, dict):
            raise UserError(f"override '{override}': '{parent}' is a value, not a group of keys")
        node = child
    node[last] = read_yaml(text, f"the value of '{override[:200]}'")
