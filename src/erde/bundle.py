"""The bundle, erde's deployable folder: manifest and ONNX stages; sealed, read and verified here.

A bundle is only data: JSON, ONNX and a model card. docs/formats.md describes every field.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from erde.errors import UserError, in_one_line, nearest, printable
from erde.files import replacing_folder, write_json, write_text
from erde.graph_files import check_graph_file
from erde.policy import SCORES, Ensemble, ExitRule, HarmParameters, harm_feature_count

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
CARD = "README.md"
# No honest manifest comes near this; a larger one is refused before it is parsed.
MAX_MANIFEST_BYTES = 64 * 2**20
# An ONNX graph is a protobuf message, which cannot be larger; a larger file is refused before it is hashed.
MAX_FILE_BYTES = 2 * 2**30 - 1
# Of objects and lists in a manifest; erde's own have 8. Python's JSON and pydantic have limits of their own, higher ones.
MAX_DEPTH = 50
# Of the reference sample, as a share of its largest logit (of 1, where all are smaller): what int8 stages get. On another
# machine a last bit that differs may tip a rounding.
MAX_TOLERANCE = 0.02


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


# Whole numbers that are kept in arrays of int64.
Count = Annotated[int, Field(ge=0, lt=2**63)]
# What logits are divided by; calibration stays well within.
Divisor = Annotated[float, Field(ge=1e-3, le=1e3)]
Side = Annotated[int, Field(ge=1, lt=2**31)]

Precision = Literal["fp32", "int8"]
Reference = Literal["final_exit", "no_exit_network", "teacher", "given"]
Guarantee = Literal["risk", "net_drop", "expected_risk"]

_REFERENCE_IN_WORDS: dict[Reference, str] = {
    "final_exit": "the full network",
    "no_exit_network": "the network without exits",
    "teacher": "the teacher",
    "given": "the given reference",
}


class Certificate(_Model):
    """A promise about one operating point: with this confidence, risk (or net drop) <= max_risk.

    Confidence is over the draw of the certify split; it holds for images drawn like that split's. Without a
    confidence the promise is about the risk's expectation over that draw. Of the certify ``images``, ``lost``
    are those that the reference gets right and the early answer wrong, ``won`` the other way round; ``risk`` is what
    is promised about as it was seen (lost less won for a net drop), ``upper_bound`` the one-sided bound that these
    counts give by themselves: it describes, the promise is ``max_risk``.
    """

    guarantee: Guarantee
    max_risk: float = Field(gt=0, lt=1)
    confidence: float | None = Field(gt=0, lt=1)
    images: int = Field(ge=1)
    lost: int = Field(ge=0)
    won: int = Field(ge=0)
    risk: float
    upper_bound: float | None
    reference: Reference
    method: str
    assumptions: str

    def sentence(self, precision: Precision = "fp32") -> str:
        """The promise in words; of an int8 bundle the full network is the one in int8."""
        who, share = _REFERENCE_IN_WORDS[self.reference], f"{self.max_risk * 100:g} %"
        if precision == "int8" and self.reference == "final_exit":
            who = "the full network in int8"
        sure = "In expectation" if self.confidence is None else f"With {self.confidence * 100:g} % confidence"
        seen = f"{self.lost:,} of {self.images:,} certify images"
        if self.guarantee == "net_drop":
            promise = f"the accuracy is at most {share} (of all images) below that of {who}"
            seen = f"{self.lost:,} lost and {self.won:,} won of {self.images:,} certify images"
        else:
            promise = (
                f"at most {share} of images are ones that {who} gets right and the early answer gets wrong"
            )
        return f"{sure}, {promise} (seen: {seen}; {self.method})."


class Measured(_Model):
    """What an operating point does on one split: shares of images; MACs, and milliseconds if known, per image."""

    images: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    risk: float
    net_drop: float
    macs: float
    macs_saved: float
    milliseconds: float | None = None
    exit_rates: list[float]


class OperatingPoint(_Model):
    """One named setting of the policy: E-1 thresholds (None disables an exit) and what is known of it.

    ``target`` is a share of images (risk), a share of the MACs (budget) or milliseconds (latency).
    """

    name: str
    kind: Literal["no-exit", "risk", "budget", "latency"]
    target: float | None
    thresholds: list[float | None]
    certificate: Certificate | None
    note: str | None = None
    tune: Measured | None = None
    test: Measured | None = None


class LeftOut(_Model):
    """A promise that was asked for and could not be made: there is no operating point of this name."""

    name: str
    target: float
    images_needed: int | None  # where the certify split was too small, the least number that would do
    note: str


class ScoreCandidate(_Model):
    """The share of MACs that a score saves on tune at the default risk.

    ``fragile`` is the share of tune images whose score lies within 1e-5 of a threshold there.
    """

    score: str
    sharpness: float
    ensemble: Ensemble = "none"
    macs_saved: float
    fragile: float = 0.0


class Stage(_Model):
    """One stage: its file and the cost of an image that leaves at its exit, all heads so far included."""

    file: str
    exit_name: str
    macs: Count
    parameters: Count


class ReferenceSample(_Model):
    """Images and the logits that every exit must give for them: how a loaded bundle checks itself."""

    images: str  # base64 of uint8 (N, H, W, C)
    count: int = Field(ge=1, le=64)
    logits: list[list[list[float]]]  # (E, N, K)
    tolerance: float

    @model_validator(mode="after")
    def _tight(self) -> ReferenceSample:
        largest = max((abs(one) for rows in self.logits for row in rows for one in row), default=0.0)
        allowed = MAX_TOLERANCE * max(1.0, largest)
        if not self.tolerance <= allowed:
            raise ValueError(
                f"the reference sample's tolerance is {self.tolerance:g}, at most {allowed:g} is allowed"
            )
        return self

    def decode(self, shape: tuple[int, int, int]) -> NDArray[np.uint8]:
        """The images, uint8 (N, H, W, C)."""
        return np.frombuffer(base64.b64decode(self.images), dtype=np.uint8).reshape(self.count, *shape)

    @staticmethod
    def encode(images: NDArray[np.uint8]) -> str:
        """The base64 text of uint8 images."""
        return base64.b64encode(np.ascontiguousarray(images).tobytes()).decode()


class Calibration(_Model):
    """What calibration saw: exit rates and score histograms on certify, at the default point, and which splits.

    Histograms have 20 equal bins over ``score_ranges``; what lies beyond is in the outermost. ``choices`` is a
    hash of the settings, the costs and the tune split; it tells a repeated calibration from a second choice on the
    same certify images (or on images of the same ``sources``), which would void the certificates.
    """

    exit_rates: list[Annotated[float, Field(ge=0, le=1)]]
    score_histograms: list[list[Count]]
    score_ranges: list[tuple[float, float]]
    tune_images: Count
    certify_images: Count
    tune_fingerprint: str
    certify_fingerprint: str
    sources: list[str]
    choices: str

    @model_validator(mode="after")
    def _consistent(self) -> Calibration:
        if len(self.score_histograms) != len(self.score_ranges):
            raise ValueError(f"{len(self.score_histograms)} histograms with {len(self.score_ranges)} ranges")
        for low, high in self.score_ranges:
            if not (low <= high and math.isfinite(high - low)):
                raise ValueError(f"scores cannot range from {low:g} to {high:g}")
        return self


class Manifest(_Model):
    """All that the runtime knows of a bundle."""

    format_version: int
    name: str
    classes: list[str] = Field(min_length=2)
    input_shape: tuple[Side, Side, Side]  # H, W, C
    mean: list[float]
    std: list[float]
    resize: Literal["shorter side, then centre crop; bilinear"]
    precision: Precision
    opset: int
    stages: list[Stage] = Field(min_length=1)
    no_exit_macs: Count
    no_exit_parameters: Count
    score: str
    sharpness: Divisor
    ensemble: Ensemble
    score_parameters: list[HarmParameters] | None
    temperatures: list[Divisor]
    operating_points: list[OperatingPoint] = Field(min_length=1)
    default_operating_point: str
    left_out: list[LeftOut]
    calibration: Calibration | None
    reference_sample: ReferenceSample
    provenance: dict[str, Any]
    files: dict[str, str]  # name -> SHA-256

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        exits = len(self.stages)
        if len(self.temperatures) != exits:
            raise ValueError(f"{len(self.temperatures)} temperatures for {exits} exits")
        if self.score not in SCORES:
            raise ValueError(f"unknown score '{self.score}'{nearest(self.score, SCORES)}")
        self._check_parameters(exits)
        sample = self.reference_sample
        rows = [row for logits in sample.logits for row in logits]
        if (
            len(sample.logits) != exits
            or any(len(logits) != sample.count for logits in sample.logits)
            or any(len(row) != len(self.classes) for row in rows)
        ):
            raise ValueError(
                f"the reference sample's logits are not {exits} exits x {sample.count} images x "
                f"{len(self.classes)} classes"
            )
        if not len(self.mean) == len(self.std) == self.input_shape[2]:
            raise ValueError(f"mean and std do not fit {self.input_shape[2]} channels")
        names = [point.name for point in self.operating_points]
        if len(set(names)) != len(names):
            raise ValueError("two operating points have the same name")
        if self.default_operating_point not in names:
            raise ValueError(f"the default operating point '{self.default_operating_point}' is not listed")
        for point in self.operating_points:
            if len(point.thresholds) != exits - 1:
                raise ValueError(f"'{point.name}' has {len(point.thresholds)} thresholds for {exits} exits")
        self._check_stage_files()
        return self

    def _check_stage_files(self) -> None:
        for stage in self.stages:
            if stage.file not in self.files:
                raise ValueError(f"{stage.file} has no checksum")
        if len({stage.file for stage in self.stages}) < len(self.stages):
            raise ValueError("two stages have the same file")

    def _check_parameters(self, exits: int) -> None:
        if (self.score == "harm") != (self.score_parameters is not None):
            raise ValueError("score_parameters belong to the score 'harm', and to no other")
        for index, one in enumerate(self.score_parameters or ()):
            features = harm_feature_count(index, len(self.classes))
            if len(one.weights) != features or len(one.class_weights) != len(self.classes):
                raise ValueError(
                    f"score_parameters of exit {index} are not {features} weights and one per class"
                )
        if self.score_parameters is not None and len(self.score_parameters) != exits - 1:
            raise ValueError(f"{len(self.score_parameters)} score_parameters for {exits} exits")

    def rule(self) -> ExitRule:
        """What the exits answer with and decide on."""
        harm = None if self.score_parameters is None else tuple(self.score_parameters)
        return ExitRule(self.score, self.sharpness, self.ensemble, harm)

    def point(self, name: str | None) -> OperatingPoint:
        """The operating point ``name``, the default one for None; :class:`UserError` if there is none."""
        name = name or self.default_operating_point
        for point in self.operating_points:
            if point.name == name:
                return point
        known = ", ".join(point.name for point in self.operating_points)
        raise UserError(f"no operating point '{name}' in this bundle; it has: {known}")


def stages_hash(manifest: Manifest) -> str:
    """A hash of the stage files alone: what a profile of the machine belongs to, whatever the thresholds."""
    return canonical_hash({stage.file: manifest.files[stage.file] for stage in manifest.stages})


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_hash(value: dict[str, Any]) -> str:
    """SHA-256 of the canonical JSON (sorted keys, no spaces) of ``value`` without its own ``seal``."""
    unsealed = {key: item for key, item in value.items() if key != "seal"}
    text = json.dumps(unsealed, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def seal_of(manifest: Manifest) -> str:
    """The seal that belongs to a manifest."""
    return canonical_hash(manifest.model_dump(mode="json"))


def seal(folder: Path, manifest: Manifest) -> str:
    """Write ``manifest`` into ``folder`` with its seal, and return the seal. The stages must be there."""
    value = manifest.model_dump(mode="json")
    value["seal"] = canonical_hash(value)
    write_json(folder / MANIFEST, value)
    return str(value["seal"])


def read(folder: Path) -> Manifest:
    """The manifest of a bundle whose format, seal, checksums and kinds of graph were verified.

    Nothing but JSON is parsed, no graph is loaded and no path outside ``folder`` is opened before that.

    Raises:
        UserError: whatever is wrong with the bundle, in one line.
    """
    if not folder.is_dir():
        raise UserError(f"no bundle at {folder}: expected a folder with {MANIFEST} and ONNX stages")
    value = _read_json(folder)
    version = value.get("format_version")
    if version != FORMAT_VERSION:
        raise UserError(
            f"bundle {folder} has format version {in_one_line(repr(version))}, this erde reads {FORMAT_VERSION}: "
            "install the erde that wrote it, or export it again"
        )
    try:
        matches = value.pop("seal", None) == canonical_hash(value)
    except (ValueError, RecursionError):  # NaN, an overflowing number, or nesting that has no canonical form
        matches = False
    if not matches:
        raise UserError(f"bundle {folder}: {MANIFEST} does not match its seal: it was changed after sealing")
    _check_json(folder, value)
    try:
        manifest = Manifest.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = in_one_line(".".join(str(part) for part in first["loc"])) or "manifest"
        what = in_one_line(first["msg"])
        raise UserError(f"bundle {folder}: {MANIFEST} is not valid at {where}: {what}") from error
    for name in manifest.files:
        _check_file(folder, name)
    for stage in manifest.stages:
        # ONNX Runtime tells formats by the name too, and graph_files.py looks at ONNX only.
        if not stage.file.endswith(".onnx"):
            raise UserError(f"bundle {folder}: the stage {stage.file} is no .onnx file")
    for name, expected in manifest.files.items():
        if file_hash(folder / name) != expected:
            raise UserError(
                f"bundle {folder}: {name} does not match its checksum: it was changed or damaged; "
                "copy the bundle again"
            )
    for stage in manifest.stages:
        check_graph_file(folder / stage.file)
    return manifest


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if path.is_symlink() or not path.is_file():
        raise UserError(
            f"no bundle at {folder}: it has no {MANIFEST} (a bundle is what `erde export` writes)"
        )
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise UserError(f"bundle {folder}: {MANIFEST} is larger than {MAX_MANIFEST_BYTES // 2**20} MiB")
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_float=_exact_float)
    except (ValueError, RecursionError) as error:
        raise UserError(f"bundle {folder}: {MANIFEST} is not JSON: copy the bundle again") from error
    if not isinstance(value, dict):
        raise UserError(f"bundle {folder}: {MANIFEST} does not hold an object: copy the bundle again")
    return value


def _check_json(folder: Path, value: dict[str, Any]) -> None:
    """What JSON allows and nobody could print or write again: nesting without end, and half characters."""
    waiting: list[tuple[Any, int]] = [(value, 1)]
    while waiting:
        node, depth = waiting.pop()
        if isinstance(node, str):
            try:
                node.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"bundle {folder}: {MANIFEST} has text that is not Unicode") from error
        elif isinstance(node, dict | list):
            if depth > MAX_DEPTH:
                raise UserError(f"bundle {folder}: {MANIFEST} is nested more than {MAX_DEPTH} levels deep")
            inside = [*node, *node.values()] if isinstance(node, dict) else node
            waiting += [(one, depth + 1) for one in inside]


def _exact_float(text: str) -> float:
    """A number as Python writes it; another spelling of the same float would slip past the seal."""
    value = float(text)
    if math.isfinite(value) and repr(value) != text:
        raise ValueError(f"{text} is not how erde writes a number")
    return value


def _check_file(folder: Path, name: str) -> None:
    """Name, kind and size of a file, before the first one is hashed."""
    # Plain names only: no separators, no "..", so that a manifest cannot point outside its folder.
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name):
        name = in_one_line(repr(name))
        raise UserError(f"bundle {folder}: the file name {name} is not allowed in a bundle")
    path = folder / name
    if path.is_symlink() or not path.is_file():
        raise UserError(f"bundle {folder}: {name} is missing: copy the bundle again")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UserError(f"bundle {folder}: {name} is larger than {MAX_FILE_BYTES:,} bytes")


def write(folder: Path, manifest: Manifest, stages: list[Path], beside_seal: Sequence[Path] = ()) -> str:
    """Write a whole bundle (stages, model card, manifest) in one step, and return its seal.

    Files of ``beside_seal`` are copied too, and are no part of what is sealed.
    """
    with replacing_folder(folder) as beside:
        for path in [*stages, *beside_seal]:
            shutil.copyfile(path, beside / path.name)
        card = model_card(manifest)
        write_text(beside / CARD, card)
        files = {**manifest.files, CARD: file_hash(beside / CARD)}
        return seal(beside, manifest.model_copy(update={"files": files}))


def model_card(manifest: Manifest) -> str:
    """The bundle's README: what it is, what it promises, what it costs, how to load it."""
    height, width, channels = manifest.input_shape
    lines = [
        f"# {manifest.name}",
        "",
        f"An image classifier with {len(manifest.stages)} exits, {len(manifest.classes)} classes, for images of "
        f"{height}x{width} pixels and {channels} channel{'s' if channels > 1 else ''} ({_precision_in_words(manifest)}).",
        "",
        "| exit | name | MACs (cumulative, heads included) | parameters |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {index} | {stage.exit_name} | {stage.macs:,} | {stage.parameters:,} |"
        for index, stage in enumerate(manifest.stages)
    ]
    lines += [
        "",
        f"The same network without exits: {manifest.no_exit_macs:,} MACs, {manifest.no_exit_parameters:,} parameters.",
        "",
        "## Operating points",
        "",
        "| name | thresholds | test accuracy | MACs saved | exit rates |",
        "|---|---|---|---|---|",
    ]
    for point in manifest.operating_points:
        thresholds = ", ".join("off" if one is None else f"{one:.4f}" for one in point.thresholds)
        measured = "- | - | -"
        if point.test is not None:
            rates = " / ".join(f"{rate:.1%}" for rate in point.test.exit_rates)
            measured = f"{point.test.accuracy:.2%} | {point.test.macs_saved:.1%} | {rates}"
        default = " (default)" if point.name == manifest.default_operating_point else ""
        lines.append(f"| {point.name}{default} | {thresholds} | {measured} |")
    lines += ["", "## What is promised", ""]
    certified = [point for point in manifest.operating_points if point.certificate is not None]
    lines += [
        f"- **{point.name}**: {point.certificate.sentence(manifest.precision)}"
        for point in certified
        if point.certificate
    ]
    if certified and certified[0].certificate:
        lines += ["", f"Assumed: {certified[0].certificate.assumptions}."]
    else:
        lines.append("Nothing: no operating point is certified.")
    if manifest.left_out:
        lines += ["", "Asked for and left out:", ""]
        lines += [f"- {one.name}: {one.note}" for one in manifest.left_out]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from erde.runtime import Session",
        "",
        'session = Session("path/to/this/folder")',
        "answer = session.predict(images)  # uint8, (N, H, W, C)",
        "answer.labels, answer.probabilities, answer.exits",
        "```",
        "",
        "## Data and limits",
        "",
        *_data_in_words(manifest),
        "- A promise holds for images drawn like those it was certified on, and for the operating points above as they are: "
        "other thresholds, a cap on exits or a deadline have none. For other images: `erde calibrate BUNDLE --data FOLDER`.",
        "- `session.monitor()` says, without labels, when images are no longer like those.",
        "- MACs are counts. What they are worth in time depends on the machine: `erde bench BUNDLE` measures it.",
        "",
    ]
    # Names are free: another program may seal a bundle whose names would move the cursor of a terminal.
    return "\n".join(map(printable, lines))


