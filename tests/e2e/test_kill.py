"""``kill -9`` at seeded and at aimed moments, and what ``--resume`` makes of it."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from .compare import assert_same_run
from .conftest import TINY, erde, erde_process

# Aimed at what is hardest to get right; the last column of each says when to shoot.
Moment = Callable[[Path], bool]


def partial_below(pattern: str) -> Moment:
    """While something half written that matches ``pattern`` exists."""
    return lambda folder: any(folder.glob(pattern))


def in_phase(name: str) -> Moment:
    """As soon as the log says that the phase has begun."""
    line = f'"event": "phase", "name": "{name}"'
    return lambda folder: (
        (folder / "log.jsonl").exists() and line in (folder / "log.jsonl").read_text("utf-8")
    )


AIMED: dict[str, Moment] = {
    "while the teacher's checkpoint is written": partial_below("arms/teacher/checkpoints/.*.partial"),
    "between two phases": partial_below("arms/teacher/checkpoints/final.safetensors"),
    "while a student's checkpoint is written": partial_below("arms/kd/checkpoints/.*.partial"),
    "while stages are exported": partial_below("arms/erde/.stages.*.partial/stage_1.onnx"),
    "in export, between two arms": partial_below("arms/ce/stages/stages.json"),
    "while stages are quantised": partial_below("arms/erde-int8/.stages.*.partial/stage_1.onnx"),
    "in export, between int8 stages and their logits": partial_below("arms/erde-int8/stages/stages.json"),
    "in calibration": in_phase("calibrate"),
    "in evaluation": in_phase("evaluate"),
    "while the bundle is sealed": partial_below(".bundle.*.partial"),
    "while the bundle in int8 is sealed": partial_below(".bundle-int8.*.partial"),
}


def start(folder: Path) -> tuple[str, ...]:
    """The arguments that start or continue the run."""
    resume = ("--resume",) if (folder / "config.yaml").exists() else ()
    return ("run", *TINY, "--out", str(folder), *resume)


def kill_at(folder: Path, moment: Moment, limit: float = 240.0) -> bool:
    """Start or continue the run and kill it at ``moment``; False where it ended before."""
    process = erde_process(*start(folder), start_new_session=True)
    try:
        deadline = time.monotonic() + limit
        while time.monotonic() < deadline:
            if process.poll() is not None:
                return False
            if moment(folder):
                os.kill(process.pid, signal.SIGKILL)
                return True
            time.sleep(0.0005)
        pytest.fail("the moment did not come")
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.slow
def test_killed_at_every_aimed_moment_it_ends_bit_for_bit_the_same(
    tiny_run: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    for name, moment in AIMED.items():
        assert kill_at(folder, moment), f"the run ended before the moment '{name}'"
    erde(*start(folder))
    assert_same_run(tiny_run[0], folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_killed_at_seeded_random_moments_it_ends_bit_for_bit_the_same(
    tiny_run: tuple[Path, str], tmp_path: Path, seed: int
) -> None:
    folder = tmp_path / "run"
    generator = random.Random(seed)
    kills = 0
    for _ in range(6):
        end = time.monotonic() + generator.uniform(1.0, 9.0)
        # Bound as a default: it is asked later.
        kills += kill_at(folder, lambda _, end=end: time.monotonic() > end)  # type: ignore[misc]
    assert kills >= 3
    erde(*start(folder))
    assert_same_run(tiny_run[0], folder)
