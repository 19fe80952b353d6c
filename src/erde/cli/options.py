"""Options and output that the commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


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
