"""Tables for a paper or a spreadsheet: one row per arm, operating point, exit, score or pair of arms.

Shares are between 0 and 1, MACs and milliseconds are per image, intervals are 95 %: what ``results.json`` holds.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from erde.evaluation.results import Comparison, ExitCost, ExitMeasures, Results, ScoreOutcome
from erde.policy.points import Agreement, Certificate, Measured, OperatingPoint

Row = dict[str, Any]


def rows_of(table: str, results: Mapping[str, Results]) -> list[Row]:
    """The rows of one of TABLES for named runs, all with the same columns."""
    return [{"run": run, **row} for run, run_results in results.items() for row in TABLES[table](run_results)]


def csv_text(rows: Sequence[Row]) -> str:
    """Rows as comma-separated text with a header; lists are joined by ``;``, and nothing stands for null."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, list):
        return ";".join("" if item is None else str(item) for item in value)
    return value


def _columns(value: BaseModel | None, model: type[BaseModel], prefix: str = "", without: str = "") -> Row:
    """The fields of a schema object; an interval becomes two columns, a missing object empty ones."""
    row: Row = {}
    for name in model.model_fields:
        inner = None if value is None else getattr(value, name)
        if name in without.split():
            continue
        if name.endswith("_interval"):
            name = name.removesuffix("_interval")
            row[f"{prefix}{name}_low"], row[f"{prefix}{name}_high"] = inner or (None, None)
        else:
            row[f"{prefix}{name}"] = inner
    return row


_ARM_FIELDS = (
    "role", "loss", "backbone", "head", "parameters", "no_exit_macs", "no_exit_parameters",
    "score", "sharpness", "ensemble", "default_operating_point",
)  # fmt: skip


def _arms(results: Results) -> Iterator[Row]:
    for name, arm in results.arms.items():
        default = arm.default_point()
        (low, high), paper = arm.exits[-1].accuracy_interval, arm.paper_curve
        yield {
            "arm": name,
            "exported": name == results.exported_arm,
            **{field: getattr(arm, field) for field in _ARM_FIELDS},
            "exits": len(arm.exits),
            "final_exit_accuracy": arm.exits[-1].accuracy,
            "final_exit_accuracy_low": low,
            "final_exit_accuracy_high": high,
            **_columns(default.test, Measured, "test_"),
            "area": arm.curve.area,
            "area_low": arm.curve.area_interval and arm.curve.area_interval[0],
            "area_high": arm.curve.area_interval and arm.curve.area_interval[1],
            "paper_area": paper and paper.area,
            "paper_area_low": paper and paper.area_interval and paper.area_interval[0],
            "paper_area_high": paper and paper.area_interval and paper.area_interval[1],
            "oracle_accuracy": arm.oracle.accuracy,
            "oracle_macs": arm.oracle.macs,
        }


def _operating_points(results: Results) -> Iterator[Row]:
    for name, arm in results.arms.items():
        for point in arm.operating_points:
            yield {
                "arm": name,
                "default": point.name == arm.default_operating_point,
                **_columns(point, OperatingPoint, without="certificate tune test tune_agreement"),
                **_columns(point.certificate, Certificate, "certificate_"),
                **_columns(point.tune, Measured, "tune_"),
                **_columns(point.tune_agreement, Agreement, "tune_agreement_"),
                **_columns(point.test, Measured, "test_"),
            }


def _exits(results: Results) -> Iterator[Row]:
    for name, arm in results.arms.items():
        for index, (cost, measures) in enumerate(zip(arm.cost, arm.exits, strict=True)):
            row = _columns(measures, ExitMeasures, without="reliability")
            yield {"arm": name, "exit": index, **_columns(cost, ExitCost), **row}


def _scores(results: Results) -> Iterator[Row]:
    for name, arm in results.arms.items():
        for outcome in arm.score_outcomes:
            yield {"arm": name, **_columns(outcome, ScoreOutcome)}


def _comparisons(results: Results) -> Iterator[Row]:
    for comparison in results.comparisons:
        yield _columns(comparison, Comparison)


TABLES: dict[str, Callable[[Results], Iterator[Row]]] = {
    "arms": _arms,
    "operating-points": _operating_points,
    "exits": _exits,
    "scores": _scores,
    "comparisons": _comparisons,
}
