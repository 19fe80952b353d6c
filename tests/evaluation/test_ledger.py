"""Rows of a ledger: written, read back, refused, and enough for the tables of a study."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erde.evaluation.ledger import Ledger, Row, rows_of
from erde.evaluation.study import arm_seeds, summarise
from erde.recipe.schema import Config
from erde.recipe.study import LedgerConfig, StudyConfig, load_ledger
from erde.report.ledger_text import ledger_text
from tests.helpers.checks import user_error
from tests.helpers.hand_made_runs import hand_made_run

PLANNED = Path(__file__).parents[2] / "benchmarks" / "ledger.yaml"
STUDY = StudyConfig(
    name="small",
    recipe="digits",
    seeds=[3, 4],
    reference="kd",
    keys={"arms": {"kd": {"loss": "kd"}, "ce": {"loss": "ce"}}, "export": {"arm": "kd"}},
)
LEDGER = LedgerConfig(studies=[STUDY])


def fill(study: StudyConfig, seed: int, results: Path, run: Path) -> list[Row]:
    """The rows of a seed, from a run that was made by hand."""
    config = study.config(seed)
    rows = rows_of(study, config, run, hand_made_run(config, run))
    results.mkdir(exist_ok=True)
    for row in rows:
        row.write(results / row.file)
    return rows


def test_rows_are_enough_for_the_study(tmp_path: Path) -> None:
    for seed in STUDY.seeds:
        fill(STUDY, seed, tmp_path / "results", tmp_path / f"seed{seed}")
    runs = {seed: hand_made_run(STUDY.config(seed), tmp_path / f"again{seed}") for seed in STUDY.seeds}
    expected = summarise(
        "small", "kd", {seed: arm_seeds(tmp_path / f"again{seed}", run) for seed, run in runs.items()}
    )
    ledger = Ledger.read(LEDGER, tmp_path / "results")
    assert ledger.summary(STUDY) == expected
    accuracy = expected.measures["accuracy of exits, mean"]["ce"]
    assert accuracy.values == [
        np.mean([measured.accuracy for measured in run.arms["ce"].exits]) for run in runs.values()
    ]
    assert accuracy.difference is not None
    # Of the arms, a recipe has the row's own and the exported one.
    kept = {row.arm: list(row.recipe["arms"]) for row in ledger.rows.values() if row.seed == 3}
    assert kept == {"teacher": ["kd"], "kd": ["kd"], "ce": ["kd", "ce"]}
    row = ledger.rows["small-kd-seed3.json"]
    arm = runs[3].arms["kd"]
    assert [measured.accuracy for measured in row.exits] == [measured.accuracy for measured in arm.exits]
    assert (row.macs_saved, row.test.size) == (
        expected.measures["MACs saved at early"]["kd"].values[0], 600,
    )  # fmt: skip
    assert (row.curve.macs[0], row.curve.macs[-1]) == (round(arm.curve.macs[0]), round(arm.curve.macs[-1]))
    assert (row.versions["erde"], row.commit, row.seconds) == ("0.1.0", "abc", 90.0)
    assert row.machine == {"cpu": "a processor", "gpu": None}
    assert all(path.stat().st_size < 10_000 for path in (tmp_path / "results").iterdir())


def test_rows_of_a_teacher_that_is_cross_fitted_are_read_back(tmp_path: Path) -> None:
    held_out = {"loss": {"name": "erde", "wrong_test": "held_out"}}
    arms = {"kd": {"loss": "kd"}, "ce": {"loss": "ce"}, "doubt": held_out, "doubt-too": held_out}
    keys = {"arms": arms, "export": {"arm": "kd"}, "teacher.cross_fit": 2, "teacher.disjoint": False}
    study = STUDY.model_copy(update={"keys": keys, "seeds": [3]})
    fill(study, 3, tmp_path / "results", tmp_path / "run")
    ledger = Ledger.read(LedgerConfig(studies=[study]), tmp_path / "results")
    assert ledger.seeds(study, filled=True) == [3]
    # A recipe with cross_fit needs an arm that asks for it.
    kept = {row.arm: list(row.recipe["arms"]) for row in ledger.rows.values()}
    assert kept["ce"] == ["kd", "ce", "doubt"]


def test_a_promise_that_could_not_be_given_saves_nothing(tmp_path: Path) -> None:
    rows = {row.arm: row for row in fill(STUDY, 3, tmp_path / "results", tmp_path / "run")}
    row = rows["kd"].model_copy(update={"default_operating_point": "no-exit"})
    # All exits are computed: more than the network without them takes.
    assert row.macs_saved == 1 - row.exits[-1].macs / row.no_exit_macs < 0
    one_exit = row.model_copy(update={"exits": row.exits[-1:]})
    assert one_exit.macs_saved is None


def test_a_seed_counts_when_all_its_rows_are_there(tmp_path: Path) -> None:
    empty = Ledger.read(LEDGER, tmp_path / "none")
    assert [row.file for row in empty.planned][:3] == [
        "small-teacher-seed3.json", "small-kd-seed3.json", "small-ce-seed3.json",
    ]  # fmt: skip
    assert empty.seeds(STUDY, filled=False) == [3, 4]
    assert empty.summary(STUDY) is None
    assert empty.expected_seconds(empty.planned[0]) is None

    fill(STUDY, 4, tmp_path / "results", tmp_path / "run")
    ledger = Ledger.read(LEDGER, tmp_path / "results")
    assert ledger.seeds(STUDY, filled=True) == [4]
    assert ledger.summary(STUDY).seeds == [4]
    assert ledger.expected_seconds(ledger.planned[0]) == 90.0
    (tmp_path / "results" / "small-ce-seed4.json").unlink()
    ledger = Ledger.read(LEDGER, tmp_path / "results")
    assert ledger.seeds(STUDY, filled=True) == []
    assert ledger.summary(STUDY) is None


def test_a_teacher_that_teaches_all_seeds_costs_nothing_twice(tmp_path: Path) -> None:
    study = STUDY.model_copy(update={"one_teacher": True})
    fill(study, 3, tmp_path / "results", tmp_path / "run")
    ledger = Ledger.read(LedgerConfig(studies=[study]), tmp_path / "results")
    expected = {planned.file: ledger.expected_seconds(planned) for planned in ledger.planned}
    assert (expected["small-teacher-seed4.json"], expected["small-kd-seed4.json"]) == (0.0, 90.0)


def _change(tree: dict[str, Any], *keys: str, to: Any) -> None:
    for key in keys[:-1]:
        tree = tree[key]
    tree[keys[-1]] = to


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda row: row.pop("measures"), r"is no row of a ledger \(measures: Field required\)"),
        (lambda row: _change(row, "seed", to="x"), r"is no row of a ledger \(seed: Input should be"),
        (lambda row: _change(row, "accuracy", to=1), r"is no row of a ledger \(accuracy: Extra"),
        (
            lambda row: _change(row, "seed", to=9),
            r"the row of another run \(study 'small', arm 'ce', seed 9\)",
        ),
        (
            lambda row: _change(row, "recipe", "train", "epochs", to=9),
            "another recipe: there train.epochs is 9",
        ),
        (
            lambda row: _change(row, "recipe", "arms", "ce", "loss", to="kd"),
            "another recipe: there arms.ce.loss",
        ),
        (lambda row: _change(row, "recipe", "teacher", "train", "epochs", to=9), "teacher.train.epochs is 9"),
        (lambda row: _change(row, "one_teacher", to=True), "there one_teacher is True"),
        (lambda row: _change(row, "recipe", "epoch", to=3), "a recipe of another version of erde"),
    ],
)
def test_what_is_not_the_planned_row_is_refused(change: Any, said: str, tmp_path: Path) -> None:
    fill(STUDY, 3, tmp_path / "results", tmp_path / "run")
    path = tmp_path / "results" / "small-ce-seed3.json"
    row = json.loads(path.read_text())
    change(row)
    path.write_text(json.dumps(row))
    with user_error(said):
        Ledger.read(LEDGER, tmp_path / "results")


@pytest.mark.parametrize("text", ["", "{", "[]", "\x00", '{"format_version": 7}'])
def test_what_is_no_row_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "small-ce-seed3.json").write_text(text)
    with user_error("is no row of a ledger"):
        Ledger.read(LEDGER, tmp_path)


def test_keys_that_decide_nothing_may_differ(tmp_path: Path) -> None:
    fill(STUDY, 3, tmp_path / "results", tmp_path / "run")
    keys = {
        "arms": {"kd": {"loss": "kd"}, "erde": {"loss": "erde"}, "ce": {"loss": "ce"}},
        "threads": 2, "device": "cpu", "train.checkpoint_seconds": 1, "export": {"precisions": ["fp32"]},
    }  # fmt: skip
    more = STUDY.model_copy(update={"keys": keys})
    assert len(Ledger.read(LedgerConfig(studies=[more]), tmp_path / "results").rows) == 3
    # The students of another backbone are other rows, their teacher is the same.
    other = STUDY.model_copy(update={"keys": {**STUDY.keys, "student.backbone": "resnet14"}})
    with user_error("small-kd-seed3.json is of another recipe: there student.backbone is 'resnet8'"):
        Ledger.read(LedgerConfig(studies=[other]), tmp_path / "results")


def test_two_rows_have_two_files(tmp_path: Path) -> None:
    arms = {"b-kd": {"loss": "kd"}}
    first = StudyConfig(name="a", recipe="digits", seeds=[0], reference="b-kd", keys={"arms": arms})
    second = StudyConfig(
        name="a-b", recipe="digits", seeds=[0], reference="kd", keys={"arms": {"kd": {"loss": "kd"}}}
    )
    with user_error("studies 'a' and 'a-b' would both write a-b-kd-seed0.json"):
        Ledger.read(LedgerConfig(studies=[first, second]), tmp_path)


def test_text_has_an_overview_and_the_tables(tmp_path: Path) -> None:
    for seed in (4, 3):
        fill(STUDY, seed, tmp_path / "results", tmp_path / f"seed{seed}")
    other = STUDY.model_copy(update={"name": "other"})
    text = ledger_text(Ledger.read(LedgerConfig(studies=[STUDY, other]), tmp_path / "results"))
    assert "6 of 12 planned" in text
    assert "| small | digits | teacher, kd, ce | 3, 4 | – | 0.1 |" in text
    assert "| other | digits | teacher, kd, ce | – | 3, 4 | – |" in text
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings[:3] == ["# Full training runs", "## Study small", "### Accuracy"]
    assert "Study other" not in text


# ---------------------------------------------------------------- the file


def test_studies_stand_in_the_file_or_beside_it(tmp_path: Path) -> None:
    inside = "{name: a, recipe: digits, seeds: [0], reference: kd}"
    (tmp_path / "b.yaml").write_text("{name: b, recipe: digits, seeds: [1, 2], reference: kd}")
    (tmp_path / "ledger.yaml").write_text(f"studies: [{inside}, b.yaml]")
    assert [study.seeds for study in load_ledger(tmp_path / "ledger.yaml").studies] == [[0], [1, 2]]
    for text, said in [
        ("[1]", "expected keys and values, got list"),
        ("{}", "the key 'studies' is missing"),
        ("studies: []", "studies: expected"),
        ("studies: [none.yaml]", "no study at .*none.yaml"),
        (f"studies: [{inside}, {inside}]", "the name 'a' is given twice"),
        (f"{{studies: [{inside}], study: 1}}", "unknown key 'study'"),
        ("studies: [{name: a, recipe: digits, seeds: [], reference: kd}]", "studies.0.seeds: expected"),
    ]:
        (tmp_path / "ledger.yaml").write_text(text)
        with user_error(said):
            load_ledger(tmp_path / "ledger.yaml")
    with user_error("no ledger at"):
        load_ledger(tmp_path / "none.yaml")


def test_what_the_project_plans_is_valid_for_every_seed(tmp_path: Path) -> None:
    config = load_ledger(PLANNED)
    ledger = Ledger.read(config, tmp_path)
    assert {planned.study.name for planned in ledger.planned} == {study.name for study in config.studies}
    recipes: dict[str, Config] = {planned.study.name: planned.recipe for planned in ledger.planned}
    pairs = {name: (recipe.teacher.backbone, recipe.student.backbone) for name, recipe in recipes.items()}
    assert pairs["cifar100-wrn-40-2-wrn-16-2"] == ("wrn-40-2", "wrn-16-2")
    assert all(len(study.seeds) >= 3 for study in config.studies)
    assert all(recipe.train.together for recipe in recipes.values())
    papers = recipes["papers-resnet32x4-resnet8x4"]
    assert (papers.teacher.exits, papers.student.exits, papers.train_of("teacher").epochs) == (1, 1, 240)
    assert [share * papers.train.epochs for share in papers.train.milestones] == [150, 180, 210]
    assert papers.distillation_of("kd").alpha == 0.9
    assert papers.distillation_of("dkd").exit_weights == [2]
