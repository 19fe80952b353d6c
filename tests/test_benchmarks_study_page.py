"""The study's page and the README's table are those of the rows in ``results/``."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import study_page

from erde.evaluation.ledger import Ledger
from erde.recipe.study import load_ledger


@pytest.mark.parametrize("path", [study_page.PAGE, study_page.README], ids=lambda path: path.name)
def test_the_documents_are_those_of_the_rows(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text == study_page.written(text, study_page.read()), (
        "write them anew: python benchmarks/study_page.py"
    )


@pytest.mark.parametrize("arm", ["ce", "kd", "erde"])
def test_the_headline_is_the_mean_of_the_seeds(arm: str) -> None:
    rows = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in study_page.RESULTS.glob(f"{study_page.SHOWN}-{arm}-seed*.json")
    ]
    exits = np.mean([[measured["accuracy"] for measured in row["exits"]] for row in rows], axis=0)
    area, saved = (
        np.mean([row["measures"][name] for row in rows]) for name in (study_page.AREA, study_page.SAVED)
    )
    (line,) = [
        line for line in study_page.read().headline(study_page.SHOWN).splitlines() if f"| {arm} |" in line
    ]
    cells = [cell.split(" ± ")[0].strip() for cell in line.strip("|").split("|")]
    assert cells[1] == " / ".join(f"{100 * value:.1f}" for value in exits)
    assert (cells[2], cells[4]) == (f"{100 * area:.1f}", f"{100 * saved:.1f}")


def test_arms_of_one_teacher_count_the_same_errors_of_it() -> None:
    wrong = defaultdict(set)
    for row in study_page.read().rows:
        if (share := row.measures.get("teacher wrong")) is not None:
            wrong[row.study, row.seed].add(share)
    assert wrong
    assert [len(shares) for shares in wrong.values()] == [1] * len(wrong)


def test_the_list_of_studies_is_that_of_the_ledger() -> None:
    listed = re.findall(
        r"^\| `([\w-]+)` \|.*->", (study_page.RESULTS / "README.md").read_text(encoding="utf-8"), re.M
    )
    assert listed == [study.name for study in load_ledger(study_page.LEDGER).studies]


def test_only_the_places_are_written(tmp_path: Path) -> None:
    empty = study_page.Filled(Ledger.read(load_ledger(study_page.LEDGER), tmp_path))
    place = "<!-- study readings -->\n{}<!-- end of the study -->"
    text = f"before\n{place.format('old')}\nbetween\n{place.format('')}\nafter"
    new = place.format(f"\n{study_page.EMPTY}\n\n")
    assert study_page.written(text, empty) == f"before\n{new}\nbetween\n{new}\nafter"
