"""The networks that a chain is made of: bundles, and ONNX classifiers of other programs."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from erde import bundle
from erde.bundle.manifest import Manifest, Stage
from erde.chains.onnx_batch import ROUNDED_TOLERANCE, tolerance_of
from erde.chains.onnx_classifier import OnnxClassifier, read_classifier, resize_input, write_stage
from erde.chains.preprocessing import Preprocessing
from erde.common.errors import UserError
from erde.policy.points import Precision

Shape = tuple[int, int, int]  # H, W, C


@dataclass(frozen=True)
class Network:
    """A network of a chain; a bundle may be several of them, since a chain can be part of another.

    Attributes:
        classes: names, where they are known.
        image_shape: the images that it wants.
        macs, parameters: of the network alone, without exits; ``uncounted`` are operators that the MACs leave out.
        stages: with costs that begin at 0.
        origin: what is known of its making, for the manifest.
        write: writes its graphs to a folder, under the names of the stages given, for images of a shape.
        rounds: it computes in int8 or half precision inside, so its logits differ more on another machine.
        manifest: of a bundle.
        notes: lines that a user should see.
    """

    name: str
    class_count: int
    classes: list[str] | None
    image_shape: Shape
    macs: int
    parameters: int
    precision: Precision
    uncounted: tuple[str, ...]
    stages: tuple[Stage, ...]
    origin: dict[str, Any]
    write: Callable[[Sequence[Stage], Path, Shape], None]
    rounds: bool
    manifest: Manifest | None = None
    notes: tuple[str, ...] = ()


def bundle_network(folder: Path, manifest: Manifest) -> Network:
    """The bundle with this manifest, whose stages are in ``folder``; its exits stay exits."""

    def write(stages: Sequence[Stage], target: Path, image_shape: Shape) -> None:
        for own, stage, takes_image in zip(manifest.stages, stages, manifest.takes_image(), strict=True):
            if takes_image and image_shape != manifest.input_shape:
                resize_input(folder / own.file, target / stage.file, image_shape)
            else:
                shutil.copyfile(folder / own.file, target / stage.file)

    largest = max(1.0, float(np.abs(manifest.reference_sample.logits).max(initial=0.0)))
    return Network(
        name=manifest.name,
        class_count=len(manifest.classes),
        classes=manifest.classes,
        image_shape=manifest.input_shape,
        macs=manifest.no_exit_macs,
        parameters=manifest.no_exit_parameters,
        precision=manifest.precision,
        uncounted=(),
        stages=tuple(manifest.stages),
        origin={
            "name": manifest.name,
            "seal": bundle.seal_of(manifest),
            "provenance": manifest.provenance,
        },
        write=write,
        # A chain of float32's precision may have a network of another program in it that rounds.
        rounds=manifest.reference_sample.tolerance >= bundle.MAX_TOLERANCE * largest / 2,
        manifest=manifest,
    )


def onnx_network(classifier: OnnxClassifier) -> Network:
    """A classifier of another program, with a single exit.

    Its numbers are called fp32, whatever it computes in inside.
    """

    def write(stages: Sequence[Stage], target: Path, image_shape: Shape) -> None:
        write_stage(classifier, target / stages[0].file, image_shape)

    stage = Stage(
        file="stage_0.onnx",
        exit_name="final",
        macs=classifier.macs,
        parameters=classifier.parameters,
        input="image",
    )
    return Network(
        name=classifier.name,
        class_count=classifier.class_count,
        classes=None,
        image_shape=(*classifier.preprocessing.resize, classifier.channels),
        macs=classifier.macs,
        parameters=classifier.parameters,
        precision="fp32",
        uncounted=classifier.uncounted,
        stages=(stage,),
        origin={
            "name": classifier.name,
            "sha256": bundle.file_hash(classifier.path),
            "opset": classifier.opset,
            "gives": classifier.output_kind,
            "preprocessing": classifier.preprocessing.summary(),
            "uncounted": list(classifier.uncounted),
        },
        write=write,
        rounds=tolerance_of(classifier.model) == ROUNDED_TOLERANCE,
        notes=classifier.notes,
    )


def open_network(path: Path, preprocessing: Preprocessing | None = None) -> Network:
    """A bundle's folder or an ONNX file.

    Raises:
        UserError: neither, or not one that could be a network of a chain.
    """
    if path.is_dir():
        return bundle_network(path, bundle.read(path))
    if path.is_file() and path.suffix == ".onnx":
        return onnx_network(read_classifier(path, preprocessing))
    raise UserError(f"nothing at {path} that a chain could use: expected a bundle's folder or a .onnx file")
