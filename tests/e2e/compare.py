"""Whether two run folders hold the same, times and machine apart."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

# What says when or where, not what.
TIMES = {"timing.json", "log.jsonl", "environment.json", "report.html"}


def results_without_times(folder: Path) -> dict[str, Any]:
    """``results.json`` without its timings and environment."""
    value: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    del value["timings"], value["environment"]
    return value


def assert_same_run(first: Path, second: Path) -> None:
    """Every file the same to the byte: weights, stages, logits, policies, bundle; results apart from times."""
    names = [
        sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
        for folder in (first, second)
    ]
    assert names[0] == names[1], sorted(set(names[0]) ^ set(names[1]))
    for name in names[0]:
        path = Path(name)
        if path.name in TIMES or name == "results.json":
            continue
        left, right = (first / name).read_bytes(), (second / name).read_bytes()
        if path.suffix == ".safetensors":
            # The file's metadata holds the seconds that training took.
            left, right = _weights(first / name), _weights(second / name)
        assert left == right, f"{name} differs"
    assert results_without_times(first) == results_without_times(second)


def _weights(path: Path) -> bytes:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        return b"".join(name.encode() + file.get_tensor(name).tobytes() for name in sorted(file.keys()))
