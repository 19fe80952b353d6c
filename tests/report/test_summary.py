"""The summary for a colleague: made from the results, true in every case."""

from __future__ import annotations

from typing import Any

import pytest

from erde.evaluation.results import Results
from erde.report.run_page import render
from erde.report.summary import NOT_PROMISED, sentences
from tests.helpers.pages import Page, make_results

# What a colleague would have to look up.
GLOSSARY = ("MAC", "risk", "certif", "threshold", "exit", "operating point", "bundle", "split", "score")


def changed(
    measured: dict[str, Any] | None = None, proof: dict[str, Any] | None = None, **arm: Any
) -> Results:
    """Results whose exported arm, default point's measures or certificate differ."""
    results = make_results()
    exported = results.arms["erde"]
    points = [point.model_copy() for point in exported.operating_points]
    for index, point in enumerate(points):
        if point.name == exported.default_operating_point:
            assert point.test is not None
            assert point.certificate is not None
            points[index] = point.model_copy(
                update={
                    "test": point.test.model_copy(update=measured or {}),
                    "certificate": point.certificate.model_copy(update=proof or {}),
                }
            )
    arms = results.arms | {"erde": exported.model_copy(update={"operating_points": points} | arm)}
    return results.model_copy(update={"arms": arms})


def test_it_says_what_is_saved_promised_and_measured_in_words_that_need_no_glossary() -> None:
    results = changed(
        {"accuracy": 0.7125, "exit_rates": [0.45, 0.2, 0.35], "macs_saved": 0.289, "risk": 0.0061}
    )
    told = sentences(results, doubtful=False)
    assert told == [
        "This network sorts images into 5 classes (airplane, automobile, bird and 2 more) and gives its answer early, "
        "after part of the computation, where it is sure enough.",
        "At the default setting 65 of 100 images are answered early, which saves 28.9\N{NO-BREAK SPACE}% of the computation; "
        "71.2 of 100 answers are right, against 71.6 when every image is computed to the end.",
        "Promised: of 100 images at most 1 gets a wrong answer where computing to the end gives the right one "
        "(of 100 promises made in this way at most 10 fail).",
        "Measured on the 2,500 test images of cifar10, which had no part in training or in choosing the setting, "
        "it was 0.61 of 100: within the promise.",
        NOT_PROMISED,
    ]  # fmt: skip
    assert not [word for word in GLOSSARY if word in " ".join(told)]


def test_it_stands_at_the_top_of_the_page() -> None:
    results = make_results()
    page = Page(render(results))
    told = sentences(results, doubtful=False)
    assert [page.part(data_summary=str(index)) for index in range(5)] == [
        text.replace("\N{NO-BREAK SPACE}", " ") for text in told
    ]
    assert page.text.index("In short") < page.text.index("Certified.")


def test_without_certificate_nothing_is_promised_and_nothing_is_saved() -> None:
    told = sentences(make_results(certified=False), doubtful=False)
    assert 3 <= len(told) <= 5
    assert told[1] == (
        "At the default setting no image is answered early, so nothing is saved; 71.6 of 100 answers are right."
    )
    assert told[2] == (
        "At this setting nothing is promised about wrong answers: "
        "proving what was asked for takes at least 4,605 images set aside for it."
    )
    assert told[3].startswith("All this was measured on the 2,500 test images of cifar10")


def test_a_network_with_one_exit_answers_nothing_early() -> None:
    told = sentences(make_results(exits=1, names=("fixed-small",), certified=False), doubtful=False)
    assert told[0].endswith("and computes every image to the end.")
    assert "it has no early answers, so nothing is saved" in told[1]
    assert told[2] == "At this setting nothing is promised about wrong answers."


@pytest.mark.parametrize(
    ("saved", "words"),
    [(0.0, "saves no computation"), (-0.013, "takes 1.3\N{NO-BREAK SPACE}% more computation")],
)
def test_exits_that_save_nothing_are_said_to(saved: float, words: str) -> None:
    assert f"which {words};" in sentences(changed({"macs_saved": saved}), doubtful=False)[1]


@pytest.mark.parametrize(
    ("milliseconds", "words"),
    [
        (0.6, "saves 25.0\N{NO-BREAK SPACE}% of the time (0.6 instead"),
        (0.88, "takes 10.0\N{NO-BREAK SPACE}% more time (0.88 instead"),
    ],
)
def test_time_is_told_where_a_machine_was_timed(milliseconds: float, words: str) -> None:
    results = changed({"milliseconds": milliseconds})
    arm = results.arms["erde"]
    points = list(arm.operating_points)
    assert points[0].kind == "no-exit"
    assert points[0].test is not None
    points[0] = points[0].model_copy(update={"test": points[0].test.model_copy(update={"milliseconds": 0.8})})
    arms = results.arms | {"erde": arm.model_copy(update={"operating_points": points})}
    told = sentences(results.model_copy(update={"arms": arms}), doubtful=False)[1]
    assert f" and {words} of 0.8 ms for an image on the machine that was timed);" in told
    assert "time" not in sentences(changed(), doubtful=False)[1]


@pytest.mark.parametrize(
    ("proof", "words"),
    [
        ({"max_risk": 0.0025}, "of 10,000 images at most 25 get a wrong answer where computing to the end gives the right one"),
        ({"max_risk": 0.005}, "of 1,000 images at most 5 get a wrong answer"),
        ({"max_risk": 0.0123456}, "of 100 images at most 1.23456 get a wrong answer"),
        ({"reference": "teacher"}, "at most 1 gets a wrong answer where the teacher gives the right one"),
        ({"confidence": 0.95}, "(of 100 promises made in this way at most 5 fail)"),
        ({"confidence": None}, "(that holds on average over many such checks)"),
        ({"guarantee": "net_drop"}, "of 100 images at most 1 fewer is answered right than by computing to the end"),
        ({"guarantee": "disagreement"}, "of 100 images at most 1 gets another answer than from computing to the end"),
    ],
)  # fmt: skip
def test_every_kind_of_promise_is_told_as_it_is(proof: dict[str, Any], words: str) -> None:
    told = sentences(changed(proof=proof), doubtful=False)
    assert words in told[2]
    assert told[3].endswith("within the promise.") == (
        proof.get("guarantee") != "disagreement" and proof.get("max_risk", 1) > 0.0061
    )


def test_a_promise_that_did_not_hold_or_says_little_is_not_praised() -> None:
    broken = sentences(changed({"risk": 0.0123}), doubtful=True)
    assert broken[3].endswith("it was 1.23 of 100: more than promised.")
    assert broken[2].endswith("; but that is itself so often wrong that this says little.")


def test_what_was_not_measured_is_not_told() -> None:
    results = make_results()
    arm = results.arms["erde"]
    points = [point.model_copy(update={"test": None}) for point in arm.operating_points]
    arms = results.arms | {"erde": arm.model_copy(update={"operating_points": points})}
    told = sentences(results.model_copy(update={"arms": arms}), doubtful=False)
    assert told[1] == "It was not measured on test images, so nothing is known of what it saves."
    assert len(told) == 4
