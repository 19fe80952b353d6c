from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from erde.evaluation import run_folder
from erde.evaluation.results import Results
from tests.helpers.checks import user_error


class Named:
    """Stands in for results: only the names matter here."""


@pytest.fixture
def any_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Results, "read", classmethod(lambda cls, path: Named()))


@pytest.mark.usefixtures("any_results")
def test_runs_get_the_shortest_names_that_differ(tmp_path: Path) -> None:
    for name in ("a/run", "b/run", "c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "saved.json").touch()
    results = run_folder.read_results([tmp_path / "a/run", tmp_path / "c", tmp_path / "saved.json"])
    assert list(results) == ["run", "c", "saved"]
    results = run_folder.read_results([tmp_path / "a/run", tmp_path / "b/run"])
    assert list(results) == ["a/run", "b/run"]
    with user_error("a/run is given twice: give each run once"):
        run_folder.read_results([tmp_path / "a/run", tmp_path / "b" / ".." / "a" / "run"])


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with user_error("no results at .*results.json: finish the run first"):
        run_folder.read_results([tmp_path])
    with user_error("has no logits yet: run erde export first"):
        run_folder.read_logits(tmp_path, "erde")
    with user_error("is not calibrated yet: run erde calibrate first"):
        run_folder.read_policy(tmp_path, "erde")
    (tmp_path / "arms" / "erde").mkdir(parents=True)
    (tmp_path / "arms" / "erde" / "policy.json").write_text(json.dumps({"score": "entropy"}))
    with user_error("is not a policy of this erde: run erde calibrate again"):
        run_folder.read_policy(tmp_path, "erde")
    shutil.rmtree(tmp_path / "arms")
