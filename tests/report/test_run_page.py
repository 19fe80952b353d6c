"""The report: all that it must say, safely, in one file that a browser draws without the network."""

from __future__ import annotations

import dataclasses
import datetime
import html
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from erde.calibration.thresholds import ScoredSplit, sweep
from erde.common.history import Epoch, Health
from erde.common.splits import TestLogits
from erde.evaluation.confusion import Confusion
from erde.evaluation.evidence import ArmInput, Evidence, collect
from erde.evaluation.results import Quantised, Results, RuntimeAgreement, SplitInfo
from erde.policy.cost import Cost
from erde.report.run_page import render, write_report
from tests.helpers.hand_made import hand_made_exit_choice, hand_made_policy
from tests.helpers.oracles import synthetic_logits
from tests.helpers.pages import (
    Page,
    browse,
    compared,
    make_arm,
    make_results,
    needs_browser,
    root_of,
)

COST = Cost(exit_macs=(12_400_000, 26_700_000, 41_100_000), no_exit_macs=41_000_000)
IMAGES = 2_500
# Where the default operating point lies on the paths of these tests.
DEFAULT = 120


def arm_input(seed: int, cost: Cost = COST, images: int = IMAGES) -> ArmInput:
    """An arm whose default operating point lies on its path."""
    made = hand_made_policy(cost=cost)
    early = made.points[1].model_copy(update={"thresholds": list(made.path.thresholds[DEFAULT])})
    made = dataclasses.replace(made, points=[made.points[0], early])
    return ArmInput(TestLogits(*synthetic_logits(seed, images)), made, cost)


def pictures(count: int, side: int = 32) -> np.ndarray:
    return np.random.default_rng(5).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


INPUTS = {name: arm_input(seed) for seed, name in enumerate(("teacher", "erde", "kd", "ce"))}


@pytest.fixture(scope="module")
def evidence() -> Evidence:
    return collect(INPUTS, "erde", pictures(IMAGES))


@pytest.fixture(scope="module")
def results() -> Results:
    return make_results()


@pytest.fixture(scope="module")
def page(results: Results) -> Page:
    return Page(render(results))


def test_summary_and_certificate_come_first(results: Results, page: Page) -> None:
    point = results.arms["erde"].operating_points[1]
    assert point.test is not None
    assert point.certificate is not None
    summary, promise = page.part(class_="summary"), page.part(data_certified="yes", data_point="risk-1")
    (tiles,) = page.parts(class_="tiles")
    assert f"{100 * point.test.accuracy:.1f} %" in tiles
    assert f"{100 - 100 * point.test.macs_saved:.1f} %" in tiles
    assert "71.6 %" in tiles  # of the final exit
    assert point.certificate.sentence() in promise
    assert point.certificate.assumptions[1:] in promise
    places = [page.text.index(text) for text in (summary, promise, tiles, page.part(id="tradeoff"))]
    assert places == sorted(places)


def test_a_tile_names_the_same_network_without_exits_where_it_was_trained() -> None:
    plain = make_arm("fixed-full", 1, certified=True, quality=0.722)
    arms = make_results().arms | {"fixed-full": plain}
    tiles = Page(render(make_results(arms=arms))).part(class_="tiles")
    assert "trained without exits (fixed-full): 72.2 %" in tiles


def test_without_certificate_it_says_so_and_why() -> None:
    results = make_results(certified=False)
    page = Page(render(results))
    promise = page.part(data_certified="no", data_point="no-exit")
    missing = results.arms["erde"].left_out[0]
    assert f"{missing.name}, but {missing.note}." in promise
    assert page.parts(data_certified="yes") == []
    assert page.values("data-kept") == []


def test_every_arm_point_and_exit_is_in_a_table(results: Results, page: Page) -> None:
    for name, arm in results.arms.items():
        several = len(arm.exits) > 1
        for point in arm.operating_points:
            assert len(page.parts(data_arm=name, data_point=point.name)) == several
        exits = page.part(data_exits=name)
        for cost in arm.cost:
            assert cost.name in exits
            assert f"{cost.parameters:,}" in exits
    assert page.tags.count("table") == page.tags.count("caption")
    assert "off, off" in page.text
    assert {value for _, name, value in page.attributes if name == "scope"} == {"col", "row", "rowgroup"}


def test_health_of_heads_has_a_table_and_trouble_a_line_of_its_own() -> None:
    def with_health(dead: int) -> Results:
        health = Health(
            dead_units=[dead, 0], units=[16, 32], first_exit_accuracy=0.66, probe_accuracy=0.641, images=960
        )
        last = Epoch(
            epoch=30,
            phase="joint",
            learning_rate=0.0,
            parts={"loss": 1.0, "gradient_norm_heads": [0.25, 0.5], "gradient_norm_trunk": 1.75},
            health=health,
        )
        arms = make_results().arms
        return make_results(arms=arms | {"kd": arms["kd"].model_copy(update={"history": [last]})})

    healthy, ill = Page(render(with_health(1))), Page(render(with_health(13)))
    assert healthy.part(data_health="kd") == "kd training 1 of 16 / 0 of 32 66.0 64.1 0.25 / 0.5 1.8"
    assert healthy.parts(data_unhealthy=None) == []
    assert "13 of 16 / 0 of 32" in ill.part(data_unhealthy="kd")
    # It is not folded away.
    assert "13 of 16" in ill.part(class_="card section", open="")


