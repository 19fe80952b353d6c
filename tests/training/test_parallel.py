"""Two processes on one training, as ``torchrun`` starts them: gradients, files, a killed rank, accuracy."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from erde.training.job import FINAL, LAST
from tests.helpers import parallel_worker
from tests.helpers.checks import entries

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
}


def torchrun(*arguments: str) -> list[str]:
    # A free port of its own: several tests may run at once.
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments]


def run(*arguments: str, timeout: int = 300) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        torchrun(*arguments), capture_output=True, text=True, timeout=timeout, env=ENVIRONMENT, check=False
    )


def test_gradients_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    done = run("-m", "tests.helpers.parallel_worker", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    computed = load_file(tmp_path / "gradients.safetensors")
    worst = 0.0
    for loss in parallel_worker.LOSSES:
        expected = parallel_worker.gradients(loss)
        largest = max(float(gradient.abs().max()) for gradient in expected.values())
        assert largest > 0.03
        for name, gradient in expected.items():
            difference = float((computed[f"{loss}/{name}"] - gradient).abs().max())
            assert difference < 1e-5, (loss, name, difference)
            worst = max(worst, difference)
            parts = float((computed[f"in parts/{name}"] - computed[f"erde/{name}"]).abs().max())
            assert parts < 1e-5
    print(f"largest difference {worst:.1e}")
    # The second process wrote nothing, the first one did.
    assert json.loads((tmp_path / "second.json").read_text()) == []
    assert entries(tmp_path / "folder") == [FINAL, "tensorboard", "training.json"]
    assert len(entries(tmp_path / "folder" / "tensorboard")) == 1


DIGITS = (
    "digits",
    "train.epochs=6",
    "teacher.train={epochs: 2}",
    "arms={erde: {loss: erde}, kd: {loss: kd}}",
    "export.precisions=[fp32]",
    "train.checkpoint_seconds=0",
    "threads=1",
    "device=cpu",
)


def history(folder: Path, arm: str) -> object:
    return json.loads((folder / "arms" / arm / "history.json").read_text())


@pytest.mark.slow
def test_a_killed_rank_and_resume(tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = run("-m", "erde", "run", *DIGITS, "--out", str(whole))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("bundle:") == 1
    said = tmp_path / "stderr.txt"
    with said.open("w") as file:
        process = subprocess.Popen(
            torchrun("-m", "erde", "run", *DIGITS, "--out", str(killed)),
            stdout=subprocess.DEVNULL,
            stderr=file,
            env=ENVIRONMENT,
        )
    try:
        last = killed / "arms" / "erde" / "checkpoints" / LAST
        end = time.monotonic() + 300
        while not last.exists():
            assert process.poll() is None, said.read_text()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.05)
        os.kill(second_process(process.pid), signal.SIGKILL)
        assert process.wait(timeout=120) != 0
    finally:
        process.terminate()  # the launcher ends both ranks
        process.wait(timeout=120)
    assert not (killed / "arms" / "erde" / "history.json").exists()
    done = run("-m", "erde", "run", *DIGITS, "--out", str(killed), "--resume")
    assert done.returncode == 0, done.stderr[-3000:]
    for arm in ("teacher", "erde", "kd"):
        assert history(killed, arm) == history(whole, arm)
        stages = [folder / "arms" / arm / "stages" / "stage_2.onnx" for folder in (whole, killed)]
        assert stages[0].read_bytes() == stages[1].read_bytes()
    # One writer: no event of the log stands there twice.
    events = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    trained = [entry["arm"] for entry in events if entry["event"] == "trained"]
    assert trained == ["teacher", "erde", "kd"]


def second_process(launcher: int) -> int:
    """The process id of rank 1 among the launcher's children."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
            variables = (folder / "environ").read_bytes().split(b"\0")
        except (OSError, IndexError, ValueError):
            continue
        if parent == launcher and b"RANK=1" in variables:
            return int(folder.name)
    raise AssertionError("rank 1 is not there")


@pytest.mark.slow
def test_two_processes_learn_as_much_as_one(tmp_path: Path) -> None:
    arguments = [
        setting
        for setting in DIGITS
        if not setting.startswith(("train.epochs", "arms", "teacher", "train.checkpoint"))
    ]
    arguments += ["train.epochs=25", "arms={ce: {loss: ce}}", "export.arm=ce"]
    folders = {"one": tmp_path / "one", "two": tmp_path / "two"}
    command = [sys.executable, "-m", "erde", "run", *arguments, "--out", str(folders["one"])]
    subprocess.run(command, capture_output=True, check=True, env=ENVIRONMENT, timeout=300)
    assert run("-m", "erde", "run", *arguments, "--out", str(folders["two"])).returncode == 0
    accuracy = {}
    for name, folder in folders.items():
        results = json.loads((folder / "results.json").read_text())
        accuracy[name] = results["arms"]["ce"]["exits"][-1]["accuracy"]
    print(accuracy)
    assert min(accuracy.values()) > 0.85
    # Batch norm sees half a batch; 360 test images have a standard error of about 0.015 each.
    assert abs(accuracy["one"] - accuracy["two"]) < 0.06


def test_one_line_for_all_processes(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    done = run("-m", "erde", "run", "digits", "train.batch_size=33", "device=cpu", "--out", out)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "train.batch_size is 33, which 2 processes cannot share equally" in lines[0]
    # The one traceback is the launcher's own.
    assert "src/erde" not in done.stderr
    assert not (tmp_path / "run").exists()
