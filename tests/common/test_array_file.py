from __future__ import annotations

import io
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erde.common.array_file import ArrayFileError, read_npz


def test_arrays_come_back_as_they_were(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {
        "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "empty": np.empty((0, 3)),
        "one": np.asarray(3),
        "words": np.asarray(["a", "bcd"]),
        "zeros": np.zeros(10_000),
    }
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "some.npz", **arrays)
        loaded = read_npz(tmp_path / "some.npz")
        assert list(loaded) == list(arrays)
        for name, array in arrays.items():
            assert np.array_equal(loaded[name], array)
            assert loaded[name].dtype == array.dtype


def npy(header: str, data: bytes = b"") -> bytes:
    text = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def header(shape: str = "(2,)", descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


def packed(content: bytes, compression: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("logits.npy", content)
    return file.getvalue()


def encrypted() -> bytes:
    content = bytearray(packed(npy(header(), bytes(8))))
    content[6] |= 1  # in the file's own header, and in the directory's
    content[content.index(b"PK\x01\x02") + 8] |= 1
    return bytes(content)


def with_method(method: int) -> bytes:
    content = bytearray(packed(npy(header(), bytes(8))))
    content[8] = method
    content[content.index(b"PK\x01\x02") + 10] = method
    return bytes(content)


HOSTILE = {
    "no zip": b"logits",
    "a single array": npy(header(), bytes(8)),
    "encrypted": encrypted(),
    "an unknown method": with_method(99),
    "damaged LZMA": packed(npy(header(), bytes(8)), zipfile.ZIP_LZMA)[:45] + b"\xff" * 20 + bytes(200),
    "a syntax error": packed(npy("{'descr': '<f4', 'shape': (", bytes(8))),
    "an unhashable shape": packed(npy(header("[{}]"), bytes(8))),
    "21.8 TiB": packed(npy(header("(3000000000000,)", "'<f8'"), bytes(8))),
    "more than a number holds": packed(
        npy(header("(10**400,)".replace("10**400", "1" + "0" * 400)), bytes(8))
    ),
    "a negative length": packed(npy(header("(-2,)"), bytes(8))),
    "a boolean length": packed(npy(header("(True,)"), bytes(4))),
    "objects": packed(npy(header("(1,)", "'|O'"), bytes(8))),
    "an unknown type": packed(npy(header("(1,)", "'nonsense'"), bytes(8))),
    "too little data": packed(npy(header("(3,)"), bytes(8))),
    "too much data": packed(npy(header("(1,)"), bytes(8))),
    "no array": packed(b"text"),
    "a bomb": packed(npy(header("(100000000,)"), bytes(400_000_000)), zipfile.ZIP_DEFLATED),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_one_line(name: str, tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    path.write_bytes(HOSTILE[name])
    with pytest.raises(ArrayFileError) as caught:
        read_npz(path)
    assert "\n" not in str(caught.value)
    assert 0 < len(str(caught.value)) < 300


def test_every_changed_byte_of_a_small_file_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "some.npz"
    np.savez(path, a=np.arange(2, dtype=np.float32))
    content = path.read_bytes()
    refused = 0
    for position in range(len(content)):
        for mask in (0x01, 0x80):
            path.write_bytes(content[:position] + bytes([content[position] ^ mask]) + content[position + 1 :])
            try:
                read_npz(path)
            except ArrayFileError:
                refused += 1
    assert refused > 200


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_npz(tmp_path / "none.npz")
