"""Options and output that the commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erde.common.errors import UserError

if TYPE_CHECKING:
    from erde.calibration.settings import Settings


def _bundle_folder(context: typer.Context, given: Path) -> Path:
    from erde.bundle.shipped import bundle_folder

    # A shell that completes a line downloads nothing.
    return given if context.resilient_parsing else bundle_folder(given)


Bundle = Annotated[
    Path,
    typer.Argument(
        help="A bundle's folder, digits-demo, which comes with erde, or hf://OWNER/NAME.",
        callback=_bundle_folder,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print a machine-readable JSON object as the last line.")]

Engine = Annotated[
    str, typer.Option(help="onnxruntime, or openvino, which needs the extra of that name.", metavar="NAME")
]


def finish(as_json: bool, value: dict[str, Any]) -> None:
    """Print the machine-readable last line, if asked for."""
    if as_json:
        print(json.dumps(value))


def parse_share(text: str, option: str) -> float:
    """``0.5%`` or ``0.005`` as 0.005."""
    try:
        value = float(text.strip().removesuffix("%"))
    except ValueError as error:
        raise UserError(f"{option} is '{text}': expected a share such as 0.5% or 0.005") from error
    share = value / 100 if text.strip().endswith("%") else value
    if not 0 < share < 1:
        raise UserError(
            f"{option} is '{text}': expected more than 0 % and less than 100 %, such as 0.5% or 0.005"
        )
    return share


def parse_milliseconds(text: str, option: str) -> float:
    """``2ms`` or ``2`` as 2.0."""
    try:
        value = float(text.strip().removesuffix("ms"))
    except ValueError as error:
        raise UserError(f"{option} is '{text}': expected milliseconds such as 2ms") from error
    return value


def settings_of(given: dict[str, Any]) -> Settings:
    """The settings that the command line's words mean, by option; what was not given keeps its default."""
    from erde.calibration.settings import Settings
    from erde.recipe.validation import validate

    parsers = {
        "max_risks": ("--max-risk", parse_share),
        "confidence": ("--confidence", parse_share),
        "budgets": ("--budget", parse_share),
        "latency_budgets": ("--latency-budget", parse_milliseconds),
    }
    values = {}
    for key, words in given.items():
        if words is None or words == []:
            continue
        if key not in parsers:
            values[key] = words
            continue
        option, parse = parsers[key]
        values[key] = (
            parse(words, option) if isinstance(words, str) else [parse(word, option) for word in words]
        )
    return validate(Settings, values)
