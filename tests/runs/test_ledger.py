"""Filling a ledger: which seeds are trained, with which teacher, what is written, and the command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from erde.common import environment, progress
from erde.common.time_limit import TimeIsUpError
from erde.evaluation.ledger import Ledger
from erde.evaluation.study import Study
from erde.recipe.schema import Config
from erde.recipe.study import LedgerConfig, StudyConfig
from erde.runs.study import fill_ledger, run_study
from erde.training import loop
from tests.helpers.checks import entries, user_error
from tests.helpers.command import run_command
from tests.helpers.hand_made_runs import cut_at, hand_made_run
from tests.runs.test_study import TINY

FIRST = StudyConfig(
    name="first",
    recipe="digits",
    seeds=[0, 1],
    reference="kd",
    one_teacher=True,
    keys={"arms": {"kd": {"loss": "kd"}, "ce": {"loss": "ce"}}, "export.arm": "kd"},
)
OTHER = StudyConfig(
    name="other", recipe="digits", seeds=[5], reference="ce", keys={"arms": {"ce": {"loss": "ce"}}}
)
CONFIG = LedgerConfig(studies=[FIRST, OTHER])
ROWS = [f"first-{arm}-seed{seed}.json" for arm in ("ce", "kd", "teacher") for seed in (0, 1)]


class Trained:
    """Stands in for a run's training: ``places`` are the run folders, ``configs`` their recipes."""

    def __init__(self, stop_at: str = "") -> None:
        self.places: list[str] = []
        self.configs: list[Config] = []
        self.stop_at = stop_at

    def __call__(self, config: Config, place: Path, *, resume: bool) -> Any:
        name = f"{place.parent.name}/{place.name}"
        if name == self.stop_at:
            raise TimeIsUpError
        self.places.append(name)
        self.configs.append(config)
        return hand_made_run(config, place)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    stand_in = Trained()
    monkeypatch.setattr("erde.runs.study.run", stand_in)
    return stand_in


def test_only_what_is_empty_is_trained(trained: Trained, tmp_path: Path) -> None:
    results, runs = tmp_path / "results", tmp_path / "runs"
    trained.stop_at = "first/seed1"
    with pytest.raises(TimeIsUpError):
        fill_ledger(Ledger.read(CONFIG, results), results, runs)
    assert trained.places == ["first/seed0"]
    assert entries(results) == ROWS[::2]
    trained.stop_at = ""
    fill_ledger(Ledger.read(CONFIG, results), results, runs)
    assert trained.places == ["first/seed0", "first/seed1", "other/seed5"]
    assert entries(results) == sorted([*ROWS, "other-ce-seed5.json"])
    # The second seed has the teacher of the first; its row has the planned recipe, which names no file.
    taught = trained.configs[1].teacher
    assert taught.weights == str(runs / "first/seed0/arms/teacher/checkpoints/final.safetensors")
    assert str(tmp_path) not in (results / "first-kd-seed1.json").read_text()
    whole = Ledger.read(CONFIG, results)
    assert [len(whole.seeds(study, filled=True)) for study in CONFIG.studies] == [2, 1]
    fill_ledger(whole, results, runs)
    assert len(trained.places) == 3


