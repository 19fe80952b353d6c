"""Damaged and forged bundles from a seed: what a bad disk, a bad network or a hostile author could hand over.

``mutate`` makes one bundle; the same seed makes the same bundle. Many are sealed again, checksums included, as
somebody who knows the format would do, so that what is wrong gets past the seal.
"""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from erde.bundle.manifest import MANIFEST, MAX_TOLERANCE
from erde.bundle.profile import PROFILE

OUTSIDE = "outside.bin"


@dataclass(frozen=True)
class Mutation:
    """What was done. ``must_refuse``: an answer would be wrong, whatever it says."""

    seed: int
    kind: str
    what: str
    resealed: bool = False
    must_refuse: bool = False


@dataclass(frozen=True)
class Place:
    """Where a bundle is mutated: ``folder`` is the copy, ``other`` another whole bundle."""

    folder: Path
    other: Path
    random: Random

    def stages(self) -> list[str]:
        return sorted(one.name for one in self.folder.glob("*.onnx"))

    def files(self) -> list[str]:
        """Stages more often than the rest."""
        return [MANIFEST, "README.md", PROFILE, *self.stages(), *self.stages()]


# ---------------------------------------------------------------- bytes


def bits(place: Place) -> str:
    """From one flipped bit to many, in any file."""
    random = place.random
    name = random.choice(place.files())
    path = place.folder / name
    content = bytearray(path.read_bytes())
    flips = random.choice((1, 1, 1, 2, 4, 16, 128))
    for _ in range(flips):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)
    return f"{flips} of {name}"


def low_bits(place: Place) -> str:
    """The last mantissa bits of some weights: the bundle may well stay right."""
    random = place.random
    name = random.choice(place.stages())
    model = onnx.load(place.folder / name)
    tensors = [one for one in model.graph.initializer if one.data_type == TensorProto.FLOAT]
    for tensor in tensors:
        words = np.frombuffer(tensor.raw_data, dtype=np.uint32).copy()
        words[random.randrange(len(words))] ^= random.randrange(1, 4)
        tensor.raw_data = words.tobytes()
    (place.folder / name).write_bytes(model.SerializeToString())
    return f"{len(tensors)} weights of {name}"


def splice(place: Place) -> str:
    """Bytes cut off, added, overwritten, repeated or left out."""
    random = place.random
    name = random.choice(place.files())
    path = place.folder / name
    content = path.read_bytes()
    at = random.randrange(len(content))
    length = random.choice((1, 2, 8, 100, 10_000))
    how = random.choice(("truncate", "extend", "extend with zeros", "overwrite", "repeat", "leave out"))
    end = min(len(content), at + length)
    path.write_bytes(
        {
            "truncate": content[:at],
            "extend": content + random.randbytes(length),
            "extend with zeros": content + bytes(length),
            "overwrite": content[:at] + random.randbytes(end - at) + content[end:],
            "repeat": content[:end] + content[at:],
            "leave out": content[:at] + content[end:],
        }[how]
    )
    return f"{how} {name} at {at}, {length} bytes"


# ---------------------------------------------------------------- files


def swap(place: Place) -> str:
    """Stages exchanged, or a file of another bundle in the place of one."""
    random = place.random
    name = random.choice((*place.stages(), MANIFEST, PROFILE))
    source = place.folder if name.endswith(".onnx") and random.random() < 0.6 else place.other
    second = name if source == place.other else random.choice([one for one in place.stages() if one != name])
    first_bytes, second_bytes = (place.folder / name).read_bytes(), (source / second).read_bytes()
    (place.folder / name).write_bytes(second_bytes)
    if source == place.folder:
        (place.folder / second).write_bytes(first_bytes)
    return f"{name} and {second} of {'this' if source == place.folder else 'another'} bundle"


def vanish(place: Place) -> str:
    """A file that is missing, a folder, a link, a pipe, endless or huge."""
    random = place.random
    name = random.choice((*place.files(), "extra"))
    path = place.folder / name
    content = path.read_bytes() if path.exists() else b"extra"
    path.unlink(missing_ok=True)
    how = random.choice(("missing", "folder", "link", "link inside", "pipe", "zeros without end", "huge"))
    if how == "folder":
        path.mkdir()
    elif how == "link":
        (place.folder.parent / OUTSIDE).write_bytes(content)
        path.symlink_to(Path("..") / OUTSIDE)
    elif how == "link inside":
        (place.folder / "aside").write_bytes(content)
        path.symlink_to("aside")
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "zeros without end":
        path.symlink_to("/dev/zero")
    elif how == "huge":
        path.touch()
        os.truncate(path, 2**40)  # takes no room on the disk
    return f"{name}: {how}"


