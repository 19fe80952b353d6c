"""Folders of images by class as ``datasets`` tables: names and labels only, so that a million files take seconds.

The ``datasets`` library reads such folders too, and what it makes of them is the rule here (splits, classes,
order); but it takes milliseconds and tens of kilobytes a file. Layouts that are not plain are left to it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from erde.common.errors import UserError, in_one_line
from erde.common.images import SUFFIXES

MAX_CARD_BYTES = 2**20
# Folder name -> split.
SPLITS = {"train": "train", "test": "test", "val": "validation", "validation": "validation"}


def open_image_folder(folder: Path) -> dict[str, Any] | None:
    """Tables with ``image`` and ``label`` by split; None where ``folder`` is not laid out plainly.

    Plain is ``<class>/<image>`` in the folder or in its sub-folder ``train``, with ``test``, ``val`` or
    ``validation`` beside it; no metadata files, no folders in a class's folder.
    """
    folders, files = _entries(folder)
    if files & {"metadata.csv", "metadata.jsonl", "metadata.parquet", "README.md"}:
        return None
    _check_classes(folder, folders, files)
    if not folders:
        return None
    if "train" in folders:
        splits = {split: folder / name for name, split in SPLITS.items() if name in folders}
    elif folders & {"test", "val", "validation"}:
        return None
    else:
        splits = {"train": folder}
    scanned = {split: _scan(path) for split, path in splits.items()}
    contents = {split: by_class for split, by_class in scanned.items() if by_class is not None}
    if len(contents) < len(scanned):
        return None
    classes = sorted({name for by_class in contents.values() for name in by_class})
    return {split: _table(splits[split], by_class, classes) for split, by_class in contents.items()}


def _check_classes(folder: Path, folders: set[str], files: set[str]) -> None:
    """Raise if the images lie in no folder of a class: they have no labels then."""
    if "train" in folders:
        folder = folder / "train"
        folders, files = _entries(folder)
    unlabelled = sorted(name for name in files if Path(name).suffix.lower() in SUFFIXES)
    if unlabelled and len(unlabelled) == len(files) and not folders:
        raise UserError(
            f"{folder} has images ({unlabelled[0]}, ...) and no folder per class, which gives the labels: "
            f"move them to {folder}/<class>/<image>, or see `erde predict` for images without labels"
        )


def check_card(folder: Path) -> None:
    """Refuse a card (``README.md``) that sends the ``datasets`` library to the network or out of ``folder``.

    Raises:
        UserError: the place that it names, or a card that is not YAML.
    """
    from huggingface_hub import DatasetCard

    for name in ("README.md", ".huggingface.yaml"):
        path = folder / name
        if not path.is_file():
            continue
        if path.stat().st_size > MAX_CARD_BYTES:
            raise UserError(f"{path} is larger than {MAX_CARD_BYTES:,} bytes: remove it")
        try:
            card = (
                DatasetCard.load(path).data.to_dict()
                if name == "README.md"
                else yaml.safe_load(path.read_bytes())
            )
        except Exception as error:  # of two libraries
            raise UserError(f"the YAML in {path} cannot be read: repair it, or remove the file") from error
        waiting = [card.get("configs") if isinstance(card, dict) else None]
        seen: set[int] = set()  # an alias may stand for what it is part of
        while waiting:
            node = waiting.pop()
            if isinstance(node, str) and _leads_away(node):
                raise UserError(
                    f"{path} takes data from '{in_one_line(node)}', which is not in the folder: remove that line"
                )
            if isinstance(node, dict | list) and id(node) not in seen:
                seen.add(id(node))
                waiting += node.values() if isinstance(node, dict) else node


def _leads_away(place: str) -> bool:
    return "://" in place or "::" in place or place.startswith(("/", "~")) or ".." in Path(place).parts


def _entries(folder: Path) -> tuple[set[str], set[str]]:
    """Names of folders and files in ``folder``, hidden ones left out."""
    folders: set[str] = set()
    files: set[str] = set()
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith("."):
                (folders if entry.is_dir() else files).add(entry.name)
    return folders, files


def _scan(folder: Path) -> dict[str, list[str]] | None:
    """The image files of each class; None where something else is there."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    suffixes = set(ImageFolder.EXTENSIONS)
    classes, files = _entries(folder)
    if not classes or any(os.path.splitext(name)[1].lower() in suffixes for name in files):
        return None
    contents = {}
    for name in sorted(classes):
        folders, files = _entries(folder / name)
        images = sorted(file for file in files if os.path.splitext(file)[1].lower() in suffixes)
        if folders or not images or any(file.startswith("metadata.") for file in files):
            return None
        contents[name] = images
    return contents


def _table(folder: Path, contents: dict[str, list[str]], classes: list[str]) -> Any:
    import datasets
    import pyarrow as pa

    root = os.path.abspath(folder)
    columns = []
    for name, images in contents.items():
        paths = pa.array([os.path.join(root, name, image) for image in images], pa.string())
        encoded = pa.StructArray.from_arrays(
            [pa.nulls(len(paths), pa.binary()), paths], fields=datasets.Image().pa_type.fields
        )
        label = pa.array(np.full(len(paths), classes.index(name)))
        columns.append(pa.table({"image": encoded, "label": label}))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    return datasets.Dataset(pa.concat_tables(columns), info=datasets.DatasetInfo(features=features))
