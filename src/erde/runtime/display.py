"""Answers for people: a table in text, and in a notebook one with the images."""

from __future__ import annotations

import base64
import html as markup
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from erde.common.errors import printable

if TYPE_CHECKING:
    from erde.runtime.prediction import Prediction

COLUMNS = ("image", "class", "probability", "exit", "next")
NUMBERS = ("probability", "exit")
# Images in a table.
MOST_ROWS = 20
# Classes beside the first one.
RUNNERS_UP = 2
# Characters of a name.
_WIDTH = 50
# Pixels of a thumbnail's longer side.
_THUMBNAIL = 96


def text(answer: Prediction) -> str:
    """``answer`` as a few lines: a row per image, and what was saved."""
    lines = [*_more(answer), _summary(answer)]
    if len(answer.labels):
        columns = zip(COLUMNS, *_rows(answer), strict=True)
        lines = [*map(str.rstrip, map("  ".join, zip(*map(_aligned, columns), strict=True))), *lines]
    return "\n".join(lines)


def html(answer: Prediction) -> str:
    """``answer`` as an HTML table; its images are in the page, and every name is escaped."""
    body = []
    for index, row in enumerate(_rows(answer)):
        cells = [markup.escape(cell) for cell in row]
        cells[1] = f"<b>{cells[1]}</b>"
        if answer.thumbnails is not None:
            cells[0] = f"{_picture(answer.thumbnails[index])}<br>{cells[0]}"
        body.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heading = "".join(f"<th>{name}</th>" for name in COLUMNS)
    table = f"<table><thead><tr>{heading}</tr></thead><tbody>{''.join(body)}</tbody></table>" if body else ""
    below = "<br>".join(map(markup.escape, [*_more(answer), _summary(answer)]))
    return f"<div>{table}<p>{below}</p></div>"


def likeliest(answer: Prediction, count: int, images: int | None = None) -> list[list[tuple[str, float]]]:
    """The ``count`` likeliest classes, as (name, probability), of each image or of the first ``images``."""
    # By logits: their order is that of the probabilities, and two of those may be equal after rounding.
    order = np.argsort(-answer.logits[:images], axis=-1, kind="stable")[:, :count]
    return [
        [(answer.name_of(label), float(probabilities[label])) for label in labels]
        for labels, probabilities in zip(order, answer.probabilities[:images], strict=True)
    ]


def _rows(answer: Prediction) -> list[tuple[str, ...]]:
    """The cells of the table, as ``COLUMNS`` names them."""
    files = answer.files or [""] * len(answer.labels)
    rows: list[tuple[str, ...]] = []
    for index, (first, *others) in enumerate(likeliest(answer, 1 + RUNNERS_UP, MOST_ROWS)):
        # The end of a path tells more than its start.
        image = _cut(printable(files[index])[::-1])[::-1] or str(index)
        beside = ", ".join(f"{_cut(printable(name))} {probability:.1%}" for name, probability in others)
        rows.append((image, _cut(printable(first[0])), f"{first[1]:.1%}", str(answer.exits[index]), beside))
    return rows


def _cut(text: str) -> str:
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."


def _aligned(cells: Sequence[str]) -> list[str]:
    """The cells of a column, its heading first, in one width; numbers at the right."""
    width = max(map(len, cells))
    return [cell.rjust(width) if cells[0] in NUMBERS else cell.ljust(width) for cell in cells]


def _more(answer: Prediction) -> list[str]:
    rest = len(answer.labels) - MOST_ROWS
    return [f"... and {rest:,} more"] if rest > 0 else []


def _summary(answer: Prediction) -> str:
    count, exits = len(answer.labels), len(answer.temperatures)
    if not count:
        return "no images"
    point = answer.operating_point
    how = "at thresholds of your own" if point is None else f"at operating point {printable(point)}"
    left = " / ".join(f"{images:,}" for images in np.bincount(answer.exits, minlength=exits))
    return (
        f"{count:,} image{'s' if count > 1 else ''} {how}: {left} left "
        f"at exit{'s' if exits > 1 else ''} {' / '.join(map(str, range(exits)))}, {answer.macs.mean():,.0f} MACs an image"
        f"{'; not certified' if answer.capped else ''}"
    )


def _picture(pixels: NDArray[np.uint8]) -> str:
    """An ``img`` that holds its pixels."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(encoded.getvalue()).decode()}"
    return f'<img alt="" width="{max(64, image.width)}" style="image-rendering:pixelated" src="{source}">'
