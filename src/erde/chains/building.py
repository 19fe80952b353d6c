"""A chain of networks as one bundle that is not calibrated yet."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from erde import bundle
from erde.bundle.manifest import Manifest, Stage
from erde.chains.networks import Network, Shape
from erde.common.environment import erde_version
from erde.common.errors import UserError, listed
from erde.common.files import make_folder
from erde.policy.points import Precision
from erde.runtime.stages import StageRunner

# Of the largest logit: what a foreign network's float logits may differ by on another machine.
TOLERANCE = 1e-3


def check_chain(networks: Sequence[Network]) -> None:
    """:class:`UserError` where networks cannot stand behind one another, or never could save anything."""
    if len(networks) < 2:
        raise UserError(
            "a chain has two networks or more: a cheap one in front, and the one that answers the rest"
        )
    last = networks[-1]
    for network in networks[:-1]:
        if network.class_count != last.class_count:
            raise UserError(
                f"'{network.name}' tells {network.class_count:,} classes, '{last.name}' {last.class_count:,}: give networks "
                "of one task"
            )
        if network.image_shape[2] != last.image_shape[2]:
            raise UserError(
                f"'{network.name}' takes images of {network.image_shape[2]} channels, '{last.name}' of "
                f"{last.image_shape[2]}: give networks of one kind of images"
            )
        first = network.stages[0].macs
        if first >= last.macs and not (network.uncounted or last.uncounted):
            raise UserError(
                f"the first exit of '{network.name}' takes {first:,} MACs, '{last.name}' alone {last.macs:,}: nothing can be "
                "saved; give the cheapest network first and the best one last"
            )


def class_names(networks: Sequence[Network], given: Sequence[str] | None = None) -> list[str]:
    """The class names that all networks agree on; those of ``given``, or numbers, where none has names."""
    named = [network for network in networks if network.classes is not None]
    count = networks[-1].class_count
    if given is not None and (len(given) != count or len(set(given)) != len(given)):
        raise UserError(
            f"{len(given):,} class names ({len(set(given)):,} different ones) were given for {count:,} classes: give one per "
            "class, in the order of the logits"
        )
    lists = [list(network.classes or ()) for network in named] + ([list(given)] if given is not None else [])
    for names in lists[1:]:
        if names == lists[0]:
            continue
        if sorted(names) == sorted(lists[0]):
            raise UserError(
                f"two networks have the same classes in another order ({listed(lists[0][:3])} ... and {listed(names[:3])} ...): "
                "export one of them again with the order of the other"
            )
        odd = next(name for name in names if name not in lists[0])
        raise UserError(
            f"two networks have other classes ('{odd}' is in one only): give networks of one task"
        )
    return lists[0] if lists else [str(label) for label in range(count)]


def common_shape(networks: Sequence[Network]) -> Shape:
    """The images of the chain: as large as the largest that a network wants."""
    shapes = [network.image_shape for network in networks]
    height, width = (max(shape[side] for shape in shapes) for side in (0, 1))
    for network, shape in zip(networks, shapes, strict=True):
        if shape[0] * width != shape[1] * height:
            raise UserError(
                f"'{network.name}' takes images of {shape[0]}x{shape[1]} pixels, the chain would take {height}x{width}: give "
                "networks whose images have the same ratio of height and width"
            )
    return height, width, shapes[0][2]


def chain_stages(networks: Sequence[Network]) -> list[Stage]:
    """The stages of all networks in order, with cumulative costs."""
    stages: list[Stage] = []
    names = _distinct_names(networks)
    macs = parameters = 0
    for network, name in zip(networks, names, strict=True):
        own = network.stages
        for index, stage in enumerate(own):
            stages.append(
                stage.model_copy(
                    update={
                        "file": f"stage_{len(stages)}.onnx",
                        "exit_name": f"{name}.{stage.exit_name}" if len(own) > 1 else name,
                        "macs": macs + stage.macs,
                        "parameters": parameters + stage.parameters,
                        "input": "image" if index == 0 else stage.input,
                        "network": stage.network or name,
                    }
                )
            )
        macs, parameters = stages[-1].macs, stages[-1].parameters
    return stages


def _distinct_names(networks: Sequence[Network]) -> list[str]:
    names: list[str] = []
    for network in networks:
        copies = sum(name.split("#")[0] == network.name for name in names)
        names.append(network.name if not copies else f"{network.name}#{copies + 1}")
    return names


@contextmanager
def built_chain(
    networks: Sequence[Network], beside: Path, sample: NDArray[np.uint8], classes: list[str]
) -> Iterator[Path]:
    """A sealed chain without early exits in a folder next to ``beside``, which is removed at the end.

    ``sample``: a few uint8 images (N, H, W, C) of the chain's shape, by which the bundle will check itself.
    """
    folder = beside.with_name(f".{beside.name}.chain.partial")
    stages_folder = beside.with_name(f".{beside.name}.stages.partial")
    try:
        for leftover in (folder, stages_folder):
            shutil.rmtree(leftover, ignore_errors=True)
        make_folder(stages_folder)
        shape: Shape = tuple(sample.shape[1:])
        stages = chain_stages(networks)
        rest = stages
        for network in networks:
            own, rest = rest[: len(network.stages)], rest[len(network.stages) :]
            network.write(own, stages_folder, shape)
        manifest = _manifest(networks, stages, stages_folder, sample, classes)
        bundle.write(folder, manifest, [stages_folder / stage.file for stage in stages])
        yield folder
    finally:
        for leftover in (folder, stages_folder):
            shutil.rmtree(leftover, ignore_errors=True)


def _manifest(
    networks: Sequence[Network],
    stages: list[Stage],
    folder: Path,
    sample: NDArray[np.uint8],
    classes: list[str],
) -> Manifest:
    takes_image = [stage.input == "image" for stage in stages]
    logits = StageRunner(
        [folder / stage.file for stage in stages], threads=1, takes_image=takes_image
    ).all_logits(sample)
    precisions = {network.precision for network in networks}
    precision: Precision = precisions.pop() if len(precisions) == 1 else "mixed"
    exact = precision == "fp32" and not any(network.rounds for network in networks)
    tolerance = TOLERANCE if exact else bundle.MAX_TOLERANCE
    channels = sample.shape[3]
    front, last = networks[0].manifest, networks[-1]
    return bundle.uncalibrated(
        sample=sample,
        logits=logits,
        tolerance=tolerance,
        note="not calibrated: the last network answers",
        name=" + ".join(network.name for network in networks),
        classes=classes,
        mean=[0.0] * channels if front is None else front.mean,
        std=[1.0] * channels if front is None else front.std,
        precision=precision,
        opset=max(
            (network.manifest.opset for network in networks if network.manifest is not None), default=18
        ),
        stages=stages,
        no_exit_macs=last.macs,
        no_exit_parameters=last.parameters,
        provenance={"erde": erde_version(), "networks": [network.origin for network in networks]},
        files={stage.file: bundle.file_hash(folder / stage.file) for stage in stages},
    )