def _data_in_words(manifest: Manifest) -> list[str]:
    # Provenance is free: another program may seal a bundle that says nothing of it.
    recipe, splits = manifest.provenance.get("recipe"), manifest.provenance.get("splits")
    lines = []
    data = recipe.get("data") if isinstance(recipe, dict) else None
    name = data.get("name") if isinstance(data, dict) else None
    if isinstance(name, str) and isinstance(splits, dict):
        sizes = ", ".join(
            f"{split} {one['size']:,}"
            for split, one in splits.items()
            if isinstance(one, dict) and isinstance(one.get("size"), int)
        )
        lines.append(
            f"- Data set `{in_one_line(name)}`; images: {sizes}. Recipe, versions and fingerprints: `manifest.json`."
        )
    if manifest.precision == "int8":
        lines.append("- The full network that promises speak of is this one, in int8.")
    if manifest.calibration is not None:
        seen = manifest.calibration
        lines.append(
            f"- Thresholds were chosen on {seen.tune_images:,} images and certified on {seen.certify_images:,} others."
        )
    return lines


def _precision_in_words(manifest: Manifest) -> str:
    if manifest.precision == "fp32":
        return "fp32"
    quantisation = manifest.provenance.get("quantisation")
    # Provenance is free: another program may seal a bundle that says nothing of it.
    kept = quantisation.get("kept_in_float") if isinstance(quantisation, dict) else None
    if not isinstance(kept, list):
        return manifest.precision
    layers = {"first": "the first convolution", "last": "the linear layers of the heads"}
    said = " and ".join(layers.get(str(one), str(one)) for one in kept)
    return f"{manifest.precision}, logits in float{f'; {said} kept in float' if said else ''}"


def differences(first: Manifest, second: Manifest) -> dict[str, tuple[Any, Any]]:
    """Fields in which two manifests differ, by dotted name: (value in the first, in the second)."""
    found: dict[str, tuple[Any, Any]] = {}

    def walk(one: Any, other: Any, key: str) -> None:
        if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
            one, other = dict(enumerate(one)), dict(enumerate(other))
        if isinstance(one, dict) and isinstance(other, dict):
            for name in [*one, *(name for name in other if name not in one)]:
                walk(one.get(name), other.get(name), f"{key}.{name}" if key else str(name))
        elif one != other:
            found[key] = (one, other)

    walk(first.model_dump(mode="json"), second.model_dump(mode="json"), "")
    return found
