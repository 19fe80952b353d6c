"""Classes and mistakes in the report: the numbers, the rows in the order that a reader asks for."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

from erde.common.splits import TestLogits
from erde.evaluation.evidence import ArmInput, Evidence, collect
from erde.evaluation.measures import measure_classes
from erde.evaluation.results import Results
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.report.classes import class_rows
from erde.report.run_page import render
from tests.helpers.hand_made import hand_made_policy
from tests.helpers.oracles import synthetic_logits
from tests.helpers.pages import Page, browse, make_results, needs_browser, root_of

COST = Cost(exit_macs=(12_400_000, 26_700_000, 41_100_000), no_exit_macs=41_000_000)
NAMES = ["airplane", "automobile", "bird", "cat", "deer"]


def made(classes: int = 5, images: int = 900) -> tuple[Results, Evidence, ArmInput]:
    """Results and evidence of one arm, both from the same logits."""
    inputs = ArmInput(
        TestLogits(*synthetic_logits(8, images, classes=classes)),
        hand_made_policy(thresholds=(0.5, 0.4)),
        COST,
    )
    arm = make_results(names=("erde",)).arms["erde"]
    points = [
        arm.operating_points[0],
        arm.operating_points[1].model_copy(
            update={"thresholds": list(inputs.policy.default_point().thresholds)}
        ),
    ]
    arm = arm.model_copy(
        update={"classes": measure_classes(inputs.test, inputs.policy), "operating_points": points}
    )
    results = make_results(names=("erde",), arms={"erde": arm})
    names = NAMES if classes == 5 else [f"name-{index}" for index in range(classes)]
    results = results.model_copy(update={"data": results.data.model_copy(update={"classes": names})})
    return results, collect({"erde": inputs}, "erde"), inputs


def answered(inputs: ArmInput) -> tuple[np.ndarray, np.ndarray]:
    """Answer and exit of every image at the default operating point."""
    answers, scores = inputs.policy.rule.apply(inputs.test.logits)
    exits = policy.decide(scores, inputs.policy.default_point().thresholds)
    return policy.take_exit(answers.argmax(axis=-1), exits), exits


def test_the_matrix_in_the_page_is_that_of_scikit_learn() -> None:
    results, evidence, inputs = made()
    source = render(results, evidence)
    answers, _ = answered(inputs)
    expected = confusion_matrix(inputs.test.labels, answers)
    body = re.search(r'data-confusion="matrix".*?<tbody>(.*?)</tbody>', source, re.DOTALL)
    assert body is not None
    rows = [
        [int(count.replace(",", "")) for count in re.findall(r"<td[^>]*>([\d,]+)</td>", row)]
        for row in re.findall(r"<tr>.*?</tr>", body[1], re.DOTALL)
    ]
    np.testing.assert_array_equal(rows, expected)
    off = expected - np.diag(expected.diagonal())
    true, answer = np.unravel_index(off.argmax(), off.shape)
    total = expected[true].sum()
    said = f"{off.max()} of {total} images of {NAMES[true]} are taken for {NAMES[answer]}."
    assert Page(source).part(data_mistake=None).endswith(said)


def test_rows_agree_with_a_count_over_the_images_of_each_class() -> None:
    results, evidence, inputs = made()
    answers, exits = answered(inputs)
    labels, final = inputs.test.labels, inputs.test.logits[-1].argmax(axis=-1)
    rows = class_rows(results.arms["erde"], evidence.confusion)
    assert sorted(row.index for row in rows) == list(range(5))
    for row in rows:
        mine = labels == row.index
        assert row.measures.images == mine.sum()
        assert row.measures.accuracy == pytest.approx((answers[mine] == row.index).mean())
        assert row.measures.no_exit_accuracy == pytest.approx((final[mine] == row.index).mean())
        assert row.early == pytest.approx((exits[mine] < 2).mean())
        own = np.array([cost.macs for cost in results.arms["erde"].cost])
        assert row.macs_saved == pytest.approx(
            1 - own[exits[mine]].mean() / results.arms["erde"].no_exit_macs
        )
        wrong = np.bincount(answers[mine & (answers != labels)], minlength=5)
        assert row.mistake == (int(wrong.argmax()), int(wrong.max()))
    assert [row.measures.drop for row in rows] == sorted((row.measures.drop for row in rows), reverse=True)


def test_a_class_without_images_has_dashes() -> None:
    results, evidence, inputs = made()
    few = TestLogits(
        inputs.test.logits[:, inputs.test.labels != 3], inputs.test.labels[inputs.test.labels != 3]
    )
    arm = results.arms["erde"].model_copy(update={"classes": measure_classes(few, inputs.policy)})
    confusion = collect({"erde": dataclasses.replace(inputs, test=few)}, "erde").confusion
    row = next(row for row in class_rows(arm, confusion) if row.index == 3)
    assert (row.early, row.macs_saved, row.mistake) == (None, None, None)
    page = Page(
        render(
            results.model_copy(update={"arms": {"erde": arm}}),
            dataclasses.replace(evidence, confusion=confusion),
        )
    )
    assert page.part(data_class="3").startswith("cat 0 0.0 0.0 0.0 – – –")


def test_of_many_classes_the_most_frequent_mistakes_are_a_list() -> None:
    results, evidence, inputs = made(classes=30)
    page = Page(render(results, evidence))
    assert page.values("data-confusion") == ["pairs"]
    matrix = confusion_matrix(inputs.test.labels, answered(inputs)[0], labels=range(30))
    images = matrix.sum(axis=1)
    np.fill_diagonal(matrix, 0)
    true, answer = np.unravel_index(matrix.argmax(), matrix.shape)
    share = 100 * matrix.max() / images[true]
    assert page.part(data_confusion="pairs").startswith(
        f"name-{true} name-{answer} {matrix.max()} {share:.1f}"
    )
    assert len(re.findall("name-", page.part(data_confusion="pairs"))) == 50


def test_without_evidence_or_without_mistakes_there_is_one_line() -> None:
    results, evidence, _ = made()
    assert "not counted" in Page(render(results)).part(data_confusion="none")
    flawless = dataclasses.replace(evidence.confusion, answer=evidence.confusion.true)
    page = Page(render(results, dataclasses.replace(evidence, confusion=flawless)))
    assert page.part(data_confusion="none") == "Every test image was answered right."


SORT = """
const root = document.documentElement, table = document.querySelector('table.sortable');
const headings = [...table.tHead.rows[0].cells];
const heading = (label) => headings.find((cell) => cell.textContent.replace(/\\s+/g, ' ').startsWith(label));
const order = () => headings.filter((cell) => cell.ariaSort).map((cell) => cell.cellIndex + ' ' + cell.ariaSort);
const seen = () => [...table.tBodies[0].rows].map((row) => row.dataset.class).join(' ') + '/' + order().join(' ');
const told = [seen()];
for (const label of ['accuracy', 'accuracy', 'class', 'class', 'leave']) {
  // A button takes Enter and space by itself.
  const button = heading(label).querySelector('button');
  button.focus();
  if (document.activeElement !== button) throw new Error('no focus');
  button.click();
  told.push(seen());
}
root.dataset.told = told.join('|');
"""


@needs_browser
def test_a_click_on_a_heading_sorts_the_classes(tmp_path: Path) -> None:
    results, evidence, inputs = made()
    classes = measure_classes(inputs.test, inputs.policy)
    dom = browse(tmp_path, render(results, evidence), then=SORT)
    told = re.search(r'data-told="([^"]*)"', root_of(dom))
    assert told is not None
    assert "data-failed" not in root_of(dom)

    def by(values: list[float], state: str) -> str:
        return " ".join(map(str, sorted(range(5), key=lambda index: values[index]))) + "/" + state

    accuracy, up = [measured.accuracy for measured in classes], list(map(float, range(5)))
    assert len(set(accuracy)) == 5
    assert told[1].split("|") == [
        by([-measured.drop for measured in classes], "4 descending"),
        by([-share for share in accuracy], "2 descending"),
        by(accuracy, "2 ascending"),
        by(up, "0 ascending"),
        by([-index for index in up], "0 descending"),
        by([measured.exit_rates[-1] for measured in classes], "5 descending"),
    ]
