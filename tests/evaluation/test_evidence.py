"""What a report embeds: exact ranks, honest samples, and the images that its headings promise."""

from __future__ import annotations

import base64
import dataclasses
import io
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from erde.calibration.thresholds import ScoredSplit, ThresholdPath, sweep
from erde.common.splits import TestLogits
from erde.evaluation import evidence
from erde.evaluation.evidence import ArmEvidence, ArmInput, collect, encode
from erde.policy import rule as policy
from erde.policy.cost import Cost
from erde.policy.rule import ExitRule
from tests.helpers.hand_made import COST, hand_made_policy
from tests.helpers.oracles import synthetic_logits


def arm_input(images: int = 400, seed: int = 3, **changes: Any) -> ArmInput:
    return ArmInput(TestLogits(*synthetic_logits(seed, images)), hand_made_policy(**changes), COST)


def along(arm: ArmInput, *thresholds: tuple[float | None, ...]) -> ArmInput:
    """The arm with another path."""
    path = ThresholdPath(thresholds, np.zeros(len(thresholds)), np.zeros(len(thresholds)))
    return dataclasses.replace(arm, policy=dataclasses.replace(arm.policy, path=path))


def read(evidence: ArmEvidence, exits: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_]]:
    """Ranks (E-1, n), levels (P, E-1), bits (E+1, n) of what is embedded, unpacked as the page does."""
    value = evidence.embedded()
    kind = {1: "<u1", 2: "<u2"}[value["width"]]

    def unpack(key: str, dtype: str) -> NDArray[Any]:
        return np.frombuffer(base64.b64decode(str(value[key])), dtype)

    packed = unpack("bits", "u1").reshape(-1, int(str(value["images"])))
    bits = np.stack([packed[row // 8] >> (row % 8) & 1 for row in range(exits + 1)]).astype(bool)
    return unpack("ranks", kind).reshape(exits - 1, -1), unpack("levels", kind).reshape(-1, exits - 1), bits


def check_counts(arm: ArmInput, evidence: ArmEvidence, rows: NDArray[np.int64] | slice = slice(None)) -> None:
    """At every point of the path the embedded numbers say what scores and thresholds say."""
    scored = ScoredSplit.of(arm.test, arm.policy.rule, arm.reference_right)
    mine = ScoredSplit(scored.scores[:, rows], scored.right[:, rows], scored.reference_right[rows])
    expected = sweep(mine, arm.policy.path.thresholds)
    exits = len(scored.scores)
    ranks, levels, bits = read(evidence, exits)
    assert len(levels) == len(arm.policy.path.thresholds)
    for point, level in enumerate(levels):
        leaving = np.full(ranks.shape[1], exits - 1)
        for index in reversed(range(exits - 1)):
            leaving[ranks[index] > level[index]] = index
        right = bits[leaving, np.arange(len(leaving))]
        assert np.bincount(leaving, minlength=exits).tolist() == expected.leaving[point].tolist()
        assert right.sum() == expected.right[point]
        assert (bits[exits] & ~right).sum() == expected.lost[point]
        assert (right & ~bits[exits]).sum() == expected.won[point]


@pytest.mark.parametrize(
    "rule",
    [
        ExitRule("margin", 1.4),
        ExitRule("patience"),
        ExitRule("energy"),
        ExitRule("entropy", 1.0, "geometric"),
    ],
)
def test_every_point_of_a_path_counts_as_scores_and_thresholds_do(rule: ExitRule) -> None:
    arm = arm_input(rule=rule)
    check_counts(arm, collect({"a": arm}, "a").arms["a"])


def test_thresholds_that_rise_again_and_exits_that_are_disabled_again() -> None:
    scores = ScoredSplit.of(arm_input().test, ExitRule(), None).scores
    # The first two are scores of images, where "greater" and "at least" differ.
    low, high = float(np.sort(scores[0])[100]), float(np.sort(scores[0])[300])
    arm = along(arm_input(), (None, None), (high, None), (low, 0.5), (None, 0.2), (high, 0.9), (-1.0, None))
    check_counts(arm, collect({"a": arm}, "a").arms["a"])


def test_a_reference_of_its_own_decides_what_is_lost() -> None:
    arm = dataclasses.replace(arm_input(), reference_right=np.arange(400) % 3 == 0)
    check_counts(arm, collect({"a": arm}, "a").arms["a"])


def test_many_thresholds_take_two_bytes_and_few_take_one() -> None:
    few = arm_input()
    few = along(few, *few.policy.path.thresholds[::8])
    many = along(few, *((float(value), None) for value in np.linspace(0, 1, 700)))
    for arm, width in ((few, 1), (many, 2)):
        evidence = collect({"a": arm}, "a").arms["a"]
        assert evidence.embedded()["width"] == width
        check_counts(arm, evidence)


def test_thresholds_and_named_points_can_be_read_back() -> None:
    arm = arm_input()
    path = arm.policy.path.thresholds
    points = [arm.policy.points[0], arm.policy.points[1].model_copy(update={"thresholds": list(path[30])})]
    arm = dataclasses.replace(arm, policy=dataclasses.replace(arm.policy, points=points))
    evidence = collect({"a": arm}, "a").arms["a"]
    assert (evidence.named, evidence.start) == ({"no-exit": 0, "early": 30}, 30)
    _, levels, _ = read(evidence, 3)
    for thresholds, level in zip(path, levels, strict=True):
        shown = [
            column[at] if at < len(column) else None
            for column, at in zip(evidence.thresholds, level, strict=True)
        ]
        assert tuple(shown) == thresholds


def test_large_test_splits_are_sampled_by_seed_and_alike_for_all_arms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evidence, "MAX_IMAGES", 150)
    arms = {name: arm_input(seed=seed) for seed, name in enumerate("ab")}
    collected = collect(arms, "a", seed=7)
    assert collected.test_images == 400
    rows = np.sort(np.random.default_rng(7).choice(400, 150, replace=False))
    for name, arm in arms.items():
        check_counts(arm, collected.arms[name], rows)
    other = collect(arms, "a", seed=8)
    assert not np.array_equal(other.arms["a"].right, collected.arms["a"].right)


def test_many_arms_share_the_room_of_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MAX_RANK_BYTES", 3 * 4 * 100)
    paths = arm_input().policy.path.thresholds[::8]
    arms = {name: along(arm_input(), *paths) for name in "abcd"}
    # Two exits of one byte each and one byte of bits, for four arms.
    assert len(collect(arms, "a").arms["a"].reference_right) == 100


def test_networks_with_one_exit_have_no_path() -> None:
    cost = Cost((100,), 100)
    logits, labels = synthetic_logits(1, 50)
    plain = ArmInput(TestLogits(logits[-1:], labels), hand_made_policy(cost=cost), cost)
    pictures = np.zeros((50, 8, 8, 1), dtype=np.uint8)
    evidence = collect({"plain": plain, "several": arm_input(50)}, "plain", pictures)
    assert set(evidence.arms) == {"several"}
    assert evidence.galleries == ()
    assert collect({"plain": plain}, "plain", pictures).arms == {}


# ---------------------------------------------------------------- images


class OneByOne:
    """A source that gives few images at a time, each telling its own row in its pixels."""

    def __init__(self, count: int) -> None:
        self.shape = (count, 8, 8, 3)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: NDArray[np.int64] | slice) -> NDArray[np.uint8]:
        assert isinstance(index, np.ndarray)
        assert index.shape == (1,)
        row = int(index[0])
        return np.full((1, 8, 8, 3), [row // 256, row % 256, 7], dtype=np.uint8)


def row_of(address: str) -> int:
    data = address.partition("base64,")[2]
    red, green, _ = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))[4, 4]
    return 256 * int(red) + int(green)


def test_galleries_show_who_leaves_first_and_last_and_who_is_confidently_wrong() -> None:
    arm = arm_input()
    galleries = collect({"a": arm}, "a", OneByOne(400)).galleries
    scored = ScoredSplit.of(arm.test, arm.policy.rule, None)
    exits = policy.decide(scored.scores, arm.policy.points[1].thresholds)
    assert [(gallery.kind, gallery.exit) for gallery in galleries] == [
        ("surest", 0), ("unsure", 0), ("surest", 1), ("unsure", 1), ("stayed", 2), ("wrong", None)
    ]  # fmt: skip
    for gallery in galleries[:5]:
        index = gallery.exit
        assert index is not None
        members = np.flatnonzero(exits == index)
        assert gallery.total == len(members) > 12
        score = scored.scores[min(index, 1)]
        ranked = members[np.argsort(score[members], kind="stable")]
        expected = ranked[::-1] if gallery.kind == "surest" else ranked
        assert [row_of(thumbnail.address) for thumbnail in gallery.thumbnails] == expected[:12].tolist()
    wrong = galleries[5]
    confidence = []
    for thumbnail in wrong.thumbnails:
        row = row_of(thumbnail.address)
        assert exits[row] == thumbnail.exit < 2
        assert (
            arm.test.labels[row]
            == thumbnail.true
            != thumbnail.answer
            == arm.test.logits[thumbnail.exit, row].argmax()
        )
        tempered = policy.softmax(
            arm.test.logits[thumbnail.exit, row], arm.policy.temperatures[thumbnail.exit]
        )
        assert thumbnail.confidence == pytest.approx(tempered.max(), rel=1e-12)
        confidence.append(thumbnail.confidence)
    assert confidence == sorted(confidence, reverse=True)
    assert wrong.total == int(((exits < 2) & ~policy.take_exit(scored.right, exits)).sum())
    assert len(wrong.thumbnails) == min(12, wrong.total)


def test_a_group_without_images_is_empty() -> None:
    arm = arm_input(thresholds=(None, None))
    galleries = collect({"a": arm}, "a", OneByOne(400)).galleries
    assert [gallery.total for gallery in galleries] == [0, 0, 0, 0, 400, 0]
    assert [len(gallery.thumbnails) for gallery in galleries] == [0, 0, 0, 0, 12, 0]


def test_many_exits_show_fewer_images_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evidence, "MAX_THUMBNAILS", 30)
    assert (
        max(len(gallery.thumbnails) for gallery in collect({"a": arm_input()}, "a", OneByOne(400)).galleries)
        == 5
    )


def decoded(address: str) -> Image.Image:
    head, _, data = address.partition(";base64,")
    assert head in ("data:image/png", "data:image/webp")
    return Image.open(io.BytesIO(base64.b64decode(data)))


@pytest.mark.parametrize("channels", [1, 3])
def test_small_images_lose_nothing(channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, channels), dtype=np.uint8)
    shown = np.asarray(decoded(encode(pixels)).convert("L" if channels == 1 else "RGB"))
    assert np.array_equal(shown.reshape(pixels.shape), pixels)


def test_large_images_become_small() -> None:
    smooth = np.stack(np.meshgrid(np.arange(224), np.arange(300)), axis=-1)[..., [0, 1, 0]].astype(np.uint8)
    address = encode(smooth)
    assert decoded(address).size == (48, 64)
    noise = np.random.default_rng(0).integers(0, 256, (224, 224, 3), dtype=np.uint8)
    assert len(encode(noise)) < 8_000
