"""Studies: what is refused before any work, the recipes of their runs, and one that is stopped and continued."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from erde.common import environment, progress
from erde.common.errors import UserError
from erde.common.time_limit import TimeIsUpError, time_limit
from erde.evaluation.results import Results
from erde.recipe.load import load_config
from erde.recipe.schema import Config
from erde.recipe.study import StudyConfig, load_study
from erde.runs.study import run_study, taught_by
from erde.training import loop
from tests.e2e.conftest import erde, erde_process
from tests.helpers.checks import entries
from tests.helpers.hand_made_runs import cut_at, hand_made_run
from tests.runtime.test_predict_shards import children

TINY = StudyConfig(
    name="tiny",
    recipe="digits",
    seeds=[3, 4],
    reference="kd",
    one_teacher=True,
    keys={
        "train.epochs": 1,
        "teacher.train.epochs": 2,
        "teacher.backbone": "resnet14",
        "threads": 1,
        "data.train_subset": 128,
        "arms": {"kd": {"loss": "kd"}, "ce": {"loss": "ce"}},
        "export": {"arm": "kd", "precisions": ["fp32"]},
    },
)


def test_runs_share_splits_and_are_trained_in_one_go() -> None:
    first, second = (TINY.config(seed) for seed in TINY.seeds)
    assert (first.seed, second.seed) == (3, 4)
    assert first.data.split_seed == second.data.split_seed == 3
    assert first.train.together
    assert list(first.arms) == ["kd", "ce"]
    # Overrides come last.
    assert TINY.config(3, ["train.epochs=5", "data.split_seed=9"]).train.epochs == 5
    assert TINY.config(3, ["data.split_seed=9"]).data.split_seed == 9


def test_a_whole_section_leaves_the_shared_splits() -> None:
    study = TINY.model_copy(update={"keys": {**TINY.keys, "data": {"tune_size": 90}, "train": {"epochs": 4}}})
    config = study.config(4)
    assert (config.data.tune_size, config.data.split_seed) == (90, 3)
    assert (config.train.epochs, config.train.together) == (4, True)
    # Also from the command line; what a mapping sets counts.
    assert study.config(4, ["data={tune_size: 80}"]).data.split_seed == 3
    own = {"data": {"split_seed": 7}, "train": {"together": False}}
    config = study.model_copy(update={"keys": {**TINY.keys, **own}}).config(4)
    assert (config.data.split_seed, config.train.together) == (7, False)


def test_the_first_teacher_is_not_trained_again(tmp_path: Path) -> None:
    config = load_config("cifar10-subset")
    taught = taught_by(config, tmp_path)
    assert taught.teacher.trained
    assert taught.teacher.backbone == config.teacher.backbone
    assert taught.teacher.weights == str(tmp_path / "arms/teacher/checkpoints/final.safetensors")
    assert taught.data == config.data


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: a", "the key 'recipe' is missing"),
        ("[1]", "expected keys and values, got list"),
        ("{name: a/b, recipe: digits, seeds: [0], reference: kd}", "name: expected"),
        ("{name: a, recipe: digits, seeds: [], reference: kd}", "seeds: expected"),
        ("{name: a, recipe: digits, seeds: [0, 0], reference: kd}", "a seed is given twice"),
        ("{name: a, recipe: digits, seeds: [0], reference: kd, key: {}}", "unknown key 'key'"),
        ("{name: a, recipe: digit, seeds: [0], reference: kd}", "no recipe 'digit'"),
        ("{name: a, recipe: digits, seeds: [0], reference: kb}", "no arm 'kb' in the recipe"),
        ("{name: a, recipe: digits, seeds: [0], reference: kd, keys: {train.epoch: 3}}", "train.epoch"),
        (
            "{name: a, recipe: digits, seeds: [0], reference: kd, keys: {name: 2026-12-01}}",
            "keys: the value of 'name', or one in it, is no text",
        ),
    ],
)
def test_bad_studies_are_refused_before_any_work(text: str, said: str, tmp_path: Path) -> None:
    file, folder = tmp_path / "study.yaml", tmp_path / "out"
    file.write_text(text)
    with pytest.raises(UserError) as refused:
        run_study(load_study(file), folder)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not folder.exists()


def test_one_teacher_has_no_held_out_answers(tmp_path: Path) -> None:
    arms = {"held": {"loss": {"name": "erde", "wrong_test": "held_out"}}}
    keys = {**TINY.keys, "arms": arms, "export": {"arm": "held"}}
    study = TINY.model_copy(update={"keys": keys, "reference": "held"})
    assert study.config(3)  # a study of one seed may be so
    with pytest.raises(UserError, match="study tiny: one_teacher gives seed 4 a trained teacher"):
        study.config(4)
    with pytest.raises(UserError, match="one_teacher"):
        run_study(study, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_file_and_a_full_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study at"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "note.txt").touch()
    for resume in (False, True):  # --resume would train among them
        with pytest.raises(
            UserError, match="is not empty: it holds other files: choose another folder with --out"
        ):
            run_study(TINY, tmp_path, resume=resume)
        assert entries(tmp_path) == ["note.txt"]
    (tmp_path / "seed3").mkdir()
    with pytest.raises(UserError, match="is not empty: continue it with --resume"):
        run_study(TINY, tmp_path)


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="start it without torchrun"):
        run_study(TINY, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_time_limit_ends_work_and_leaves_no_alarm() -> None:
    with pytest.raises(TimeIsUpError), time_limit(0.05 / 60):
        time.sleep(10)
    with time_limit(None):
        pass


@pytest.mark.slow
def test_a_study_that_was_stopped_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_study(TINY, tmp_path / "whole")
    assert whole.seeds == [3, 4]
    accuracy = whole.measures["accuracy of exits, mean"]
    assert set(accuracy) == {"teacher", "kd", "ce"}
    assert len(set(accuracy["teacher"].values)) == 1
    assert accuracy["ce"].difference is not None

    stopped = tmp_path / "stopped"
    with monkeypatch.context() as patch:
        patch.setattr("erde.runs.study.run", cut_at("seed4"))
        with pytest.raises(TimeIsUpError):
            run_study(TINY, stopped)
    assert (stopped / "study.md").read_text().startswith("# Study tiny\n\nOne run ")
    run_study(TINY, stopped, resume=True)
    for name in ("study.json", "study.md"):
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# ---------------------------------------------------------------- several at a time


@pytest.fixture
def made_by_hand(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int | None]]:
    """No training, and no processes: ``(seed's folder, the CPUs it may take)`` of each run, the last seed first."""
    runs: list[tuple[str, int | None]] = []

    def run_by_hand(config: Config, place: Path, *, resume: bool) -> Results:
        runs.append((place.name, environment.most_cpus))
        return hand_made_run(config, place)

    def here(work: Any, seeds: Any, workers: int, **keywords: int) -> Any:
        yield from map(work, reversed(seeds))

    monkeypatch.setattr("erde.runs.study.run", run_by_hand)
    monkeypatch.setattr("erde.runs.study.in_processes", here)
    monkeypatch.setattr("erde.runs.study.in_ray", here)
    monkeypatch.setattr("erde.runs.study.import_ray", lambda: None)
    for module, name in ((environment, "most_cpus"), (progress, "prefix"), (loop, "keeps_memory")):
        monkeypatch.setattr(module, name, getattr(module, name))
    return runs


@pytest.mark.parametrize("one_teacher", [False, True])
@pytest.mark.parametrize("ray", [False, True])
def test_seeds_in_any_order_give_the_same_study(
    one_teacher: bool,
    ray: bool,
    made_by_hand: list[tuple[str, int | None]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("erde.common.environment.os.sched_getaffinity", lambda _: range(8), raising=False)
    study = TINY.model_copy(update={"seeds": [3, 4, 5, 6], "one_teacher": one_teacher})
    run_study(study, tmp_path / "serial")
    assert [name for name, _ in made_by_hand] == ["seed3", "seed4", "seed5", "seed6"]
    made_by_hand.clear()
    run_study(study, tmp_path / "beside", workers=2, ray=ray)
    # A common teacher is trained first, alone, and with all CPUs.
    shares = [8, 4, 4, 4] if one_teacher else [4, 4, 4, 4]
    order = ["seed3", "seed6", "seed5", "seed4"] if one_teacher else ["seed6", "seed5", "seed4", "seed3"]
    assert made_by_hand == list(zip(order, [1] * 4 if ray else shares, strict=True))
    for name in ("study.json", "study.md"):
        assert (tmp_path / "beside" / name).read_bytes() == (tmp_path / "serial" / name).read_bytes()


def test_without_ray_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match="--ray needs Ray, which is not installed"):
        run_study(TINY, tmp_path / "out", ray=True)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_killed_worker_leaves_a_study_that_goes_on(tmp_path: Path) -> None:
    study = TINY.model_copy(update={"one_teacher": False, "keys": {**TINY.keys, "threads": 1}})
    run_study(study, tmp_path / "serial")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study.model_dump(mode="json"), sort_keys=False))
    arguments = ["study", str(tmp_path / "study.yaml"), "--out", str(tmp_path / "out"), "--workers", "2"]
    process = erde_process(*arguments)
    deadline = time.monotonic() + 300
    while len(list((tmp_path / "out").glob("seed*/arms/teacher/checkpoints"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    workers = [
        worker
        for worker in children(process.pid)
        if "spawn_main" in Path(f"/proc/{worker}/cmdline").read_text()
    ]
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.splitlines()[-1].startswith("error: a worker process was killed")
    assert "Traceback" not in err
    assert "seed 3: " in err

    erde(*arguments, "--resume")
    for name in ("study.json", "study.md"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "serial" / name).read_bytes()


@pytest.mark.slow
def test_a_study_in_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'erde[ray]'")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    study = TINY.model_copy(update={"one_teacher": False})
    whole = run_study(study, tmp_path / "serial")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        assert run_study(study, tmp_path / "out", ray=True) == whole
    finally:
        ray.shutdown()
