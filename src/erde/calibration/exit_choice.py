"""The choice of the exits that are kept, by measured time: the subset that saves most milliseconds on tune at the risk."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from erde.calibration.checks import answers_as_labels
from erde.calibration.choice import choose_score, try_rule
from erde.calibration.settings import Settings
from erde.calibration.thresholds import best_within_risk
from erde.common import progress
from erde.common.errors import UserError
from erde.common.model import Frozen
from erde.common.splits import TuneLogits
from erde.policy.cost import Cost
from erde.policy.rule import ExitRule

# Subsets this near to the best, as a share of the time without exits, count as equal: then fewer exits are better.
HAIR = 0.005
# Costs are whole numbers: times are counted in nanoseconds.
_NANOSECONDS = 1e6
Subset = tuple[int, ...]


@dataclass(frozen=True)
class ExitTimes:
    """Milliseconds of a single image in ONNX Runtime.

    ``stages[i, j]`` (E, E), for i <= j, is a stage from behind exit i-1 (0: from the image) up to exit j, with the head
    of j alone. ``decision`` is the time to decide at an intermediate exit.
    """

    stages: NDArray[np.float64]
    decision: float

    def __len__(self) -> int:
        return len(self.stages)

    @property
    def no_exit(self) -> float:
        """Of the network without exits."""
        return float(self.stages[0, -1])

    def exit_milliseconds(self, kept: Subset) -> tuple[float, ...]:
        """Of an image that leaves at each of the intermediate exits ``kept`` and at the final one, cumulative."""
        ends = [*kept, len(self) - 1]
        starts = [0, *(exit + 1 for exit in kept)]
        stages = [float(self.stages[start, end]) for start, end in zip(starts, ends, strict=True)]
        decided = [self.decision] * len(kept) + [0.0]
        return tuple(np.cumsum(np.asarray(stages) + decided).tolist())

    def cost(self, kept: Subset) -> Cost:
        """The same for the search for thresholds, in whole nanoseconds in place of MACs."""
        return _cost(self.exit_milliseconds(kept), self.no_exit)

    def cost_in_front(self, kept: Subset, milliseconds: float) -> Cost:
        """The same for a chain: this network with a decision at its final exit, then one of so many ``milliseconds``."""
        exits = self.exit_milliseconds(kept)
        return _cost(
            (*exits, exits[-1] + self.decision + milliseconds), milliseconds, networks=(0, len(exits))
        )


def _cost(exits: Sequence[float], no_exit: float, networks: tuple[int, ...] = (0,)) -> Cost:
    nanoseconds = tuple(round(_NANOSECONDS * milliseconds) for milliseconds in exits)
    return Cost(nanoseconds, round(_NANOSECONDS * no_exit), networks=networks)


class ExitCandidate(Frozen):
    """An exit of the trained network.

    ``milliseconds``: of an image that leaves here, with no exit before; ``share`` is that of the time without exits.
    ``passing_milliseconds``: what the exit costs an image that goes on (head, decision, handing over), by itself.
    """

    name: str
    milliseconds: float
    share: float
    passing_milliseconds: float
    kept: bool


class ExitSubset(Frozen):
    """Some of the exits, the final one left out: mean milliseconds and risk on tune, at the thresholds for the risk."""

    exits: list[str]
    milliseconds: float
    time_saved: float
    risk: float


class ExitChoice(Frozen):
    """The exits that an arm with ``exits: auto`` keeps, and why: ``exits.json``.

    ``stage_milliseconds``: row i has the stages that begin behind exit i-1 and end at exit i, i+1, ..., the final one.
    ``best_of_size``: the best subset of each size, from none on.
    """

    format_version: Literal[1] = 1
    candidates: list[ExitCandidate]
    best_of_size: list[ExitSubset]
    chosen: ExitSubset
    max_risk: float
    score: str
    tune_images: int
    no_exit_milliseconds: float
    decision_milliseconds: float
    stage_milliseconds: list[list[float]]
    threads: int
    machine: str

    def line(self) -> str:
        """One sentence for the command line."""
        candidates = len(self.candidates)
        before = f"{self.no_exit_milliseconds:.3g} ms"
        if not self.chosen.exits:
            return (
                f"none of {candidates} exits saves time (at {before} an image): only the final exit is kept"
            )
        names = ", ".join(self.chosen.exits)
        return (
            f"{len(self.chosen.exits)} of {candidates} exits kept ({names}): {before} -> {self.chosen.milliseconds:.3g} ms an "
            f"image, {100 * self.chosen.time_saved:.0f} % saved on tune at a risk of {100 * self.max_risk:g} %"
        )


def choose_exits(
    tune: TuneLogits,
    names: Sequence[str],
    times: ExitTimes,
    settings: Settings,
    *,
    threads: int,
    machine: str,
    reference_right: NDArray[np.bool_] | None = None,
    first_shares: Sequence[float] | None = None,
) -> ExitChoice:
    """The subset of the intermediate exits that saves most time on tune within the first of ``settings.max_risks``.

    The score is chosen once, for all exits together (the learned one takes no part); then thresholds are searched for
    every subset, by time. Of subsets within half a per cent of the best the smallest is taken. Nothing but tune is seen.

    Args:
        tune: the logits (E, N, K) of all exits.
        names: of the intermediate exits (E-1).
        first_shares: the MACs of leaving at each intermediate exit, with no exit before, as a share of the network
            without exits: subsets that could not keep within ``settings.budgets`` are left out.

    Raises:
        UserError: a budget that no subset could keep within.
    """
    if settings.guarantee == "disagreement":
        tune = answers_as_labels(tune)
    everything = tuple(range(len(names)))
    rules = _rules(settings)
    rule = choose_score(tune, times.cost(everything), settings, reference_right, rules)[0].rule
    tried: dict[Subset, ExitSubset] = {}
    subsets = [
        subset
        for size in range(len(names) + 1)
        for subset in itertools.combinations(everything, size)
        if _keeps_budgets(subset, settings, first_shares)
    ]
    if not subsets:
        assert first_shares is not None
        raise UserError(
            f"a budget of {min(settings.budgets) * 100:g} % of the MACs cannot be met: leaving at the first exit takes "
            f"{min(first_shares) * 100:.0f} %; give a larger budget"
        )
    with progress.task("subsets of the exits", len(subsets)) as task:
        for number, subset in enumerate(subsets):
            cost = times.cost(subset)
            logits = TuneLogits(tune.logits[[*subset, -1]], tune.labels)
            choice = try_rule(logits, rule, cost, settings, reference_right)
            index = best_within_risk(choice.path, settings.max_risks[0])
            nanoseconds = float(choice.path.macs[index])
            tried[subset] = ExitSubset(
                exits=[names[exit] for exit in subset],
                milliseconds=nanoseconds / _NANOSECONDS,
                time_saved=1.0 - nanoseconds / cost.no_exit_macs,
                risk=float(choice.path.risk[index]),
            )
            if task.due():
                task.update(number + 1)
    best = pick(tried)
    by_size = {
        size: max(
            (subset for subset in tried if len(subset) == size), key=lambda subset: tried[subset].time_saved
        )
        for size in sorted({len(subset) for subset in tried})
    }
    return ExitChoice(
        candidates=[_candidate(exit, name, times, exit in best) for exit, name in enumerate(names)],
        best_of_size=[tried[subset] for subset in by_size.values()],
        chosen=tried[best],
        max_risk=settings.max_risks[0],
        score=rule.in_words(),
        tune_images=len(tune),
        no_exit_milliseconds=times.no_exit,
        decision_milliseconds=times.decision,
        stage_milliseconds=[row[start:].tolist() for start, row in enumerate(times.stages)],
        threads=threads,
        machine=machine,
    )


def pick(tried: dict[Subset, ExitSubset]) -> Subset:
    """The subset that saves most time; of those within a hair of it the one with fewest exits, then the quickest."""
    most = max(subset.time_saved for subset in tried.values())
    near = [subset for subset in tried if tried[subset].time_saved >= most - HAIR]
    return min(near, key=lambda subset: (len(subset), -tried[subset].time_saved))


def _rules(settings: Settings) -> list[ExitRule]:
    """The rules to try, without the learned score, which would have to be fitted anew for every subset."""
    if settings.score == "harm":
        settings = settings.model_copy(update={"score": "auto"})
    return [rule for rule in settings.rules() if rule.score != "harm"]


def _keeps_budgets(subset: Subset, settings: Settings, first_shares: Sequence[float] | None) -> bool:
    if not settings.budgets or first_shares is None:
        return True
    return bool(subset) and first_shares[subset[0]] <= min(settings.budgets)


def _candidate(exit: int, name: str, times: ExitTimes, kept: bool) -> ExitCandidate:
    leaving, passing = times.exit_milliseconds((exit,))
    return ExitCandidate(
        name=name,
        milliseconds=leaving,
        share=leaving / times.no_exit,
        passing_milliseconds=passing - times.no_exit,
        kept=kept,
    )
