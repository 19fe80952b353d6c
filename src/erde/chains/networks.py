"""The networks that a chain is made of: bundles, and ONNX classifiers of other programs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from erde import bundle
from erde.bundle.manifest import Manifest, Stage
from erde.chains.onnx_classifier import OnnxClassifier, read_classifier, resize_input, write_stage
from erde.chains.preprocessing import Preprocessing
from erde.common.errors import UserError
from erde.policy.points import Precision

Shape = tuple[int, int, int]  # H, W, C


@dataclass(frozen=True)
class BundleNetwork:
    """A sealed bundle as one or more networks of a chain; its exits stay exits."""

    folder: Path
    manifest: Manifest

    @property
    def name(self) -> str:
        """The bundle's own name, else its folder's."""
        return self.manifest.name

    @property
    def classes(self) -> list[str] | None:
        """Class names."""
        return self.manifest.classes

    @property
    def class_count(self) -> int:
        """The number of classes."""
        return len(self.manifest.classes)

    @property
    def image_shape(self) -> Shape:
        """The images that it is made for."""
        return self.manifest.input_shape

    @property
    def macs(self) -> int:
        """MACs of the network alone, without exits."""
        return self.manifest.no_exit_macs

    @property
    def parameters(self) -> int:
        """Its parameters, without exits."""
        return self.manifest.no_exit_parameters

    @property
    def precision(self) -> Precision:
        """The numbers that it computes in."""
        return self.manifest.precision

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Operators that the MACs leave out."""
        return ()

    def stages(self) -> list[Stage]:
        """Its stages, with costs that begin at 0."""
        return list(self.manifest.stages)

    def write(self, stages: Sequence[Stage], folder: Path, image_shape: Shape) -> None:
        """Write its graphs to ``folder`` under the names of ``stages``, for images of ``image_shape``."""
        for own, stage, takes_image in zip(
            self.manifest.stages, stages, self.manifest.takes_image(), strict=True
        ):
            source, target = self.folder / own.file, folder / stage.file
            if takes_image and image_shape != self.image_shape:
                resize_input(source, target, image_shape)
            else:
                shutil.copyfile(source, target)


@dataclass(frozen=True)
class OnnxNetwork:
    """A classifier of another program as the last network of a chain, or as one with a single exit."""

    classifier: OnnxClassifier

    @property
    def name(self) -> str:
        """The file's name."""
        return self.classifier.name

    @property
    def classes(self) -> list[str] | None:
        """Class names are not known."""
        return None

    @property
    def class_count(self) -> int:
        """The number of classes."""
        return self.classifier.class_count

    @property
    def image_shape(self) -> Shape:
        """The images that its preprocessing begins with."""
        return (*self.classifier.preprocessing.resize, self.classifier.channels)

    @property
    def macs(self) -> int:
        """Its MACs."""
        return self.classifier.macs

    @property
    def parameters(self) -> int:
        """Its parameters."""
        return self.classifier.parameters

    @property
    def precision(self) -> Precision:
        """Numbers of a foreign network are called fp32, whatever it computes in inside."""
        return "fp32"

    @property
    def uncounted(self) -> tuple[str, ...]:
        """Operators that the MACs leave out."""
        return self.classifier.uncounted

    def stages(self) -> list[Stage]:
        """A single stage."""
        return [
            Stage(
                file="stage_0.onnx",
                exit_name="final",
                macs=self.macs,
                parameters=self.parameters,
                input="image",
            )
        ]

    def write(self, stages: Sequence[Stage], folder: Path, image_shape: Shape) -> None:
        """Write its graph to ``folder``, with its preprocessing for images of ``image_shape`` inside."""
        write_stage(self.classifier, folder / stages[0].file, image_shape)


Network = BundleNetwork | OnnxNetwork


def open_network(path: Path, preprocessing: Preprocessing | None = None) -> Network:
    """A bundle's folder or an ONNX file.

    Raises:
        UserError: neither, or not one that could be a network of a chain.
    """
    if path.is_dir():
        return BundleNetwork(path, bundle.read(path))
    if path.is_file() and path.suffix == ".onnx":
        return OnnxNetwork(read_classifier(path, preprocessing))
    raise UserError(f"nothing at {path} that a chain could use: expected a bundle's folder or a .onnx file")
