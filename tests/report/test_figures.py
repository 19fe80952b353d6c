from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from erde.common.splits import TestLogits
from erde.evaluation.results import Results
from erde.policy.cost import Cost
from erde.policy.points import Agreement, Measured
from erde.policy.rule import PAPER_RULE, ExitRule
from erde.report import figures, tables
from erde.report.figures import series_of
from tests.helpers.checks import entries, user_error
from tests.helpers.hand_made import COST, hand_made_policy, hand_made_results
from tests.helpers.oracles import synthetic_logits

FIGURES = ["accuracy-against-macs", "entropies", "exits", "reliability"]
TABLES = ["arms", "comparisons", "exits", "operating-points", "scores"]


@pytest.fixture(scope="module")
def results() -> Results:
    """Two students, one with the paper's own rule, and a fixed network."""
    logits, labels = synthetic_logits(3, 500)
    other, _ = synthetic_logits(3, 500, signals=(0.9, 1.2, 1.5))
    fixed = Cost((60,), 60)
    return hand_made_results(
        {
            "erde": (TestLogits(logits, labels), hand_made_policy(ExitRule("margin"), (0.6, 0.4)), COST),
            "ce": (TestLogits(other, labels), hand_made_policy(PAPER_RULE, (0.5, None)), COST),
            "fixed": (TestLogits(logits[1:2], labels), hand_made_policy(cost=fixed), fixed),
        }
    )


@pytest.fixture
def only_erde(results: Results) -> Results:
    return results.model_copy(update={"arms": {"erde": results.arms["erde"]}, "comparisons": []})


def lines_of(figure: Figure | None, panel: int = 0) -> list[Any]:
    assert figure is not None
    return list(figure.axes[panel].get_lines())


# ---------------------------------------------------------------- files


def test_all_files_are_written(results: Results, tmp_path: Path) -> None:
    written = figures.write({"run": results}, tmp_path / "new" / "paper", ["png", "svg", "csv", "json"])
    expected = [f"{name}.{end}" for name in FIGURES for end in ("png", "svg")]
    expected += [f"{name}.{end}" for name in TABLES for end in ("csv", "json")]
    assert entries(tmp_path / "new" / "paper") == sorted(expected)
    assert sorted(path.name for path in written) == sorted(expected)
    assert len(set(written)) == len(written)


@pytest.mark.parametrize(("form", "names"), [("svg", FIGURES), ("json", TABLES)])
def test_only_what_was_asked_for(form: str, names: list[str], results: Results, tmp_path: Path) -> None:
    figures.write({"run": results}, tmp_path, [form])
    assert entries(tmp_path) == [f"{name}.{form}" for name in names]


def test_what_there_is_nothing_of_is_left_out(only_erde: Results, tmp_path: Path) -> None:
    arm = only_erde.arms["erde"].model_copy(update={"entropies": None, "score_outcomes": []})
    figures.write({"run": only_erde.model_copy(update={"arms": {"a": arm}})}, tmp_path, ["svg", "csv"])
    assert entries(tmp_path) == sorted(
        [f"{name}.svg" for name in FIGURES if name != "entropies"]
        + [f"{name}.csv" for name in TABLES if name not in ("comparisons", "scores")]
    )


def test_an_unknown_format_is_refused_before_anything_is_written(results: Results, tmp_path: Path) -> None:
    with user_error(r"^unknown format 'pgn' \(did you mean 'png'\?\)$"):
        figures.write({"run": results}, tmp_path / "paper", ["csv", "pgn"])
    assert not (tmp_path / "paper").exists()


