from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from erde.calibration.logits import calibrate_logits
from erde.calibration.settings import Settings
from erde.calibration.thresholds import ScoredSplit
from erde.common.splits import CertifyLogits, TestLogits, TuneLogits
from erde.evaluation.logits_file import (
    LogitsFile,
    calibrate_file,
    default_policy_path,
    evaluate_file,
    read_policy,
)
from erde.policy.cost import Cost
from tests.helpers.checks import user_error
from tests.helpers.command import run_command
from tests.helpers.oracles import synthetic_logits

MACS = (42, 71, 104)
SETTINGS = Settings(max_risks=(0.05, 0.02), score="margin", sharpness=1.0)


def arrays(**changes: Any) -> dict[str, Any]:
    """A whole file: three splits and the costs."""
    arrays: dict[str, Any] = {"exit_macs": np.array(MACS), "no_exit_macs": np.array(100)}
    for seed, name in enumerate(("tune", "certify", "test")):
        logits, labels = synthetic_logits(seed, 600)
        arrays |= {f"{name}_logits": logits, f"{name}_labels": labels}
    arrays |= changes
    return {name: value for name, value in arrays.items() if value is not None}


def saved(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "logits.npz"
    np.savez(path, **content)
    return path


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    return saved(tmp_path, arrays())


# ---------------------------------------------------------------- what it does


def test_how_to_split_what_is_split_already_is_refused(
    whole: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command(monkeypatch, "calibrate", str(whole), "--seed", "3") == 2
    assert f"--seed does not apply: {whole} has its tune and certify images" in capsys.readouterr().err


def test_a_file_is_calibrated_like_its_arrays(whole: Path) -> None:
    out = default_policy_path(whole)
    assert out == whole.parent / "logits.policy.json"
    calibrated = calibrate_file(whole, SETTINGS, out)
    expected = calibrate_logits(
        TuneLogits(*synthetic_logits(0, 600)),
        CertifyLogits(*synthetic_logits(1, 600)),
        Cost(MACS, 100),
        SETTINGS,
        sources=calibrated.calibration.sources,
    )
    assert len(calibrated.calibration.sources) == 2
    assert calibrated.to_json() == expected.to_json()
    read = read_policy(out)
    assert read.policy.to_json() == expected.to_json()
    assert read.cost == Cost(MACS, 100)


def test_a_policy_is_measured_on_the_test_logits(whole: Path, tmp_path: Path) -> None:
    policy = tmp_path / "deep" / "policy.json"
    calibrated = calibrate_file(whole, SETTINGS, policy)
    evaluated = evaluate_file(whole, policy, tmp_path / "measured.json")
    scored = ScoredSplit.of(TestLogits(*synthetic_logits(2, 600)), calibrated.rule, None)
    assert [point.name for point, _ in evaluated.measured()] == ["no-exit", "risk-5", "risk-2"]
    for point, measured in evaluated.measured():
        assert measured == scored.measure(point.thresholds, Cost(MACS, 100))
    assert json.loads((tmp_path / "measured.json").read_text()) == evaluated.to_json()
    assert [at_exit.accuracy for at_exit in evaluated.exits] == scored.right.mean(axis=1).tolist()


def test_one_set_of_logits_is_split_and_stratified(tmp_path: Path) -> None:
    logits, labels = synthetic_logits(0, 900)
    path = saved(tmp_path, {"logits": logits, "labels": labels.astype(np.uint8)})
    tune, certify, _ = LogitsFile(path).tune_and_certify(0.4, seed=1)
    assert len(tune.logits) + len(certify.logits) == 900
    for label in range(5):
        share = (tune.logits.labels == label).sum() / (labels == label).sum()
        assert share == pytest.approx(0.4, abs=0.01)
    rows = {row.tobytes() for part in (tune, certify) for row in part.logits.logits.transpose(1, 0, 2)}
    assert len(rows) == 900
    other = LogitsFile(path).tune_and_certify(0.4, seed=2)[0]
    assert not np.array_equal(other.logits.labels, tune.logits.labels)
    calibrate_file(path, SETTINGS, tmp_path / "policy.json", macs=[42, 71, 104], no_exit_macs=100)
    assert read_policy(tmp_path / "policy.json").cost == Cost(MACS, 100)
    # Without more said, the network without exits costs what the last exit does.
    calibrate_file(path, SETTINGS, tmp_path / "again.json", macs=[42, 71, 104])
    assert read_policy(tmp_path / "again.json").cost == Cost(MACS, 104)


def test_half_precision_and_a_reference(tmp_path: Path) -> None:
    right = np.zeros(600, dtype=bool)
    content = arrays(tune_reference_right=right, certify_reference_right=right)
    content["tune_logits"] = content["tune_logits"].astype(np.float16)
    calibrated = calibrate_file(saved(tmp_path, content), SETTINGS, tmp_path / "policy.json")
    certificate = calibrated.points[1].certificate
    assert certificate is not None
    # A reference that is never right can lose nothing.
    assert certificate.lost == 0
    assert certificate.reference == "given"
    assert "ones that the given reference gets right" in certificate.sentence()


def test_a_policy_is_measured_against_its_own_reference(whole: Path, tmp_path: Path) -> None:
    right = np.ones(600, dtype=bool)
    content = arrays(tune_reference_right=~right, certify_reference_right=~right)
    path, policy = saved(tmp_path, content), tmp_path / "policy.json"
    calibrate_file(path, SETTINGS, policy)
    with user_error(
        "was certified against a given reference, and .* has no reference_right of the test images"
    ):
        evaluate_file(path, policy)
    np.savez(path, **content, test_reference_right=~right)
    assert all(measured.risk == 0 for _, measured in evaluate_file(path, policy).measured())


# ---------------------------------------------------------------- what it refuses

WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "two axes": ({"tune_logits": np.zeros((600, 5), np.float32)}, r"float32 of shape \(600, 5\): expected floats \(E, N, K\)"),
    "whole numbers": ({"tune_logits": np.zeros((3, 600, 5), int)}, "is int64 .*: expected floats"),
    "one exit": ({"tune_logits": np.zeros((1, 600, 5), np.float32)}, "has 1 exit: thresholds need two exits"),
    "one class": ({"tune_logits": np.zeros((3, 600, 1), np.float32)}, "has 1 class: expected two or more"),
    "too few labels": ({"tune_labels": np.zeros(599, int)}, r"tune_labels is int64 of shape \(599,\): expected 600"),
    "labels as floats": ({"tune_labels": np.zeros(600)}, "tune_labels is float64"),
    "no labels": ({"tune_labels": None}, "has no array 'tune_labels'; it has: "),
    "no certify": ({"certify_logits": None}, "has no array 'certify_logits'"),
    "NaN": ({"tune_logits": np.full((3, 600, 5), np.nan, np.float32)}, "the tune logits hold 9,000 values that are NaN"),
    "label beyond": ({"tune_labels": np.full(600, 5)}, "the tune labels run from 5 to 5"),
    "no MACs": ({"exit_macs": None}, "has no exit_macs: give the cumulative MACs of the 3 exits with --macs"),
    "falling MACs": ({"exit_macs": np.array([3, 2, 1])}, r"must rise from exit to exit .*, got \[3, 2, 1\]"),
    "a single number for MACs": ({"exit_macs": np.array(7), "no_exit_macs": None}, "exit MACs must be 3 numbers, got"),
    "two MACs": ({"exit_macs": np.array([1, 2])}, "exit MACs must be 3 numbers, got"),
    "no whole": ({"no_exit_macs": np.array(-1)}, "no_exit_macs must be 1 or more, got -1"),
    "shares for MACs": ({"exit_macs": np.array([0.2, 0.5, 1.0])}, "as counts and not as shares"),
    "infinite MACs": ({"exit_macs": np.array([1, 2, np.inf])}, "exit MACs must be 3 numbers, got"),
    "MACs as text": ({"exit_macs": np.array(["a", "b", "c"])}, "exit MACs must be 3 numbers, got"),
    "two wholes": ({"no_exit_macs": np.array([1, 2])}, r"no_exit_macs must be 1 number, got"),
    "beyond float32": ({"tune_logits": np.full((3, 600, 5), 1e300)}, "NaN or infinite"),
    "half a reference": ({"tune_reference_right": np.ones(600, bool)}, "for both tune and certify, or for neither"),
    "a short reference": ({"tune_reference_right": np.ones(6, bool)}, r"bool of shape \(6,\): expected bool \(600,\)"),
    "objects": ({"tune_labels": np.array([{}] * 600)}, "is not an .npz file of plain arrays"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_files_are_refused_and_nothing_is_written(name: str, tmp_path: Path) -> None:
    changes, message = WRONG[name]
    path = saved(tmp_path, arrays(**changes))
    with user_error(message):
        calibrate_file(path, SETTINGS, tmp_path / "policy.json")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logits.npz"]


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04 torn"])
def test_a_file_that_is_no_archive(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "logits.npz"
    path.write_bytes(content)
    with user_error("is not an .npz file of plain arrays"):
        LogitsFile(path)


def test_a_torn_archive(whole: Path) -> None:
    content = bytearray(whole.read_bytes())
    content[len(content) // 3] ^= 1
    whole.write_bytes(content)
    with user_error("is not an .npz file of plain arrays"):
        LogitsFile(whole)


def test_no_file(tmp_path: Path) -> None:
    with user_error("no file at .*none.npz: expected an .npz of logits"):
        LogitsFile(tmp_path / "none.npz")


def test_a_certify_split_serves_one_choice(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "policy.json"
    calibrate_file(whole, SETTINGS, out)
    before = out.read_bytes()
    calibrate_file(whole, SETTINGS, out)
    assert out.read_bytes() == before
    with user_error("these certify images already certified other choices"):
        calibrate_file(whole, Settings(max_risks=(0.03,), score="margin"), out)
    assert out.read_bytes() == before


def test_a_promise_of_disagreement_may_be_calibrated_again(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "policy.json"
    settings = SETTINGS.model_copy(update={"guarantee": "disagreement"})
    calibrate_file(whole, settings, out)
    before = out.read_bytes()
    calibrate_file(whole, settings, out)
    assert out.read_bytes() == before
    with user_error("these certify images already certified other choices"):
        calibrate_file(whole, settings.model_copy(update={"max_risks": (0.03,)}), out)


@pytest.mark.parametrize("split", ["tune", "certify"])
def test_another_reference_is_a_second_choice(split: str, tmp_path: Path) -> None:
    right = np.ones(600, dtype=bool)
    other = right.copy()
    other[:30] = False
    content = arrays(tune_reference_right=right, certify_reference_right=right)
    path, out = saved(tmp_path, content), tmp_path / "policy.json"
    calibrate_file(path, SETTINGS, out)
    calibrate_file(path, SETTINGS, out)
    saved(tmp_path, content | {f"{split}_reference_right": other})
    with user_error("these certify images already certified other choices"):
        calibrate_file(path, SETTINGS, out)


def test_new_certify_images_may_certify_other_choices_of_the_same_tune_images(
    whole: Path, tmp_path: Path
) -> None:
    out, other = default_policy_path(whole), Settings(max_risks=(0.03,), score="margin", sharpness=1.0)
    calibrate_file(whole, SETTINGS, out)
    logits, labels = synthetic_logits(7, 600)
    saved(tmp_path, arrays(certify_logits=logits, certify_labels=labels))
    assert calibrate_file(whole, other, out).calibration.choices
    # What chose something certifies nothing, though the splits have changed places.
    changed = {
        f"{a}_{part}": arrays()[f"{b}_{part}"]
        for a, b in (("tune", "test"), ("certify", "tune"))
        for part in ("logits", "labels")
    }
    saved(tmp_path, arrays(**changed))
    with user_error("these certify images already certified other choices"):
        calibrate_file(whole, SETTINGS, out)


@pytest.mark.parametrize("split", ["tune", "certify"])
def test_nothing_is_evaluated_on_a_split_that_chose_or_certified(split: str, whole: Path) -> None:
    policy = default_policy_path(whole)
    calibrate_file(whole, SETTINGS, policy)
    # As if its sources were not known.
    value = json.loads(policy.read_text())
    value["calibration"]["sources"] = []
    policy.write_text(json.dumps(value))
    content = arrays()
    np.savez(whole, test_logits=content[f"{split}_logits"], test_labels=content[f"{split}_labels"])
    with user_error("holds the logits that .* was calibrated on"):
        evaluate_file(whole, policy)


def test_nothing_is_evaluated_on_what_it_was_calibrated_on(tmp_path: Path) -> None:
    logits, labels = synthetic_logits(0, 900)
    path = saved(tmp_path, {"logits": logits, "labels": labels, "exit_macs": np.array(MACS)})
    policy = default_policy_path(path)
    calibrate_file(path, SETTINGS, policy)
    with user_error("holds the logits that .* was calibrated on"):
        evaluate_file(path, policy)
    fresh, fresh_labels = synthetic_logits(5, 400)
    other = tmp_path / "other.npz"
    np.savez(other, logits=fresh, labels=fresh_labels)
    assert evaluate_file(other, policy).measured()[0][1].images == 400


def test_a_policy_of_other_exits(whole: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    calibrate_file(whole, SETTINGS, policy)
    two = tmp_path / "two.npz"
    np.savez(two, logits=arrays()["test_logits"][:2], labels=arrays()["test_labels"])
    with user_error("has logits of 2 exits and 5 classes, the policy .* is for 3 exits and 5 classes"):
        evaluate_file(two, policy)
    np.savez(two, logits=arrays()["test_logits"][:, :, :4], labels=np.zeros(600, int))
    with user_error("has logits of 3 exits and 4 classes"):
        evaluate_file(two, policy)


EDITS: list[tuple[str, Any]] = [
    ("temperatures", [1.0]),
    ("default", "risk-7"),
    ("exit_macs", ["1", "2", "3"]),
    ("no_exit_macs", 0),
    ("classes", "5"),
    ("rule", {"score": "entropi", "sharpness": 1.0, "ensemble": "none", "harm": None}),
    ("path", {"thresholds": [[None]], "risk": [0.0], "macs": [1.0]}),
    # Also beyond what a float can be.
    ("path", {"thresholds": [[0.5, 0.5]], "risk": [10**400], "macs": [1.0]}),
    ("exit_macs", [1, 2, 10**400]),
]


@pytest.mark.parametrize(("key", "value"), EDITS)
def test_a_policy_whose_parts_do_not_fit(key: str, value: Any, whole: Path, tmp_path: Path) -> None:
    policy = tmp_path / "policy.json"
    calibrate_file(whole, SETTINGS, policy)
    policy.write_text(json.dumps({**json.loads(policy.read_text()), key: value}))
    with user_error("is not a policy that erde calibrate LOGITS.npz wrote"):
        evaluate_file(whole, policy)
    with user_error("is there and is not a policy of this erde: remove it, or give another --out"):
        calibrate_file(whole, SETTINGS, policy)


def test_other_splits_of_the_same_images_are_a_second_choice(tmp_path: Path) -> None:
    logits, labels = synthetic_logits(0, 900)
    path = saved(tmp_path, {"logits": logits, "labels": labels, "exit_macs": np.array(MACS)})
    calibrate_file(path, SETTINGS, tmp_path / "policy.json", seed=0)
    for change in ({"seed": 1}, {"tune_share": 0.4}, {"macs": [40, 71, 104]}):
        with user_error("these certify images already certified other choices"):
            calibrate_file(path, SETTINGS, tmp_path / "policy.json", **change)


def test_a_single_array_is_no_archive(tmp_path: Path) -> None:
    np.save(tmp_path / "logits.npy", np.zeros(3))
    with user_error("is not an .npz file of plain arrays"):
        LogitsFile(tmp_path / "logits.npy")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format_version": 7}', '{"format_version": 1}', "[" * 5000]
)
def test_a_policy_that_is_none(content: str, whole: Path, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text(content)
    with user_error("is not a policy that erde calibrate LOGITS.npz wrote"):
        evaluate_file(whole, path)
    with user_error("no policy at"):
        evaluate_file(whole, tmp_path / "none.json")


def test_another_out_does_not_escape_the_check_for_reuse(whole: Path, tmp_path: Path) -> None:
    calibrate_file(whole, SETTINGS, default_policy_path(whole))
    with user_error("these certify images already certified other choices"):
        calibrate_file(
            whole, Settings(max_risks=(0.03,), score="margin", sharpness=1.0), tmp_path / "other.json"
        )
    assert not (tmp_path / "other.json").exists()
    calibrate_file(whole, SETTINGS, tmp_path / "other.json")


# ---------------------------------------------------------------- a thousand classes


def test_a_thousand_classes_most_of_them_absent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content: dict[str, Any] = {"exit_macs": np.array(MACS), "no_exit_macs": np.array(100)}
    generator = np.random.default_rng(0)
    for name, images in (("tune", 400), ("certify", 400), ("test", 300)):
        labels = generator.integers(1000, size=images)
        logits = generator.normal(size=(3, images, 1000))
        for index, signal in enumerate((5.0, 6.0, 7.0)):
            logits[index, np.arange(images), labels] += signal
        content |= {f"{name}_logits": logits.astype(np.float32), f"{name}_labels": labels}
    path = saved(tmp_path, content)
    out = default_policy_path(path)
    # Among the scores is the learned one, which has a weight per class.
    for settings in (
        Settings(max_risks=(0.05,), score="harm"),
        Settings(max_risks=(0.05,), sharpness=1.0, ensemble="none"),
    ):
        out.unlink(missing_ok=True)
        calibrated = calibrate_file(path, settings, out)
        assert calibrated.points[1].certificate is not None
        assert calibrated.calibration.exit_rates[0] > 0.1
        assert (
            "classes have no image in tune: the promise is over images as they come"
            in capsys.readouterr().err
        )
        evaluated = evaluate_file(path, out)
        assert all(0.5 < at_exit.accuracy <= 1 for at_exit in evaluated.exits)
        json.dumps(evaluated.to_json(), allow_nan=False)