# ---------------------------------------------------------------- the manifest as JSON

DEEP = "\0deep"  # stands for nesting that Python's own encoder could not write
LONG = "\0long"


def _nested(depth: int) -> list[Any]:
    return [_nested(depth - 1)] if depth else []


NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**63, 2**64, 10**30, -(10**30), 10**400,
    0.0, -0.0, 0.5, 1e308, -1e308, 5e-324, 1e-300, float("nan"), float("inf"), float("-inf"),
    "", "a", "1", "x" * 100_000, "\n", "two\nlines", "\ud800", "\0", "\x1b[31m", "é" * 300, DEEP, LONG,
    "..", ".", "../outside.bin", "/etc/hostname", "stage_0.onnx", "stage_9.onnx", "manifest.json", "C:\\x", "~",
    "x" * 300 + ".onnx", "none", "harm", "patience", "energy", "geometric", "arithmetic", "no-exit",
    [], {}, [[]], [None], [0] * 1000, {"a": 1}, [[[[[[[[]]]]]]]], {"\n": "\n"}, _nested(255),
)  # fmt: skip


def _a_value(random: Random, old: Any, value: dict[str, Any]) -> Any:
    how = random.randrange(6)
    if isinstance(old, int | float) and not isinstance(old, bool) and abs(old) < 1e300 and how < 3:
        more = (-old, old + 1, old - 1, old * 2, old * 10**6, old / 3, str(old), int(old), float(old), [old])
        return random.choice(more)
    if isinstance(old, list) and how < 3:
        some = list(old)
        random.choice(
            (
                some.clear,
                lambda: some.append(copy.deepcopy(random.choice(NASTY))),
                lambda: some.extend(old),
                lambda: some.pop() if some else None,
                lambda: some.reverse(),
                lambda: random.shuffle(some),
                lambda: some.append(list(some)),
            )
        )()
        return some
    if isinstance(old, str) and how < 2:
        return random.choice(
            (old + "\n", old[:-1], old.upper(), old * 50, f" {old}", f"../{old}", f"./{old}")
        )
    if how == 5:  # something that stands elsewhere
        return copy.deepcopy(value[random.choice(list(value))])
    return copy.deepcopy(random.choice(NASTY))


def _edit(random: Random, value: dict[str, Any]) -> str:
    """One change somewhere, keys at the top as likely as each other."""
    node: Any = value
    keys: list[Any] = []
    while True:
        choices = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not choices or (keys and random.random() < 0.15):
            break
        keys.append(random.choice(choices))
        if not isinstance(node[keys[-1]], dict | list) or random.random() < 0.25:
            break
        node = node[keys[-1]]
    where = ".".join(map(str, keys))
    how = random.random()
    if not keys or not isinstance(node, dict | list) or (isinstance(node, dict) and how < 0.12):
        extra = random.choice(
            ("extra", "", "two\nlines", "\ud800", "x" * 10_000, "\x1b[31m", "seal ", "file")
        )
        if isinstance(node, dict):
            node[extra] = copy.deepcopy(random.choice(NASTY))
        return f"extra key {extra[:12]!r} beside {where}"
    last = keys[-1] if keys[-1] in (node if isinstance(node, dict) else range(len(node))) else None
    if last is None:
        return "nothing"
    if how < 0.25:
        del node[last]
        return f"no {where}"
    node[last] = _a_value(random, node[last], value)
    return f"{where} = {str(node[last])[:40]!r}"


def _write(folder: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value)
    text = text.replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    text = text.replace(json.dumps(LONG), "1" * 5000)
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def manifest(place: Place) -> str:
    """One to three changes of the manifest's structure."""
    value = json.loads((place.folder / MANIFEST).read_text(encoding="utf-8"))
    what = [_edit(place.random, value) for _ in range(place.random.choice((1, 1, 1, 2, 3)))]
    _write(place.folder, value)
    return "; ".join(what)


