"""The other side of peers.py: earlyon in its own environment, asked through pipes. Not meant to be run by hand.

The network is built by erde's own code, which needs torch only; the rest of erde stays out. Of earlyon nothing is
replaced. Answers are JSON, one object a line.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import sys
import time
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

# The arms by name. The first two and the fourth take one image at a time.
STAGED, EAGER, EAGER_BATCH = "earlyon: staged", "earlyon: eager", "earlyon: eager, batch together"
STAGES, STAGES_BATCH = "recipe: stages in ONNX", "recipe: stages in ONNX, batch together"
ALL_EXITS = "earlyon: all-exits ONNX"
TORCH_ARMS = (STAGED, EAGER, EAGER_BATCH)
WHOLE_BATCH_ARMS = (EAGER_BATCH, STAGES_BATCH, ALL_EXITS)

PACKAGES = ("earlyon", "torch", "onnxruntime", "onnx", "numpy")

Answer = tuple[list[int], list[int]]  # exits and labels, one per image


@dataclass(frozen=True)
class Arm:
    """One way to answer a batch: ``call`` is what the clock sees, ``read`` makes sense of its result afterwards."""

    call: Callable[[Any], Any]
    read: Callable[[Any], Answer]


def timed(arm: Arm, batches: Sequence[Any]) -> dict[str, list[Any]]:
    """Seconds per batch, and the exits and labels of all images in order."""
    arm.call(batches[0])  # untimed: the alternatives that ran in between had the caches
    seconds, results = [], []
    for batch in batches:
        started = time.perf_counter()
        result = arm.call(batch)
        seconds.append(time.perf_counter() - started)
        results.append(result)
    answers = [arm.read(result) for result in results]
    return {
        "seconds": seconds,
        "exits": [one for exits, _ in answers for one in exits],
        "labels": [one for _, labels in answers for one in labels],
    }


def versions() -> dict[str, str]:
    """Of what this environment has."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def build_network(setting: dict[str, Any], folder: Path) -> Any:
    """erde's network with its trained weights, an ordinary torch module."""
    import torch

    # erde is not installed here: its package without what its __init__ asks for.
    package = types.ModuleType("erde")
    package.__path__ = [setting["source"]]
    sys.modules["erde"] = package
    from erde.networks.attach import attach_exits
    from erde.networks.backbones import build_backbone

    size = tuple(setting["input_size"])
    backbone = build_backbone(setting["backbone"], classes=setting["classes"], channels=size[0])
    network: Any = attach_exits(backbone, setting["exits"], input_size=size, head=setting["head"])
    network.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
    # Torch's faster layout here, up to a third at batch 32; exported graphs do not depend on it.
    return network.eval().to(memory_format=torch.channels_last)


def build_wrapper(network: Any, setting: dict[str, Any]) -> Any:
    """earlyon's wrapper around the network: its blocks as one flat Sequential, and its own exit heads."""
    from earlyon import EarlyExitConfig, EarlyExitWrapper, ExitPoint
    from torch import nn

    rows = [OrderedDict(stage.named_children()) for stage in network.stages]
    blocks = OrderedDict((name, block) for row in rows for name, block in row.items())
    blocks["classifier"] = network.heads[-1]
    # The number of channels is only kept by earlyon, for heads of its own making.
    points = [
        ExitPoint(f"exit{index}", list(row)[-1], head.norm.num_features)
        for index, (row, head) in enumerate(zip(rows[:-1], network.heads[:-1], strict=True))
    ]
    enabled = [one is not None for one in setting["thresholds"]]
    # A disabled exit needs a number all the same; it is not looked at.
    confidences = [1.0 if one is None else one for one in setting["thresholds"]]
    # erde: 1 - H / ln K > t; earlyon: H <= threshold, in nats.
    entropies = [(1.0 - one) * math.log(setting["classes"]) for one in confidences]
    config = EarlyExitConfig(
        backbone="custom",
        num_classes=setting["classes"],
        exit_points=points,
        confidence_thresholds=confidences if setting["policy"] == "confidence" else [],
        entropy_thresholds=entropies if setting["policy"] == "entropy" else [],
        enabled_exits=enabled,
        routing_policy=setting["policy"],
        temperature=setting["temperature"],
    )
    heads = {point.name: head for point, head in zip(points, network.heads[:-1], strict=True)}
    wrapper = EarlyExitWrapper(
        nn.Sequential(blocks), heads, _same, config, input_shape=(1, *setting["input_size"])
    )
    return wrapper.eval()