def test_seeds_at_a_time_fill_the_same_rows(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def here(work: Any, seeds: Any, workers: int) -> Any:
        assert workers == 2
        yield from map(work, reversed(seeds))

    monkeypatch.setattr("erde.runs.study.in_processes", here)
    for module, name in ((environment, "most_cpus"), (progress, "prefix"), (loop, "keeps_memory")):
        monkeypatch.setattr(module, name, getattr(module, name))
    config = LedgerConfig(studies=[FIRST.model_copy(update={"seeds": [0, 1, 2]}), OTHER])
    serial, beside = tmp_path / "serial", tmp_path / "beside"
    fill_ledger(Ledger.read(config, serial), serial, tmp_path / "runs")
    trained.places.clear()
    ledger = tmp_path / "ledger.yaml"
    ledger.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    folders = ["--results", str(beside), "--runs", str(tmp_path / "runs-beside")]
    assert run_command(monkeypatch, "ledger", str(ledger), "--run", "--workers", "2", *folders) == 0
    # The common teacher first, alone.
    assert trained.places == ["first/seed0", "first/seed2", "first/seed1", "other/seed5"]
    assert entries(serial) == entries(beside)
    for row in serial.iterdir():
        assert row.read_bytes() == (beside / row.name).read_bytes()


def test_a_teacher_that_is_elsewhere_is_not_trained_again(trained: Trained, tmp_path: Path) -> None:
    results, runs = tmp_path / "results", tmp_path / "runs"
    trained.stop_at = "first/seed1"
    with pytest.raises(TimeIsUpError):
        fill_ledger(Ledger.read(CONFIG, results), results, runs)
    shutil.rmtree(runs)
    with user_error(r"study first has one teacher, that of seed 0, and .*seed0 does not hold it"):
        fill_ledger(Ledger.read(CONFIG, results), results, runs)
    assert trained.places == ["first/seed0"]


def test_without_ray_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with user_error("--ray needs Ray, which is not installed"):
        fill_ledger(Ledger.read(CONFIG, tmp_path), tmp_path / "results", tmp_path / "runs", ray=True)
    assert entries(tmp_path) == []


def test_the_command(
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("ledger.yaml").write_text(yaml.safe_dump(CONFIG.model_dump(mode="json")))

    assert run_command(monkeypatch, "ledger", "ledger.yaml", "--json") == 0
    out = capsys.readouterr().out
    assert "filled: 0 of 7 rows" in out
    assert json.loads(out.splitlines()[-1])["empty"][0] == "first-teacher-seed0.json"
    assert entries(tmp_path) == ["ledger.yaml"]

    trained.stop_at = "first/seed1"
    assert run_command(monkeypatch, "ledger", "ledger.yaml", "--minutes", "1", "--json") == 0
    out = capsys.readouterr().out
    assert "stopped after 1 minutes; the same command continues" in out
    assert "about 2" in out  # minutes, of a row that is empty
    summary = json.loads(out.splitlines()[-1])
    assert (summary["filled"], summary["finished"]) == (3, False)

    # Only the other study; then all tables from the rows alone.
    assert run_command(monkeypatch, "ledger", "ledger.yaml", "--run", "--study", "other") == 0
    assert trained.places[-1] == "other/seed5"
    shutil.rmtree("runs")
    assert run_command(monkeypatch, "ledger", "ledger.yaml", "--table", "new/table.md") == 0
    assert "## Study first" in Path("new/table.md").read_text()
    capsys.readouterr()

    assert run_command(monkeypatch, "ledger", "ledger.yaml", "--study", "firs") == 2
    assert "error: --study: no study 'firs' in ledger.yaml (did you mean 'first'?)" in capsys.readouterr().err
    Path("results/first-kd-seed0.json").write_text("{}")
    assert run_command(monkeypatch, "ledger", "ledger.yaml") == 2
    assert capsys.readouterr().err.startswith("error: results/first-kd-seed0.json is no row of a ledger")


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with user_error("erde ledger is one process: start it without torchrun"):
        fill_ledger(Ledger.read(CONFIG, tmp_path), tmp_path / "results", tmp_path / "runs")


@pytest.mark.slow
def test_a_ledger_that_was_cut_ends_as_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, results, runs = LedgerConfig(studies=[TINY]), tmp_path / "results", tmp_path / "runs"
    with monkeypatch.context() as patch:
        patch.setattr("erde.runs.study.run", cut_at("seed4"))
        with pytest.raises(TimeIsUpError):
            fill_ledger(Ledger.read(config, results), results, runs)
    assert entries(results) == [f"tiny-{arm}-seed3.json" for arm in ("ce", "kd", "teacher")]
    fill_ledger(Ledger.read(config, results), results, runs)
    # The study of these run folders trains nothing more.
    expected = run_study(TINY, runs / "tiny", resume=True)
    shutil.rmtree(runs)
    summary = Ledger.read(config, results).summary(TINY)
    assert isinstance(summary, Study)
    assert summary == expected