def numbers(place: Place) -> str:
    """Numbers that decide: thresholds, temperatures, sharpness, tolerance, MACs, the score."""
    random = place.random
    value = json.loads((place.folder / MANIFEST).read_text(encoding="utf-8"))
    sample = value["reference_sample"]
    loosest = MAX_TOLERANCE * max(1.0, float(np.abs(sample["logits"]).max()))
    targets: list[tuple[Any, Any]] = [
        (value, "sharpness"),
        (value, "score"),
        (value, "ensemble"),
        (value["temperatures"], random.randrange(3)),
        (random.choice(value["operating_points"])["thresholds"], random.randrange(2)),
        (random.choice(value["stages"]), "macs"),
        (value, "no_exit_macs"),
        (sample, "tolerance"),
        (random.choice(sample["logits"])[0], random.randrange(4)),
        (value["input_shape"], random.randrange(3)),
        (value["calibration"], random.choice(list(value["calibration"]))),
        (value["calibration"]["score_ranges"][0], random.randrange(2)),
        (value["calibration"]["exit_rates"], random.randrange(3)),
    ]
    node, key = random.choice(targets)
    node[key] = random.choice(
        (None, 0, 1, -1, 1e-6, 1e6, 1e308, -1e308, 5e-324, 2**63, 10**400, 0.25, node[key], "patience", "energy",
         "geometric", [])
    )  # fmt: skip
    if random.random() < 0.5:
        sample["tolerance"] = random.choice(
            (loosest, 1e300)
        )  # so that the reference sample has less say, or none
    _write(place.folder, value)
    return f"{key} = {str(node[key])[:40]!r}, tolerance {sample['tolerance']}"


def paths(place: Place) -> str:
    """A stage under a name that leads elsewhere, where the right bytes lie."""
    random = place.random
    value = json.loads((place.folder / MANIFEST).read_text(encoding="utf-8"))
    stage = random.choice(value["stages"])
    content = (place.folder / stage["file"]).read_bytes()
    (place.folder.parent / OUTSIDE).write_bytes(content)
    (place.folder / "sub").mkdir()
    (place.folder / "sub" / "s.onnx").write_bytes(content)
    (place.folder / "s.ort").write_bytes(content)
    long = "x" * random.choice((200, 251, 256, 5000)) + ".onnx"
    names = (f"../{OUTSIDE}", str(place.folder.parent / OUTSIDE), f"sub/../../{OUTSIDE}", "sub/s.onnx", "s.ort", ".", "..",
             "", "/dev/zero", "/dev/stdin", "a\0b", "s\n.onnx", ".hidden", "-", "\ud800.onnx", long)  # fmt: skip
    name = random.choice(names)
    value["files"][name] = value["files"].pop(stage["file"])
    stage["file"] = name
    _write(place.folder, value)
    return f"{name[:40]!r}"


def version(place: Place) -> str:
    value = json.loads((place.folder / MANIFEST).read_text(encoding="utf-8"))
    value["format_version"] = place.random.choice(
        (0, 1, 3, -2, 2.5, "2", None, [2], 10**400, True, "x\ny" * 9)
    )
    _write(place.folder, value)
    return f"{str(value['format_version'])[:20]!r}"


def profile(place: Place) -> str:
    """What lies beside the seal: how long the stages take."""
    random = place.random
    value = json.loads((place.folder / PROFILE).read_text(encoding="utf-8"))
    node = value if random.random() < 0.4 else value["milliseconds"]
    what = _edit(random, node)
    if random.random() < 0.3:  # times that make waiting cheap or dear
        times = {size: [random.choice((1e-9, 1.0, 1e300)) for _ in range(3)] for size in ("1", "8", "4096")}
        value["milliseconds"] = times
    text = json.dumps(value).replace(json.dumps(DEEP), "[" * 100_000 + "]" * 100_000)
    (place.folder / PROFILE).write_text(text, encoding="utf-8")
    return what


# ---------------------------------------------------------------- the graphs

Graph = Callable[[onnx.ModelProto, Place], str]
HUGE = (0, -1, -2, 1, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, -(2**63), 2**63 - 1)


def _tensor(model: onnx.ModelProto, random: Random) -> onnx.TensorProto:
    return random.choice(list(model.graph.initializer))


