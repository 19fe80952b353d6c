"""What of ``benchmarks/peers.py`` needs no other environment: its errors, its rule, its network, its sums."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peers
import peers_earlyon
import pytest
import torch

import erde
from erde.common import environment
from erde.networks.network import EarlyExitNetwork
from erde.policy import rule as policy


def fake_python(folder: Path, **versions: str) -> Path:
    """A program that answers like a Python with these packages."""
    ours = environment.versions()
    answer = {
        "earlyon": "0.3.0",
        **{name: ours[name] for name in ("torch", "onnx", "onnxruntime")},
        **versions,
    }
    path = folder / "python"
    path.write_text(f"#!/bin/sh\necho '{json.dumps(answer)}'\n")
    path.chmod(0o755)
    return path


def error_of(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    python: Path,
    folder: Path,
    *more: str,
) -> str:
    given = [
        str(folder),
        "--peer-python",
        str(python),
        "--data",
        str(folder),
        "--out",
        str(folder / "o.json"),
    ]
    monkeypatch.setattr(sys, "argv", ["peers.py", *given, *more])
    assert peers.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not (folder / "o.json").exists()
    return line


def test_wrong_environments_are_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def said(python: Path) -> str:
        return error_of(monkeypatch, capsys, python, tmp_path)

    assert "there is no" in said(tmp_path / "missing")
    assert "earlyon is not installed" in said(Path(sys.executable))
    assert "earlyon 0.2.0" in said(fake_python(tmp_path, earlyon="0.2.0"))
    assert "onnxruntime 1.0.0" in said(fake_python(tmp_path, onnxruntime="1.0.0"))
    assert "is not a run folder" in said(fake_python(tmp_path))
    not_python = tmp_path / "no-python"
    not_python.write_text("hello")
    assert "is no Python" in said(not_python)


@pytest.mark.parametrize(("option", "value"), [("--rounds", "1"), ("--images", "0"), ("--check", "0")])
def test_too_small_numbers_are_one_line(
    option: str,
    value: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert option in error_of(monkeypatch, capsys, tmp_path / "any", tmp_path, option, value)


@pytest.mark.parametrize("score", sorted(peers.POLICIES))
def test_the_others_rule_is_erdes(score: str) -> None:
    logits = np.random.default_rng(0).normal(scale=3, size=(500, 10)).astype(np.float32)
    threshold = 0.7
    config = SimpleNamespace(
        exit_points=[SimpleNamespace(name="exit0")],
        temperatures={"exit0": 1.0},
        routing_policy=peers.POLICIES[score],
        confidence_thresholds=[threshold],
        entropy_thresholds=[(1 - threshold) * np.log(10)],
    )
    ours = policy.leaves(policy.score(logits, score, 1.0), threshold)
    assert 0 < ours.sum() < len(ours)
    np.testing.assert_array_equal(peers_earlyon.Router(config).fires(0, logits), ours)


def test_the_other_side_builds_the_same_network(tiny_network: EarlyExitNetwork, tmp_path: Path) -> None:
    setting = {
        "source": str(Path(erde.__file__).parent),
        "backbone": "resnet8x0.5",
        "classes": 10,
        "input_size": [1, 8, 8],
        "exits": 3,
        "head": "erde",
    }
    torch.save(tiny_network.state_dict(), tmp_path / "weights.pt")
    x = torch.randn(4, 1, 8, 8)
    torch.save(x, tmp_path / "x.pt")
    # In a process of its own: there erde is a package without its __init__.
    code = (
        "import sys, json, torch, peers_earlyon; from pathlib import Path; folder = Path(sys.argv[1]);"
        "network = peers_earlyon.build_network(json.loads(sys.argv[2]), folder);"
        "torch.save(network(torch.load(folder / 'x.pt')).detach(), folder / 'logits.pt')"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path, json.dumps(setting)],
        check=True,
        cwd=Path(peers_earlyon.__file__).parent,
    )
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), tiny_network(x), rtol=1e-4, atol=1e-4)


def test_ratios_are_taken_round_by_round() -> None:
    ours: list[list[float]] = [[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]
    summary: dict[str, Any] = peers.summarise(
        {peers.ERDE: ours, "other": [[3 * value for value in seconds] for seconds in ours]}
    )
    assert summary["other"]["times_erde_by_median"] == {"median": 3, "lower_quartile": 3, "upper_quartile": 3}
    assert summary[peers.ERDE]["times_erde_by_sum"]["median"] == 1
    assert summary["other"]["milliseconds"]["median"] == 6000


def test_arms_take_turns_on_the_same_images() -> None:
    asked: list[tuple[str, list[list[int]]]] = []

    class Side:
        def ask(self, arm: str, batches: list[np.ndarray]) -> dict[str, list[float]]:
            asked.append((arm, [rows.tolist() for rows in batches]))
            return {"seconds": [1.0] * len(batches)}

    sides: Any = dict.fromkeys(("one", "two"), Side())
    seconds = peers.measure(sides, np.arange(10), 2, rounds=2, per_round=2)
    assert {name: len(own) for name, own in seconds.items()} == {"one": 2, "two": 2}
    assert [arm for arm, _ in asked] == ["one", "two", "two", "one", "one", "two"]
    for first, second in zip(asked[::2], asked[1::2], strict=True):
        assert first[1] == second[1]
    assert asked[4][1] == [[8, 9], [0, 1]]  # past the end it begins again
