from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import pytest

import erde
from erde.common import environment


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = environment.versions()
    assert versions["python"] == platform.python_version()
    assert versions["erde"] == erde.__version__
    assert {name: versions[name] for name in ("torch", "numpy", "onnxruntime")} == {
        name: version(name) for name in ("torch", "numpy", "onnxruntime")
    }
    # What is not installed is left out.
    monkeypatch.setattr(environment, "PACKAGES", ("numpy", "no-such-package"))
    assert list(environment.versions()) == ["python", "numpy"]


def test_commit_of_this_checkout() -> None:
    commit = environment.commit()
    assert commit is None or re.fullmatch(r"[0-9a-f]{40}(\+changes)?", commit)


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "src" / "common" / "environment.py"
    source.parent.mkdir(parents=True)
    source.write_text("first")
    monkeypatch.setattr(environment, "__file__", str(source))
    assert environment.commit() is None  # no repository
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "somebody else's")
    # As in a virtual environment inside another project: that project's commit says nothing of erde.
    assert environment.commit() is None
    git(tmp_path, "add", "src")
    git(tmp_path, "commit", "-m", "erde's own")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert environment.commit() == head
    (tmp_path / "src" / "new.py").touch()
    (tmp_path / "notes.txt").touch()
    assert environment.commit() == head
    source.write_text("second")
    assert environment.commit() == f"{head}+changes"
    monkeypatch.setenv("PATH", "")
    assert environment.commit() is None  # no git


def test_describe_on_the_cpu() -> None:
    description = environment.describe("cpu", threads=3)
    assert json.loads(json.dumps(description)) == description
    assert (description["device"], description["gpu"], description["threads"]) == ("cpu", None, 3)
    assert description["versions"] == environment.versions()
    assert description["commit"] == environment.commit()
    assert 1 <= description["cpus"] <= (os.cpu_count() or 1)
    assert description["cpu"]
    assert description["platform"] == platform.platform()


def test_a_process_may_take_a_share_of_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(4), raising=False)
    shares = []
    for most in (None, 3, 9):
        monkeypatch.setattr(environment, "most_cpus", most)
        shares.append(environment.available_cpus())
    assert shares == [4, 3, 4]
