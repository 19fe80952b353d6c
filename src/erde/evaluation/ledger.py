"""The ledger of full training runs: a small file for each arm of each seed, enough to make all tables from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from erde.common.errors import UserError, in_one_line
from erde.common.files import write_json
from erde.common.model import Frozen
from erde.evaluation.results import Arm, ExitCost, Interval, Results
from erde.evaluation.study import ArmSeed, Study, arm_seeds, summarise
from erde.recipe.schema import FREE_TO_CHANGE, TEACHER, Config
from erde.recipe.study import LedgerConfig, StudyConfig
from erde.recipe.validation import first_difference, validate

# A row shows the shape of a curve; its area is among the measures.
CURVE_POINTS = 33
# The machine's, which may change while a row stays the same.
OF_MACHINE = ("device", "threads")


class RowExit(ExitCost):
    """An exit on test, had it answered every image; NLL, Brier and ECE are tempered."""

    accuracy: float
    accuracy_interval: Interval
    nll: float
    brier: float
    ece: float


class RowCurve(Frozen):
    """Some points of the arm's curve on test, mean MACs of an image and accuracy."""

    macs: list[float]
    accuracy: list[float]


class Row(ArmSeed):
    """A filled row of a ledger, ``<study>-<arm>-seed<seed>.json``: an arm of a finished run.

    ``recipe`` is as planned, of the arms this one and the exported one; with ``one_teacher`` the first seed's teacher taught
    this run. ``seconds`` and ``images_per_second`` are of the arm's training; None where the run does not know.
    """

    format_version: Literal[1] = 1
    study: str
    arm: str
    seed: int
    recipe: dict[str, Any]
    one_teacher: bool
    exits: list[RowExit]
    no_exit_macs: int
    default_operating_point: str
    curve: RowCurve
    versions: dict[str, str]
    commit: str | None
    machine: dict[str, Any]
    seconds: float | None
    images_per_second: float | None

    @property
    def file(self) -> str:
        """The name of its file."""
        return _file(self.study, self.arm, self.seed)

    @property
    def macs_saved(self) -> float | None:
        """The share of MACs saved on test at the default operating point; None for a network with one exit.

        Below 0 where no promise could be given: all exits are computed, and the last one answers.
        """
        if len(self.exits) > 1 and self.default_operating_point == "no-exit":
            return 1 - self.exits[-1].macs / self.no_exit_macs
        return self.measures.get(f"MACs saved at {self.default_operating_point}")

    def write(self, path: Path) -> None:
        """Write as JSON, in one step."""
        write_json(path, self.model_dump(mode="json"))


def _file(study: str, arm: str, seed: int) -> str:
    return f"{study}-{arm}-seed{seed}.json"


@dataclass(frozen=True)
class Planned:
    """A row of a ledger, filled or not, with its recipe."""

    study: StudyConfig
    seed: int
    arm: str
    recipe: Config

    @property
    def file(self) -> str:
        """The name of its file."""
        return _file(self.study.name, self.arm, self.seed)


@dataclass(frozen=True)
class Ledger:
    """Planned rows, and those that a folder of results holds, by the names of their files."""

    config: LedgerConfig
    planned: list[Planned]
    rows: Mapping[str, Row]

    @classmethod
    def read(cls, config: LedgerConfig, folder: Path) -> Ledger:
        """The rows of ``config`` and their files in ``folder``.

        Raises:
            UserError: a study that does not fit its recipe, two rows with the same file, a file that is no row, or the row of
                something else.
        """
        planned = []
        for study in config.studies:
            for seed in study.seeds:
                recipe = study.config(seed)
                planned += [Planned(study, seed, arm, recipe) for arm in recipe.trained_arms]
        places: dict[str, Planned] = {}
        for row in planned:
            other = places.setdefault(row.file, row)
            if other is not row:
                raise UserError(
                    f"studies '{other.study.name}' and '{row.study.name}' would both write {row.file}: rename one of them"
                )
        read = {name: read_row(folder / name, row) for name, row in places.items()}
        return cls(config, planned, {name: row for name, row in read.items() if row is not None})

    def row(self, planned: Planned) -> Row | None:
        """The filled row; None where it is not filled."""
        return self.rows.get(planned.file)

    def seeds(self, study: StudyConfig, *, filled: bool) -> list[int]:
        """The seeds of a study of which every row is filled, or the others."""
        rows = [planned for planned in self.planned if planned.study is study]
        missing = {planned.seed for planned in rows if planned.file not in self.rows}
        return [seed for seed in study.seeds if (seed not in missing) == filled]

    def summary(self, study: StudyConfig) -> Study | None:
        """The study of the seeds that are filled: that of ``erde study``, from rows alone. None without any."""
        seeds = {
            seed: {
                planned.arm: self.rows[planned.file]
                for planned in self.planned
                if planned.study is study and planned.seed == seed
            }
            for seed in self.seeds(study, filled=True)
        }
        return summarise(study.name, study.reference, seeds) if seeds else None

    def expected_seconds(self, planned: Planned) -> float | None:
        """What filled rows of the same arm took on average, whatever their machine; None where there is none."""
        study = planned.study
        if study.one_teacher and planned.arm == TEACHER and planned.seed != study.seeds[0]:
            return 0.0
        same = [row for row in self.rows.values() if (row.study, row.arm) == (study.name, planned.arm)]
        known = [row.seconds for row in same if row.seconds]
        return float(np.mean(known)) if known else None