def attributes(model: onnx.ModelProto, place: Place) -> str:
    """A number of an attribute, or of a constant that is a shape."""
    random = place.random
    found = [(node, one) for node in model.graph.node for one in node.attribute]
    shapes = [one for one in model.graph.initializer if one.data_type == TensorProto.INT64]
    if shapes and (not found or random.random() < 0.3):
        tensor = random.choice(shapes)
        array = numpy_helper.to_array(tensor).copy()
        array[random.randrange(len(array))] = random.choice(HUGE)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
        return f"{tensor.name} = {array.tolist()}"
    node, one = random.choice(found)
    if one.ints:
        one.ints[random.randrange(len(one.ints))] = random.choice((*HUGE, 2, 3, 64))
        return f"{node.op_type}.{one.name} = {list(one.ints)}"
    one.i = random.choice((*HUGE, 2, 3, 7, 10))
    return f"{node.op_type}.{one.name} = {one.i}"


def tensors(model: onnx.ModelProto, place: Place) -> str:
    """A constant whose size, type or bytes are not what they say."""
    random = place.random
    tensor = _tensor(model, random)
    how = random.choice(("dims", "more dims", "type", "cut", "longer", "none", "strange values"))
    if how == "dims" and tensor.dims:
        tensor.dims[random.randrange(len(tensor.dims))] = random.choice(HUGE)
    elif how == "more dims":
        tensor.dims.extend([random.choice(HUGE) for _ in range(random.choice((1, 2, 60)))])
    elif how == "type":
        tensor.data_type = random.choice((0, 2, 6, 7, 8, 10, 11, 14, 16, 17, 21, 22, 99, -1))
    elif how == "cut":
        tensor.raw_data = tensor.raw_data[: random.randrange(len(tensor.raw_data))]
    elif how == "longer":
        tensor.raw_data += bytes(random.choice((1, 4, 4096)))
    elif how == "none":
        tensor.ClearField("raw_data")
    else:
        array = numpy_helper.to_array(tensor).copy().astype(np.float32).reshape(-1)
        odd = random.choice((np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-42))
        array[:: random.choice((1, 7, 50))] = odd
        tensor.raw_data = array.tobytes()
        return f"{tensor.name}: {odd}"
    return f"{tensor.name}: {how}, {list(tensor.dims)[:6]}, type {tensor.data_type}"


OPERATORS = (
    "Relu", "Identity", "Exp", "Log", "Sqrt", "Neg", "Softmax", "Shape", "Size", "NonZero", "Unique", "Not", "Conv",
    "ConvTranspose", "Gemm", "MatMul", "Add", "Div", "Mod", "Pow", "Concat", "Flatten", "Squeeze", "Transpose",
    "Reshape", "Expand", "Tile", "Resize", "Pad", "TopK", "Gather", "GatherND", "ScatterND", "OneHot", "Range",
    "CumSum", "Einsum", "LSTM", "RNN", "Loop", "If", "Scan", "SequenceConstruct", "SequenceAt", "SplitToSequence",
    "Optional", "OptionalGetElement", "StringNormalizer", "ReduceMax", "DepthToSpace", "MaxUnpool", "RoiAlign",
    "NonMaxSuppression", "QuantizeLinear", "ConvInteger", "RandomNormal", "Bernoulli", "Dropout", "BatchNormalization",
)  # fmt: skip


def operators(model: onnx.ModelProto, place: Place) -> str:
    """Another operator, or one that only its author has."""
    random = place.random
    node = random.choice(list(model.graph.node))
    if random.random() < 0.4:
        node.domain = random.choice(
            ("com.example", "com.microsoft", "ai.onnx.ml", "\n", "x" * 5000, "../lib.so")
        )
        if random.random() < 0.5:
            model.opset_import.append(helper.make_opsetid(node.domain, random.choice((1, 1, 0, 2**31, -1))))
        if random.random() < 0.5:
            # The latter three end the process, or did.
            node.op_type = random.choice(("Custom", "Inverse", "QLinearSigmoid", "QLinearWhere"))
        return f"domain {node.domain[:20]!r} of {node.op_type}"
    before, node.op_type = node.op_type, random.choice(OPERATORS)
    if random.random() < 0.3:
        del node.attribute[:]
    return f"{before} -> {node.op_type}"


