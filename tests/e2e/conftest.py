"""The real command in a process of its own, and one tiny run that several tests look at."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from erde.cli import main

# Small enough for seconds, large enough for every phase; the certify split stays the recipe's.
TINY = (
    "digits",
    "train.epochs=6",
    "teacher.train.epochs=10",
    "train.batch_size=32",
    "train.checkpoint_seconds=0",
    "teacher.backbone=resnet14",
    "threads=1",
    "cascade={}",
)
Refused = Callable[..., str]


def erde_process(*arguments: str, **keywords: object) -> subprocess.Popen[str]:
    """Start the command line; stdout and stderr are pipes."""
    return subprocess.Popen(
        [sys.executable, "-m", "erde", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "COLUMNS": "200"},
        **keywords,  # type: ignore[call-overload]
    )


def erde(*arguments: str, code: int = 0) -> tuple[str, str]:
    """Run the command line to its end; stdout and stderr."""
    process = erde_process(*arguments)
    out, err = process.communicate(timeout=600)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    return out, err


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished tiny run of ``erde run``: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("tiny") / "run"
    out, _ = erde("run", *TINY, "--out", str(folder), "--json")
    return folder, out


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Refused:
    """Run the command line in this process; the one line of its refusal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("ERDE_DATA", raising=False)

    def run(*arguments: str) -> str:
        before = files(tmp_path)
        monkeypatch.setattr(sys, "argv", ["erde", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        assert stopped.value.code == 2
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, captured.err
        assert "Traceback" not in captured.err
        assert captured.err.splitlines()[-1] == errors[0]
        assert files(tmp_path) == before, "something was written"
        return errors[0]

    return run


def files(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*") if "cache" not in path.parts}