def rows_of(study: StudyConfig, recipe: Config, run: Path, results: Results) -> list[Row]:
    """The rows of a finished run; ``recipe`` is the planned one."""
    about = dict(results.environment)
    versions, commit = about.pop("versions", {}), about.pop("commit", None)
    timings = results.timings.get("training", {})
    rows = []
    for name, measured in arm_seeds(run, results).items():
        arm, timing = results.arms[name], timings.get(name, {})
        rows.append(
            Row(
                **measured.model_dump(),
                study=study.name,
                arm=name,
                seed=results.seed,
                recipe=_own_recipe(recipe, name),
                one_teacher=study.one_teacher,
                exits=_exits(arm),
                no_exit_macs=arm.no_exit_macs,
                default_operating_point=arm.default_operating_point,
                curve=_curve(arm),
                versions=versions,
                commit=commit,
                machine=about,
                seconds=timing.get("seconds"),
                images_per_second=timing.get("images_per_second"),
            )
        )
    return rows


def _own_recipe(recipe: Config, arm: str) -> dict[str, Any]:
    """The recipe of this arm and the exported one, and of those that make it sound: there may be dozens of others."""
    kept = {arm, recipe.export.arm}
    if recipe.teacher.cross_fit is not None:
        kept.update(recipe.held_out_arms[:1])
    tree = recipe.model_dump(mode="json")
    tree["arms"] = {name: about for name, about in tree["arms"].items() if name in kept}
    return tree


def _exits(arm: Arm) -> list[RowExit]:
    keys = ("accuracy", "accuracy_interval", "nll", "brier", "ece")
    return [
        RowExit(**cost.model_dump(), **{key: getattr(measured, key) for key in keys})
        for cost, measured in zip(arm.cost, arm.exits, strict=True)
    ]


def _curve(arm: Arm) -> RowCurve:
    last = len(arm.curve.macs) - 1
    points = np.unique(np.linspace(0, last, min(last + 1, CURVE_POINTS)).round().astype(int))
    return RowCurve(
        macs=[round(arm.curve.macs[point]) for point in points],
        accuracy=[round(arm.curve.accuracy[point], 5) for point in points],
    )


def read_row(path: Path, planned: Planned) -> Row | None:
    """The row in a file; None without the file, :class:`UserError` where it holds something else."""
    if not path.exists():
        return None
    try:
        row = Row.model_validate_json(path.read_bytes())
        recipe = validate(Config, row.recipe)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = in_one_line(f"{where}: {first['msg']}" if where else first["msg"])
        raise UserError(
            f"{path} is no row of a ledger ({reason}): bring the row back, or move the file away"
        ) from error
    except UserError as error:
        raise UserError(
            f"{path} has a recipe of another version of erde ({error}): move it away, and fill the row again"
        ) from error
    if (row.study, row.arm, row.seed) != (planned.study.name, planned.arm, planned.seed):
        raise UserError(
            f"{path} is the row of another run (study '{row.study}', arm '{row.arm}', seed {row.seed}): give it back its "
            "name, or move it away"
        )
    difference = first_difference(
        {**_decisive(recipe, row.arm), "one_teacher": row.one_teacher},
        {**_decisive(planned.recipe, row.arm), "one_teacher": planned.study.one_teacher},
    )
    if difference is not None:
        key, before, now = difference
        raise UserError(
            f"{path} is of another recipe: there {key} is {before!r}, the ledger plans {now!r}; plan it as it was, or move "
            "the file away and fill the row again"
        )
    return row


def _decisive(recipe: Config, arm: str) -> dict[str, Any]:
    """The keys that an arm's measures depend on: not those of other arms."""
    tree = recipe.model_dump(mode="json")
    for group, key in FREE_TO_CHANGE:
        del tree[group][key]
    others = ("arms", "student", "distillation") if arm == TEACHER else ()
    kept = {key: value for key, value in tree.items() if key not in (*OF_MACHINE, "export", *others)}
    return kept if arm == TEACHER else {**kept, "arms": {arm: tree["arms"].get(arm)}}