def wires(model: onnx.ModelProto, place: Place) -> str:
    """Values that come from elsewhere: from later, from nowhere, twice."""
    random = place.random
    graph = model.graph
    names = [name for one in graph.node for name in (*one.input, *one.output)] + ["", "nowhere"]
    node = random.choice(list(graph.node))
    how = random.choice(("input", "output", "no node", "twice", "no input", "order", "constant"))
    if how == "input":
        node.input[random.randrange(len(node.input))] = random.choice(names)
    elif how == "output":
        node.output[0] = random.choice(names)
    elif how == "no node":
        graph.node.remove(node)
    elif how == "twice":
        graph.node.append(node)
    elif how == "no input":
        node.input.pop()
    elif how == "order":
        nodes = list(graph.node)
        random.shuffle(nodes)
        del graph.node[:]
        graph.node.extend(nodes)
    else:
        graph.initializer.remove(_tensor(model, random))
    return f"{node.op_type}: {how}"


def interfaces(model: onnx.ModelProto, place: Place) -> str:
    """Inputs and outputs that are not what a stage has."""
    random = place.random
    graph = model.graph
    one = random.choice([*graph.input, *graph.output])
    dims = one.type.tensor_type.shape.dim
    how = random.choice(
        ("batch", "batch", "size", "type", "no inputs", "constant input", "more inputs", "no output", "swapped outputs",
         "more outputs", "no shape", "features as logits", "sequence")
    )  # fmt: skip
    if how == "batch":
        dims[0].dim_value = random.choice((1, 2, 2, 5, 0, -1, 2**40))
    elif how == "size":
        dims[-1].dim_value = random.choice(HUGE)
    elif how == "type":
        one.type.tensor_type.elem_type = random.choice((1, 2, 3, 6, 7, 8, 10, 11, 16))
    elif how == "no inputs":
        del graph.input[:]
    elif how == "constant input":  # the stage answers the same for all images
        name = graph.input[0].name
        shape = [2, *(dim.dim_value for dim in graph.input[0].type.tensor_type.shape.dim[1:])]
        kind = np.uint8 if name == "images" else np.float32
        graph.initializer.append(numpy_helper.from_array(np.zeros(shape, kind), name))
        del graph.input[:]
    elif how == "more inputs":
        graph.input.append(helper.make_tensor_value_info("another", TensorProto.FLOAT, ["N", 3]))
    elif how == "no output":
        del graph.output[random.randrange(len(graph.output))]
    elif how == "swapped outputs":
        outputs = list(graph.output)[::-1]
        del graph.output[:]
        graph.output.extend(outputs)
    elif how == "more outputs":
        name = random.choice(list(graph.node)).output[0]
        graph.output.insert(random.randrange(3), helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
    elif how == "no shape":
        one.type.tensor_type.ClearField("shape")
    elif how == "sequence":
        graph.node.append(helper.make_node("SequenceConstruct", ["logits"], ["many"]))
        graph.output[-1].CopyFrom(helper.make_tensor_sequence_value_info("many", TensorProto.FLOAT, None))
    else:
        graph.node.append(helper.make_node("Identity", [graph.node[0].output[0]], ["others"]))
        graph.output[-1].name = "others"
    return f"{one.name}: {how}"


def conditions(model: onnx.ModelProto, place: Place) -> str:
    """Right for the two images of the reference sample, and something else for other batches."""
    random = place.random
    graph = model.graph
    how = random.choice(("fails", "fails", "short", "long", "NaN", "infinite"))
    last = graph.node[-1]
    last.output[0] = "right"
    constant = [
        numpy_helper.from_array(np.array([0]), "zero_"),
        numpy_helper.from_array(np.array([2]), "two_"),
        numpy_helper.from_array(np.array(0.0, dtype=np.float32), "nothing_"),
        numpy_helper.from_array(np.array([0.0, 0.0, 0.0], dtype=np.float32), "three_"),
        numpy_helper.from_array(np.array([4]), "four_"),
    ]
    graph.initializer.extend(constant)
    if how == "short":
        graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis_"))
        graph.node.append(helper.make_node("Slice", ["right", "zero_", "two_", "axis_"], ["logits"]))
    elif how == "long":
        graph.node.append(helper.make_node("Pad", ["right", "pads_"], ["padded"]))
        graph.initializer.append(numpy_helper.from_array(np.array([0, 0, 3, 0]), "pads_"))
        graph.initializer.append(numpy_helper.from_array(np.array([0]), "axis_"))
        graph.node.append(helper.make_node("Slice", ["padded", "zero_", "two_", "axis_"], ["logits"]))
    elif how == "fails":
        graph.initializer.append(numpy_helper.from_array(np.array([2, 4]), "shape_"))
        graph.node.append(helper.make_node("Reshape", ["right", "shape_"], ["logits"]))
    else:
        # Rows beyond the second: 0 / 0, or 1 / 0.
        top = 0.0 if how == "NaN" else 1.0
        graph.initializer.append(numpy_helper.from_array(np.array([1]), "one_"))
        graph.initializer.append(numpy_helper.from_array(np.array([0, 1]), "both_"))
        graph.initializer.append(numpy_helper.from_array(np.array(top, dtype=np.float32), "top_"))
        graph.node.append(helper.make_node("Shape", ["right"], ["size_"], end=1))
        graph.node.append(helper.make_node("Sub", ["size_", "two_"], ["beyond_"]))
        graph.node.append(helper.make_node("Max", ["beyond_", "zero_"], ["more_"]))
        graph.node.append(helper.make_node("Min", ["more_", "one_"], ["flag_"]))
        graph.node.append(helper.make_node("Cast", ["flag_"], ["flagged_"], to=TensorProto.FLOAT))
        # 0 -> + 0; 1 -> + top / 0.
        graph.initializer.append(numpy_helper.from_array(np.array([1.0], dtype=np.float32), "unit_"))
        graph.node.append(helper.make_node("Sub", ["unit_", "flagged_"], ["below_"]))
        graph.node.append(helper.make_node("Mul", ["flagged_", "top_"], ["above_"]))
        graph.node.append(helper.make_node("Div", ["above_", "below_"], ["odd_"]))
        graph.node.append(helper.make_node("Add", ["right", "odd_"], ["logits"]))
    return how


def sizes(model: onnx.ModelProto, place: Place) -> str:
    """A graph of a few bytes that asks for a lot of memory."""
    random = place.random
    shape = [2 ** random.choice((20, 30, 34, 40)), random.choice((1, 4))]
    constant = random.random() < 0.5
    graph = model.graph
    graph.initializer.append(numpy_helper.from_array(np.array(shape), "large_"))
    value = numpy_helper.from_array(np.array([1.0], dtype=np.float32))
    graph.node.append(helper.make_node("ConstantOfShape", ["large_"], ["much_"], value=value))
    source = "much_"
    if not constant:  # so that it is not computed while the graph is loaded
        graph.node.append(helper.make_node("ReduceSum", ["logits_"], ["sum_"], keepdims=0))
        graph.node.append(helper.make_node("Mul", ["much_", "sum_"], ["more_"]))
        source = "more_"
    graph.node.append(helper.make_node("ReduceMin", [source], ["least_"], keepdims=0))
    graph.initializer.append(numpy_helper.from_array(np.array(0.0, dtype=np.float32), "naught_"))
    for node in graph.node:
        for index, name in enumerate(node.output):
            if name == "logits":
                node.output[index] = "logits_"
    graph.node.append(helper.make_node("Mul", ["least_", "naught_"], ["none_"]))
    graph.node.append(helper.make_node("Add", ["logits_", "none_"], ["logits"]))
    return f"{shape}, {'constant' if constant else 'not constant'}"


def versions(model: onnx.ModelProto, place: Place) -> str:
    random = place.random
    if random.random() < 0.5:
        model.ir_version = random.choice((0, 1, 2, 99, 2**31, -1))
    else:
        model.opset_import[0].version = random.choice((0, 1, 7, 12, 99, 2**31, -1, 2**62))
    return f"IR {model.ir_version}, opset {model.opset_import[0].version}"


def names(model: onnx.ModelProto, place: Place) -> str:
    random = place.random
    node = random.choice(list(model.graph.node))
    odd = random.choice(("", "\0", "two\nlines", "\ud7ff", "x" * 10**6, "logits", "%s%n", "../x"))
    how = random.choice(("node", "output", "graph", "operator", "input"))
    if how == "node":
        node.name = odd
    elif how == "output":
        node.output[0] = odd
    elif how == "graph":
        model.graph.name = odd
    elif how == "operator":
        node.op_type = odd
    else:
        model.graph.input[0].name = odd
    return f"{how}: {odd[:12]!r}"


GRAPHS: dict[str, Graph] = {
    one.__name__: one
    for one in (attributes, tensors, operators, wires, interfaces, conditions, sizes, versions, names)
}


def graph(place: Place) -> str:
    """One to three changes of a stage's graph that bit flips would hardly find."""
    random = place.random
    name = random.choice(place.stages())
    model = onnx.load(place.folder / name)
    what = []
    for _ in range(random.choice((1, 1, 1, 1, 2, 3))):
        change = random.choice(list(GRAPHS))
        try:
            what.append(f"{change}: {GRAPHS[change](model, place)}")
        except (IndexError, ValueError, TypeError):  # an earlier change left nothing to choose from
            what.append(f"{change}: nothing")
    (place.folder / name).write_bytes(model.SerializeToString())
    return f"{name}: {'; '.join(what)}"


def external(place: Place) -> str:
    """Weights that lie in a file of their own, inside or outside, with the right bytes in it."""
    random = place.random
    name = random.choice(place.stages())
    model = onnx.load(place.folder / name)
    tensor = max(model.graph.initializer, key=lambda one: len(one.raw_data))
    content = tensor.raw_data
    (place.folder.parent / OUTSIDE).write_bytes(content)
    (place.folder / "weights.bin").write_bytes(content)
    (place.folder / "linked.bin").symlink_to(Path("..") / OUTSIDE)
    (place.folder / "sub").mkdir()
    (place.folder / "sub" / "weights.bin").write_bytes(content)
    where = random.choice(
        ("weights.bin", "./weights.bin", "sub/weights.bin", "linked.bin", f"../{OUTSIDE}",
         str(place.folder.parent / OUTSIDE), "/dev/zero", "", "none.bin", name,
         "*/_ORT_MEM_ADDR_/*")
    )  # fmt: skip
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entries = {"location": where, "offset": "0", "length": str(len(content))}
    if random.random() < 0.3:
        entries["offset"] = random.choice(("-1", "4096", str(2**62), "x", str(2**64)))
    if random.random() < 0.2:
        entries["length"] = random.choice(("-1", "0", str(2**40), str(2**63)))
    for key, text in entries.items():
        tensor.external_data.add(key=key, value=text)
    (place.folder / name).write_bytes(model.SerializeToString())
    if random.random() < 0.5:  # and named by the manifest
        value = json.loads((place.folder / MANIFEST).read_text(encoding="utf-8"))
        value["files"]["weights.bin"] = hashlib.sha256(content).hexdigest()
        _write(place.folder, value)
    return f"{name}: {tensor.name} at {where.replace(str(place.folder.parent), '<parent>')!r}"


def endless(place: Place) -> str:
    """A loop that never ends, or functions that call functions twice, and so on."""
    random = place.random
    name = random.choice(place.stages())
    model = onnx.load(place.folder / name)
    graph = model.graph
    graph.node[-1].output[0] = "right"
    how = random.choice(("loop", "branch", "functions"))
    value = helper.make_tensor_value_info
    if how == "loop":
        inputs = [value("i", TensorProto.INT64, []), value("on", TensorProto.BOOL, []), value("a", 1, None)]
        nodes = [helper.make_node("Identity", ["on"], ["on_"]), helper.make_node("Identity", ["a"], ["a_"])]
        body = helper.make_graph(
            nodes, "body", inputs, [value("on_", TensorProto.BOOL, []), value("a_", 1, None)]
        )
        graph.initializer.append(numpy_helper.from_array(np.array(2**62), "times_"))
        graph.initializer.append(numpy_helper.from_array(np.array(True), "true_"))
        graph.node.append(helper.make_node("Loop", ["times_", "true_", "right"], ["logits"], body=body))
    elif how == "branch":
        body = helper.make_graph(
            [helper.make_node("Identity", ["right"], ["b"])], "body", [], [value("b", 1, None)]
        )
        graph.initializer.append(numpy_helper.from_array(np.array(True), "true_"))
        graph.node.append(helper.make_node("If", ["true_"], ["logits"], then_branch=body, else_branch=body))
    else:
        for depth in range(40):
            inner = f"f{depth + 1}" if depth < 39 else "Identity"
            domain = "own" if depth < 39 else ""
            nodes = [helper.make_node(inner, ["x"], ["y"], domain=domain)]
            nodes.append(helper.make_node(inner, ["y"], ["z"], domain=domain))
            imports = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]
            model.functions.append(helper.make_function("own", f"f{depth}", ["x"], ["z"], nodes, imports))
        model.opset_import.append(helper.make_opsetid("own", 1))
        graph.node.append(helper.make_node("f0", ["right"], ["logits"], domain="own"))
    (place.folder / name).write_bytes(model.SerializeToString())
    return f"{name}: {how}"


