"""The environment of a run: versions, commit, processor, threads. Saved beside every run's results."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from erde.common.errors import UserError

# The most CPUs that this process takes, where several share a machine. None: all that it may use.
most_cpus: int | None = None

PACKAGES = ("erde", "torch", "numpy", "onnx", "onnxruntime", "onnxscript", "datasets", "pillow", "scipy")


def available_cpus() -> int:
    """CPUs that this process may use, or its share of them."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return cpus if most_cpus is None else min(cpus, most_cpus)


def check_one_process(command: str) -> None:
    """Raise if ``torchrun`` started this process as one of several, which would all write the same files."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError(f"erde {command} is one process: start it without torchrun; erde run takes several")


def erde_version() -> str:
    """The version of this package."""
    return version("erde")


def versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that affect results."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def commit() -> str | None:
    """The git commit of erde's own source, ``+changes`` where it was edited; None for an installed package."""
    folder = Path(__file__).parents[1]
    try:
        # A virtual environment may lie inside somebody else's repository: only tracked source has a commit.
        subprocess.run(
            ["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__],
            capture_output=True,
            check=True,
            timeout=10,
        )
        head = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
        status = subprocess.run(
            ["git", "-C", str(folder), "status", "--porcelain", "--", str(folder)],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    tracked = [line for line in status.splitlines() if not line.startswith("??")]
    return f"{head}+changes" if tracked else head


def describe(device: str, threads: int, gpu: str | None = None) -> dict[str, Any]:
    """The environment of a run on ``device``; ``gpu`` is the name of its GPU, if it is one."""
    return {
        "versions": versions(),
        "commit": commit(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cpus": available_cpus(),
        "threads": threads,
        "device": device,
        "gpu": gpu,
    }


def cpu_model() -> str:
    """The processor's name, or its kind if the system gives no name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
