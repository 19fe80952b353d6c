"""A ledger as Markdown: which rows are filled, and the tables of every study with filled seeds."""

from __future__ import annotations

from erde.evaluation.ledger import Ledger
from erde.recipe.study import StudyConfig
from erde.report.numbers import NONE
from erde.report.study_text import study_text

INTRODUCTION = """# Full training runs

`erde ledger` made this page from the rows in the folder of results, {filled} of {planned} planned. A seed counts below
when the rows of all its arms are filled.

| study | recipe | arms | seeds filled | seeds empty | training, hours |
|---|---|---|---|---|---|
"""


def ledger_text(ledger: Ledger) -> str:
    """An overview of the studies, and the tables of those that have a filled seed."""
    text = INTRODUCTION.format(filled=len(ledger.rows), planned=len(ledger.planned))
    text += "".join(_line(ledger, study) for study in ledger.config.studies)
    for study in ledger.config.studies:
        summary = ledger.summary(study)
        if summary is not None:
            # A heading stands a level deeper here.
            text += "\n" + "".join(
                f"#{line}" if line.startswith("#") else line
                for line in study_text(summary).splitlines(keepends=True)
            )
    return text


def _line(ledger: Ledger, study: StudyConfig) -> str:
    arms = dict.fromkeys(planned.arm for planned in ledger.planned if planned.study is study)
    rows = [row for row in ledger.rows.values() if row.study == study.name]
    seconds = [row.seconds for row in rows if row.seconds is not None]
    filled, empty = (
        ", ".join(map(str, ledger.seeds(study, filled=filled))) or NONE for filled in (True, False)
    )
    hours = f"{sum(seconds) / 3600:.1f}" if seconds else NONE
    return f"| {study.name} | {study.recipe} | {', '.join(arms)} | {filled} | {empty} | {hours} |\n"
