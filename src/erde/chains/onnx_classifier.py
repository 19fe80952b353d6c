"""Any ONNX classifier as one stage of a chain: read and checked, then written with its preprocessing inside."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from erde.bundle.graph_check import check_graph_file
from erde.chains.onnx_batch import (
    BATCH_AXIS,
    are_close,
    open_batch,
    probe_images,
    run_one_by_one,
    tolerance_of,
)
from erde.chains.onnx_builder import Builder, ImageShape, resized
from erde.chains.onnx_files import (
    IR_VERSION,
    check_operators,
    copied,
    import_onnx,
    keep_output,
    load_network,
    open_session,
    opset_of,
    save,
)
from erde.chains.onnx_macs import count_macs, count_parameters
from erde.chains.preprocessing import UNSET, Layout, Preprocessing, preprocessing_beside
from erde.common.errors import UserError, in_one_line, listed

OutputKind = Literal["logits", "probabilities"]

_INPUT_TYPES = {1: np.float32, 2: np.uint8, 10: np.float16}  # onnx.TensorProto
_OUTPUT_NAMES = ("logits", "output", "probabilities")
# Probabilities in float16 are off by this much in sum.
_SUM_TOLERANCE = 5e-3
# Below the smallest probability that matters; the logarithm of 0 is no logit.
_LEAST_PROBABILITY = 1e-30
# What is put before and after a network is the same from this opset on; resizing as Pillow does needs a later one.
_OLDEST_OPSET, _CONVERTED_OPSET, _RESIZE_OPSET = 10, 13, 18


@dataclass(frozen=True)
class OnnxClassifier:
    """A network from an ONNX file that takes one image and gives one number per class.

    Attributes:
        preprocessing: complete: size, layout and resize are known.
        output_kind: of the network; a stage always gives logits.
        macs: of one image, as far as they could be counted.
        uncounted: operators with arithmetic that is not in ``macs``.
        fixed_batch_of_one: a stage takes single images only.
        opset: of the file.
        channels: of the images, 1 or 3.
        notes: lines that a user should see.
    """

    path: Path
    name: str
    class_count: int
    preprocessing: Preprocessing
    output_kind: OutputKind
    macs: int
    uncounted: tuple[str, ...]
    parameters: int
    fixed_batch_of_one: bool
    opset: int
    channels: int
    notes: tuple[str, ...]
    model: Any = field(repr=False, compare=False)


def read_classifier(path: Path, preprocessing: Preprocessing | None = None) -> OnnxClassifier:
    """Read an ONNX file and find out, by running it, whether it can be a stage.

    Args:
        preprocessing: of its images; by default that of ``preprocessing_beside``. A network that takes uint8 needs none.

    Raises:
        UserError: why it cannot.
    """
    path = Path(path)
    model = load_network(path)
    kind, layout = _check_input(model, path, preprocessing)
    if preprocessing is None:
        preprocessing = preprocessing_beside(path)
    preprocessing, channels, notes = _complete(model, path, kind, layout, preprocessing)
    probes = probe_images((*preprocessing.size, channels))
    x = network_input(probes, preprocessing, kind)
    _set_sides(model, x.shape[1:])
    name = _choose_output(model, path, x)
    keep_output(model, name)
    check_operators(model, path)
    alone = run_one_by_one(open_session(model, path), x, path)[0]
    output_kind = _output_kind(model, path, alone)
    model, fixed = open_batch(model, x, alone, path)
    macs, uncounted = count_macs(model)
    return OnnxClassifier(
        path=path,
        name=path.stem,
        class_count=math.prod(alone.shape[1:]),
        preprocessing=preprocessing,
        output_kind=output_kind,
        macs=macs,
        uncounted=uncounted,
        parameters=count_parameters(model),
        fixed_batch_of_one=fixed,
        opset=opset_of(model),
        channels=channels,
        notes=notes,
        model=model,
    )


def network_input(images: NDArray[np.uint8], preprocessing: Preprocessing, kind: type) -> NDArray[Any]:
    """uint8 (N, H, W, C) of the network's size as the network takes them: what a stage computes in its graph."""
    x = images if preprocessing.channels == "RGB" else images[..., ::-1]
    if kind is not np.uint8:
        mean, std = np.array(preprocessing.mean), np.array(preprocessing.std)
        x = ((x * preprocessing.scale - mean) / std).astype(kind)
    return np.ascontiguousarray(x if preprocessing.layout == "NHWC" else x.transpose(0, 3, 1, 2))