def test_figures_are_the_same_bytes_whatever_the_users_settings(results: Results, tmp_path: Path) -> None:
    figures.write({"run": results}, tmp_path / "one", ["png", "svg"])
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"lines.linewidth": 7, "svg.hashsalt": None, "axes.facecolor": "red"}):
        figures.write({"run": results}, tmp_path / "two", ["png", "svg"])
    assert dict(matplotlib.rcParams) == before
    for name in entries(tmp_path / "one"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert "dc:date" not in (tmp_path / "one" / "exits.svg").read_text()


def test_pictures_are_one_column_wide(results: Results, tmp_path: Path) -> None:
    figures.write({"run": results}, tmp_path, ["png"])
    for name in FIGURES:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert 0.7 * 3.4 < image.width / 300 <= 3.45, name
            pixels = np.asarray(image.convert("L"))
        assert pixels.max() == 255
        assert 0.01 < (pixels < 200).mean() < 0.4, name


def test_a_failure_leaves_the_old_picture(
    results: Results, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "accuracy-against-macs.png"
    old.write_text("old")

    def fail(self: Figure, path: Path, **settings: Any) -> None:
        path.write_text("half")
        raise RuntimeError("no ink")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(RuntimeError, match="no ink"):
        figures.write({"run": results}, tmp_path, ["png"])
    assert entries(tmp_path) == [old.name]
    assert old.read_text() == "old"


# ---------------------------------------------------------------- figures


def test_series_differ_in_colour_or_marker(results: Results) -> None:
    arm = results.arms["erde"]
    many = results.model_copy(update={"arms": {f"arm{index}": arm for index in range(20)}})
    series = series_of({"run": many})
    assert len({(line.colour, line.marker) for line in series}) == 20
    assert len({line.marker for line in series[:8]}) == len({line.colour for line in series[:8]}) == 8
    assert [line.label for line in series[:2]] == ["arm0", "arm1"]
    assert series_of({"a": many, "b": many})[20].label == "arm0 (b)"


def test_palette_is_the_reports() -> None:
    style = (Path(figures.__file__).parent / "assets" / "report.css").read_text()
    light = style.split("@media")[0]
    assert all(f"--arm-{index}: {colour};" in light for index, colour in enumerate(figures.PALETTE))


def test_curves_and_points(results: Results) -> None:
    figure = figures.accuracy_against_macs(series_of({"run": results}))
    lines = lines_of(figure)
    erde, ce, fixed = results.arms.values()
    curves = [line for line in lines if len(line.get_xdata()) > 1]
    # The curve and, dotted, the paper's rule; of the arm whose rule that is, one curve; of a point, none.
    assert [line.get_color() for line in curves] == [
        figures.PALETTE[0],
        figures.PALETTE[0],
        figures.PALETTE[1],
    ]
    assert erde.paper_curve is not None
    drawn = (erde.curve, erde.paper_curve, ce.curve)
    for line, curve in zip(curves, drawn, strict=True):
        assert line.get_xdata() == pytest.approx(np.array(curve.macs) / 1e6)
        assert line.get_ydata() == pytest.approx(100 * np.array(curve.accuracy))
    assert [line.is_dashed() for line in curves] == [False, True, False]
    points = [line for line in lines if len(line.get_xdata()) == 1]
    expected = [
        (point.test.macs / 1e6, 100 * point.test.accuracy, point.name == arm.default_operating_point)
        for arm in (erde, ce, fixed)
        for point in arm.operating_points
        if point.test is not None
    ]
    markers = [
        (line.get_xdata()[0], line.get_ydata()[0], line.get_markerfacecolor() != "white") for line in points
    ]
    assert [point[2] for point in markers] == [point[2] for point in expected]
    assert np.array(markers) == pytest.approx(np.array(expected, np.float64))
    assert figure is not None
    bars: list[Any] = list(figure.axes[0].collections)
    assert len(bars) == 3
    low, high = erde.operating_points[1].test.accuracy_interval
    assert bars[0].get_segments()[0][:, 1] == pytest.approx([100 * low, 100 * high])


@pytest.mark.parametrize(
    ("costs", "scale", "label"),
    [
        ((2e6, 4e6), "linear", "MACs per image (million)"),
        ((2e6, 90e6), "log", "MACs per image (million)"),
        ((2e9, 4e9), "linear", "MACs per image (billion)"),
    ],
)
def test_axis_suits_the_costs(costs: tuple[float, float], scale: str, label: str, only_erde: Results) -> None:
    arm = only_erde.arms["erde"]
    arms = {}
    for index, macs in enumerate(costs):
        factor = macs / arm.curve.macs[0]
        curve = arm.curve.model_copy(update={"macs": [factor * value for value in arm.curve.macs]})
        arms[str(index)] = arm.model_copy(
            update={"curve": curve, "paper_curve": None, "operating_points": []}
        )
    figure = figures.accuracy_against_macs(series_of({"run": only_erde.model_copy(update={"arms": arms})}))
    assert figure is not None
    assert figure.axes[0].get_xscale() == scale
    assert figure.axes[0].get_xlabel() == label


def test_milliseconds_only_where_they_are_known(results: Results, tmp_path: Path) -> None:
    assert figures.accuracy_against_milliseconds(series_of({"run": results})) is None
    arm = results.arms["erde"]
    curve = arm.curve.model_copy(update={"milliseconds": [value / 10 for value in arm.curve.macs]})
    timed = [
        point.model_copy(update={"test": point.test.model_copy(update={"milliseconds": 7.0})})
        for point in arm.operating_points
        if isinstance(point.test, Measured)
    ]
    arm = arm.model_copy(update={"curve": curve, "operating_points": timed})
    known = results.model_copy(update={"arms": {**results.arms, "erde": arm}})
    lines = lines_of(figures.accuracy_against_milliseconds(series_of({"run": known})))
    assert {line.get_color() for line in lines} == {figures.PALETTE[0]}
    assert lines[0].get_xdata() == pytest.approx(curve.milliseconds)
    assert [line.get_xdata()[0] for line in lines[1:]] == [7, 7]
    figures.write({"run": known}, tmp_path, ["svg"])
    assert "accuracy-against-milliseconds.svg" in entries(tmp_path)


def test_accuracy_of_exits(results: Results) -> None:
    figure = figures.exits(series_of({"run": results}))
    first, second, across = lines_of(figure)
    for line, name in ((first, "erde"), (second, "ce")):
        assert line.get_ydata() == pytest.approx(
            [100 * measured.accuracy for measured in results.arms[name].exits]
        )
        assert np.round(line.get_xdata()).tolist() == [0, 1, 2]
    assert (first.get_xdata() < second.get_xdata()).all()
    assert across.get_ydata() == pytest.approx([100 * results.arms["fixed"].exits[0].accuracy] * 2)
    assert figure is not None
    bars: Any = figure.axes[0].collections[0]
    low, high = results.arms["erde"].exits[0].accuracy_interval
    assert bars.get_segments()[0][:, 1] == pytest.approx([100 * low, 100 * high])


def test_reliability_shows_the_bins_with_images(results: Results) -> None:
    figure = figures.reliability(series_of({"run": results}))
    assert figure is not None
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["erde", "ce", "fixed"]
    assert [len(axes.get_lines()) - 1 for axes in shown] == [3, 3, 1]
    bins = results.arms["ce"].exits[1].reliability
    filled = [index for index, count in enumerate(bins.count) if count]
    assert len(filled) < 15
    line = lines_of(figure, 1)[2]
    assert line.get_xdata() == pytest.approx([100 * bins.confidence[index] for index in filled])
    assert line.get_ydata() == pytest.approx([100 * bins.accuracy[index] for index in filled])
    # The last panel of each column has numbers below it, and says of what.
    assert [axes.get_xlabel() for axes in shown] == ["", "confidence (%)", "confidence (%)"]


def test_entropies_of_arms_that_had_a_teacher(results: Results) -> None:
    series = series_of({"run": results})
    figure = figures.entropies(series)
    assert figure is not None
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["erde, exit 0", "exit 1", "exit 2", "fixed, exit 0"]
    histograms = results.arms["erde"].entropies
    assert histograms is not None
    for panel, right, wrong in zip(shown, histograms.teacher_right, histograms.teacher_wrong, strict=False):
        patches: list[Any] = list(panel.patches)
        for patch, counts in zip(patches, (right, wrong), strict=True):
            assert patch.get_data().values == pytest.approx(100 * np.array(counts) / sum(counts))
    assert figures.entropies([line for line in series if line.label == "ce"]) is None


def test_names_are_names(only_erde: Results, tmp_path: Path) -> None:
    arms = {
        "_a": only_erde.arms["erde"],
        "$b": only_erde.arms["erde"],
        r"$\frac$" + "y" * 40: only_erde.arms["erde"],
    }
    odd = only_erde.model_copy(update={"arms": arms})
    figure = figures.exits(series_of({"run": odd}))
    assert figure is not None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(arms)
    figures.write({"run": odd}, tmp_path, ["png"])


# ---------------------------------------------------------------- tables


def read_both(folder: Path, name: str) -> tuple[list[dict[str, str]], list[dict[str, Any]]]:
    with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file)), json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))


