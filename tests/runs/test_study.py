"""Studies: what is refused before any work, the recipes of their runs, and one that is stopped and continued."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from erde.common.errors import UserError
from erde.common.time_limit import TimeIsUpError, time_limit
from erde.recipe.load import load_config
from erde.recipe.study import StudyConfig, load_study
from erde.runs.chain import run
from erde.runs.study import run_study, taught_by

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


def test_a_missing_file_and_a_full_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no study at"):
        load_study(tmp_path / "none.yaml")
    (tmp_path / "note.txt").touch()
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

    def until_the_second(config, folder, **keywords):  # type: ignore[no-untyped-def]
        if folder.name == "seed4":
            run(config, folder, until="distill")
            raise TimeIsUpError
        return run(config, folder, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("erde.runs.study.run", until_the_second)
        with pytest.raises(TimeIsUpError):
            run_study(TINY, stopped)
    assert (stopped / "study.md").read_text().startswith("# Study tiny\n\nOne run ")
    run_study(TINY, stopped, resume=True)
    for name in ("study.json", "study.md"):
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
