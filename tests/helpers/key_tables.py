"""Writes the key tables of the documents from the recipe's models: ``python -m tests.helpers.key_tables``.

A document says where: ``<!-- keys of `train` -->`` or ``<!-- keys of the loss `kd` -->``, and ``<!-- end of keys -->``.
"""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import BaseModel

from erde.recipe.keys import SECTIONS, keys_of
from erde.recipe.losses import LOSSES
from erde.recipe.schema import NetworkConfig, TeacherConfig
from erde.recipe.study import StudyConfig

COMMAND = "python -m tests.helpers.key_tables"
DOCS = Path(__file__).parents[2] / "docs"
DOCUMENTS = [DOCS / "formats.md", DOCS / "studies.md", *sorted((DOCS / "methods").glob("*.md"))]
PLACES: dict[str, type[BaseModel]] = {
    "the recipe": SECTIONS[""],
    **{f"`{name}`": section for name, section in SECTIONS.items() if name},
    "the study": StudyConfig,
    **{f"the loss `{name}`": loss for name, loss in LOSSES.items()},
}


def table(place: str) -> str:
    """The table of a section or a loss. The teacher's has the keys that a student does not have."""
    section = PLACES[place]
    keys = keys_of(section)
    if section is TeacherConfig:
        shared = keys_of(NetworkConfig)
        keys = [key for key in keys if key not in shared]
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for key in keys:
        if place.startswith("the loss") and key.name == "name":
            continue
        missing = "" if key.type == "section" else "required"
        default = f"`{key.default}`" if key.default is not None else missing
        lines.append(f"| `{key.name}` | {key.type} | {default} | {key.meaning} |")
    return "\n".join(lines)


def written(text: str) -> str:
    """A document with its tables written anew."""
    return re.sub(
        r"(<!-- keys of (.+?) -->\n).*?(<!-- end of keys -->)",
        lambda part: f"{part[1]}\n{table(part[2])}\n\n{part[3]}",
        text,
        flags=re.S,
    )


if __name__ == "__main__":
    for path in DOCUMENTS:
        path.write_text(written(path.read_text(encoding="utf-8")), encoding="utf-8")
