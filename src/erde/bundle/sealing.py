"""The bundle, erde's deployable folder: manifest and ONNX stages; sealed, read and verified here.

A bundle is only data: JSON, ONNX and a model card. docs/formats.md describes every field.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from erde.bundle.card import model_card
from erde.bundle.graph_check import check_graph_file
from erde.bundle.manifest import FORMAT_VERSION, MANIFEST, READABLE_VERSIONS, Manifest
from erde.common.errors import UserError, in_one_line
from erde.common.files import replacing_folder, write_json, write_text

CARD = "README.md"
# No honest manifest comes near this; a larger one is refused before it is parsed.
MAX_MANIFEST_BYTES = 64 * 2**20
# An ONNX graph is a protobuf message, which cannot be larger; a larger file is refused before it is hashed.
MAX_FILE_BYTES = 2 * 2**30 - 1
# Of objects and lists in a manifest; erde's own have 8. Python's JSON and pydantic have limits of their own, higher ones.
MAX_DEPTH = 50


def stages_hash(manifest: Manifest) -> str:
    """A hash of the stage files alone: what a profile of the machine belongs to, whatever the thresholds."""
    return canonical_hash({stage.file: manifest.files[stage.file] for stage in manifest.stages})


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_hash(value: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON (sorted keys, no spaces) of ``value`` without its own ``seal``."""
    unsealed = {key: item for key, item in value.items() if key != "seal"}
    text = json.dumps(unsealed, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seal_of(manifest: Manifest) -> str:
    """The seal that belongs to a manifest; of a version before today's over the fields that its file has."""
    older = manifest.format_version < FORMAT_VERSION
    return canonical_hash(manifest.model_dump(mode="json", exclude_unset=older))


def seal(folder: Path, manifest: Manifest) -> str:
    """Write ``manifest`` into ``folder`` with its seal, and return the seal. The stages must be there."""
    value = {**manifest.model_dump(mode="json"), "format_version": FORMAT_VERSION}
    value["seal"] = canonical_hash(value)
    write_json(folder / MANIFEST, value)
    return str(value["seal"])


def read(folder: Path) -> Manifest:
    """The manifest of a bundle whose format, seal, checksums and kinds of graph were verified.

    Nothing but JSON is parsed, no graph is loaded and no path outside ``folder`` is opened before that.

    Raises:
        UserError: whatever is wrong with the bundle, in one line.
    """
    manifest = read_manifest(folder)
    for name in manifest.files:
        _check_file(folder, name)
    for name, expected in manifest.files.items():
        if file_hash(folder / name) != expected:
            raise UserError(
                f"bundle {folder}: {name} does not match its checksum: it was changed or damaged; "
                "copy the bundle again"
            )
    for stage in manifest.stages:
        check_graph_file(folder / stage.file)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle, of which format, seal and names of files were verified; no other file is looked at.

    Raises:
        UserError: whatever is wrong with the manifest, in one line.
    """
    if not folder.is_dir():
        raise UserError(f"no bundle at {folder}: expected a folder with {MANIFEST} and ONNX stages")
    value = _read_json(folder)
    version = value.get("format_version")
    if version not in READABLE_VERSIONS:
        raise UserError(
            f"bundle {folder} has format version {in_one_line(repr(version))}, this erde reads "
            f"{' and '.join(map(str, READABLE_VERSIONS))}: "
            "install the erde that wrote it, or export it again"
        )
    try:
        matches = value.pop("seal", None) == canonical_hash(value)
    except (ValueError, RecursionError):  # NaN, an overflowing number, or nesting that has no canonical form
        matches = False
    if not matches:
        raise UserError(f"bundle {folder}: {MANIFEST} does not match its seal: it was changed after sealing")
    _check_json(folder, value)
    try:
        manifest = Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = in_one_line(".".join(str(part) for part in first["loc"])) or "manifest"
        problem = in_one_line(first["msg"])
        raise UserError(f"bundle {folder}: {MANIFEST} is not valid at {where}: {problem}") from error
    for name in manifest.files:
        # Plain names only: no separators, no "..", so that a manifest cannot point outside its folder.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
            name = in_one_line(repr(name))
            raise UserError(f"bundle {folder}: the file name {name} is not allowed in a bundle")
    for stage in manifest.stages:
        # ONNX Runtime tells formats by the name too, and graph_check.py looks at ONNX only.
        if not stage.file.endswith(".onnx"):
            raise UserError(f"bundle {folder}: the stage {stage.file} is not an .onnx file")
    return manifest


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise UserError(
            f"no bundle at {folder}: it has no {MANIFEST} (`erde run` and `erde.export` write bundles)"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise UserError(f"bundle {folder}: {MANIFEST} is larger than {MAX_MANIFEST_BYTES // 2**20} MiB")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_float=_exact_float)
    except (ValueError, RecursionError) as error:
        raise UserError(f"bundle {folder}: {MANIFEST} is not JSON: copy the bundle again") from error
    if not isinstance(value, dict):
        raise UserError(f"bundle {folder}: {MANIFEST} does not hold an object: copy the bundle again")
    return value


def _check_json(folder: Path, value: dict[str, Any]) -> None:
    """Refuse JSON that could not be printed or written again: nesting without end, and half characters."""
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, str):
            try:
                node.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"bundle {folder}: {MANIFEST} has text that is not Unicode") from error
        elif isinstance(node, dict | list):
            if depth > MAX_DEPTH:
                raise UserError(f"bundle {folder}: {MANIFEST} is nested more than {MAX_DEPTH} levels deep")
            inside = [*node, *node.values()] if isinstance(node, dict) else node
            waiting += [(child, depth + 1) for child in inside]


def _exact_float(text: str) -> float:
    """A number as Python writes it; another spelling of the same float would slip past the seal."""
    value = float(text)
    if math.isfinite(value) and repr(value) != text:
        raise ValueError(f"{text} is not how erde writes a number")
    return value


def _check_file(folder: Path, name: str) -> None:
    """Kind and size of a file, before the first one is hashed."""
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise UserError(f"bundle {folder}: {name} is missing: copy the bundle again")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"bundle {folder}: {name} is larger than {MAX_FILE_BYTES:,} bytes")


def write(folder: Path, manifest: Manifest, stages: list[Path], beside_seal: Sequence[Path] = ()) -> str:
    """Write a whole bundle (stages, model card, manifest) in one step, and return its seal.

    Files and folders of ``beside_seal`` are copied too, and are no part of what is sealed.
    """
    with replacing_folder(folder) as beside:
        for path in stages:
            shutil.copyfile(path, beside / path.name)
        for path in beside_seal:
            try:
                if path.is_dir() and not path.is_symlink():
                    shutil.copytree(path, beside / path.name, symlinks=True)
                else:  # a link stays one where the folder stays
                    shutil.copy2(path, beside / path.name, follow_symlinks=path.parent != folder)
            except shutil.Error as error:  # of a folder: what failed there, each with its place
                place, _, reason = error.args[0][0]
                for number in (errno.ENOSPC, errno.EDQUOT):
                    if f"[Errno {number}]" in reason:  # it has only the text
                        raise OSError(number, os.strerror(number)) from error
                raise _not_copied(place, reason) from error
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise _not_copied(path, error.strerror or str(error)) from error
        card = model_card(manifest)
        write_text(beside / CARD, card)
        files = {**manifest.files, CARD: file_hash(beside / CARD)}
        return seal(beside, manifest.model_copy(update={"files": files}))


def _not_copied(path: str | Path, reason: str) -> UserError:
    return UserError(
        f"{path} cannot be copied beside the new bundle: {in_one_line(reason)}; remove it, or give another place with out="
    )


def differences(first: Manifest, second: Manifest) -> dict[str, tuple[Any, Any]]:
    """Fields in which two manifests differ, by dotted name: (value in the first, in the second)."""
    changes: dict[str, tuple[Any, Any]] = {}

    def walk(old: Any, new: Any, key: str) -> None:
        if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
            old, new = dict(enumerate(old)), dict(enumerate(new))
        if isinstance(old, dict) and isinstance(new, dict):
            for name in [*old, *(name for name in new if name not in old)]:
                walk(old.get(name), new.get(name), f"{key}.{name}" if key else str(name))
        elif old != new:
            changes[key] = (old, new)

    walk(first.model_dump(mode="json"), second.model_dump(mode="json"), "")
    return changes
