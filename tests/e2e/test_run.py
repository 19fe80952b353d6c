"""The whole chain through the real command, on real digits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from erde.bundle.sealing import read
from erde.data.load import load_splits
from erde.evaluation.results import Results
from erde.policy import rule as policy
from erde.recipe.load import load_config
from erde.runtime.session import Session

from .compare import assert_same_run
from .conftest import TINY, Refused, erde

ARMS = ("teacher", "erde", "kd", "ce", "fixed-small", "fixed-tiny")


def test_run_leaves_exactly_the_documented_files(tiny_run: tuple[Path, str]) -> None:
    folder, _ = tiny_run
    expected = {"config.yaml", "environment.json", "splits.json", "log.jsonl", "results.json", "report.html"}
    expected |= {
        "bundle/manifest.json",
        "bundle/README.md",
        *(f"bundle/stage_{index}.onnx" for index in range(3)),
    }
    expected |= {name.replace("bundle/", "bundle-int8/") for name in expected}
    chain = ("manifest.json", "README.md", *(f"stage_{index}.onnx" for index in range(6)))
    expected |= {f"bundle-cascade/{name}" for name in chain}
    baselines = ("no-exit", "no-exit-int8", "fixed-small", "fixed-tiny")
    expected |= {f"baselines/{name}.onnx" for name in baselines}
    stages = [f"stages/{name}" for name in ("stages.json", *(f"stage_{index}.onnx" for index in range(3)))]
    expected |= {f"arms/erde-int8/{name}" for name in ("logits.npz", "policy.json", *stages)}
    for arm in ARMS:
        exits = 1 if arm.startswith("fixed") else 3
        files = ["history.json", "timing.json", "logits.npz", "policy.json", "checkpoints/final.safetensors"]
        files += ["stages/stages.json", *(f"stages/stage_{index}.onnx" for index in range(exits))]
        expected |= {f"arms/{arm}/{name}" for name in files}
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == expected
    # Small enough for a mail, with all that it needs inside.
    assert (folder / "report.html").stat().st_size < 3_000_000


def test_output_ends_with_a_table_and_one_json_line(tiny_run: tuple[Path, str]) -> None:
    folder, out = tiny_run
    lines = out.splitlines()
    summary = json.loads(lines[-1])
    results = Results.read(folder / "results.json")
    assert summary["arms"]["erde"]["exit_accuracy"] == [
        measured.accuracy for measured in results.arms["erde"].exits
    ]
    for arm in (*ARMS, "erde-int8"):
        assert any(line.startswith("│") and f" {arm} " in line for line in lines), arm
    assert any(line.startswith(f"report: {folder}") for line in lines)


def test_training_took_the_recipes_epochs_and_learnt(tiny_run: tuple[Path, str]) -> None:
    results = Results.read(tiny_run[0] / "results.json")
    for name, arm in results.arms.items():
        assert [entry.epoch for entry in arm.history] == list(range(1, (10 if name == "teacher" else 6) + 1))
        losses = [entry.parts["loss"] for entry in arm.history]
        assert losses[-1] < losses[0], name
        # Ten classes: chance is 10 %.
        assert arm.exits[-1].accuracy > 0.3, name
    assert results.arms["erde"].teacher_wrong is not None
    assert max(results.arms["erde"].teacher_wrong) > 0


def test_too_small_a_certify_split_is_said_and_gives_no_early_exit(tiny_run: tuple[Path, str]) -> None:
    folder, out = tiny_run
    manifest = read(folder / "bundle")
    (left_out,) = manifest.left_out
    assert (left_out.name, left_out.images_needed) == ("risk-0.5", 460)
    assert "risk-0.5" not in [point.name for point in manifest.operating_points]
    assert "at least 460 would be needed" in left_out.note
    assert "at least 460 would be needed" in out


def test_runtime_agrees_with_the_evaluation_image_by_image(tiny_run: tuple[Path, str]) -> None:
    folder, _ = tiny_run
    results = Results.read(folder / "results.json")
    assert results.agreement.disagreements == 0
    assert results.agreement.torch_disagreements == 0
    # Not taken from the run's own word: once more from its files.
    data = load_splits(load_config(folder / "config.yaml").data, 0)
    session = Session(folder / "bundle", threads=1)
    with np.load(folder / "arms/erde/logits.npz") as arrays:
        logits, labels = arrays["test_logits"], arrays["test_labels"]
    assert np.array_equal(labels, data.test.labels)
    for point in session.manifest.operating_points:
        exits = policy.decide(session.rule.apply(logits)[1], point.thresholds)
        answer = session.predict(data.test.images[:], operating_point=point.name)
        assert (answer.exits == exits).mean() > 0.99
        right = float((answer.labels == data.test.labels).mean())
        assert point.test is not None
        assert abs(right - point.test.accuracy) <= 1 / len(labels)
        assert abs(answer.macs.mean() - point.test.macs) <= 0.01 * point.test.macs


def test_int8_is_calibrated_on_its_own_logits_and_agrees_with_its_runtime(tiny_run: tuple[Path, str]) -> None:
    folder, _ = tiny_run
    results = Results.read(folder / "results.json")
    quantised, arm, float_arm = results.quantised, results.arms["erde-int8"], results.arms["erde"]
    assert quantised is not None
    assert (quantised.arm, arm.precision, float_arm.precision) == ("erde-int8", "int8", "fp32")
    assert (arm.role, arm.loss, arm.cost, arm.history) == (
        "student",
        "erde",
        float_arm.cost,
        float_arm.history,
    )
    assert quantised.agreement.images == 360
    assert quantised.agreement.disagreements == 0
    assert quantised.bytes < 0.6 * quantised.fp32_bytes
    assert list(results.arms)[:3] == ["teacher", "erde", "erde-int8"]
    # Once more from its files.
    session = Session(folder / "bundle-int8", threads=1)
    manifest = session.manifest
    assert (manifest.precision, manifest.provenance["arm"]) == ("int8", "erde-int8")
    data = load_splits(load_config(folder / "config.yaml").data, 0)
    logits = {}
    for name in ("erde", "erde-int8"):
        with np.load(folder / f"arms/{name}/logits.npz") as arrays:
            logits[name] = arrays["test_logits"]
    assert np.array_equal(session.all_logits(data.test.images), logits["erde-int8"])
    assert 0 < np.abs(logits["erde-int8"] - logits["erde"]).max() < 0.3 * np.abs(logits["erde"]).max()
    float_manifest = read(folder / "bundle")
    assert manifest.temperatures != float_manifest.temperatures
    assert manifest.temperatures == [measured.temperature for measured in arm.exits]
    assert manifest.calibration is not None
    assert float_manifest.calibration is not None
    assert manifest.calibration.certify_fingerprint != float_manifest.calibration.certify_fingerprint
    assert read(folder / "bundle-int8") == manifest
    seal = json.loads((folder / "bundle-int8/manifest.json").read_text(encoding="utf-8"))["seal"]
    assert seal == quantised.bundle_seal != results.bundle_seal
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    (line,) = [entry for entry in log if entry["event"] == "quantised"]
    assert (line["arm"], line["kept_in_float"]) == ("erde-int8", quantised.kept_in_float)


def test_the_teacher_stands_behind_the_students(tiny_run: tuple[Path, str]) -> None:
    folder, out = tiny_run
    results = Results.read(folder / "results.json")
    cascade = results.cascade
    assert cascade is not None
    assert set(cascade.fronts) == {*ARMS, "erde-int8"} - {"teacher"}
    assert cascade.agreement.disagreements == 0
    assert cascade.no_exit_macs == results.arms["teacher"].no_exit_macs
    with np.load(folder / "arms" / "teacher" / "logits.npz") as arrays:
        logits, labels = arrays["test_logits"][-1], arrays["test_labels"]
    teacher_right = logits.argmax(axis=1) == labels
    for name, front in cascade.fronts.items():
        own = [cost.macs for cost in results.arms[name].cost]
        behind = [own[-1] + cost.macs for cost in results.arms["teacher"].cost]
        assert front.exit_macs == own + behind
        for point in front.operating_points:
            measured = point.test
            assert measured is not None
            if set(point.thresholds) == {None}:
                assert measured.macs == results.arms["teacher"].cost[-1].macs
                assert measured.accuracy == teacher_right.mean()
                continue
            macs = np.dot(measured.exit_rates, front.exit_macs)
            assert measured.macs == pytest.approx(macs)
            assert measured.macs_saved == pytest.approx(1 - macs / cascade.no_exit_macs)
    session = Session(folder / "bundle-cascade")
    assert session.manifest.networks() == (0, 3)
    certificate = session.manifest.point(None).certificate
    assert certificate is not None
    assert certificate.reference == "fallback"
    assert any(line.startswith("erde before the teacher") for line in out.splitlines())


def test_arms_saw_the_same_students_and_shared_settings(tiny_run: tuple[Path, str]) -> None:
    results = Results.read(tiny_run[0] / "results.json")
    costs = {name: arm.cost for name, arm in results.arms.items() if arm.role == "student"}
    assert costs["erde"] == costs["erde-int8"] == costs["kd"] == costs["ce"]
    rates = {name: [entry.learning_rate for entry in arm.history] for name, arm in results.arms.items()}
    assert rates["erde"] == rates["kd"] == rates["ce"] == rates["fixed-small"] == rates["fixed-tiny"]


@pytest.mark.slow
def test_steps_one_by_one_give_what_run_gives(tiny_run: tuple[Path, str], tmp_path: Path) -> None:
    folder = tmp_path / "steps"
    erde("train", *TINY, "--out", str(folder))
    for arm in ("erde", "kd"):
        erde("distill", str(folder), "--arm", arm)
    erde("distill", str(folder))
    for step in ("export", "calibrate", "evaluate"):
        out, _ = erde(step, str(folder), "--json")
        json.loads(out.splitlines()[-1])
    assert_same_run(tiny_run[0], folder)


def test_plain_export_is_the_final_exit(tiny_run: tuple[Path, str], tmp_path: Path) -> None:
    import onnxruntime

    folder, _ = tiny_run
    erde("export", str(folder), "--plain", str(tmp_path / "plain.onnx"), "--arm", "kd")
    data = load_splits(load_config(folder / "config.yaml").data, 0)
    images = data.test.images[:16]
    session = onnxruntime.InferenceSession(str(tmp_path / "plain.onnx"))
    (logits,) = session.run(None, {"images": images})
    with np.load(folder / "arms/kd/logits.npz") as arrays:
        assert np.allclose(logits, arrays["test_logits"][-1, :16], atol=1e-4)


def test_predict_on_image_files(tiny_run: tuple[Path, str], tmp_path: Path) -> None:
    from PIL import Image

    folder, _ = tiny_run
    data = load_splits(load_config(folder / "config.yaml").data, 0)
    images = data.test.images[:20]
    (tmp_path / "images").mkdir()
    for index, image in enumerate(images):
        Image.fromarray(image[..., 0]).save(tmp_path / "images" / f"{index:02}.png")
    expected = Session(folder / "bundle").predict(images)
    out, _ = erde("predict", str(folder / "bundle"), str(tmp_path / "images"), "--batch-size", "7")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["label"] for row in rows] == expected.labels.tolist()
    assert [row["exit"] for row in rows] == expected.exits.tolist()
    erde("predict", str(folder / "bundle"), str(tmp_path / "images"), "--out", str(tmp_path / "answers.csv"))
    lines = (tmp_path / "answers.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "path,label,class,probability,exit,score,macs"
    assert len(lines) == 21


def test_bundle_commands(tiny_run: tuple[Path, str]) -> None:
    folder, _ = tiny_run
    bundle = str(folder / "bundle")
    seal = json.loads(erde("bundle", "verify", bundle, "--json")[0].splitlines()[-1])["seal"]
    assert seal == Results.read(folder / "results.json").bundle_seal
    assert "What is promised" in erde("bundle", "info", bundle)[0]
    assert "the same" in erde("bundle", "diff", bundle, bundle)[0]


def test_a_second_run_into_the_same_folder_is_refused_and_resume_of_a_finished_one_changes_nothing(
    tiny_run: tuple[Path, str],
) -> None:
    folder, _ = tiny_run
    before = (folder / "results.json").read_bytes()
    _, err = erde("run", *TINY, "--out", str(folder), code=2)
    assert "continue it with --resume" in err
    erde("run", *TINY, "--out", str(folder), "--resume")
    assert (folder / "results.json").read_bytes() == before


def test_a_profiled_bundle_gives_milliseconds(tiny_run: tuple[Path, str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_run[0], tmp_path / "run"))
    times = Session(folder / "bundle", threads=1).profile(rounds=3).exit_milliseconds()
    erde("evaluate", str(folder))
    arm = Results.read(folder / "results.json").arms["erde"]
    assert arm.curve.milliseconds is not None
    # From all at the final exit to (nearly) all at the first.
    assert arm.curve.milliseconds[0] == pytest.approx(times[-1])
    for rates, milliseconds in zip(arm.curve.exit_rates, arm.curve.milliseconds, strict=True):
        assert milliseconds == pytest.approx(np.dot(rates, times))
    test = arm.default_point().test
    assert test is not None
    assert test.milliseconds == pytest.approx(np.dot(test.exit_rates, times))
    # The profile outlives the new seal.
    assert Session(folder / "bundle").cost().exit_milliseconds == times
    assert "milliseconds" in (folder / "report.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------- what a finished run refuses


def test_a_run_folder_of_another_config(refused: Refused, tiny_run: tuple[Path, str]) -> None:
    line = refused("run", *TINY, "train.epochs=99", "--resume", "--out", str(tiny_run[0]))
    assert "another recipe" in line
    assert "99" in line


def test_what_a_bundle_and_a_run_cannot_be_asked(
    refused: Refused, tiny_run: tuple[Path, str], tmp_path: Path
) -> None:
    folder = tiny_run[0]
    assert "give labelled images with --data" in refused("calibrate", str(folder / "bundle"))
    assert "knows its own MACs" in refused(
        "calibrate", str(folder / "bundle"), "--data", "x", "--macs", "1,2,3"
    )
    assert "its own recipe says what to calibrate" in refused("calibrate", str(folder), "--max-risk", "1%")
    assert "its results stay in its folder" in refused("evaluate", str(folder), "--out", "x.json")
    assert "two runs or more" in refused("compare", str(folder))
    assert "given twice" in refused("compare", str(folder), str(folder))


def test_a_run_is_certified_once(tiny_run: tuple[Path, str], refused: Refused, tmp_path: Path) -> None:
    """Editing the recipe after looking at what was certified voids the promise, so it is refused."""
    folder = Path(shutil.copytree(tiny_run[0], tmp_path / "copy"))
    recipe = folder / "config.yaml"
    recipe.write_text(recipe.read_text().replace("confidence: 0.9", "confidence: 0.8"))
    before = (folder / "arms" / "teacher" / "policy.json").read_bytes()
    assert "these certify images already certified other choices" in refused("calibrate", str(folder))
    assert (folder / "arms" / "teacher" / "policy.json").read_bytes() == before