# ---------------------------------------------------------------- reading


def _check_input(model: Any, path: Path, preprocessing: Preprocessing | None) -> tuple[type, Layout]:
    """The type of the one input, and its layout."""
    inputs = list(model.graph.input)
    if len(inputs) != 1:
        names = in_one_line(listed([value.name for value in inputs])) or "none"
        raise UserError(f"{path} has {len(inputs)} inputs ({names}), expected one image")
    value = inputs[0]
    onnx = import_onnx()
    kind = _INPUT_TYPES.get(value.type.tensor_type.elem_type)
    if kind is None:
        number = value.type.tensor_type.elem_type
        got = onnx.TensorProto.DataType.Name(number).lower() if number else "no tensor"
        raise UserError(f"{path} takes {got} ('{value.name}'), expected float32, float16 or uint8")
    sides = value.type.tensor_type.shape.dim
    if len(sides) != 4:
        shape = ", ".join(side.dim_param or str(side.dim_value or "?") for side in sides)
        raise UserError(
            f"{path} takes an input of shape ({shape}), expected four axes: batch, channels, height, width in either layout"
        )
    if sides[0].dim_value > 1:
        raise UserError(
            f"{path} takes batches of exactly {sides[0].dim_value} images: export it with an open batch axis or a batch of 1"
        )
    first, last = (_is_channels(sides[place], 1, 3) for place in (1, 3))
    if not first and not last:  # a fourth is alpha, and refused later
        first, last = (_is_channels(sides[place], 4) for place in (1, 3))
    given = preprocessing.layout if preprocessing is not None else None
    if given is not None:
        if not (first if given == "NCHW" else last) and (first or last):
            raise UserError(
                f"{path} takes an input of shape ({_shape(sides)}), which is not {given}: give the other layout"
            )
        return kind, given
    if first == last:
        raise UserError(
            f"{path} takes an input of shape ({_shape(sides)}), which does not tell where the channels are: give "
            "the layout, NCHW or NHWC, in its preprocessing file"
        )
    return kind, "NCHW" if first else "NHWC"


def _is_channels(side: Any, *counts: int) -> bool:
    return side.dim_value in counts or "channel" in side.dim_param.lower()


def _shape(sides: Any) -> str:
    return ", ".join(side.dim_param or str(side.dim_value or "?") for side in sides)


