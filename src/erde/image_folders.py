"""Folders of images by class as ``datasets`` tables: names and labels only, so that a million files take seconds.

The ``datasets`` library reads such folders too, and what it makes of them is the rule here (splits, classes,
order); but it takes milliseconds and tens of kilobytes a file. Layouts that are not plain are left to it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from erde.images import SUFFIXES

# Of files that may tell the classes of the images beside them.
TABLES = {".csv", ".json", ".jsonl", ".parquet", ".md", ".arrow", ".py"}
# Folder name -> split.
SPLITS = {"train": "train", "test": "test", "val": "validation", "validation": "validation"}


def open_image_folder(folder: Path) -> dict[str, Any] | None:
    """Tables with ``image`` and ``label`` by split; None where ``folder`` is not laid out plainly.

    Plain is ``<class>/<image>`` in the folder or in its sub-folder ``train``, with ``test``, ``val`` or
    ``validation`` beside it; no metadata files, no folders in a class's folder.
    """
    found, files = _entries(folder)
    if files & {"metadata.csv", "metadata.jsonl", "metadata.parquet", "README.md"} or not found:
        return None
    if "train" in found:
        splits = {split: folder / name for name, split in SPLITS.items() if name in found}
    elif found & {"test", "val", "validation"}:
        return None
    else:
        splits = {"train": folder}
    scanned = {split: _scan(place) for split, place in splits.items()}
    contents = {split: one for split, one in scanned.items() if one is not None}
    if len(contents) < len(scanned):
        return None
    classes = sorted({name for one in contents.values() for name in one})
    return {split: _table(splits[split], one, classes) for split, one in contents.items()}


def is_flat(folder: Path) -> bool:
    """Whether there are images in ``folder`` and nothing that tells their classes."""
    folders, files = _entries(folder)
    suffixes = {os.path.splitext(name)[1].lower() for name in files}
    return not folders and bool(suffixes & set(SUFFIXES)) and not suffixes & TABLES


def _entries(folder: Path) -> tuple[set[str], set[str]]:
    """Names of folders and files in ``folder``, hidden ones left out."""
    folders: set[str] = set()
    files: set[str] = set()
    with os.scandir(folder) as entries:
        for one in entries:
            if not one.name.startswith("."):
                (folders if one.is_dir() else files).add(one.name)
    return folders, files


def _scan(folder: Path) -> dict[str, list[str]] | None:
    """The image files of each class; None where something else is there."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    suffixes = set(ImageFolder.EXTENSIONS)
    classes, files = _entries(folder)
    if not classes or any(os.path.splitext(name)[1].lower() in suffixes for name in files):
        return None
    found = {}
    for name in sorted(classes):
        folders, files = _entries(folder / name)
        images = sorted(one for one in files if os.path.splitext(one)[1].lower() in suffixes)
        if folders or not images or any(one.startswith("metadata.") for one in files):
            return None
        found[name] = images
    return found


def _table(folder: Path, contents: dict[str, list[str]], classes: list[str]) -> Any:
    import datasets
    import pyarrow as pa

    root = os.path.abspath(folder)
    columns = []
    for name, images in contents.items():
        paths = pa.array([os.path.join(root, name, one) for one in images], pa.string())
        image = pa.StructArray.from_arrays(
            [pa.nulls(len(paths), pa.binary()), paths], fields=datasets.Image().pa_type.fields
        )
        label = pa.array(np.full(len(paths), classes.index(name)))
        columns.append(pa.table({"image": image, "label": label}))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    return datasets.Dataset(pa.concat_tables(columns), info=datasets.DatasetInfo(features=features))
