"""Options and output that the commands share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer


def _bundle_folder(given: Path) -> Path:
    from erde.bundle.shipped import bundle_folder

    return bundle_folder(given)


Bundle = Annotated[
    Path,
    typer.Argument(help="A bundle's folder, or digits-demo, which comes with erde.", callback=_bundle_folder),
]
Json = Annotated[bool, typer.Option("--json", help="Print a machine-readable JSON object as the last line.")]

Engine = Annotated[
    str, typer.Option(help="onnxruntime, or openvino, which needs the extra of that name.", metavar="NAME")
]


def finish(as_json: bool, value: dict[str, Any]) -> None:
    """Print the machine-readable last line, if asked for."""
    if as_json:
        print(json.dumps(value))