def test_the_page_says_its_date_and_how_the_bundle_is_used(
    results: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A day that stays: at midnight today's date would change between the page and the look at it.
    day = SimpleNamespace(today=lambda: datetime.date(2031, 2, 3))
    monkeypatch.setattr("erde.report.run_page.datetime", SimpleNamespace(date=day))
    header = Page(render(results)).part(class_="top")
    assert "2031-02-03" in header
    assert "erde predict bundle IMAGES" in header
    assert 'erde.runtime.Session("bundle")' in header


def test_numbers_have_sane_digits(page: Page) -> None:
    shown = re.sub(r"0\.0005|[0-9a-f]{12,}", "", page.text)
    assert re.findall(r"\d\.\d{5,}", shown) == []
    assert "1,234.6 s" in page.text
    assert "71.6 69.8 to 73.4" in page.text


def test_exits_that_were_chosen_by_time_have_their_tables(results: Results, page: Page) -> None:
    assert page.parts(data_exit_choice="erde") == []
    choice = hand_made_exit_choice()
    chosen = Page(render(replaced(results, exit_choice=choice)))
    assert choice.line()[1:] in chosen.part(data_exit_choice="erde")
    assert {exit.kept for exit in choice.candidates} == {True, False}
    for exit in choice.candidates:
        times = f"{exit.milliseconds:.3g} {100 * exit.share:.1f} {exit.passing_milliseconds:.2g}"
        row = f"{exit.name} {times} {'kept' if exit.kept else 'dropped'}"
        assert chosen.part(data_candidate=exit.name) == row
    assert len(choice.best_of_size) == 4
    assert chosen.part(data_subset="0") == "0 the final exit alone 4 0.0 0.00"


def test_risk_above_the_promise_is_marked(page: Page) -> None:
    results = make_results(names=("erde",))
    points = results.arms["erde"].operating_points
    assert points[1].test is not None
    worse = points[1].model_copy(update={"test": points[1].test.model_copy(update={"risk": 0.0123})})
    broken = Page(render(replaced(results, operating_points=[points[0], worse])))
    assert broken.part(data_kept="no").startswith("1.23 ")
    assert broken.parts(data_kept="yes") == []
    assert page.parts(data_kept="no") == []
    assert "0.68 bound 0.96 0.61" in page.part(data_arm="erde", data_point="risk-1")


def test_agreement_is_stated_both_ways_and_for_the_bundle_in_int8(results: Results, page: Page) -> None:
    assert "10,000 of 10,000" in page.part(data_agreement="runtime", data_disagreements="0")
    assert "2 lie within 1e-05" in page.part(data_agreement="runtime")
    assert page.parts(data_agreement="int8") == []
    inner = RuntimeAgreement(
        images=10_000, operating_points=["no-exit", "early"], disagreements=3, band=4, band_width=1e-5
    )
    quantised = Quantised(
        arm="erde-int8", bundle_seal="", agreement=inner, kept_in_float=["first"], tune_images=1,
        fp32_tune_accuracy=[], tune_accuracy=[], label_agreement=[], fp32_bytes=2, bytes=1,
    )  # fmt: skip
    broken = results.agreement.model_copy(update={"disagreements": 7})
    changed = Page(render(results.model_copy(update={"quantised": quantised, "agreement": broken})))
    assert "7 of 20,000" in changed.part(data_agreement="runtime", data_disagreements="7")
    assert "3 of 20,000" in changed.part(data_agreement="int8", data_disagreements="3")
    # Folded only where there is nothing to worry about.
    assert len(changed.parts(class_="card section", open=None)) == 1
    assert page.parts(class_="card section", open=None) == []


HOSTILE = '</script><script>document.documentElement.dataset.broken="yes"</script><img src=x onerror=boom()><b>bold</b>&"\''


def hostile_results() -> Results:
    """The same hostile text wherever a text can stand."""
    results = make_results(names=("teacher", "erde"))
    arm = results.arms["erde"]
    texts = {"name": HOSTILE, "note": HOSTILE, "certificate": None}
    outcomes = [outcome.model_copy(update={"score": HOSTILE}) for outcome in arm.score_outcomes]
    missing = [point.model_copy(update={"name": HOSTILE, "note": HOSTILE}) for point in arm.left_out]
    points = [arm.operating_points[0], arm.operating_points[1].model_copy(update=texts)]
    costs = [cost.model_copy(update={"name": HOSTILE}) for cost in arm.cost]
    changed = arm.model_copy(
        update={"operating_points": points, "default_operating_point": HOSTILE, "cost": costs, "loss": HOSTILE,
                "backbone": HOSTILE, "score": HOSTILE, "score_outcomes": outcomes, "left_out": missing}
    )  # fmt: skip
    split = SplitInfo(size=1, fingerprint=HOSTILE)
    data = results.data.model_copy(
        update={"name": HOSTILE, "classes": [HOSTILE, "b", "c", "d", HOSTILE], "splits": {HOSTILE: split}}
    )
    return make_results(
        name=HOSTILE, exported_arm=HOSTILE, recipe={HOSTILE: HOSTILE}, data=data, bundle_seal=HOSTILE,
        environment={HOSTILE: HOSTILE}, timings={HOSTILE: 1.0}, comparisons=[compared(HOSTILE, "teacher", 0.1)],
        agreement=results.agreement.model_copy(update={"operating_points": [HOSTILE]}),
    ).model_copy(update={"arms": {"teacher": results.arms["teacher"], HOSTILE: changed}})  # fmt: skip


def hostile_evidence() -> Evidence:
    """The same hostile name for the arm and for one of its operating points."""
    arm = INPUTS["erde"]
    early = arm.policy.points[1].model_copy(update={"name": HOSTILE})
    calibrated = dataclasses.replace(arm.policy, points=[arm.policy.points[0], early], default=HOSTILE)
    hostile = dataclasses.replace(arm, policy=calibrated)
    return collect({"teacher": INPUTS["teacher"], HOSTILE: hostile}, HOSTILE, pictures(IMAGES))


def test_text_from_the_data_stays_text() -> None:
    source = render(hostile_results(), hostile_evidence())
    clean, page = Page(render(make_results())), Page(source)
    assert len(page.scripts) == len(clean.scripts) == 3
    assert page.tags.count("img") > 30  # thumbnails, whose alternatives hold hostile class names
    assert "img" not in clean.tags
    assert not [attribute for attribute in page.attributes if attribute[1].startswith("on")]
    assert HOSTILE not in source.replace(html.escape(HOSTILE), "")
    assert any(HOSTILE in value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))
    assert json.loads(page.scripts[1])["exported"] == HOSTILE
    assert page.text.count("onerror=boom()><b>bold</b>") > 20


