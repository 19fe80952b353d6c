"""Bundles that are calibrated in place, and where a new one goes."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

import erde
from erde.bundle.manifest import MANIFEST
from erde.bundle.sealing import read, seal_of
from erde.bundle.shipped import bundle_folder
from erde.data.load import DataSplits
from erde.runtime.session import Session
from tests.helpers.checks import user_error

RULE = {"score": "margin", "sharpness": 1.0}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """The shipped bundle with its samples, and what an operator may have put beside them."""
    folder = Path(shutil.copytree(bundle_folder("digits-demo"), tmp_path / "v1"))
    (folder / "notes.txt").write_text("mine")
    (folder / "newest").symlink_to("notes.txt")
    (folder / ".git").mkdir()
    (folder / ".git" / "HEAD").write_text("ref: refs/heads/main")
    return folder


def test_in_place_all_stays_that_the_manifest_does_not_name(demo: Path, digits: DataSplits) -> None:
    before = seal_of(read(demo))
    there = sorted(path.relative_to(demo) for path in demo.rglob("*"))
    erde.calibrate(demo, digits, max_risk=0.1, **RULE)
    assert seal_of(read(demo)) != before
    assert sorted(path.relative_to(demo) for path in demo.rglob("*")) == there
    assert (demo / "notes.txt").read_text() == "mine"
    assert (demo / "newest").readlink() == Path("notes.txt")
    assert len(Session(demo, threads=1).samples()) == 3


def test_a_link_to_a_bundle_stays_a_link(demo: Path, digits: DataSplits) -> None:
    before = seal_of(read(demo))
    current = demo.with_name("current")
    current.symlink_to(demo.name)
    erde.calibrate(current, digits, max_risk=0.1, **RULE)
    assert current.readlink() == Path(demo.name)
    assert seal_of(read(demo)) != before
    assert sorted(path.name for path in demo.parent.iterdir()) == ["current", "v1"]
    assert (demo / "notes.txt").is_file()


@pytest.mark.parametrize("place", ["pipe", "folder/pipe"])
def test_what_cannot_be_copied_in_place_is_said_in_a_line(place: str, demo: Path, digits: DataSplits) -> None:
    (demo / place).parent.mkdir(exist_ok=True)
    os.mkfifo(demo / place)
    before, there = seal_of(read(demo)), sorted(demo.parent.rglob("*"))
    with user_error(f"{demo / place}.*out="):
        erde.calibrate(demo, digits, max_risk=0.1, **RULE)
    assert seal_of(read(demo)) == before
    assert sorted(demo.parent.rglob("*")) == there
    # Elsewhere it stands in nobody's way.
    erde.calibrate(demo, digits, max_risk=0.1, out=demo.with_name("v2"), **RULE)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("place", ["notes.txt", ".git/HEAD"])
def test_a_full_disk_is_no_reason_to_remove_a_file(
    place: str, number: int, demo: Path, digits: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile

    def full(source: str | Path, target: str | Path, **options: Any) -> Any:
        if Path(source) == demo / place:
            raise OSError(number, os.strerror(number), str(target))
        return copy(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", full)
    with user_error(f"no space left on the disk while writing {demo}: free some space"):
        erde.calibrate(demo, digits, max_risk=0.1, **RULE)


@pytest.mark.parametrize("inside", [".", ".git"])
def test_the_working_directory_is_not_replaced(
    inside: str, demo: Path, digits: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(demo / inside)
    before = seal_of(read(demo))
    with user_error("working directory"):
        erde.calibrate("." if inside == "." else demo, digits, max_risk=0.1, **RULE)
    assert seal_of(read(demo)) == before
    assert Path.cwd() == (demo / inside).resolve()


def test_elsewhere_only_the_bundle_goes(demo: Path, digits: DataSplits) -> None:
    out = demo.with_name("v2")
    erde.calibrate(demo, digits, max_risk=0.1, out=out, **RULE)
    assert sorted(path.name for path in out.iterdir()) == sorted([MANIFEST, *read(demo).files])


def test_what_is_more_than_a_bundle_is_not_replaced(demo: Path, digits: DataSplits) -> None:
    other = demo.with_name("site")
    other.mkdir()
    (other / MANIFEST).write_text('{"name": "my page"}')  # of a web page
    (other / "index.html").write_text("mine")
    bundle = bundle_folder("digits-demo")
    for out in (other, demo):
        there = sorted(out.rglob("*"))
        with user_error("is there already and is no bundle, or more than that"):
            erde.calibrate(bundle, digits, max_risk=0.1, out=out, **RULE)
        assert sorted(out.rglob("*")) == there
    plain = demo.with_name("v2")
    for _ in range(2):
        erde.calibrate(demo, digits, max_risk=0.1, out=plain, **RULE)


@pytest.mark.parametrize("name", ["digits-demo", "hf://me/digits"])
def test_a_bundle_that_is_no_folder_needs_a_place(
    name: str, digits: DataSplits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with user_error(f"^'{name}' .*out="):
        erde.calibrate(name, digits, max_risk=0.1, **RULE)
    assert not list(tmp_path.iterdir())