def test_tables_hold_the_results(results: Results, tmp_path: Path) -> None:
    figures.write({"a": results, "b": results}, tmp_path, ["csv", "json"])
    erde = results.arms["erde"]
    sizes = {"arms": 3, "operating-points": 5, "exits": 7, "scores": 6, "comparisons": 6}
    for name, size in sizes.items():
        text, rows = read_both(tmp_path, name)
        assert len(text) == len(rows) == 2 * size
        assert [row["run"] for row in rows] == ["a"] * size + ["b"] * size
        for written, other in zip(text, rows, strict=True):
            assert list(written) == list(other) == list(rows[0])
            for column, value in other.items():
                if isinstance(value, float):
                    assert float(written[column]) == value
                elif isinstance(value, list):
                    assert (
                        written[column].split(";") == ["" if part is None else str(part) for part in value]
                        or not value
                    )
                else:
                    assert written[column] == ("" if value is None else str(value))
    default = erde.operating_points[1]
    assert default.test is not None
    arm = read_both(tmp_path, "arms")[1][0]
    assert arm["arm"] == "erde"
    assert arm["test_accuracy"] == default.test.accuracy
    assert [arm["test_accuracy_low"], arm["test_accuracy_high"]] == list(default.test.accuracy_interval)
    assert arm["area"] == erde.curve.area
    assert [arm["area_low"], arm["area_high"]] == list(erde.curve.area_interval or ())
    assert erde.paper_curve is not None
    assert arm["paper_area"] == erde.paper_curve.area
    assert arm["oracle_accuracy"] == erde.oracle.accuracy
    none, point = read_both(tmp_path, "operating-points")[1][:2]
    assert (none["name"], none["default"]) == ("no-exit", False)
    assert (point["name"], point["default"], point["thresholds"]) == ("early", True, [0.6, 0.4])
    assert point["certificate_lost"] == 9
    assert point["test_net_drop"] == default.test.net_drop
    exit_ = read_both(tmp_path, "exits")[1][1]
    assert (exit_["exit"], exit_["name"], exit_["macs"]) == (1, "group1", 71)
    assert exit_["brier"] == erde.exits[1].brier
    assert exit_["accuracy_low"] == erde.exits[1].accuracy_interval[0]
    assert read_both(tmp_path, "scores")[1][2]["test_risk"] == erde.score_outcomes[2].test_risk
    pair = read_both(tmp_path, "comparisons")[1][0]
    assert (pair["first"], pair["second"], pair["at"]) == ("erde", "ce", "default")
    assert pair["macs_high"] == results.comparisons[0].macs_interval[1]


