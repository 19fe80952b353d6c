"""The real command in a process of its own, and one tiny run that several tests look at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Small enough for seconds, large enough for every phase; the certify split stays the recipe's.
TINY = (
    "digits",
    "train.epochs=6",
    "teacher.train.epochs=10",
    "train.batch_size=32",
    "train.checkpoint_seconds=0",
    "teacher.backbone=resnet14",
    "threads=1",
)


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