def _same(x: Any) -> Any:
    return x


class Router:
    """earlyon's rule in numpy, for its graphs in ONNX Runtime: which images of (B, K) logits may leave."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.names = [point.name for point in config.exit_points]

    def fires(self, index: int, logits: NDArray[Any]) -> NDArray[np.bool_]:
        config = self.config
        scaled = logits / config.temperatures[self.names[index]]
        shifted = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
        total = shifted.sum(axis=-1)
        if config.routing_policy == "confidence":
            # The largest probability: its exponent is 0.
            return np.asarray(1.0 / total >= config.confidence_thresholds[index])
        probabilities = shifted / total[:, None]
        entropy = -(probabilities * np.log(np.maximum(probabilities, 1e-12))).sum(axis=-1)
        return np.asarray(entropy <= config.entropy_thresholds[index])


def open_onnx(path: Path) -> Any:
    """One thread, the processor, and otherwise what ONNX Runtime does by itself."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class AllExitsGraph:
    """What earlyon exports: one graph that always computes every exit; the rule is applied to its outputs."""

    def __init__(self, wrapper: Any, input_size: Sequence[int], folder: Path) -> None:
        from earlyon.onnx import export_all_exits_to_onnx

        path = folder / "all_exits.onnx"
        export_all_exits_to_onnx(wrapper, path, input_shape=(1, *input_size))
        self.session, self.router = open_onnx(path), Router(wrapper.config)

    def __call__(self, x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
        """Exits (B,) and the logits (B, K) that answer."""
        outputs = self.session.run(None, {"input": x})
        exits = np.full(len(x), len(outputs) - 1)
        answer = outputs[-1]
        for index in range(len(outputs) - 2, -1, -1):
            if self.router.config.enabled_exits[index]:
                fires = self.router.fires(index, outputs[index])
                exits[fires] = index
                answer = np.where(fires[:, None], outputs[index], answer)
        return exits, answer


class StageGraphs:
    """earlyon's stages as ONNX graphs, and the loop that its documentation describes and does not ship.

    Its rule for a batch, as in ``forward_inference_batched``: the batch leaves when every image in it may.
    """

    def __init__(self, staged: Any, example: Any, folder: Path) -> None:
        import torch

        self.router = Router(staged.config)
        self.sessions: list[Any] = []
        enabled = staged.config.enabled_exits
        x = example
        for index, stage in enumerate(staged.stages):
            final = index == len(staged.stages) - 1
            # Like its own runtime: the head of a disabled exit does not run, the last stage has logits only.
            module = stage if not final and enabled[index] else stage.trunk
            outputs = ["logits"] if final else ["features", "logits"][: 1 + enabled[index]]
            path = folder / f"peer_stage_{index}.onnx"
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                torch.onnx.export(
                    module,
                    (x,),
                    str(path),
                    input_names=["x"],
                    output_names=outputs,
                    dynamic_axes={name: {0: "batch"} for name in ["x", *outputs]},
                    opset_version=17,
                    dynamo=False,  # what its own export uses
                )
            with torch.no_grad():
                x = stage.trunk(x)
            self.sessions.append(open_onnx(path))

    def __call__(self, x: NDArray[Any]) -> tuple[int, NDArray[Any]]:
        """The exit of the whole batch and its logits (B, K)."""
        last = len(self.sessions) - 1
        for index, session in enumerate(self.sessions[:-1]):
            outputs = session.run(None, {"x": x})
            x = outputs[0]
            if len(outputs) == 2 and self.router.fires(index, outputs[1]).all():
                return index, outputs[1]
        return last, self.sessions[-1].run(None, {"x": x})[0]


def build_arms(wrapper: Any, setting: dict[str, Any], folder: Path) -> dict[str, Arm]:
    """Every way that earlyon has, or describes, to answer a batch."""
    import torch
    from earlyon.staged import staged_model

    staged = staged_model(wrapper)
    final = len(staged.stages) - 1
    example = torch.zeros(1, *setting["input_size"])
    stage_graphs = StageGraphs(staged, example, folder)
    all_exits = AllExitsGraph(wrapper, setting["input_size"], folder)

    def exit_of(index: int) -> int:
        return final if index == -1 else index

    def one_by_one(answer: Callable[[Any], Any]) -> Callable[[Any], Any]:
        return lambda batch: [answer(image) for image in batch]

    def read_single(results: list[Any]) -> Answer:
        return [exit_of(one.exit_taken) for one in results], [int(one.prediction.argmax()) for one in results]

    def read_batch(result: Any) -> Answer:
        labels = result.predictions.argmax(dim=-1).tolist()
        return [exit_of(result.exit_taken)] * len(labels), labels

    def read_stages(results: list[tuple[int, NDArray[Any]]]) -> Answer:
        exits = [index for index, logits in results for _ in logits]
        return exits, [int(row.argmax()) for _, logits in results for row in logits]

    return {
        STAGED: Arm(one_by_one(staged.infer), read_single),
        EAGER: Arm(one_by_one(lambda image: wrapper(image, mode="inference")), read_single),
        EAGER_BATCH: Arm(wrapper.forward_inference_batched, read_batch),
        STAGES: Arm(one_by_one(stage_graphs), read_stages),
        STAGES_BATCH: Arm(lambda batch: [stage_graphs(batch)], read_stages),
        ALL_EXITS: Arm(all_exits, lambda result: (result[0].tolist(), result[1].argmax(axis=-1).tolist())),
    }


class Images:
    """The test images, normalised once; batches as each arm wants them, made outside the clock."""

    def __init__(self, folder: Path, setting: dict[str, Any]) -> None:
        import torch

        self.bytes = torch.from_numpy(np.load(folder / "images.npy"))
        self.scale = torch.tensor([1 / (255 * value) for value in setting["std"]])
        self.shift = torch.tensor([-m / s for m, s in zip(setting["mean"], setting["std"], strict=True)])
        self.tensor = self.normalise(self.bytes)

    def normalise(self, images: Any) -> Any:
        """uint8 (B, H, W, C) to float32 (B, C, H, W), which is channels-last already."""
        return (images.float() * self.scale + self.shift).permute(0, 3, 1, 2)

    def normalising_milliseconds(self, size: int) -> float:
        """What erde's time has and earlyon's has not, for a batch of ``size``."""
        arm = Arm(self.normalise, lambda _: ([], []))
        return 1e3 * float(np.median(timed(arm, [self.bytes[:size]] * 50)["seconds"]))

    def batch(self, arm: str, rows: list[int]) -> Any:
        """The images ``rows`` (B, C, H, W), or a list of single ones; tensors, or arrays for ONNX Runtime."""
        import torch

        chosen = self.tensor[rows]
        in_torch = arm in TORCH_ARMS
        whole: Any = chosen.contiguous(
            memory_format=torch.channels_last if in_torch else torch.contiguous_format
        )
        whole = whole if in_torch else whole.numpy()
        return whole if arm in WHOLE_BATCH_ARMS else [whole[index : index + 1] for index in range(len(rows))]


def serve(folder: Path, questions: TextIO, answers: TextIO) -> None:
    """Say hello with the arms' names, then time what is asked for until the questions end."""
    import torch

    torch.set_num_threads(1)
    torch.set_num_interop_threads(1)
    setting = json.loads((folder / "setting.json").read_text(encoding="utf-8"))
    wrapper = build_wrapper(build_network(setting, folder), setting)
    arms, images = build_arms(wrapper, setting, folder), Images(folder, setting)
    flops = wrapper.flops_estimate  # lazily made by earlyon: not within the first call that is timed
    hello = {
        "arms": list(arms),
        "flops_method": flops.method,
        "normalising_milliseconds": {size: images.normalising_milliseconds(size) for size in (1, 32)},
    }
    print(json.dumps(hello), file=answers, flush=True)
    for line in questions:
        question = json.loads(line)
        batches = [images.batch(question["arm"], rows) for rows in question["batches"]]
        print(json.dumps(timed(arms[question["arm"]], batches)), file=answers, flush=True)


def main() -> None:
    if sys.argv[1:] == ["--versions"]:
        print(json.dumps(versions()))
        return
    # Whatever a library prints goes to stderr; the pipe is for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    serve(Path(sys.argv[1]), sys.stdin, answers)


if __name__ == "__main__":
    main()
