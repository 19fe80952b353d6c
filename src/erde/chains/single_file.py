"""A bundle as one ONNX file for programs in any language: the exits are nested branches, of which ONNX Runtime runs one."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from erde import bundle
from erde.bundle.manifest import Manifest
from erde.chains.onnx_files import IR_VERSION, import_onnx, opset_of, serialised
from erde.common.errors import UserError
from erde.common.files import check_new, make_folder, replacing_file
from erde.policy import rule as policy
from erde.policy.cost import first_stage
from erde.policy.points import OperatingPoint
from erde.runtime.session import Session

OUTPUTS = ("label", "probabilities", "exit")
# Reductions take their axes as an input from this opset on.
OLDEST_OPSET = 18
PROBES = 8


def write_single_file(
    bundle_folder: str | Path, path: str | Path, operating_point: str | None = None
) -> OperatingPoint:
    """Write the bundle as one ONNX file for single images, with preprocessing and the exit rule inside.

    It takes ``images``, uint8 (1, H, W, C), and gives ``label`` int64 (1,), ``probabilities`` float32 (1, K) and ``exit``
    int64 (1,), as :meth:`Session.predict` does at the operating point (the bundle's default without a name), which is
    returned. A stage that an image does not reach lies in a branch that is not run. Thresholds are the weights
    ``threshold_<exit>``.

    Raises:
        UserError: no such point; ``path`` is there already; stages of different opsets that cannot be joined; a file that
            answers otherwise than the bundle does.
    """
    path = Path(path)
    if path.suffix != ".onnx":
        raise UserError(f"{path} is no name of an ONNX file: expected one that ends in .onnx")
    check_new(path, "choose another name")
    session = Session(bundle_folder, threads=1)
    manifest = session.manifest
    point = manifest.point(operating_point)
    make_folder(path.parent)
    stages = [import_onnx().load(str(session.folder / stage.file)) for stage in manifest.stages]
    model = _Single(manifest, point, _at_one_opset(stages)).model()
    content = serialised(model, path)
    with replacing_file(path) as partial:
        partial.write_bytes(content)
        _check(partial, path, session, point)
    return point


def _at_one_opset(stages: list[Any]) -> list[Any]:
    """The stages at the highest opset of any: one file has one."""
    onnx = import_onnx()
    highest = max(OLDEST_OPSET, *(opset_of(stage) for stage in stages))
    raised = []
    for stage in stages:
        if opset_of(stage) < highest:
            try:
                stage = onnx.version_converter.convert_version(stage, highest)
            except Exception as error:
                raise UserError(
                    f"a stage has opset {opset_of(stage)}, and cannot be raised to {highest}, which another one has: make "
                    f"the chain again from files of opset {highest}"
                ) from error
        raised.append(stage)
    return raised


@dataclass
class _Graph:
    """Nodes and weights of the file's main graph, or of a branch."""

    nodes: list[Any] = field(default_factory=list)
    weights: list[Any] = field(default_factory=list)


class _Single:
    """Builds the file; names are ``stage_<k>/...`` for a stage's own tensors and ``rule_<n>`` for the rule's."""

    def __init__(self, manifest: Manifest, point: OperatingPoint, stages: Sequence[Any]) -> None:
        self.manifest, self.point, self.stages = manifest, point, stages
        self.rule = manifest.rule()
        self.onnx = import_onnx()
        self.classes = len(manifest.classes)
        self.count = 0
        self.start = first_stage(manifest.networks(), point.thresholds)

    def model(self) -> Any:
        """The whole file."""
        helper, kinds = self.onnx.helper, self.onnx.TensorProto
        graph = _Graph()
        outputs = self._from_stage(graph, self.start, "images", [])
        for own, name in zip(outputs, OUTPUTS, strict=True):
            graph.nodes.append(helper.make_node("Identity", [own], [name]))
        image = helper.make_tensor_value_info("images", kinds.UINT8, [1, *self.manifest.input_shape])
        proto = helper.make_graph(graph.nodes, "erde", [image], self._values(OUTPUTS), graph.weights)
        _keep_needed(proto)
        opsets = [helper.make_opsetid("", max(map(opset_of, self.stages)))]
        model = helper.make_model(proto, opset_imports=opsets, ir_version=IR_VERSION, producer_name="erde")
        notes = {
            "classes": json.dumps(self.manifest.classes),
            "operating_point": self.point.name,
            "bundle_seal": bundle.seal_of(self.manifest),
        }
        if self.point.certificate is not None:
            notes["promise"] = self.point.certificate.sentence(self.manifest.precision)
        helper.set_model_props(model, notes)
        self.onnx.checker.check_model(model)
        return model

    def _values(self, names: Sequence[str]) -> list[Any]:
        """Label, probabilities and exit under these names."""
        kinds, value = self.onnx.TensorProto, self.onnx.helper.make_tensor_value_info
        label, probabilities, exit = names
        return [
            value(label, kinds.INT64, [1]),
            value(probabilities, kinds.FLOAT, [1, self.classes]),
            value(exit, kinds.INT64, [1]),
        ]

    def _from_stage(self, graph: _Graph, index: int, features: str, so_far: list[str]) -> list[str]:
        """Add stage ``index`` and all that follows; the names of label, probabilities and exit."""
        stage = self.onnx.compose.add_prefix(self.stages[index], f"stage_{index}/")
        takes_image = self.manifest.takes_image()[index]
        entry = stage.graph.input[0].name
        graph.nodes.append(self._node("Identity", ["images" if takes_image else features], entry))
        graph.nodes.extend(stage.graph.node)
        graph.weights.extend(stage.graph.initializer)
        logits, given = stage.graph.output[-1].name, stage.graph.output[0].name
        so_far = [*so_far, logits]
        if index == len(self.stages) - 1:
            return self._answer(graph, index, logits)
        threshold = self.point.thresholds[index]
        if threshold is None:
            return self._from_stage(graph, index + 1, given, so_far)
        joint = self._joint_answer(graph, so_far)
        score = self._score(graph, so_far, joint)
        name = f"threshold_{index}"
        graph.weights.append(self.onnx.numpy_helper.from_array(np.float64(threshold).reshape(()), name))
        leaves = self._add(graph, "Greater", [score, name])
        branches = {}
        for branch in ("then_branch", "else_branch"):
            inner = _Graph()
            if branch == "then_branch":
                names = self._answer(inner, index, joint)
            else:
                names = self._from_stage(inner, index + 1, given, so_far)
            branches[branch] = self.onnx.helper.make_graph(
                inner.nodes, f"{branch}_{index}", [], self._values(names), inner.weights
            )
        outputs = [self._name() for _ in OUTPUTS]
        graph.nodes.append(self.onnx.helper.make_node("If", [leaves], outputs, **branches))
        return outputs

    def _answer(self, graph: _Graph, index: int, logits: str) -> list[str]:
        """Label, probabilities and exit of an image that leaves at ``index`` with ``logits``."""
        label = self._add(graph, "ArgMax", [logits], axis=1, keepdims=0)
        tempered = self._add(
            graph,
            "Div",
            [self._double(graph, logits), self._number(graph, self.manifest.temperatures[index])],
        )
        probabilities = self._add(graph, "Softmax", [tempered], axis=1)
        kinds = self.onnx.TensorProto
        exit = self._constant(graph, np.array([index]))
        return [label, self._add(graph, "Cast", [probabilities], to=kinds.FLOAT), exit]

    # ---------------------------------------------------------------- the rule of policy/rule.py, in nodes

    def _joint_answer(self, graph: _Graph, so_far: list[str]) -> str:
        if self.rule.ensemble == "none" or len(so_far) == 1:
            return so_far[-1]
        each = [self._log_softmax(graph, logits) for logits in so_far]
        if self.rule.ensemble == "geometric":
            return self._mean(graph, each)
        return self._add(graph, "Log", [self._mean(graph, [self._add(graph, "Exp", [x]) for x in each])])

    def _score(self, graph: _Graph, so_far: list[str], answer: str) -> str:
        """The score of the last exit of ``so_far``: a double without axes."""
        if self.rule.score == "patience":
            score = self._run_of_agreement(graph, so_far)
        elif self.rule.score == "harm":
            score = self._harm(graph, so_far)
        else:
            score = self._own_score(graph, answer)
        return self._add(graph, "Squeeze", [score])

    def _own_score(self, graph: _Graph, answer: str) -> str:
        sharpness = self._number(graph, self.rule.sharpness)
        scaled = self._add(graph, "Div", [self._double(graph, answer), sharpness])
        if self.rule.score == "energy":
            return self._add(graph, "Mul", [self._reduce(graph, "ReduceLogSumExp", scaled), sharpness])
        logs = self._add(graph, "LogSoftmax", [scaled], axis=1)
        if self.rule.score == "entropy":
            return self._add(graph, "Sub", [self._number(graph, 1.0), self._normalised_entropy(graph, logs)])
        probabilities = self._add(graph, "Exp", [logs])
        if self.rule.score == "max_probability":
            return self._reduce(graph, "ReduceMax", probabilities)
        return self._margin(graph, self._largest(graph, probabilities, 2))

    def _normalised_entropy(self, graph: _Graph, logs: str) -> str:
        weighted = self._add(graph, "Mul", [self._add(graph, "Exp", [logs]), logs])
        total = self._reduce(graph, "ReduceSum", weighted)
        return self._add(graph, "Div", [total, self._number(graph, -math.log(self.classes))])

    def _margin(self, graph: _Graph, top_two: str) -> str:
        """The first less the second of (1, 2 or more)."""
        weights = self._constant(graph, np.array([[1.0], [-1.0]]))
        first_two = self._add(graph, "Gather", [top_two, self._constant(graph, np.array([0, 1]))], axis=1)
        return self._add(graph, "MatMul", [first_two, weights])

    def _run_of_agreement(self, graph: _Graph, so_far: list[str]) -> str:
        labels = [self._add(graph, "ArgMax", [logits], axis=1, keepdims=0) for logits in so_far]
        run, agreeing = self._number(graph, 1.0), None
        for earlier in reversed(labels[:-1]):
            same = self._double(graph, self._add(graph, "Equal", [earlier, labels[-1]]))
            agreeing = same if agreeing is None else self._add(graph, "Mul", [agreeing, same])
            run = self._add(graph, "Add", [run, agreeing])
        return run

    def _harm(self, graph: _Graph, so_far: list[str]) -> str:
        """The features of ``policy.harm_features`` and the regression on them."""
        assert self.rule.harm is not None
        parameters = self.rule.harm[len(so_far) - 1]
        logs = [self._log_softmax(graph, logits) for logits in so_far]
        label = self._add(graph, "ArgMax", [so_far[-1]], axis=1, keepdims=1)
        highest = self._largest(graph, logs[-1], min(policy.TOP, self.classes))
        features = [
            self._normalised_entropy(graph, logs[-1]),
            self._margin(graph, self._add(graph, "Exp", [highest])),
            highest,
        ]
        for earlier, log in zip(so_far[:-1], logs[:-1], strict=True):
            other = self._add(graph, "ArgMax", [earlier], axis=1, keepdims=1)
            features.append(self._add(graph, "GatherElements", [log, label], axis=1))
            features.append(self._double(graph, self._add(graph, "Equal", [other, label])))
        joined = self._add(graph, "Concat", features, axis=1)
        weights = self._constant(graph, np.array(parameters.weights).reshape(-1, 1))
        class_weights = self._constant(graph, np.array([parameters.class_weights]))
        log_odds = self._add(graph, "MatMul", [joined, weights])
        log_odds = self._add(graph, "Add", [log_odds, self._number(graph, parameters.bias)])
        by_class = self._add(graph, "GatherElements", [class_weights, label], axis=1)
        log_odds = self._add(graph, "Add", [log_odds, by_class])
        return self._add(graph, "Sigmoid", [self._add(graph, "Neg", [log_odds])])

    # ---------------------------------------------------------------- nodes

    def _name(self) -> str:
        self.count += 1
        return f"rule_{self.count}"

    def _node(self, kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
        return self.onnx.helper.make_node(kind, inputs, [output], **attributes)

    def _add(self, graph: _Graph, kind: str, inputs: list[str], **attributes: Any) -> str:
        name = self._name()
        graph.nodes.append(self._node(kind, inputs, name, **attributes))
        return name

    def _constant(self, graph: _Graph, values: NDArray[Any]) -> str:
        name = self._name()
        graph.weights.append(self.onnx.numpy_helper.from_array(values, name))
        return name

    def _number(self, graph: _Graph, value: float) -> str:
        return self._constant(graph, np.array(value, dtype=np.float64))

    def _double(self, graph: _Graph, x: str) -> str:
        return self._add(graph, "Cast", [x], to=self.onnx.TensorProto.DOUBLE)

    def _log_softmax(self, graph: _Graph, logits: str) -> str:
        return self._add(graph, "LogSoftmax", [self._double(graph, logits)], axis=1)

    def _reduce(self, graph: _Graph, kind: str, x: str) -> str:
        return self._add(graph, kind, [x, self._constant(graph, np.array([1]))], keepdims=1)

    def _mean(self, graph: _Graph, each: list[str]) -> str:
        # ONNX Runtime has no Mean of doubles.
        return self._add(graph, "Div", [self._add(graph, "Sum", each), self._number(graph, len(each))])

    def _largest(self, graph: _Graph, x: str, count: int) -> str:
        """The ``count`` largest of (1, K), the largest first."""
        values, places = self._name(), self._name()
        amount = self._constant(graph, np.array([count]))
        graph.nodes.append(self.onnx.helper.make_node("TopK", [x, amount], [values, places], axis=1))
        return values


def _keep_needed(graph: Any) -> set[str]:
    """Drop what no output needs, such as heads of disabled exits, which ONNX Runtime would compute; the names that are left."""
    needed = {value.name for value in graph.output}
    for index in reversed(range(len(graph.node))):
        node = graph.node[index]
        if needed.isdisjoint(node.output):
            del graph.node[index]
            continue
        needed.update(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                needed |= _keep_needed(attribute.g)
    for index in reversed(range(len(graph.initializer))):
        if graph.initializer[index].name not in needed:
            del graph.initializer[index]
    return needed


def _check(file: Path, path: Path, session: Session, point: OperatingPoint) -> None:
    """Hold ``file``, which is to become ``path``, against the bundle.

    Images are the reference sample and noise, at more than one brightness.
    """
    shape = session.manifest.input_shape
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (PROBES, *shape))
    images = np.concatenate(
        [
            session.manifest.reference_sample.decode(shape)[:PROBES],
            (noise * np.linspace(0, 1, PROBES).reshape(-1, 1, 1, 1)).astype(np.uint8),
        ]
    )
    logits = session.all_logits(images)
    unsure = policy.in_band(session.rule.apply(logits)[1], point.thresholds) | policy.near_tie(logits)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    alone = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    for image, skip in zip(images, unsure, strict=True):
        expected = session.predict(image[None], operating_point=point.name)
        label, _, exit = alone.run(list(OUTPUTS), {"images": image[None]})
        if not skip and (label[0], exit[0]) != (expected.labels[0], expected.exits[0]):
            raise UserError(
                f"{path} answers otherwise than the bundle (class {label[0]} at exit {exit[0]} for {expected.labels[0]} at "
                f"{expected.exits[0]}) and is not kept: use the bundle itself, and report this with onnxruntime's version"
            )