def test_what_was_seen_without_labels_has_columns_of_its_own(only_erde: Results, tmp_path: Path) -> None:
    arm = only_erde.arms["erde"]
    agreement = Agreement(
        images=10, disagreement=0.1, macs=60.0, macs_saved=0.4, exit_rates=[0.5, 0.25, 0.25]
    )
    none, *others = arm.operating_points
    points = [none, *(point.model_copy(update={"tune_agreement": agreement}) for point in others)]
    arms = {"erde": arm.model_copy(update={"operating_points": points})}
    figures.write({"run": only_erde.model_copy(update={"arms": arms})}, tmp_path, ["csv", "json"])
    text, rows = read_both(tmp_path, "operating-points")
    assert not any(isinstance(value, dict) for row in rows for value in row.values())
    assert (rows[0]["tune_agreement_disagreement"], rows[1]["tune_agreement_disagreement"]) == (None, 0.1)
    assert text[1]["tune_agreement_exit_rates"] == "0.5;0.25;0.25"
    assert "tune_agreement" not in text[1]


def test_disabled_exits_and_what_is_missing_are_empty_cells(results: Results) -> None:
    points = tables.rows_of("operating-points", {"run": results})
    text = list(csv.DictReader(tables.csv_text(points).splitlines()))
    assert [row["thresholds"] for row in text] == [";", "0.6;0.4", ";", "0.5;", ""]
    assert text[0]["certificate_lost"] == text[0]["target"] == text[0]["tune_macs"] == ""
    assert text[1]["test_exit_rates"].count(";") == 2
