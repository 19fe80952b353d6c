"""How long each stage would take that could be made of a network's exits, in ONNX Runtime, on single images.

A stage of a chain begins at the image or behind an exit that is kept, and ends at the next exit that is kept: with E
exits there are E(E+1)/2 such stretches. Each is cut from one export of the whole network and timed as the graph that it
would be in a bundle. The time of any subset's chain is then a sum of measured times.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from erde.calibration.exit_choice import ExitTimes
from erde.common import progress
from erde.common.splits import Images, TuneLogits, TuneSplit
from erde.exporting.graphs import block_input, cut_graph
from erde.exporting.modules import FEATURES_IN, Pack, Preprocess, Unpack, prepare, write_graph
from erde.networks.network import EarlyExitNetwork
from erde.policy.rule import PAPER_RULE, leaves
from erde.runtime.stages import StageRunner

ROUNDS, WARM_UP = 40, 3
# Of the rounds, in per cent. A busy machine only adds time, and more to what takes longer, so that medians would speak for
# many short stages there.
QUICKEST = 10
# Large networks take fewer rounds.
MOST_SECONDS, FEWEST_ROUNDS = 60.0, 10
MOST_IMAGES = 256


class _EveryExit(nn.Module):
    """Images to the packed features of every stage but the last, and the logits of every exit."""

    def __init__(self, preprocess: nn.Module, network: EarlyExitNetwork) -> None:
        super().__init__()
        self.preprocess, self.network, self.pack = preprocess, network, Pack()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, H, W, C) to E-1 feature tensors and E times (B, K)."""
        features, logits = [], []
        handed = self.preprocess(images)
        last = len(self.network.stages) - 1
        for index, stage in enumerate(self.network.stages):
            handed = stage(handed)
            logits.append(self.network.logits_of(index, handed))
            if index < last:
                packed = self.pack(handed)
                features.append(packed)
                if not isinstance(handed, Tensor):
                    # The next stage reads what was packed, so that the graph can be cut there.
                    handed = Unpack([tensor.shape[1:] for tensor in handed])(packed)
        return (*features, *logits)


def measure_exits(
    network: EarlyExitNetwork,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    tune: TuneSplit,
    *,
    opset: int = 18,
    threads: int | None = None,
    rounds: int = ROUNDS,
    seed: int = 0,
) -> tuple[ExitTimes, TuneLogits]:
    """Milliseconds of every stretch of ``network``, and the logits of all its exits on ``tune``.

    Every stretch is timed on a single image right after the one that gives its input, as an image would meet it; all
    take turns within each round, in a new random order; what counts is the quickest tenth of the rounds.

    Raises:
        UserError: a network that torch cannot write as ONNX.
    """
    exits = len(network.stages)
    with tempfile.TemporaryDirectory(prefix="erde-exits-") as folder:
        whole = Path(folder) / "whole.onnx"
        features = [f"features_{index}" for index in range(exits - 1)]
        logits = [f"logits_{index}" for index in range(exits)]
        module = _EveryExit(Preprocess(mean, std), prepare(network)).eval()
        example = torch.from_numpy(np.array(tune.images[:2]))
        write_graph(module, example, whole, ["images"], [*features, *logits], opset)
        model = onnx.load(whole)
        stretches = [(start, end) for start in range(exits) for end in range(start, exits)]
        paths = []
        for start, end in stretches:
            wanted = {features[end]: "features"} if end < exits - 1 else {}
            entry = ("images", "images") if start == 0 else (features[start - 1], FEATURES_IN)
            stage = cut_graph(model, entry, {**wanted, logits[end]: "logits"})
            if start > 0:
                block_input(stage)
            paths.append(Path(folder) / f"{start}-{end}.onnx")
            onnx.save(stage, paths[-1])
        runner = StageRunner(
            paths,
            threads,
            takes_image=[start == 0 for start, _ in stretches],
            gives_features=[end < exits - 1 for _, end in stretches],
        )
        every_exit = StageRunner([paths[stretches.index((index, index))] for index in range(exits)], threads)
        tune_logits = TuneLogits(every_exit.all_logits(tune.images), tune.labels)
        drawn_from = np.asarray(tune.images[:MOST_IMAGES])
        return _time(runner, stretches, exits, drawn_from, rounds, seed), tune_logits


def _time(
    runner: StageRunner,
    stretches: list[tuple[int, int]],
    exits: int,
    images: Images,
    rounds: int,
    seed: int,
) -> ExitTimes:
    """Milliseconds (E, E) from stage to exit, and of a decision."""
    generator = np.random.default_rng(seed)
    times: dict[tuple[int, int], list[float]] = {stretch: [] for stretch in stretches}
    decisions: list[float] = []
    begun = time.perf_counter()
    with progress.task("exits against the clock", rounds + WARM_UP) as task:
        for turn in range(rounds + WARM_UP):
            for index in generator.permutation(len(stretches)):
                start, end = stretches[index]
                number = int(generator.integers(len(images)))
                image = images[number : number + 1]
                x = runner.run_bound(stretches.index((0, start - 1)), image)[0] if start else image
                assert x is not None
                clock = time.perf_counter()
                logits = runner.run_bound(int(index), x)[1]
                done = time.perf_counter()
                leaves(PAPER_RULE.decide_on([logits], logits, final=False), 0.5)
                decisions.append(time.perf_counter() - done)
                times[start, end].append(done - clock)
            if task.due():
                task.update(turn + 1, f"{len(stretches)} stages")
            if turn >= FEWEST_ROUNDS + WARM_UP and time.perf_counter() - begun > MOST_SECONDS:
                break
    milliseconds = np.full((exits, exits), np.nan)
    for (start, end), seconds in times.items():
        milliseconds[start, end] = undisturbed(seconds)
    return ExitTimes(at_most_their_parts(milliseconds), undisturbed(decisions))


def undisturbed(seconds: list[float]) -> float:
    """Milliseconds of a call that took so many seconds in each round, the first of which warmed up."""
    return 1e3 * float(np.percentile(seconds[WARM_UP:], QUICKEST))


def at_most_their_parts(milliseconds: NDArray[np.float64]) -> NDArray[np.float64]:
    """Times (E, E) from stage to exit, none above the sum of its parts: those compute more, a head between them."""
    bounded = milliseconds.copy()
    exits = len(bounded)
    for length in range(1, exits):
        for start in range(exits - length):
            end = start + length
            parts = bounded[start, start:end] + bounded[start + 1 : end + 1, end]
            bounded[start, end] = min(bounded[start, end], parts.min())
    return bounded
