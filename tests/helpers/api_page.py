"""Writes docs/api.md from the docstrings of what users import: ``python -m tests.helpers.api_page``."""

from __future__ import annotations

import inspect
import re
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

COMMAND = "python -m tests.helpers.api_page"
PAGE = Path(__file__).parents[2] / "docs" / "api.md"
# In a user's order. ``erde`` alone stands for a name of the package itself.
GROUPS: dict[str, list[str]] = {
    "Run bundles": [
        "erde.load", "erde.runtime.Session", "erde.runtime.Prediction", "erde.runtime.monitor.Monitor",
        "erde.runtime.monitor.DriftReport", "erde.Predictor",
    ],
    "Networks that you have": [
        "erde.accelerate", "erde.acceleration.work.Accelerated", "erde.cascade", "erde.Preprocessing",
        "erde.write_single_file",
    ],
    "Data, backbones and exits": [
        "erde.load_data", "erde.data.load.DataSplits", "erde.build_backbone", "erde.attach_exits", "erde.keep_exits",
        "erde.EarlyExitNetwork", "erde.load_teacher_weights", "erde.adapt_teacher",
    ],
    "Train": ["erde.train", "erde.distill"],
    "Export and calibrate": [
        "erde.export", "erde.ImageFormat", "erde.calibrate", "erde.ask_for_labels", "erde.recalibrate_with_labels",
        "erde.calibration.settings.Settings", "erde.calibration.policy_file.CalibratedPolicy",
        "erde.policy.points.OperatingPoint", "erde.policy.points.Certificate",
    ],
    "Whole runs and studies": [
        "erde.load_config", "erde.run", "erde.recipe.study.load_study", "erde.runs.study.run_study",
    ],
    "Errors": ["erde.UserError"],
}  # fmt: skip
HEAD = f"""<!-- Written by `{COMMAND}` from the docstrings: change those. -->
# Python API

What `erde` offers to Python. [python.md](python.md) shows the way from training to a bundle; here is every function
and class with its arguments. `import erde` is enough for names such as `erde.load`; `erde.runtime.Session` and other
names of a module are imported from it. Bad input raises [`erde.UserError`](#erdeusererror) everywhere.

Shapes: N or B images, H x W pixels, C channels, K classes, E exits, the final one included.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        for name in names:
            module, _, last = name.rpartition(".")
            value = getattr(import_module(module), last)
            parts += entry("###", name, value)
            parts += [
                part
                for member in members(value)
                for part in entry("####", f"{last}.{member}", vars(value)[member])
            ]
    return "\n".join(parts)


def members(value: Any) -> list[str]:
    """The public methods and properties that a class itself defines and explains, in the order of its source."""
    if not inspect.isclass(value):
        return []
    kinds = (property, cached_property, classmethod, staticmethod)
    return [
        name
        for name, member in vars(value).items()
        if not name.startswith("_")
        and (inspect.isfunction(member) or isinstance(member, kinds))
        and member.__doc__
    ]


def entry(level: str, name: str, value: Any) -> list[str]:
    """Heading, signature and docstring."""
    lines = [f"{level} `{name}`\n"]
    value = getattr(value, "__func__", value)
    if callable(value) and not (inspect.isclass(value) and issubclass(value, Exception)):
        lines.append(f"```python\n{signature(name.rpartition('.')[2], value)}\n```\n")
    return [*lines, markdown(inspect.getdoc(value) or "") + "\n"]


def signature(name: str, value: Any) -> str:
    """Of a function, or of a class as it is made; an argument per line where one line would be long."""
    shape = inspect.signature(value)
    bases = value.__mro__[::-1] if inspect.isclass(value) else ()
    # Pydantic's models evaluate theirs; these are as in the source.
    written = {name: text for base in bases for name, text in vars(base).get("__annotations__", {}).items()}
    arguments: list[str] = []
    for argument in shape.parameters.values():
        if argument.name in ("self", "cls"):
            continue
        if argument.kind is argument.KEYWORD_ONLY and "*" not in arguments:
            arguments.append("*")
        sign = "**" if argument.kind is argument.VAR_KEYWORD else ""
        kind = annotation(written.get(argument.name, argument.annotation))
        arguments.append(f"{sign}{argument.name}: {kind}{default(argument.default)}")
    result = "" if inspect.isclass(value) else f" -> {annotation(shape.return_annotation)}"
    line = f"{name}({', '.join(arguments)}){result}"
    return line if len(line) <= 100 else f"{name}(\n    " + ",\n    ".join(arguments) + f",\n){result}"


def annotation(value: Any) -> str:
    """As it stands in the source, without the modules' names."""
    text = value if isinstance(value, str) else inspect.formatannotation(value)
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Z_a-z])", "", text)


def default(value: Any) -> str:
    """Objects of ``erde`` are named and not spelt out."""
    if value is inspect.Parameter.empty:
        return ""
    own = type(value).__module__.startswith(("erde", "pydantic"))
    text = f'"{value}"' if isinstance(value, str) else repr(value)
    return f" = {type(value).__name__}()" if own else f" = {text}"


def markdown(docstring: str) -> str:
    """A docstring as Markdown: sections become lists, a name between double backticks code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", docstring).replace("``", "`")
    head, *sections = re.split(r"^(Args|Attributes|Raises):\n", text, flags=re.M)
    parts = [head.rstrip()]
    for title, body in zip(sections[::2], sections[1::2], strict=True):
        items, rest = re.match(r"((?: {4}[^\n]*\n?|\n(?= {4}))*)(.*)", body, re.S).groups()
        # An item's further lines are indented once more.
        lines = re.sub(r"\n {8,}", " ", items).splitlines()
        listed = "\n".join("- " + re.sub(r"^([\w, ]+?):", code, line.strip()) for line in lines if line)
        parts += [f"{title}:\n\n{listed}", rest.strip()]
    return "\n\n".join(part for part in parts if part)


def code(names: re.Match[str]) -> str:
    """The names before a colon, each as code."""
    return ", ".join(f"`{name}`" for name in names[1].split(", ")) + ":"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
