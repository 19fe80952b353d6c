"""What must stay light: ``--help``, and the runtime in an environment without torch."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.checks import save_by_class

ROOT = Path(__file__).parents[2]
HEAVY = (
    "torch",
    "onnxruntime",
    "numpy",
    "scipy",
    "plotly",
    "datasets",
    "sklearn",
    "PIL",
    "pandas",
)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["run", "--help"], ["bundle", "--help"], ["predict", "--help"], ["bench", "--help"]],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys, atexit\n"
        f"atexit.register(lambda: print('LOADED', [one for one in {HEAVY!r} if one in sys.modules]))\n"
        f"sys.argv = ['erde', *{arguments!r}]\n"
        "from erde.cli.main import main\n"
        "main()\n"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "Usage:" in out
    assert "Example:" in out or arguments in (["--help"], ["bundle", "--help"])
    assert "LOADED []" in out


def cpu_seconds_of_children() -> float:
    """Of all that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_help_answers_within_half_a_second() -> None:
    # CPU time, the best of several: other work on the machine can only make it slower.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    best = 1e9
    for _ in range(7):
        before = cpu_seconds_of_children()
        subprocess.run(
            [sys.executable, "-m", "erde", "--help"], capture_output=True, check=True, env=environment
        )
        best = min(best, cpu_seconds_of_children() - before)
    assert best < 0.5


@pytest.mark.slow
def test_a_bundle_is_calibrated_anew_without_torch(tiny_run: tuple[Path, str], tmp_path: Path) -> None:
    """On an operator's own labelled images, with the extra ``analysis`` and nothing of ``train``."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    subprocess.run([*pip, *constraints, f"{ROOT}[analysis]"], check=True, timeout=600)
    from erde.data.load import load_splits
    from erde.recipe.load import load_config

    folder = tiny_run[0]
    save_by_class(load_splits(load_config(folder / "config.yaml").data, 0).test, tmp_path / "photos")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}

    def erde(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(environment / "bin" / "erde"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=clean, cwd=tmp_path)

    options = ("--data", "photos", "--out", "new", "--max-risk", "5%", "--confidence", "95%", "--json")
    done = erde("calibrate", str(folder / "bundle"), *options)
    assert done.returncode == 0, done.stderr
    (point,) = [
        point
        for point in json.loads(done.stdout.splitlines()[-1])["operating_points"]
        if point["kind"] == "risk"
    ]
    assert point["certificate"]["confidence"] == 0.95
    assert "intact" in erde("bundle", "verify", "new").stdout
    logits = folder / "arms" / "erde" / "logits.npz"
    calibrated = erde("calibrate", str(logits), "--out", "policy.json", "--max-risk", "5%")
    assert calibrated.returncode == 0
    measured = erde("evaluate", str(logits), "--policy", "policy.json")
    assert "risk-5: accuracy" in measured.stdout, measured.stderr
    probe = "import importlib.util as u; print([n for n in ('torch', 'datasets', 'sklearn', 'onnxscript') if u.find_spec(n)])"
    python = [str(environment / "bin" / "python"), "-c", probe]
    assert subprocess.run(python, capture_output=True, text=True, env=clean).stdout.strip() == "[]"


@pytest.mark.slow
def test_a_bundle_runs_in_a_fresh_environment_without_torch(
    tiny_run: tuple[Path, str], tmp_path: Path
) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    install = [
        str(python),
        "-m",
        "pip",
        "install",
        "--quiet",
        "--constraint",
        str(ROOT / "constraints.txt"),
        str(ROOT),
    ]
    subprocess.run(install, check=True, timeout=600)
    program = """
import json, sys
import numpy as np
from erde.runtime import Session
session = Session(sys.argv[1], threads=1)
images = np.load(sys.argv[2])
answer = session.predict(images)
missing = []
for name in ("torch", "scipy", "datasets", "sklearn", "onnx", "plotly"):
    try:
        __import__(name)
    except ModuleNotFoundError:
        missing.append(name)
print(json.dumps({"exits": answer.exits.tolist(), "labels": answer.labels.tolist(), "missing": missing}))
"""
    from erde.data.load import load_splits
    from erde.recipe.load import load_config
    from erde.runtime.session import Session

    folder = tiny_run[0]
    test = load_splits(load_config(folder / "config.yaml").data, 0).test
    images = test.images[:50]
    import numpy as np

    np.save(tmp_path / "images.npy", images)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "COV"))}
    done = subprocess.run(
        [str(python), "-c", program, str(folder / "bundle"), str(tmp_path / "images.npy")],
        capture_output=True,
        text=True,
        env=clean,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    answered = json.loads(done.stdout)
    expected = Session(folder / "bundle", threads=1).predict(images)
    assert answered["missing"] == ["torch", "scipy", "datasets", "sklearn", "onnx", "plotly"]
    assert answered["exits"] == expected.exits.tolist()
    assert answered["labels"] == expected.labels.tolist()

    def erde(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(environment / "bin" / "erde"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, env=clean, cwd=tmp_path)

    assert "intact" in erde("bundle", "verify", str(folder / "bundle")).stdout
    save_by_class(test, tmp_path / "photos")
    options = (
        "--data",
        "photos",
        "--batch-sizes",
        "1,8",
        "--threads",
        "1",
        "--rounds",
        "2",
        "--out",
        "bench.json",
    )
    timed = erde("bench", str(folder / "bundle"), *options)
    assert timed.returncode == 0, timed.stderr
    assert "no figure: pip install 'erde[analysis]'" in timed.stdout
    report = json.loads((tmp_path / "bench.json").read_text())
    assert {measurement["contender"] for measurement in report["measurements"]} >= {
        "no-exit.onnx",
        "risk-5",
        "every exit computed",
    }
    refused = erde("run", "digits")
    assert refused.returncode == 2
    assert "pip install 'erde[train]'" in refused.stderr
    size = sum(
        path.stat().st_size for path in environment.rglob("*") if path.is_file() and not path.is_symlink()
    )
    pip = sum(
        path.stat().st_size for path in environment.glob("lib/*/site-packages/pip/**/*") if path.is_file()
    )
    print(f"base install without pip: {(size - pip) / 1e6:.0f} MB")
    assert (size - pip) / 1e6 <= 210