def test_nothing_is_loaded_from_elsewhere(results: Results, evidence: Evidence) -> None:
    page = Page(render(results, evidence))
    loading = {"src", "href", "srcset", "data", "action", "poster", "background", "formaction"}
    targets = [value for _, name, value in page.attributes if name in loading]
    assert any(value.startswith("#") for value in targets)
    allowed = re.compile(r"#[\w-]*|data:image/(png|webp);base64,[\w+/=]+")
    assert [value for value in targets if not allowed.fullmatch(value)] == []
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    ours = page.styles + page.scripts[1:]
    assert not re.search(r"https?://|@import|url\(", "".join(ours))
    policy = next(value for tag, name, value in page.attributes if tag == "meta" and "default-src" in value)
    assert policy.startswith("default-src 'none';")


def test_size_with_long_histories_and_many_exits(tmp_path: Path) -> None:
    results = make_results(exits=8)
    arms = {name: arm.model_copy(update={"history": arm.history * 20}) for name, arm in results.arms.items()}
    write_report(results.model_copy(update={"arms": arms}), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 3_000_000
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_size_with_evidence_of_ten_thousand_images_and_five_arms(tmp_path: Path) -> None:
    arms = {f"arm-{seed}": arm_input(seed, images=10_000) for seed in range(5)}
    evidence = collect(arms, "arm-0", pictures(10_000, side=96))
    assert len(evidence.arms["arm-4"].reference_right) == 10_000
    write_report(make_results(names=tuple(arms)), tmp_path / "report.html", evidence)
    assert (tmp_path / "report.html").stat().st_size < 3_000_000


@pytest.mark.parametrize("exits", [2, 5, 8])
def test_one_arm_alone_with_any_number_of_exits(exits: int) -> None:
    page = Page(render(make_results(exits=exits, names=("ce",))))
    assert f"{exits - 1} layer{exits}.2" in page.part(data_exits="ce")
    assert f"{exits - 1}: " in page.part(data_rates="ce")
    assert {"data-teacher-wrong", "data-comparisons"} <= {
        name for _, name, value in page.attributes if value == "none"
    }


def test_a_network_with_one_exit_can_be_the_exported_one() -> None:
    page = Page(render(make_results(exits=1, names=("fixed-small",))))
    assert page.parts(data_slider="none")
    assert page.parts(class_="why") == []
    assert page.parts(data_arm="fixed-small", data_point="no-exit")


def test_unmeasured_points_are_dashes() -> None:
    arm = make_arm("kd", 3, certified=True, quality=0.7)
    bare = [point.model_copy(update={"test": None, "tune": None}) for point in arm.operating_points]
    arms = {"kd": arm.model_copy(update={"operating_points": bare, "score_candidates": [], "history": []})}
    page = Page(render(make_results(exported_arm="kd", arms=arms)))
    assert page.parts(class_="tiles") == []
    assert re.search(r"[\d.]+ % of|of 100 answers", page.part(class_="summary")) is None
    assert page.part(data_arm="kd", data_point="no-exit").endswith("– – – – –")


# ---------------------------------------------------------------- promises, comparisons, scores, classes


def replaced(results: Results, name: str = "erde", **changes: Any) -> Results:
    return results.model_copy(
        update={"arms": results.arms | {name: results.arms[name].model_copy(update=changes)}}
    )


def test_a_promise_of_the_net_drop_is_held_against_the_net_drop(results: Results) -> None:
    points = results.arms["erde"].operating_points
    point = points[1]
    assert point.test is not None
    assert point.certificate is not None
    proof = point.certificate.model_copy(update={"guarantee": "net_drop"})
    # The risk is above what was promised, the drop is not.
    test = point.test.model_copy(update={"risk": 0.0123, "net_drop": 0.0087})
    changed = [points[0], point.model_copy(update={"certificate": proof, "test": test})]
    kept = Page(render(replaced(results, operating_points=changed)))
    assert "drop ≤ 1 % with 90 % confidence 0.68 bound 0.96 0.87" in kept.part(
        data_arm="erde", data_point="risk-1"
    )
    assert "0.87 %" in kept.parts(class_="tiles")[0]
    assert "no" not in kept.values("data-kept")
    worse = [points[0], changed[1].model_copy(update={"test": test.model_copy(update={"net_drop": 0.0111})})]
    assert Page(render(replaced(results, operating_points=worse))).part(data_kept="no").startswith("1.11 ")


def test_a_promise_of_other_answers_is_not_held_against_the_risk(results: Results) -> None:
    points = results.arms["erde"].operating_points
    assert points[1].test is not None
    assert points[1].certificate is not None
    proof = points[1].certificate.model_copy(update={"guarantee": "disagreement"})
    changed = [points[0], points[1].model_copy(update={"certificate": proof})]
    page = Page(render(replaced(make_results(names=("erde",)), operating_points=changed)))
    row = page.part(data_arm="erde", data_point="risk-1")
    assert (
        "other answers ≤ 1 % with 90 % confidence 0.68 bound 0.96 – other answers are not counted on test"
        in row
    )
    assert page.values("data-kept") == []
    assert "the promise is about other answers" in page.parts(class_="tiles")[0]


def test_a_promise_in_expectation_names_no_confidence(results: Results) -> None:
    points = results.arms["erde"].operating_points
    assert points[1].certificate is not None
    update = {"guarantee": "expected_risk", "confidence": None, "upper_bound": None}
    proof = points[1].certificate.model_copy(update=update)
    changed = [points[0], points[1].model_copy(update={"certificate": proof})]
    row = Page(render(replaced(results, operating_points=changed))).part(data_arm="erde", data_point="risk-1")
    assert "risk ≤ 1 % in expectation 0.68 0.61" in row


def test_promises_that_were_left_out_are_listed_with_their_reason(results: Results, page: Page) -> None:
    for missing in results.arms["erde"].left_out:
        assert all(missing.note in text for text in page.parts(data_left_out=missing.name))
        assert page.parts(data_left_out=missing.name)


def test_areas_stand_beside_those_of_the_papers_rule_and_the_oracle(page: Page) -> None:
    assert (
        page.part(data_area="erde")
        == "erde margin at sharpness 1.4 70.12 69.12 to 71.12 69.23 68.23 to 70.23 80.6 60.0"
    )


def test_comparisons_say_who_is_better_or_that_no_difference_was_seen(results: Results) -> None:
    pairs = [
        compared("erde", "kd", 0.0234), compared("erde", "fixed-small", -0.02), compared("erde", "ce", 0.004, at="no-exit")
    ]  # fmt: skip
    page = Page(render(results.model_copy(update={"comparisons": pairs})))
    numbers = "−1.25 −1.40 to −1.10 211 180 0.130"
    better, worse, same = (
        page.part(data_first="erde", data_second=name) for name in ("kd", "fixed-small", "ce")
    )
    assert better == f"erde – kd +2.34 +1.34 to +3.34 {numbers} erde is better"
    assert worse == f"erde – fixed-small −2.00 −3.00 to −1.00 {numbers} fixed-small is better"
    assert same.startswith(f"erde – ce +0.40 −0.60 to +1.40 {numbers} no ")
    assert page.values("data-at") == ["default", "no-exit"]


def test_scores_above_their_target_on_test_are_marked(page: Page) -> None:
    rows = page.part(data_outcomes="erde", data_target="0.01")
    assert "margin 1.4 none 21.0 22.0 0.90 71.6 entropy 1 none 21.0 19.0 1.17 above 71.6" in rows


def test_the_class_that_pays_most_is_named(results: Results, page: Page) -> None:
    text = page.part(data_worst="bird")
    assert "3.5 points" in text
    assert "71.6 to 68.1 %" in text
    assert "With 625 images, a single one makes 0.16 points." in text
    classes = [measured.model_copy(update={"images": 1}) for measured in results.arms["erde"].classes]
    single = Page(render(replaced(results, classes=classes)))
    assert "With 1 image, a single one makes 100.00 points." in single.part(data_worst="bird")


def test_a_single_image_is_no_images(results: Results, evidence: Evidence) -> None:
    pairs = np.array([0, 0, 1, 2, 3, 4]), np.array([0, 1, 1, 2, 3, 4])
    counted = dataclasses.replace(evidence, confusion=Confusion(5, *pairs, np.array([9, 1, 9, 9, 9, 9])))
    table = Page(render(results, counted)).part(data_classes="erde")
    assert "automobile 1 image " in table


def test_of_a_thousand_classes_those_that_pay_most_are_shown(results: Results) -> None:
    measured = results.arms["erde"].classes[0]
    many = [measured.model_copy(update={"drop": number / 1e4}) for number in range(1000)]
    arm = results.arms["erde"].model_copy(update={"classes": many})
    names = [f"name-{number}" for number in range(1000)]
    page = Page(
        render(
            results.model_copy(
                update={
                    "arms": {"erde": arm},
                    "data": results.data.model_copy(update={"classes": names}),
                    "comparisons": [],
                }
            )
        )
    )
    assert re.findall(r"name-\d+", page.part(data_classes="erde")) == [
        f"name-{number}" for number in range(999, 979, -1)
    ]


@pytest.mark.parametrize(
    ("accuracies", "classes", "words"),
    [
        ((0.3, 0.4, 0.71), 10, None),
        ((0.3, 0.72, 0.71), 10, None),
        ((0.778, 0.222, 0.106), 10, "right on 10.6 % of the test images, an earlier exit on 77.8 %: a promise against it"),
        ((0.1, 0.2, 0.45), 10, "right on 45.0 % of the test images: a promise against it says little"),
        ((0.1, 0.2, 0.45), 1000, None),
    ],
)  # fmt: skip
def test_a_promise_against_a_poor_network_is_not_green(
    accuracies: tuple[float, ...], classes: int, words: str | None, results: Results
) -> None:
    arm = results.arms["erde"]
    exits = [
        measured.model_copy(update={"accuracy": accuracy})
        for measured, accuracy in zip(arm.exits, accuracies, strict=True)
    ]
    data = results.data.model_copy(update={"classes": [str(number) for number in range(classes)]})
    changed = results.model_copy(
        update={"data": data, "arms": results.arms | {"erde": arm.model_copy(update={"exits": exits})}}
    )
    written = render(changed)
    assert ("promise good" in written) == (words is None)
    assert [words in doubt for doubt in Page(written).parts(data_doubt=None)] == (
        [] if words is None else [True]
    )


def test_entropies_on_images_that_the_teacher_gets_right_and_wrong(page: Page) -> None:
    # 90 of 100 in the first bin, whose middle is 0.025, 10 in the next; all wrong ones in the eleventh.
    assert "exit 0 0.030 0.525 +0.495" in page.part(data_entropies="erde")


@pytest.mark.parametrize(
    ("accuracy", "macs", "verdict", "numbers"),
    [
        (0.60, 22_400_000, "better", ["60.0 %", "22.4 million", " more."]),
        (0.75, 22_400_000, "worse", ["75.0 %", " less: "]),
        (None, 22_400_000, "close", []),
        (0.60, 5_000_000, "dearer", ["5 million", "12.4 million."]),
        (0.66, 5_000_000, "dearer-not-better", ["66.0 %", "12.4 million, "]),
    ],
)
def test_whether_a_smaller_network_would_do(
    accuracy: float | None, macs: int, verdict: str, numbers: list[str], results: Results
) -> None:
    curve, small = results.arms["erde"].curve, results.arms["fixed-small"]
    if accuracy is None:  # just below that of the dearest setting that costs no more
        accuracy = (
            next(share for share, cost in zip(curve.accuracy, curve.macs, strict=True) if cost <= macs)
            - 0.005
        )
    bounds = (accuracy - 0.01, accuracy + 0.01)
    exits = [small.exits[0].model_copy(update={"accuracy": accuracy, "accuracy_interval": bounds})]
    cost = [small.cost[0].model_copy(update={"macs": macs})]
    changed = replaced(results, "fixed-small", exits=exits, cost=cost, no_exit_macs=macs)
    text = Page(render(changed)).part(data_smaller="fixed-small", data_verdict=verdict)
    assert all(number in text for number in numbers), text


def test_a_boosted_network_trained_without_exits_is_no_smaller_one() -> None:
    results = make_results()
    # The MACs without exits of a boosted one are those of all heads; its twin has one head.
    boosted = results.arms["erde"].model_copy(update={"no_exit_macs": results.arms["erde"].cost[-1].macs})
    plain = make_arm("fixed-full", 1, certified=True, quality=0.722)
    page = Page(render(make_results(arms=results.arms | {"erde": boosted, "fixed-full": plain})))
    assert "trained without exits (fixed-full): 72.2 %" in page.part(class_="tiles")
    assert page.parts(data_smaller="fixed-small")
    assert page.parts(data_smaller="fixed-full") == []


def test_without_a_smaller_network_there_is_no_verdict() -> None:
    page = Page(render(make_results(names=("teacher", "erde"))))
    assert page.parts(data_smaller=None) == []
    assert page.parts(class_="why")


# ---------------------------------------------------------------- images and the slider


def test_without_evidence_there_is_no_slider_and_it_says_why(page: Page) -> None:
    assert page.parts(data_slider="none")
    assert page.parts(data_gallery="none")
    assert ("id", "explore") not in {(name, value) for _, name, value in page.attributes}


def test_every_image_says_in_words_what_it_shows(results: Results, evidence: Evidence) -> None:
    page = Page(render(results, evidence))
    alternatives = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert len(alternatives) == sum(len(gallery.thumbnails) for gallery in evidence.galleries) > 40
    shape = r"true class \w+, (rightly|wrongly) answered \w+ at exit [012] with confidence (> )?[\d.]+.%"
    assert all(re.fullmatch(shape, text) for text in alternatives)
    kinds = ["surest", "unsure", "surest", "unsure", "stayed", "wrong"]
    assert page.values("data-gallery") == kinds
    assert "all 2,500 test images" in page.part(id="explore-note")


def test_a_group_without_images_is_one_line(results: Results) -> None:
    arm = INPUTS["erde"]
    stay = arm.policy.points[1].model_copy(update={"thresholds": [None, None]})
    calm = dataclasses.replace(arm, policy=dataclasses.replace(arm.policy, points=[stay]))
    page = Page(render(results, collect({"erde": calm}, "erde", pictures(IMAGES))))
    # An exit where no image leaves has one line, not two.
    assert page.values("data-gallery") == ["surest", "surest", "stayed", "wrong"]
    assert len(page.parts(class_="gallery-none soft")) == 3
    assert len(page.parts(class_="gallery")) == 1


def test_no_answer_is_shown_as_certain(results: Results, evidence: Evidence) -> None:
    sure = dataclasses.replace(evidence.galleries[0].thumbnails[0], confidence=1 - 1e-9)
    gallery = dataclasses.replace(evidence.galleries[0], thumbnails=(sure,))
    page = Page(render(results, dataclasses.replace(evidence, galleries=(gallery,))))
    spoken = next(value for tag, name, value in page.attributes if (tag, name) == ("img", "alt"))
    assert spoken.endswith("with confidence > 99.99\N{NO-BREAK SPACE}%")


def test_a_sample_of_the_test_images_is_said_to_be_one(results: Results, evidence: Evidence) -> None:
    sampled = dataclasses.replace(evidence, test_images=50_000)
    assert "2,500 of the 50,000 test images, drawn at random" in Page(render(results, sampled)).part(
        id="explore-note"
    )


def drawn_traces(dom: str) -> dict[str, int]:
    """Scatter traces in each figure of a DOM."""
    figures = re.split(r'id="plot-', dom)[1:]
    return {
        figure[: figure.index('"')]: len(re.findall(r'class="trace scatter', figure)) for figure in figures
    }


FIGURES = """
const drawn = (name) => document.getElementById('plot-' + name), data = (name) => drawn(name).data;
document.documentElement.dataset.figures = JSON.stringify({
  drops: drawn('classes').layout.annotations.map((note) => note.text),
  clipped: data('reliability').filter((trace) => trace.mode.includes('markers')).map((trace) => trace.cliponaxis),
  entropies: data('entropies').map(({ x, y, line }) => [x[0], x.slice(-1)[0], x.length, y.length, line.shape]),
  last: data('entropies')[0].y.slice(-2),
  dashes: ['tradeoff', 'exits', 'history', 'scores'].flatMap(data).filter((trace) => trace.line && trace.line.dash)
    .map((trace) => [trace.name, trace.line.dash]),
});
"""


@needs_browser
def test_what_the_figures_draw(tmp_path: Path, results: Results, evidence: Evidence) -> None:
    # 6.25 points: Python and JavaScript round it differently.
    arm = results.arms["erde"]
    classes = [arm.classes[0].model_copy(update={"drop": 0.0625}), *arm.classes[1:]]
    source = render(replaced(results, classes=classes), evidence)
    dom = browse(tmp_path, source, then=FIGURES)
    root = root_of(dom)
    assert "data-failed" not in root
    # A difference of accuracies is in points, on the slider too.
    assert re.search(r"Net drop of accuracy</dt><dd>−?[\d.]+\spoints</dd>", dom)
    written = re.search(r'data-figures="([^"]*)"', root)
    assert written is not None
    drawn = json.loads(html.unescape(written[1]))
    # Of the class figure's annotations none has another sign than the table.
    table = re.search(r'<tbody data-classes="erde">(.*?)</tbody>', source, re.DOTALL)
    assert table is not None
    cells = [re.findall(r"<td data-value=[^>]*>([^<]*)</td>", row)[3] for row in table[1].split("<tr ")[1:]]
    assert sorted(drawn["drops"]) == sorted(cells)
    assert cells[0] == "+6.2"
    # Markers at 100 % are whole.
    assert drawn["clipped"] == [False] * 3
    # The bars of a histogram are equally wide, the first and the last too.
    assert drawn["entropies"] == [[0, 1, 21, 21, "hv"]] * 6
    assert drawn["last"][0] == drawn["last"][1]
    # Dotted is the paper's rule, and the line of the networks without exits, which is no arm's.
    dotted = {name for name, dash in drawn["dashes"] if dash == "dot"}
    assert dotted == {"erde, the paper's rule"}


def slider(dom: str) -> dict[str, str]:
    """What stands on the slider's panel as data, its words among them."""
    panel = re.search(r'<div id="explore"[^>]*>', dom)
    assert panel is not None
    values = dict(re.findall(r'data-(\w+)="([^"]*)"', panel[0]))
    control = re.search(r'<input type="range"[^>]*>', dom)
    assert control is not None
    spoken = re.search(r'aria-valuetext="([^"]*)"', control[0])
    assert spoken is not None
    return values | {"spoken": spoken[1].replace("\N{NO-BREAK SPACE}", " ")}


def expected_at(name: str, point: int) -> dict[str, str]:
    """The same, computed in Python from scores and thresholds."""
    arm = INPUTS[name]
    scored = ScoredSplit.of(arm.test, arm.policy.rule, None)
    counts = sweep(scored, [arm.policy.path.thresholds[point]])
    measured = counts.measured(0, arm.cost)
    words = (
        f"accuracy {100 * measured.accuracy:.1f} %, {100 - 100 * measured.macs_saved:.1f} % of the MACs, "
        f"risk {100 * measured.risk:.2f} %"
    )
    return {
        "point": str(point), "leaving": " ".join(map(str, counts.leaving[0])), "right": str(counts.right[0]),
        "lost": str(counts.lost[0]), "won": str(counts.won[0]), "macs": f"{measured.macs:.17g}", "spoken": words,
    }  # fmt: skip


def same(shown: dict[str, str], expected: dict[str, str]) -> bool:
    """Equal as they stand; of a number with a fraction the value counts, not how it is written."""
    macs = float(shown["macs"]) == float(expected["macs"])
    return macs and {**shown, "macs": ""} == {**expected, "macs": ""}


def check_ring(dom: str, expected: dict[str, str]) -> None:
    """The ring stands in the figure where the numbers say."""
    ring = re.search(r'data-ring="(\S+) (\S+)"', root_of(dom))
    assert ring is not None
    assert float(ring[1]) == pytest.approx(float(expected["macs"]) / 1e6, rel=1e-12)
    assert float(ring[2]) == pytest.approx(100 * int(expected["right"]) / IMAGES, rel=1e-12)


@needs_browser
def test_a_link_to_a_setting_shows_the_numbers_of_python(
    tmp_path: Path, results: Results, evidence: Evidence
) -> None:
    read = (
        "const drawn = document.getElementById('plot-tradeoff').data, ring = drawn[drawn.length - 1];"
        "document.documentElement.dataset.ring = ring.x[0] + ' ' + ring.y[0];"
    )
    dom = browse(tmp_path, render(results, evidence), fragment="#point=37&arm=kd", then=read)
    assert "data-failed" not in root_of(dom)
    expected = expected_at("kd", 37)
    assert same(slider(dom), expected), (slider(dom), expected)
    check_ring(dom, expected)


def current_rows(dom: str) -> list[tuple[str, str]]:
    """Arm and operating point of the rows that the slider stands at."""
    rows = re.findall(r"<tr data-arm=[^>]*data-point=[^>]*>", dom)
    return [
        (values["data-arm"], values["data-point"])
        for row in rows
        if (values := dict(re.findall(r'([\w-]+)="([^"]*)"', row))).get("aria-current") == "true"
    ]


NAMED = """
const root = document.documentElement, copy = document.querySelector("button[aria-label^='Copy a link']");
[...document.querySelectorAll('.jumps button')].find((jump) => jump.textContent === 'no-exit').click();
root.dataset.shown = location.hash;
root.dataset.copied = copy.dataset.text;
const range = document.getElementById('explore-range');
range.value = String(Number(range.max) - 37);
range.dispatchEvent(new Event('input'));
root.dataset.between = copy.dataset.text;
"""


@needs_browser
def test_a_link_names_the_operating_point_and_opens_it(
    tmp_path: Path, results: Results, evidence: Evidence
) -> None:
    page = render(results, evidence)
    root = root_of(browse(tmp_path, page, then=NAMED))
    assert 'data-shown="#point=no-exit"' in root
    copied = re.search(r'data-copied="file:[^"]*page.html(#[^"]*)"', root)
    assert copied is not None
    assert re.search(r'data-between="[^"]*#point=37"', root)
    opened = browse(tmp_path, page, fragment=copied[1])
    expected = expected_at("erde", 0)
    expected["spoken"] += "; operating point no-exit, not certified"
    assert same(slider(opened), expected), (slider(opened), expected)
    assert current_rows(opened) == [("erde", "no-exit")]


@needs_browser
def test_a_link_to_no_operating_point_says_so(tmp_path: Path, results: Results, evidence: Evidence) -> None:
    dom = browse(tmp_path, render(results, evidence), fragment="#point=risk-%3Cb%3E7")
    assert slider(dom)["point"] == str(DEFAULT)
    assert '<p class="warn-text">erde has no operating point “risk-&lt;b&gt;7” on its path' in dom


PRINTED = """
const root = document.documentElement, place = document.getElementById('plot-tradeoff');
const seen = () => Math.round(place.querySelector('svg').getBoundingClientRect().width) + ' ' + place.layout.font.color;
const before = seen();
window.dispatchEvent(new Event('beforeprint'));
until(() => seen() !== before, () => {
  root.dataset.paper = seen();
  window.dispatchEvent(new Event('afterprint'));
  until(() => seen() === before, () => { root.dataset.screen = before + '/' + seen(); });
});
"""


@needs_browser
def test_on_paper_figures_are_as_wide_as_the_sheet_and_dark_on_white(
    tmp_path: Path, results: Results
) -> None:
    dom = browse(tmp_path, render(results), "--blink-settings=preferredColorScheme=0", then=PRINTED)
    root = root_of(dom)
    assert 'data-paper="690 #1c2430"' in root
    screen = re.search(r'data-screen="([^"]*)/([^"]*)"', root)
    assert screen is not None
    assert screen[1] == screen[2]
    assert screen[1].endswith(" #e6eaf0")


@needs_browser
def test_moving_the_slider_counts_anew_and_tells_it_once(
    tmp_path: Path, results: Results, evidence: Evidence
) -> None:
    last = len(INPUTS["erde"].policy.path.thresholds) - 1
    # To the right is towards the full network: the value counts from the other end of the path.
    move = (
        "const range = document.getElementById('explore-range'), told = [];"
        "new MutationObserver(() => told.push(document.getElementById('status').textContent))"
        ".observe(document.getElementById('status'), { childList: true });"
        "for (const point of [10, 20, 63]) {"
        f"  range.value = String({last} - point);"
        "  range.dispatchEvent(new Event('input'));"
        "}"
        "const ring = () => document.getElementById('plot-tradeoff').data.slice(-1)[0];"
        "const at = 1e-6 * Number(document.getElementById('explore').dataset.macs);"
        "until(() => Math.abs(ring().x[0] - at) < 1e-9 && told.length > 0, () => {"
        "  document.documentElement.dataset.told = told.length + ': ' + told.join('|');"
        "  document.documentElement.dataset.ring = ring().x[0] + ' ' + ring().y[0]; });"
    )
    dom = browse(tmp_path, render(results, evidence), then=move)
    expected = expected_at("erde", 63)
    assert same(slider(dom), expected), (slider(dom), expected)
    check_ring(dom, expected)
    told = re.search(r'data-told="([^"]*)"', root_of(dom))
    assert told is not None
    text = told[1].replace("\N{NO-BREAK SPACE}", " ")
    assert text.startswith(f"1: {expected['spoken']}; leaving at exit 0 ")


@needs_browser
def test_the_slider_starts_at_the_default_operating_point(
    tmp_path: Path, results: Results, evidence: Evidence
) -> None:
    dom = browse(tmp_path, render(results, evidence))
    expected = expected_at("erde", DEFAULT)
    expected["spoken"] += "; operating point early, not certified"
    assert same(slider(dom), expected), (slider(dom), expected)
    pressed = re.findall(r'<button type="button" aria-pressed="(\w+)">([\w-]+)</button>', dom)
    assert ("true", "early") in pressed
    assert ("false", "no-exit") in pressed


COPY = """
const table = document.querySelector('#arms table'), button = table.closest('.table').querySelector('button.copy');
const root = document.documentElement;
Object.defineProperty(navigator, 'clipboard', { value: CLIPBOARD });
document.execCommand = () => { root.dataset.copied = document.activeElement.value; return true; };
button.focus();
button.click();
setTimeout(() => {
  root.dataset.said = document.getElementById('status').textContent + '/' + button.textContent;
  root.dataset.focused = document.activeElement === button;
}, 1200);
"""


@needs_browser
@pytest.mark.parametrize(
    "clipboard",
    ["{ writeText: (text) => { root.dataset.copied = text; return Promise.resolve(); } }", "undefined"],
)
def test_a_table_is_copied_as_text_between_tabs(tmp_path: Path, results: Results, clipboard: str) -> None:
    dom = browse(tmp_path, render(results), then=COPY.replace("CLIPBOARD", clipboard))
    copied = re.search(r'data-copied="([^"]*)"', root_of(dom))
    assert copied is not None
    lines = copied[1].rstrip("\n").split("\n")
    assert lines[0].split("\t")[:5] == ["arm", "role", "loss", "backbone", "MACs without exits (million)"]
    erde = ["erde (exported)", "student", "erde", "resnet20", "41.0", "303,224", "71.6 (69.8 to 73.4)"]
    assert lines[2].split("\t")[:7] == erde
    assert {line.count("\t") for line in lines} == {10}
    assert len(lines) == 6
    assert 'data-said="Copied to the clipboard/Copied"' in root_of(dom)
    assert 'data-focused="true"' in root_of(dom)


@needs_browser
def test_a_browser_draws_every_figure(tmp_path: Path, results: Results, evidence: Evidence) -> None:
    dom = browse(tmp_path, render(results, evidence))
    root = root_of(dom)
    assert 'data-drawn="yes"' in root
    assert "data-failed" not in root
    # Four arms with a line and markers, one single point, the paper's rule, the slider's ring; five arms; a
    # diagonal and a line for each of three exits; bars; two lines for each exit; two scores; five histories.
    traces = {
        "tradeoff": 11,
        "exits": 5,
        "reliability": 6,
        "classes": 0,
        "entropies": 6,
        "scores": 3,
        "history": 5,
    }
    assert drawn_traces(dom) == traces
    assert dom.count('class="trace bars"') == 3
    assert "erde without exits" in dom
    # Plotly would offer to send the chart to its own servers.
    assert 'data-title="Download plot' in dom
    assert 'data-title="Share' not in dom
    # The teacher is out of the first view, and the choice to see it is there; no arm has a profile.
    assert re.search(r'id="choose-view"[^>]*hidden', dom) is None
    assert re.search(r'id="choose-cost"[^>]*hidden', dom) is not None


@needs_browser
def test_a_link_opens_a_folded_section_whose_figure_has_the_whole_width(
    tmp_path: Path, results: Results
) -> None:
    act = (
        "const place = document.getElementById('plot-reliability'), root = document.documentElement;"
        "const columns = () => new Set(Object.keys(place.layout).filter((key) => key.startsWith('xaxis'))"
        ".map((key) => place.layout[key].domain[0])).size;"
        "root.dataset.before = place.closest('details').open + ' ' + columns();"
        "document.querySelector('nav a[href=\\'#reliability\\']').click();"
        "until(() => place.closest('details').open && columns() === 3, () => {"
        "  root.dataset.open = place.closest('details').open; root.dataset.columns = columns(); });"
    )
    root = root_of(browse(tmp_path, render(results), then=act))
    assert 'data-before="false' in root
    assert 'data-open="true"' in root
    assert 'data-columns="3"' in root


@needs_browser
def test_with_a_profile_the_axis_can_be_time(tmp_path: Path) -> None:
    results = make_results(names=("erde", "kd"))
    for name in results.arms:
        curve = results.arms[name].curve
        timed = curve.model_copy(update={"milliseconds": [macs / 4e6 for macs in curve.macs]})
        results = replaced(results, name, curve=timed)
    cost = dataclasses.replace(COST, exit_milliseconds=(3.1, 6.5, 9.25))
    inputs = {name: arm_input(seed, cost) for seed, name in enumerate(("erde", "kd"))}
    act = (
        "document.querySelector('[data-cost=milliseconds]').click();"
        "setTimeout(() => { const place = document.getElementById('plot-tradeoff');"
        "  const ring = place.data[place.data.length - 1];"
        "  document.documentElement.dataset.ring = ring.x[0];"
        "  document.documentElement.dataset.axis = place.layout.xaxis.title.text; }, 500);"
    )
    dom = browse(tmp_path, render(results, collect(inputs, "erde")), fragment="#point=50", then=act)
    scored = ScoredSplit.of(inputs["erde"].test, inputs["erde"].policy.rule, None)
    leaving = sweep(scored, [inputs["erde"].policy.path.thresholds[50]]).leaving[0]
    milliseconds = float(leaving @ np.array([3.1, 6.5, 9.25])) / IMAGES
    ring = re.search(r'data-ring="([^"]*)"', root_of(dom))
    assert ring is not None
    assert float(ring[1]) == pytest.approx(milliseconds, rel=1e-12)
    assert 'data-axis="time per image (ms)"' in root_of(dom)
    assert f"{milliseconds:.2f} ms" in dom.replace("\N{NO-BREAK SPACE}", " ")


@needs_browser
def test_a_browser_runs_nothing_from_the_data(tmp_path: Path) -> None:
    dom = browse(tmp_path, render(hostile_results(), hostile_evidence()))
    root = root_of(dom)
    assert 'data-drawn="yes"' in root
    assert "data-failed" not in root
    assert "data-broken" not in root
    assert re.search(r"<img[^>]*onerror=(?!boom\(\)&)", re.sub(r'"[^"]*"', '""', dom)) is None
    # Plotly sets a few tags itself, <b> among them: the name has to be seen as it is.
    legends = re.findall(r'<text class="legendtext".*?</text>', dom, re.DOTALL)
    assert any(
        re.search(r">[^<>]*onerror=boom\(\)&gt;&lt;b&gt;bold&lt;/b&gt;[^<>]*<", legend) for legend in legends
    )
    # The slider works for an arm and a point of that name, and says the point's name as text.
    assert slider(dom)["point"] == str(DEFAULT)
    assert re.search(
        r'aria-pressed="true">[^<]*onerror=boom\(\)&gt;&lt;b&gt;bold&lt;/b&gt;[^<]*</button>', dom
    )