def _complete(
    model: Any, path: Path, kind: type, layout: Layout, given: Preprocessing | None
) -> tuple[Preprocessing, int, tuple[str, ...]]:
    """The preprocessing with all that the graph tells, the number of channels, and lines about it."""
    sides = [side.dim_value for side in model.graph.input[0].type.tensor_type.shape.dim]
    height, width, channels = sides[2:] + sides[1:2] if layout == "NCHW" else sides[1:]
    notes = list(given.warnings) if given is not None else []
    if given is None:
        given = Preprocessing()
    if channels not in (0, 1, 3):
        raise UserError(f"{path} takes images of {channels} channels, expected 1 or 3")
    if kind is np.uint8:
        if given.mean:
            notes.append(f"{path} takes pixels 0 to 255: mean and std are not used")
        given = replace(given, mean=(0.0,), std=(1.0,), scale=1.0)
    elif not given.mean:
        raise UserError(
            f"{path} takes normalised images: give its mean and std (0 and 1 where it takes pixels between 0 and 1), or a "
            "preprocessor_config.json"
        )
    channels = channels or 3
    if len(given.mean) not in (1, channels):
        raise UserError(
            f"{path} takes images of {channels} channels, but mean and std have {len(given.mean)} numbers: give one per "
            "channel, or a single one"
        )
    if channels == 1 and given.channels == "BGR":
        raise UserError(f"{path} takes images of 1 channel: leave out the order BGR")
    mean, std = (values * (channels // len(values)) for values in (given.mean, given.std))
    size = given.size
    if size == UNSET:
        if not height or not width:
            raise UserError(f"{path} takes images of any size: give the size that it was trained for")
        size = (height, width)
    for side, length in zip(size, (height, width), strict=True):
        if length and side != length:
            raise UserError(
                f"{path} takes images of {height or '?'}x{width or '?'}, but its preprocessing gives "
                f"{size[0]}x{size[1]}: give the size that it takes"
            )
    resize = size if given.resize == UNSET else given.resize
    return (
        replace(given, size=size, mean=mean, std=std, layout=layout, resize=resize),
        channels,
        tuple(notes),
    )


def _set_sides(model: Any, shape: tuple[int, ...]) -> None:
    for side, length in zip(model.graph.input[0].type.tensor_type.shape.dim[1:], shape, strict=True):
        side.dim_value = length


def _choose_output(model: Any, path: Path, x: NDArray[Any]) -> str:
    """Name of the output with one number per class."""
    name: str
    if len(model.graph.output) == 1:  # else the operators of some outputs do not matter
        keep_output(model, model.graph.output[0].name)
        check_operators(model, path)
    names = [value.name for value in model.graph.output if value.type.HasField("tensor_type")]
    results = dict(zip(names, run_one_by_one(open_session(model, path), x[:1], path, names), strict=True))
    fitting = {
        name: result.shape
        for name, result in results.items()
        if result.dtype.kind == "f"
        and result.ndim >= 2
        and len(result) == 1
        and max(result.shape) == result.size
    }
    if len(names) == 1:
        if not fitting:
            shape = results[names[0]].shape
            raise UserError(
                f"{path} gives an output of shape {shape} and type {results[names[0]].dtype} for one image, expected "
                "one number per class: (1, classes) of floats"
            )
        name = names[0]
    else:
        named = [name for known in _OUTPUT_NAMES for name in fitting if name.lower() == known]
        flat = [name for name, shape in fitting.items() if len(shape) == 2]
        if named:
            name = named[0]
        elif len(flat) == 1:
            name = flat[0]
        else:
            raise UserError(
                f"{path} has {len(model.graph.output)} outputs ({in_one_line(listed([v.name for v in model.graph.output]))}), "
                "expected one with a number per class: export it with that one only, or call it 'logits'"
            )
    if math.prod(fitting[name]) < 2:
        raise UserError(f"{path} gives one number per image, expected one per class, 2 or more")
    return name


def _output_kind(model: Any, path: Path, rows: NDArray[Any]) -> OutputKind:
    rows = rows.reshape(len(rows), -1).astype(np.float64)
    if not np.isfinite(rows).all():
        raise UserError(f"{path} gives numbers that are not finite for random images: check its mean and std")
    in_range = bool((rows >= 0).all() and (rows <= 1).all())
    if bool(np.abs(rows.sum(axis=1) - 1).max() <= _SUM_TOLERANCE) and in_range:
        return "probabilities"
    # Behind it nothing may be computed.
    made_by = {name: node for node in model.graph.node for name in node.output}
    last = made_by.get(model.graph.output[0].name)
    while last is not None and last.op_type in ("Identity", "Cast"):
        last = made_by.get(last.input[0])
    if last is not None and last.op_type == "Sigmoid":
        raise UserError(
            f"{path} ends in Sigmoid, a yes or no for each class by itself; expected a network that chooses one class"
        )
    return "logits"


# ---------------------------------------------------------------- writing


def write_stage(classifier: OnnxClassifier, path: Path, image_shape: ImageShape) -> None:
    """Write one ONNX file: uint8 ``images`` (N, H, W, C) of ``image_shape`` to float32 ``logits`` (N, K).

    An image of another size than ``preprocessing.resize`` is brought to that, as Pillow does it bilinearly, within one
    level of 256; then follow the centre crop, the normalisation, the network and, for probabilities, the logarithm.

    Raises:
        UserError: images with other channels; operators too old to be put behind a resize.
    """
    given = classifier.preprocessing
    if image_shape[2] != classifier.channels:
        raise UserError(
            f"{classifier.path} takes images of {classifier.channels} channels, the other parts of the chain take "
            f"{image_shape[2]}: all must take the same"
        )
    resizes = image_shape[:2] != given.resize
    model = _at_opset(classifier, _RESIZE_OPSET if resizes else _OLDEST_OPSET)
    model = import_onnx().compose.add_prefix(model, "network/", inplace=True)
    builder = Builder(model)
    source, target = model.graph.input[0], model.graph.output[0]
    x = _image_to_network(builder, classifier, image_shape)
    builder.before("Identity", x, source.name)
    y = builder.after("Cast", [builder.after("Flatten", [target.name], axis=1)], to=1)
    if classifier.output_kind == "probabilities":
        least = builder.constant(np.float32(_LEAST_PROBABILITY))
        y = builder.after("Log", [builder.after("Max", [y, least])])
    builder.after("Identity", [y], name="logits")
    batch = 1 if classifier.fixed_batch_of_one else BATCH_AXIS
    builder.set_ends([batch, *image_shape], [batch, classifier.class_count])
    save(model, path)
    check_graph_file(path)


def resize_input(source: Path, target: Path, image_shape: ImageShape) -> None:
    """Write the stage ``source``, which takes uint8 (N, h, w, C), so that it takes images of ``image_shape``.

    They are brought to h x w as in :func:`write_stage`; the rest of the graph stays as it is.

    Raises:
        UserError: no such stage, or other channels.
    """
    onnx = import_onnx()
    model = load_network(source)
    value = model.graph.input[0]
    sides = value.type.tensor_type.shape.dim
    height, width, channels = (side.dim_value for side in sides[1:])
    if value.type.tensor_type.elem_type != onnx.TensorProto.UINT8 or image_shape[2] != channels:
        raise UserError(
            f"{source} takes images of {channels} channels, the other parts of the chain take {image_shape[2]}: all must "
            "take the same"
        )
    if opset_of(model) < _RESIZE_OPSET:
        raise UserError(
            f"{source} has opset {opset_of(model)}, resizing needs {_RESIZE_OPSET}: export it again"
        )
    prefix = "resize/"
    while any(name.startswith(prefix) for node in model.graph.node for name in (*node.input, *node.output)):
        prefix = f"again/{prefix}"  # of a file that was written here
    inner = f"{prefix}images"
    for node in model.graph.node:
        for place, used in enumerate(node.input):
            if used == value.name:
                node.input[place] = inner
    builder = Builder(model, prefix)
    x = resized(builder, value.name, image_shape, (height, width), (height, width))
    builder.before("Identity", x, inner)
    builder.insert()
    for side, length in zip(sides[1:], image_shape, strict=True):
        side.dim_value = length
    save(model, target)


def _image_to_network(builder: Builder, classifier: OnnxClassifier, image_shape: ImageShape) -> str:
    """Nodes from the chain's images to the input of the network; the name of what they give."""
    given = classifier.preprocessing
    x = resized(builder, "images", image_shape, given.resize, given.size)
    axis = 3
    if given.layout == "NCHW":
        x, axis = builder.before("Transpose", x, perm=[0, 3, 1, 2]), 1
    if given.channels == "BGR":
        x = builder.before("Gather", x, None, builder.constant(np.array([2, 1, 0])), axis=axis)
    element = builder.model.graph.input[0].type.tensor_type.elem_type
    kind = _INPUT_TYPES[element]
    if kind is np.uint8:
        return x
    shape = (-1, 1, 1) if axis == 1 else (-1,)
    std = np.array(given.std)
    factor = (given.scale / std).astype(np.float32).reshape(shape)
    shift = (-np.array(given.mean) / std).astype(np.float32).reshape(shape)
    x = builder.before("Cast", x, to=1)
    x = builder.before("Mul", x, None, builder.constant(factor))
    x = builder.before("Add", x, None, builder.constant(shift))
    return x if kind is np.float32 else builder.before("Cast", x, to=element)


def _at_opset(classifier: OnnxClassifier, needed: int) -> Any:
    """The network with at least opset ``needed``; the same numbers, or an error."""
    if classifier.opset >= needed:
        return copied(classifier.model)
    onnx = import_onnx()
    needed = max(needed, _CONVERTED_OPSET)
    advice = f"export it again with opset {needed}"
    try:
        model = onnx.version_converter.convert_version(classifier.model, needed)
    except Exception as error:
        raise UserError(
            f"{classifier.path} has opset {classifier.opset} and cannot be raised to {needed} "
            f"({in_one_line(str(error))}): {advice}"
        ) from error
    model.ir_version = max(model.ir_version, IR_VERSION)
    given = classifier.preprocessing
    element = model.graph.input[0].type.tensor_type.elem_type
    x = network_input(probe_images((*given.size, classifier.channels)), given, _INPUT_TYPES[element])
    before = run_one_by_one(open_session(classifier.model, classifier.path), x, classifier.path)[0]
    after = run_one_by_one(open_session(model, classifier.path), x, classifier.path)[0]
    if not are_close(after, before, tolerance_of(model)):
        raise UserError(
            f"{classifier.path} has opset {classifier.opset} and gives other numbers when raised to {needed}: {advice}"
        )
    return model