def hidden(place: Place) -> str:
    """A loop, or weights elsewhere, in a graph whose key has bits beyond the 32nd: ONNX Runtime drops those."""
    what = place.random.choice((endless, external))(place)
    name = what.split(":")[0]
    content = (place.folder / name).read_bytes()
    graph = onnx.load_model_from_string(content).graph.SerializeToString()
    at = content.index(graph)
    start = content.rindex(b"\x3a", 0, at)  # the key of field 7; a length without that byte follows
    high = place.random.choice((0x10, 0x20, 0x40, 0x70))
    key = bytes((0xBA, 0x80, 0x80, 0x80, high))
    (place.folder / name).write_bytes(content[:start] + key + content[start + 1 :])
    return f"{what}, key {key.hex()}"


def reference_images(place: Place) -> str:
    """Another reference sample: other images, none, too many, not base64."""
    random = place.random
    value = json.loads((place.folder / MANIFEST).read_text(encoding="utf-8"))
    sample = value["reference_sample"]
    pixels = base64.b64decode(sample["images"])
    sample["images"] = random.choice(
        ("", "!", "=", "AAAA", sample["images"] * 50, sample["images"][:-4], "\ud800",
         base64.b64encode(random.randbytes(len(pixels))).decode(), sample["images"][:-1] + "\n")
    )  # fmt: skip
    if random.random() < 0.4:
        value["input_shape"] = random.choice(([-1, 8, 3], [8, 8, -1], [8, 3, 8], [64, 3, 1], [1, 1, 192], [0, 8, 3],
                                              [2**40, 2**40, 3]))  # fmt: skip
    _write(place.folder, value)
    return f"{sample['images'][:12]!r}, shape {value['input_shape']}"


