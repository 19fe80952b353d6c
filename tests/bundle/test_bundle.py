from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from erde import bundle
from erde.bundle import sealing
from erde.bundle.card import model_card
from erde.bundle.manifest import MANIFEST, Manifest
from erde.bundle.sealing import CARD, canonical_hash, differences, file_hash, read, seal, seal_of, write
from erde.cli import main
from erde.policy.points import Certificate
from erde.runtime.session import Session
from tests.helpers.checks import entries, user_error

FILES = (MANIFEST, CARD, "stage_0.onnx", "stage_1.onnx", "stage_2.onnx")
Edit = Callable[[dict[str, Any]], Any]


def load_manifest(folder: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return value


def forge(folder: Path, edit: Edit) -> None:
    """Change the manifest and seal it again, as somebody who knows the format would."""
    value = load_manifest(folder)
    edit(value)
    value["seal"] = canonical_hash(value)
    (folder / MANIFEST).write_text(json.dumps(value), encoding="utf-8")


@pytest.fixture
def no_graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No graph may be loaded."""
    loaded: list[Any] = []

    def refuse(path: Any, *_: Any, **__: Any) -> None:
        loaded.append(path)

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    yield
    assert loaded == []


# ---------------------------------------------------------------- writing and reading


def test_what_is_written_is_read(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = read(tiny_bundle)
    stages = [tiny_bundle / stage.file for stage in manifest.stages]
    seal = write(tmp_path / "copy", manifest, stages)
    assert seal == load_manifest(tmp_path / "copy")["seal"] == load_manifest(tiny_bundle)["seal"]
    assert read(tmp_path / "copy") == manifest
    assert entries(tmp_path) == ["copy"]
    assert entries(tmp_path / "copy") == entries(tiny_bundle) == sorted(FILES)


def test_the_manifest_lists_every_other_file(tiny_bundle: Path) -> None:
    files = read(tiny_bundle).files
    assert sorted([*files, MANIFEST]) == sorted(FILES)
    for name, expected in files.items():
        assert hashlib.sha256((tiny_bundle / name).read_bytes()).hexdigest() == expected
        assert file_hash(tiny_bundle / name) == expected


def test_a_new_seal_for_a_changed_manifest(bundle_copy: Path) -> None:
    manifest = read(bundle_copy)
    other = manifest.model_copy(update={"name": "other"})
    before = load_manifest(bundle_copy)["seal"]
    assert seal(bundle_copy, other) == load_manifest(bundle_copy)["seal"] != before
    assert read(bundle_copy) == other


def test_a_bundle_is_replaced_in_one_step(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = read(bundle_copy)

    def fail(*_: Any) -> str:
        assert read(bundle_copy) == manifest
        raise RuntimeError("killed")

    monkeypatch.setattr(sealing, "seal", fail)
    stages = [bundle_copy / stage.file for stage in manifest.stages]
    with pytest.raises(RuntimeError, match="killed"):
        write(bundle_copy, manifest.model_copy(update={"name": "other"}), stages)
    assert read(bundle_copy) == manifest
    assert entries(bundle_copy.parent) == ["bundle"]


def test_the_reference_sample_is_kept_exactly() -> None:
    images = np.arange(2 * 3 * 4 * 1, dtype=np.uint8).reshape(2, 3, 4, 1)
    sample = bundle.ReferenceSample(
        images=bundle.ReferenceSample.encode(images), count=2, logits=[[[0.0]]], tolerance=0.01
    )
    assert np.array_equal(sample.decode((3, 4, 1)), images)


def test_operating_points_by_name(tiny_bundle: Path) -> None:
    manifest = read(tiny_bundle)
    assert [point.name for point in manifest.operating_points] == [
        "no-exit",
        "risk-5",
        "risk-10",
        "budget-80",
    ]
    assert manifest.point("risk-10").target == 0.1
    assert manifest.point(None).name == "risk-5"
    with user_error("no operating point 'risk-6' in this bundle; it has: no-exit, risk-5, risk-10"):
        manifest.point("risk-6")


# ---------------------------------------------------------------- the canonical form


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


def test_the_canonical_hash_does_not_depend_on_the_order_of_keys(tiny_bundle: Path) -> None:
    value = load_manifest(tiny_bundle)
    other = shuffled(value)
    assert list(other) != list(value)
    assert canonical_hash(other) == canonical_hash(value) == value["seal"]


@pytest.mark.parametrize(
    "other",
    [
        {"a": [2, 1], "b": {"c": "d"}},
        {"a": [1, 2], "b": {"c": "e"}},
        {"a": [1, 2], "b": {"e": "d"}},
        {"a": [1, 2]},
        {"a": [1, 2], "b": {"c": "d", "seal": "x"}},
        {"a": [1.0, 2], "b": {"c": "d"}},
        {"a": [True, 2], "b": {"c": "d"}},
    ],
)
def test_the_canonical_hash_depends_on_all_else(other: dict[str, Any]) -> None:
    value = {"a": [1, 2], "b": {"c": "d"}}
    assert canonical_hash(other) != canonical_hash(value)
    assert canonical_hash({**value, "seal": "x"}) == canonical_hash(value)


def test_the_canonical_form_as_documented() -> None:
    expected = hashlib.sha256(b'{"a":[1,0.5,null],"b":"\\u00e9"}').hexdigest()
    assert canonical_hash({"seal": "x", "b": "é", "a": [1, 0.5, None]}) == expected


# ---------------------------------------------------------------- damage


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_changed_byte_in_each_file(name: str, place: float, bundle_copy: Path) -> None:
    path = bundle_copy / name
    content = bytearray(path.read_bytes())
    position = int(place * len(content))
    if name == MANIFEST:
        # White space between values means nothing: take a digit.
        position = next(at for at in range(position, len(content)) if chr(content[at]) in "1234567")
    content[position] += 1
    path.write_bytes(content)
    with user_error(f"bundle {bundle_copy}: {name} "):
        Session(bundle_copy)


def test_the_last_digit_of_a_float_is_sealed_too(bundle_copy: Path) -> None:
    # 0.1 and 0.10 are one float: the canonical form alone could not tell them apart.
    path = bundle_copy / MANIFEST
    text = path.read_text(encoding="utf-8")
    number = re.search(r"\d\.\d+(?=[,\s])", text)
    assert number is not None
    path.write_text(text[: number.end()] + "0" + text[number.end() :], encoding="utf-8")
    with user_error(f"bundle {bundle_copy}: {MANIFEST} is not JSON"):
        Session(bundle_copy)


@pytest.fixture(scope="module")
def damaged(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("damaged") / "bundle"))


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(FILES), place=st.floats(0, 1, exclude_max=True), change=st.integers(1, 255))
def test_any_changed_byte_of_any_file_is_refused(damaged: Path, name: str, place: float, change: int) -> None:
    path = damaged / name
    content = path.read_bytes()
    value = load_manifest(damaged)
    other = bytearray(content)
    other[int(place * len(content))] ^= change
    path.write_bytes(other)
    try:
        with user_error(f"bundle {damaged}"):
            read(damaged)
    except pytest.fail.Exception:
        # The seal is of the canonical form: the same values in other bytes are the same manifest.
        assert name == MANIFEST
        assert load_manifest(damaged) == value
    finally:
        path.write_bytes(content)


def test_the_seal_of_a_bundle_of_version_2_is_the_one_in_its_file(bundle_copy: Path) -> None:
    def older(value: dict[str, Any]) -> None:
        value["format_version"] = 2
        for stage in value["stages"]:
            del stage["input"], stage["network"]
        for point in value["operating_points"]:
            del point["tune_agreement"]

    forge(bundle_copy, older)
    manifest = read(bundle_copy)
    assert seal_of(manifest) == load_manifest(bundle_copy)["seal"]
    # Sealed again it is a bundle of today's version.
    assert seal(bundle_copy, manifest) == seal_of(read(bundle_copy)) != seal_of(manifest)


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "folder", "symlink"])
def test_a_file_that_is_not_what_it_was(name: str, how: str, bundle_copy: Path, tmp_path: Path) -> None:
    path = bundle_copy / name
    content = path.read_bytes()
    path.unlink()
    if how == "symlink":
        # Its content would be right.
        (tmp_path / "outside").write_bytes(content)
        path.symlink_to(tmp_path / "outside")
    elif how == "folder":
        path.mkdir()
    elif how != "missing":
        # The manifest's last byte is a line break, which means nothing.
        path.write_bytes(content[: 0 if how == "empty" else -2])
    damage = how in ("empty", "truncated")
    gone = f"it has no {MANIFEST}" if name == MANIFEST else f"{name} is missing"
    wrong = f"{name} {'is not JSON' if name == MANIFEST else 'does not match its checksum'}"
    with user_error(f"{bundle_copy}: {wrong if damage else gone}"):
        Session(bundle_copy)


@pytest.mark.usefixtures("no_graphs")
def test_no_bundle_at_all(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path):
        with user_error(f"no bundle at {path}"):
            Session(path)
    (tmp_path / "file").touch()
    with user_error(f"no bundle at {tmp_path / 'file'}: expected a folder"):
        Session(tmp_path / "file")


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{}", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"1" * 5000, "is not JSON"),
        (b"[1, 2]", "does not hold an object"),
        (b"null", "does not hold an object"),
        (b'"format_version"', "does not hold an object"),
        (b"{}", "has format version None"),
        (b'{"format_version": 2}', "does not match its seal"),
        (b'{"format_version": 2, "seal": null}', "does not match its seal"),
        # Numbers that Python reads and canonical JSON does not have.
        (b'{"format_version": 2, "name": NaN, "seal": "0"}', "does not match its seal"),
        (b'{"format_version": 2, "name": 1e999, "seal": "0"}', "does not match its seal"),
        (b'{"format_version": 2, "name": ' + b"[" * 900 + b"]" * 900 + b"}", "does not match its seal"),
    ],
)
def test_a_manifest_that_is_none(content: bytes, message: str, bundle_copy: Path) -> None:
    (bundle_copy / MANIFEST).write_bytes(content)
    with user_error(f"{message}.*: (copy|install|it was changed)"):
        Session(bundle_copy)


@pytest.mark.usefixtures("no_graphs")
def test_a_manifest_too_large_is_not_even_parsed(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.truncate(bundle_copy / MANIFEST, bundle.MAX_MANIFEST_BYTES + 1)
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: pytest.fail("was read"))
    with user_error("manifest.json is larger than 64 MiB"):
        Session(bundle_copy)


# ---------------------------------------------------------------- forged manifests


def rename_stage(name: str) -> Edit:
    def edit(value: dict[str, Any]) -> None:
        value["files"][name] = value["files"].pop("stage_1.onnx")
        value["stages"][1]["file"] = name

    return edit


def set_at(*keys: Any, to: Any) -> Edit:
    def edit(value: dict[str, Any]) -> None:
        *path, last = keys
        node: Any = value
        for key in path:
            node = node[key]
        node[last] = to

    return edit


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


HARM = {"bias": 0.0, "weights": [0.0] * 6, "class_weights": [0.0] * 10}

FORGERIES: dict[str, tuple[Edit, str]] = {
    "newer version": (set_at("format_version", to=4), "format version 4, this erde reads 2 and 3: install"),
    "version as text": (set_at("format_version", to="2"), "format version '2', this erde reads 2 and 3"),
    "unknown key": (set_at("extra", to=1), "not valid at extra: Extra inputs"),
    "unknown deep key": (set_at("stages", 0, "extra", to=1), r"not valid at stages\.0\.extra"),
    "missing key": (lambda value: value.pop("classes"), "not valid at classes: Field required"),
    "wrong type": (set_at("sharpness", to="high"), "not valid at sharpness"),
    "sharpness zero": (set_at("sharpness", to=0), "not valid at sharpness"),
    "one class": (set_at("classes", to=["a"]), "not valid at classes"),
    "classes": (set_at("classes", to=["a", "b"]), "logits are not 3 exits x 2 images x 2 classes"),
    "precision": (set_at("precision", to="int4"), "not valid at precision"),
    "score": (set_at("score", to="entrophy"), r"unknown score 'entrophy' \(did you mean 'entropy'\?\)"),
    "older version": (set_at("format_version", to=1), "format version 1, this erde reads 2 and 3"),
    "ensemble": (set_at("ensemble", to="sum"), "not valid at ensemble"),
    "harm without parameters": (set_at("score", to="harm"), "score_parameters belong to the score 'harm'"),
    "parameters without harm": (
        set_at("score_parameters", to=[]),
        "score_parameters belong to the score 'harm'",
    ),
    "parameters of too few exits": (
        lambda value: value.update(score="harm", score_parameters=[HARM]),
        "1 score_parameters for 3 exits",
    ),
    "parameters of a wrong shape": (
        lambda value: value.update(score="harm", score_parameters=[HARM, HARM]),
        "score_parameters of exit 1 are not 8 weights and one per class",
    ),
    "two temperatures": (set_at("temperatures", to=[1.0, 1.0]), "2 temperatures for 3 exits"),
    "temperature zero": (set_at("temperatures", to=[1.0, 0.0, 1.0]), r"not valid at temperatures\.1"),
    "one threshold": (
        set_at("operating_points", 1, "thresholds", to=[0.5]),
        "'risk-5' has 1 thresholds for 3 exits",
    ),
    "three thresholds": (
        set_at("operating_points", 0, "thresholds", to=[0.5, 0.5, 0.5]),
        "'no-exit' has 3 thresholds for 3 exits",
    ),
    "default": (set_at("default_operating_point", to="fast"), "the default operating point 'fast' is not"),
    "no points": (set_at("operating_points", to=[]), "not valid at operating_points"),
    "same name": (set_at("operating_points", 1, "name", to="no-exit"), "two operating points have the same"),
    "no checksum": (lambda value: value["files"].pop("stage_1.onnx"), r"stage_1\.onnx has no checksum"),
    "wrong checksum": (set_at("files", "stage_1.onnx", to="0" * 64), r"stage_1\.onnx does not match its"),
    "slash": (rename_stage("a/b.onnx"), r"'a/b\.onnx' is not allowed"),
    "backslash": (rename_stage("a\\b.onnx"), "is not allowed"),
    "parent": (rename_stage("../stage_1.onnx"), r"'\.\./stage_1\.onnx' is not allowed"),
    "dots": (rename_stage(".."), r"'\.\.' is not allowed"),
    "hidden": (rename_stage(".stage"), "is not allowed"),
    "absolute": (rename_stage("/etc/hostname"), "'/etc/hostname' is not allowed"),
    "line break": (rename_stage("stage_1.onnx\n"), "is not allowed"),
    "empty name": (rename_stage(""), "'' is not allowed"),
    "one file twice": (
        lambda value: value["stages"][2].update(file="stage_1.onnx"),
        "two stages have the same file",
    ),
    "loose tolerance": (
        set_at("reference_sample", "tolerance", to=1e6),
        r"the reference sample's tolerance is 1e\+06, at most 0\.\d+ is allowed",
    ),
    "deep provenance": (
        set_at("provenance", "x", to=nested(255)),
        "manifest.json is nested more than 50 levels",
    ),
    "half a character": (set_at("name", to="\ud800"), "manifest.json has text that is not Unicode"),
    "half a character in a key": (
        set_at("provenance", "\ud800", to=1),
        "manifest.json has text that is not Unicode",
    ),
    "fewer stages": (lambda value: value["stages"].pop(), "3 temperatures for 2 exits"),
    "ragged logits": (
        lambda value: value["reference_sample"]["logits"][1][0].pop(),
        "the reference sample's logits are not 3 exits x 2 images x 10 classes",
    ),
    "no logits": (set_at("reference_sample", "logits", to=[]), "the reference sample's logits are not"),
    "many images": (set_at("reference_sample", "count", to=10**9), r"not valid at reference_sample\.count"),
}


@pytest.mark.usefixtures("no_graphs")
@pytest.mark.parametrize("name", FORGERIES)
def test_a_forged_manifest_is_refused_before_a_graph_is_loaded(name: str, bundle_copy: Path) -> None:
    edit, message = FORGERIES[name]
    forge(bundle_copy, edit)
    with user_error(f"^bundle {bundle_copy}.*{message}"):
        Session(bundle_copy)


@pytest.mark.usefixtures("no_graphs")
def test_the_same_changes_without_a_new_seal(bundle_copy: Path) -> None:
    value = load_manifest(bundle_copy)
    value["operating_points"][1]["certificate"]["max_risk"] = 0.001
    (bundle_copy / MANIFEST).write_text(json.dumps(value))
    with user_error("does not match its seal: it was changed after sealing"):
        Session(bundle_copy)


def test_forging_alone_is_not_what_is_refused(bundle_copy: Path) -> None:
    forge(bundle_copy, set_at("name", to="other"))
    assert Session(bundle_copy).manifest.name == "other"


def recompute(folder: Path) -> None:
    def edit(value: dict[str, Any]) -> None:
        value["files"] = {name: file_hash(folder / name) for name in value["files"]}

    forge(folder, edit)


@pytest.mark.parametrize(("first", "second"), [(0, 1), (1, 2), (0, 2)])
def test_swapped_stages_with_new_checksums(first: int, second: int, bundle_copy: Path) -> None:
    path, other = (bundle_copy / f"stage_{index}.onnx" for index in (first, second))
    path.rename(bundle_copy / "aside")
    other.rename(path)
    (bundle_copy / "aside").rename(other)
    recompute(bundle_copy)
    with user_error(f"{bundle_copy}.*(its stages do not|cannot be run as a stage)"):
        Session(bundle_copy)


@pytest.mark.usefixtures("no_graphs")
def test_a_stage_named_for_ort_s_own_format(bundle_copy: Path) -> None:
    (bundle_copy / "stage_1.onnx").rename(bundle_copy / "stage_1.ort")
    forge(bundle_copy, rename_stage("stage_1.ort"))
    with user_error(rf"^bundle {bundle_copy}: the stage stage_1\.ort is not an \.onnx file"):
        Session(bundle_copy)


@pytest.mark.usefixtures("no_graphs")
def test_a_large_file_is_refused_before_any_is_hashed(
    bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.truncate(bundle_copy / "stage_2.onnx", bundle.MAX_FILE_BYTES + 1)
    monkeypatch.setattr(sealing, "file_hash", lambda path: pytest.fail(f"{path} was hashed"))
    with user_error("stage_2.onnx is larger than"):
        Session(bundle_copy)


def test_a_truncated_stage_with_a_new_checksum(bundle_copy: Path) -> None:
    path = bundle_copy / "stage_1.onnx"
    path.write_bytes(path.read_bytes()[:-100])
    recompute(bundle_copy)
    with user_error(f"ONNX Runtime cannot load {path}"):
        Session(bundle_copy)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (set_at("reference_sample", "logits", 1, 0, 0, to=99.0), "do not give the logits of its reference"),
        (set_at("reference_sample", "images", to="!"), "do not run"),
        (set_at("reference_sample", "images", to=base64.b64encode(b"ab").decode()), "do not run"),
        (set_at("reference_sample", "count", to=1), "the reference sample's logits are not"),
        (set_at("input_shape", to=[4, 4, 1]), "do not run"),
    ],
)
def test_a_reference_sample_that_does_not_fit(edit: Edit, message: str, bundle_copy: Path) -> None:
    forge(bundle_copy, edit)
    with user_error(f"^bundle {bundle_copy}.*{message}"):
        Session(bundle_copy)


# ---------------------------------------------------------------- card and differences


def certificate(**changes: Any) -> Certificate:
    values = {
        "max_risk": 0.005,
        "confidence": 0.95,
        "images": 2500,
        "guarantee": "risk",
        "lost": 7,
        "won": 3,
        "risk": 0.0028,
        "upper_bound": 0.0048,
        "reference": "final_exit",
        "method": "some method",
        "assumptions": "images like these",
    }
    return Certificate.model_validate({**values, **changes})


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("final_exit", "the full network gets right"),
        ("no_exit_network", "the network without exits gets right"),
        ("teacher", "the teacher gets right"),
    ],
)
def test_the_sentence_of_a_certificate(reference: str, words: str) -> None:
    assert certificate(reference=reference).sentence() == (
        f"With 95 % confidence, at most 0.5 % of images are ones that {words} and the early answer gets wrong "
        "(seen: 7 of 2,500 certify images; some method)."
    )


def test_the_card_says_what_is_promised(tiny_bundle: Path) -> None:
    manifest = read(tiny_bundle)
    card = (tiny_bundle / CARD).read_text(encoding="utf-8")
    assert card == model_card(manifest)
    certified = [point for point in manifest.operating_points if point.certificate]
    assert certified
    for point in certified:
        assert point.certificate is not None
        assert f"- **{point.name}**: {point.certificate.sentence()}" in card
        assert f"Assumed: {point.certificate.assumptions}." in card
    assert "| risk-5 (default) |" in card
    for stage in manifest.stages:
        assert f"| {stage.exit_name} | {stage.macs:,} | {stage.parameters:,} |" in card
    assert "for images of 8x8 pixels and 1 channel (" in card
    assert "Nothing: no operating point is certified." not in card


def test_the_card_without_a_promise(tiny_bundle: Path) -> None:
    manifest = read(tiny_bundle)
    points = [point.model_copy(update={"certificate": None}) for point in manifest.operating_points]
    card = model_card(manifest.model_copy(update={"operating_points": points}))
    assert "Nothing: no operating point is certified." in card
    assert "With 90 % confidence" not in card


@pytest.mark.parametrize(
    "provenance",
    [
        {"recipe": {"data": ["digits"]}, "splits": {"train": {"size": 1}}},
        {"recipe": {"data": {"name": ["digits"]}}, "splits": {"train": 1}},
        {"recipe": [], "splits": {}},
        {"quantisation": {"kept_in_float": 3}},
        {"quantisation": {"kept_in_float": [["first"]]}},
        {"quantisation": []},
    ],
)
def test_the_card_takes_any_provenance(provenance: dict[str, Any], tiny_bundle: Path) -> None:
    manifest = read(tiny_bundle).model_copy(update={"provenance": provenance, "precision": "int8"})
    assert "in int8" in model_card(manifest)


def test_the_card_has_no_control_characters(tiny_bundle: Path) -> None:
    # `erde bundle info` prints it: a name must not move the cursor or colour the terminal.
    manifest = read(tiny_bundle).model_copy(update={"name": "\x1b]0;owned\x07\r\x9b31m"})
    card = model_card(manifest)
    assert all(line.isprintable() for line in card.split("\n"))
    assert "owned" in card


def test_differences(tiny_bundle: Path) -> None:
    manifest = read(tiny_bundle)
    assert differences(manifest, manifest) == {}
    value = manifest.model_dump(mode="json")
    value["name"] = "other"
    value["stages"][1]["macs"] = 7
    value["operating_points"][0]["thresholds"] = [None, 0.5]
    value["provenance"] = {"new": {"deep": 1}, "erde": manifest.provenance["erde"]}
    value["classes"] = [*manifest.classes, "ten"]
    for rows in value["reference_sample"]["logits"]:
        for row in rows:
            row.append(0.0)
    other = Manifest.model_validate(value)
    changes = {
        key: pair for key, pair in differences(manifest, other).items() if "reference_sample" not in key
    }
    assert changes == {
        "name": ("tiny", "other"),
        "stages.1.macs": (manifest.stages[1].macs, 7),
        "operating_points.0.thresholds.1": (None, 0.5),
        "provenance.new": (None, {"deep": 1}),
        "provenance.torch": (manifest.provenance["torch"], None),
        "classes": (manifest.classes, [*manifest.classes, "ten"]),
    }


def test_manifests_do_not_change(tiny_bundle: Path) -> None:
    manifest = read(tiny_bundle)
    with pytest.raises(ValueError, match="frozen"):
        manifest.name = "other"  # type: ignore[misc]


def test_the_command_gives_the_fields_that_differ(
    tiny_bundle: Path, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read(bundle_copy)
    seal(bundle_copy, manifest.model_copy(update={"name": "other"}))
    monkeypatch.setattr(sys, "argv", ["erde", "bundle", "diff", str(tiny_bundle), str(bundle_copy), "--json"])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["fields"]["name"] == {"first": "tiny", "second": "other"}
    assert said["differences"] == len(said["fields"])
