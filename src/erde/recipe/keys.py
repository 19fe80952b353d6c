"""The keys of a recipe in words, from its models: for ``erde list keys`` and the tables of the documents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel

from erde.recipe import schema
from erde.recipe.types import Section

# The sections by their dotted place in a recipe.
SECTIONS: dict[str, type[Section]] = {
    "": schema.Config,
    "data": schema.DataConfig,
    "data.augmentation": schema.AugmentationConfig,
    "student": schema.NetworkConfig,
    "teacher": schema.TeacherConfig,
    "distillation": schema.DistillationConfig,
    "train": schema.TrainConfig,
    "arms.<arm>": schema.ArmConfig,
    "export": schema.ExportConfig,
    "calibration": schema.CalibrationConfig,
    "cascade": schema.CascadeConfig,
}


class Key(NamedTuple):
    """A key of a section. ``default`` is in YAML; a section and a key that must be given have none."""

    name: str
    type: str
    default: str | None
    meaning: str


def keys_of(section: type[Section]) -> list[Key]:
    """The keys of a section, in its order."""
    types = section.model_json_schema()["properties"]
    keys = []
    for name, field in section.model_fields.items():
        default = field.get_default(call_default_factory=True)
        text = default if isinstance(default, str) else None
        if text is None and not field.is_required() and not isinstance(default, BaseModel):
            text = json.dumps(default)
        keys.append(Key(name, _in_words(types[name]), text, " ".join((field.description or "").split())))
    return keys


def _in_words(schema: Mapping[str, Any]) -> str:
    """A type in JSON Schema, for people."""
    if "anyOf" in schema:
        *most, last = [_in_words(branch) for branch in schema["anyOf"]]
        return f"{', '.join(most)} or {last}"
    if "$ref" in schema:
        return "section"
    choices = [schema["const"]] if "const" in schema else schema.get("enum")
    if choices is not None:
        return ", ".join(f"`{choice}`" for choice in choices)
    if schema["type"] == "array":
        items = schema["prefixItems"][0] if "prefixItems" in schema else schema["items"]
        count = len(schema["prefixItems"]) if "prefixItems" in schema else "list of"
        kind, *bounds = _in_words(items).split(" ", 1)
        return " ".join([f"{count} {kind}s" if kind in ("number", "text") else f"{count} {kind}", *bounds])
    words = {"boolean": "`true`, `false`", "string": "text", "object": "mapping", "null": "`null`"}
    return words.get(schema["type"], f"{schema['type']}{_bounds(schema)}")


def _bounds(schema: Mapping[str, Any]) -> str:
    lowest, highest = schema.get("minimum"), schema.get("maximum")
    if lowest is not None and highest is not None:
        return f" from {lowest:,} to {highest:,}"
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    return ",".join(f" {sign} {schema[name]}" for name, sign in signs.items() if name in schema)
