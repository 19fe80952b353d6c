"""The tables and the picture of docs/study.md, and the README's table of it, from the rows in results/.

    python benchmarks/study_page.py

``<!-- study NAME -->`` is the place of a study's tables, ``<!-- headline of NAME -->`` that of its table in the README. Both
end with ``<!-- end of the study -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import matplotlib.pyplot as plt
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from erde.common.files import write_text
from erde.evaluation.ledger import Ledger, Row
from erde.evaluation.study import ArmMeasure, Study
from erde.recipe.study import load_ledger
from erde.report.figures import DASHES, GREY, MARKERS, PALETTE, STYLE
from erde.report.numbers import points
from erde.report.study_text import difference_cell, mean_cell, study_text

ROOT = Path(__file__).parents[1]
LEDGER, RESULTS = ROOT / "benchmarks" / "ledger.yaml", ROOT / "results"
PAGE, README, PICTURE = ROOT / "docs" / "study.md", ROOT / "README.md", ROOT / "docs" / "images" / "study.svg"
# The study of the picture, and the arms of the README: one of each method.
SHOWN = "readings"
METHODS = ("ce", "kd", "erde", "dynamickd", "dkd", "phuong", "byot", "exit-ensemble")
CURVES = ("ce", "kd", "erde", "dynamickd", "dkd")
AREA, SAVED = "area under the curve", "MACs saved at risk-1"
GRID = np.linspace(0.4, 1.0, 61)
EMPTY = "No seed of it is filled yet."


class Filled:
    """The studies of the ledger that have filled seeds, and their rows."""

    def __init__(self, ledger: Ledger) -> None:
        summaries = {study.name: ledger.summary(study) for study in ledger.config.studies}
        self.studies = {name: study for name, study in summaries.items() if study is not None}
        self.rows = list(ledger.rows.values())

    def tables(self, name: str) -> str:
        """A study's tables, as parts of a page."""
        if name not in self.studies:
            return EMPTY
        without_title = re.sub("^# .*\n\n", "", study_text(self.studies[name]))
        return without_title.replace("\n## ", "\n#### ").strip()

    def headline(self, name: str) -> str:
        """One arm of each method, the largest area first, and what it was measured on."""
        if name not in self.studies:
            return EMPTY
        study = self.studies[name]
        area = study.measures[AREA]
        arms = sorted((arm for arm in METHODS if arm in area), key=lambda arm: -mean(area[arm]))
        exits = [measure for measure in study.measures if re.fullmatch(r"accuracy of exit \d+", measure)]
        lines = [
            f"| arm | exits alone, % | area under the curve, % | minus `{study.reference}` | MACs saved at 1 % risk, % |",
            "|---|---|---|---|---|",
        ]
        for arm in arms:
            alone = " / ".join(points(mean(study.measures[measure][arm])) for measure in exits)
            curve, saved = area[arm], study.measures[SAVED][arm]
            lines.append(
                f"| {arm} | {alone} | {mean_cell(curve)} | {difference_cell(curve)} | {mean_cell(saved)} |"
            )
        (machine,) = {str(row.machine["cpu"]) for row in self.rows if row.study == name}
        seeds = len(study.seeds)
        about = f"{seeds} seed{'s' if seeds > 1 else ''}, {study.test_images:,} test images, trained on one core of {machine}."
        if seeds > 1:
            about += " ± is half the width of the 95 % interval over seeds; p is of the paired t-test, corrected by Holm's"
            about += " method for all arms of the study."
        return "\n".join([*lines, "", about])

    def picture(self, name: str) -> Figure:
        """Left, accuracy against MACs; right, each arm's area under the curve minus the reference's."""
        figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 3.6), layout="constrained")
        self._draw_curves(left, name)
        self._draw_differences(right, self.studies[name])
        return figure

    def _draw_curves(self, axes: Axes, name: str) -> None:
        for number, arm in enumerate(CURVES):
            each = [on_grid(row) for row in self.rows if (row.study, row.arm) == (name, arm)]
            axes.plot(
                100 * GRID,
                100 * np.mean(each, axis=0),
                label=arm,
                color=PALETTE[number],
                marker=MARKERS[number],
                markevery=(3 * number, 15),
                linestyle=DASHES[number % len(DASHES)],
            )
        axes.set(xlabel="MACs, % of the network without exits", ylabel="accuracy on test, %")
        axes.legend(loc="lower right")

    def _draw_differences(self, axes: Axes, study: Study) -> None:
        area = study.measures[AREA]
        compared = {arm: known for arm, measure in area.items() if (known := measure.difference) is not None}
        arms = sorted(compared, key=lambda arm: compared[arm].mean)
        for place, arm in enumerate(arms):
            known = compared[arm]
            colour = PALETTE[CURVES.index(arm)] if arm in CURVES else GREY
            if known.interval is not None:
                low, high = known.interval
                axes.plot([100 * low, 100 * high], [place, place], color=colour)
            axes.plot(100 * known.mean, place, marker="o", color=colour)
        axes.axvline(0, color=PALETTE[CURVES.index(study.reference)])
        axes.set(yticks=range(len(arms)), yticklabels=arms)
        axes.set_xlabel(f"area under the curve minus {study.reference}'s, points")


def mean(measure: ArmMeasure) -> float:
    return float("nan") if measure.estimate is None else measure.estimate.mean


def on_grid(row: Row) -> NDArray[np.float64]:
    """Accuracy at the MACs of ``GRID``; NaN where the network is never so cheap."""
    macs, accuracy = np.array(row.curve.macs) / row.no_exit_macs, np.array(row.curve.accuracy)
    order = np.argsort(macs)
    on_it: NDArray[np.float64] = np.interp(GRID, macs[order], accuracy[order], left=np.nan)
    return on_it


def read() -> Filled:
    return Filled(Ledger.read(load_ledger(LEDGER), RESULTS))


def written(text: str, filled: Filled) -> str:
    """A document with its marked places written anew."""
    kinds: dict[str, Callable[[str], str]] = {"study": filled.tables, "headline of": filled.headline}
    return re.sub(
        r"(<!-- (study|headline of) ([\w.-]+) -->\n).*?(<!-- end of the study -->)",
        lambda place: f"{place[1]}\n{kinds[place[2]](place[3])}\n\n{place[4]}",
        text,
        flags=re.S,
    )


def main() -> None:
    filled = read()
    for path in (PAGE, README):
        write_text(path, written(path.read_text(encoding="utf-8"), filled))
    if SHOWN in filled.studies:
        with matplotlib.style.context(["default", STYLE]):
            filled.picture(SHOWN).savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    main()