# ---------------------------------------------------------------- all of them

# How often each kind comes up, how often it is sealed again, and whether any answer to a sealed one is wrong.
KINDS: dict[str, tuple[Callable[[Place], str], int, float, bool]] = {
    "bits": (bits, 5, 0.75, False),
    "low bits": (low_bits, 1, 0.8, False),
    "splice": (splice, 3, 0.75, False),
    "swap": (swap, 1, 0.75, False),
    "vanish": (vanish, 2, 0.5, False),
    "manifest": (manifest, 5, 0.85, False),
    "numbers": (numbers, 3, 1.0, False),
    "paths": (paths, 1, 0.9, True),
    "version": (version, 1, 0.5, True),
    "profile": (profile, 2, 0.3, False),
    "graph": (graph, 8, 1.0, False),
    "external": (external, 2, 1.0, True),
    "endless": (endless, 1, 1.0, True),
    "hidden": (hidden, 1, 1.0, True),
    "reference": (reference_images, 1, 1.0, False),
}


def mutate(original: Path, other: Path, folder: Path, seed: int) -> Mutation:
    """Make a mutated copy of ``original`` at ``folder``, whose parent is this mutation's own."""
    random = Random(seed)
    shutil.copytree(original, folder)
    (folder.parent / OUTSIDE).write_bytes(b"outside")
    kind = random.choices(list(KINDS), [one[1] for one in KINDS.values()])[0]
    change, _, share, must_refuse = KINDS[kind]
    made = Mutation(seed, kind, change(Place(folder, other, random)), must_refuse=must_refuse)
    if random.random() < share:
        made = replace(made, resealed=reseal(folder))
    return made


def reseal(folder: Path) -> bool:
    """New checksums and a new seal, where the manifest is still JSON."""
    path = folder / MANIFEST
    if not path.is_file() or path.stat().st_size > 2**26:  # a pipe, a device, or huge
        return False
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        for name in value["files"]:
            one = folder / name
            if one.is_file() and one.resolve().is_relative_to(folder.parent) and one.stat().st_size < 2**30:
                value["files"][name] = hashlib.sha256(one.read_bytes()).hexdigest()
        unsealed = {key: item for key, item in value.items() if key != "seal"}
        text = json.dumps(unsealed, sort_keys=True, separators=(",", ":"))
        value["seal"] = hashlib.sha256(text.encode()).hexdigest()
        path.write_text(json.dumps(value), encoding="utf-8")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return False
    return True
