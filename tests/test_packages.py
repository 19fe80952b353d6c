"""What the wheel and the source archive hold: all of the package, and nothing else."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import erde

ROOT = Path(__file__).parents[1]
# Bytes; the shipped bundle is a good part of it.
MOST = 800_000


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return folder


def package_files() -> set[str]:
    """All files of the package that are kept in version control, below ``src``."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "src/erde"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name.removeprefix("src/") for name in listed.split("\0") if name and (ROOT / name).is_file()}


def test_the_wheel_is_the_package_and_small(archives: Path) -> None:
    wheel = archives / f"erde-{erde.__version__}-py3-none-any.whl"
    information = f"erde-{erde.__version__}.dist-info/"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith(information)}
        entry_points = archive.read(f"{information}entry_points.txt").decode()
        metadata = archive.read(f"{information}METADATA").decode()
        assert f"{information}licenses/LICENSE" in archive.namelist()
    assert names == package_files()
    assert {"erde/py.typed", "erde/bundle/demos/digits-demo/manifest.json"} <= names
    suffixes = {".py", ".typed", ".yaml", ".json", ".j2", ".html", ".css", ".js", ".onnx", ".md", ".png"}
    assert {Path(name).suffix for name in names} <= suffixes
    assert wheel.stat().st_size < MOST
    assert "erde = erde.__main__:main" in entry_points
    # Each extra has to be named where a reader looks for it.
    extras = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Provides-Extra: ")]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [extra for extra in extras if f"'.[{extra}]'" not in readme] == ["dev"]


def test_the_source_archive_has_no_tests_and_no_results(archives: Path) -> None:
    top = f"erde-{erde.__version__}/"
    with tarfile.open(archives / f"erde-{erde.__version__}.tar.gz") as archive:
        names = {member.name.removeprefix(top) for member in archive.getmembers()}
    beside = {name for name in names if not name.startswith("src/erde/")}
    assert beside == {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "PKG-INFO", ".gitignore"}
    assert {name.removeprefix("src/") for name in names - beside} == package_files()
