"""Places of exits in a traced model: by name, or at shares of its MACs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx, nn

from erde.common.errors import UserError, nearest
from erde.networks.cutting import Cut, Facts, StepError, find_cuts, gather_facts
from erde.networks.tracing import Opener, Trace, enclosing_modules

# An exit may stand this far, in shares of the MACs, from where it was wanted.
NEAR = 0.1
# Where the classifier begins: most of the MACs are spent by then, and before a pooling if little follows it.
_MOST = 0.5
_LITTLE = 0.03
# The end of a block is preferred within this part of the distance between two exits.
_BLOCK_END = 0.35
_NO_BLOCK = 99


def wanted_share(number: int, exits: int, at_most: bool) -> float:
    """Where exit ``number`` (from 1) of ``exits`` is wanted, in shares of the MACs.

    At equal shares; with ``at_most``, as many as there are places, closer together near the image: most images leave
    there, and those that do not pay are dropped later.
    """
    return float((number / exits) ** (1.5 if at_most else 1.0))


@dataclass(frozen=True)
class Plan:
    """A traced model with the cuts for its exits in order, and ``tail``, the cut before its own classifier.

    ``places``: all clean cuts until ``tail``. ``notes`` name the exits that stand elsewhere than was asked for; ``distance``
    is the largest distance of an exit from its wanted place, in shares of the MACs.
    """

    trace: Trace
    facts: Facts
    cuts: tuple[Cut, ...]
    names: tuple[str, ...]
    places: tuple[Cut, ...]
    tail: Cut
    notes: tuple[str, ...]
    distance: float


def plan_exits(
    model: nn.Module, exits: int | Sequence[str], input_size: Sequence[int], at_most: bool = False
) -> Plan:
    """Open ``model`` as far as ``exits`` needs it, and choose the cuts; with ``at_most`` fewer than so many will do.

    Modules inside that ask for sizes or types are opened only where exits would else stand far from where they were
    wanted: that takes a slower tracer, and opening more may move exits that stand well.

    Raises:
        UserError: a name that is no module, a place that cannot be reached, more exits than places.
    """
    if not isinstance(exits, int):
        _check_names(model, exits)
    elif exits < 1:
        raise UserError(f"exits={exits} is not possible: expected 1 or more, the final one included")
    opener = Opener(model, input_size)
    refusal = plan = None
    try:
        plan = _plan(opener, exits, input_size, at_most)
    except UserError as error:
        refusal = error
    if (plan is None or plan.distance > NEAR) and opener.refused and not opener.uses_values:
        try:
            other = _plan(Opener(model, input_size, uses_values=True), exits, input_size, at_most)
        except UserError:
            pass  # the first tracer's reason, if there is one, is nearer to the model's code
        else:
            plan = other if plan is None or other.distance < plan.distance else plan
    if plan is None:
        assert refusal is not None
        raise refusal
    return plan


def _plan(opener: Opener, exits: int | Sequence[str], input_size: Sequence[int], at_most: bool) -> Plan:
    while True:
        try:
            facts = gather_facts(opener.trace, input_size)
        except StepError as error:
            if not opener.close(error.node, error.cause):
                raise UserError(
                    f"{type(opener.model).__name__} cannot be cut: '{error.node.name}' in its own forward fails on what is "
                    f"traced ({str(error).splitlines()[0] if str(error) else type(error.cause).__name__}); put that step into "
                    "a module of its own, which stays whole"
                ) from error.cause
            continue
        if not opener.open(_worth_opening(opener.trace, facts, exits)):
            break
    map_of = _Map(opener, facts)
    cuts = map_of.at_shares(exits, at_most) if isinstance(exits, int) else map_of.at_names(exits)
    names = [map_of.name(cut) for cut in cuts]
    for index, cut in enumerate(cuts):
        if names.count(names[index]) > 1:
            names[index] = f"{names[index]}.{facts.nodes[cut.place].name}"
    if isinstance(exits, int):
        distances = [
            abs(cut.share - wanted_share(number, len(cuts) + 1, at_most))
            for number, cut in enumerate(cuts, start=1)
        ]
    else:
        distances = map_of.distances
    return Plan(
        opener.trace,
        facts,
        tuple(cuts),
        tuple(names),
        tuple(map_of.cuts),
        map_of.tail,
        tuple(map_of.notes),
        max(distances, default=0.0),
    )


def _check_names(model: nn.Module, names: Sequence[str]) -> None:
    known = {path for path, _ in model.named_modules() if path}
    for name in names:
        if name not in known:
            raise UserError(
                f"no place '{name}' for an exit: no module has that path{nearest(name, _hints(known, name))}"
            )


def _hints(known: set[str], name: str) -> set[str]:
    # All paths of a large model are no help: those of about the same depth are.
    depth = name.count(".")
    return {path for path in known if path.count(".") == depth} or {path for path in known if "." not in path}


def _worth_opening(trace: Trace, facts: Facts, exits: int | Sequence[str]) -> list[str]:
    paths = []
    for node, macs in zip(facts.nodes, facts.macs, strict=True):
        if node.op != "call_module":
            continue
        path, module = str(node.target), trace.lookup(str(node.target))
        if isinstance(exits, int):
            wanted = macs * 3 * exits > facts.total_macs and exits > 1
        else:
            wanted = any(name.startswith(f"{path}.") for name in exits)
        # The classifier's features may stand inside the last module that holds everything.
        wanted = wanted or macs * 2 > facts.total_macs or type(module) is nn.Sequential
        if wanted:
            paths.append(path)
    return paths


class _Map:
    """The clean cuts of a traced model, with names."""

    def __init__(self, opener: Opener, facts: Facts) -> None:
        self.opener, self.trace, self.facts = opener, opener.trace, facts
        self.notes: list[str] = []
        self.distances: list[float] = []  # of exits that stand elsewhere than was asked for
        self.paths: dict[fx.Node, list[str]] = {}
        for path, node in self.trace.ends.items():
            self.paths.setdefault(node, []).append(path)
        cuts = find_cuts(facts)
        self.tail = self._find_tail(cuts)
        self.cuts = [cut for cut in cuts if cut.place < self.tail.place and 0 < cut.share < self.tail.share]

    def _find_tail(self, cuts: Sequence[Cut]) -> Cut:
        """The last cut with maps or tokens of several places; else with any map or token; else before the last layer."""
        weighted = [index for index, macs in enumerate(self.facts.macs) if macs > 0]
        before_last = [cut for cut in cuts if weighted and cut.place < weighted[-1]]
        if not before_last:
            raise UserError(
                f"{type(self.trace.model).__name__} has no place before its last layer through which everything flows, so there "
                f"is none for an exit{self._why_so_few(1)}"
            )
        single = [cut for cut in before_last if cut.tensors == 1 and cut.share >= _MOST]
        spatial = [cut for cut in single if len(cut.shapes[0]) >= 2]
        wide = [cut for cut in spatial if _several_places(cut.shapes[0])]
        if wide and spatial[-1].share - wide[-1].share <= _LITTLE:
            return self._as_a_map(wide)
        if spatial or single:
            return self._as_a_map(spatial or single)
        # Two streams, each with a classifier: the last exit looks at all of them.
        streams = [cut for cut in before_last if all(len(shape) >= 2 for shape in cut.shapes)]
        return (streams or before_last)[-1]

    def _as_a_map(self, cuts: Sequence[Cut]) -> Cut:
        """Among ``cuts`` behind the same layers as the last: the last before axes are joined, or values dropped."""
        group = [cut for cut in cuts if cut.share == cuts[-1].share]
        kept = [cut for cut in group if not self._drops(cut.live[0])] or group
        rank = max(len(cut.shapes[0]) for cut in kept)
        return [cut for cut in kept if len(cut.shapes[0]) == rank][-1]

    def _drops(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            return "dropout" in type(self.trace.lookup(str(node.target))).__name__.lower()
        return "dropout" in str(getattr(node.target, "__name__", node.target))

    # ------------------------------------------------------------ names

    def name(self, cut: Cut) -> str:
        """The shortest path of a module that ends here; else the step's own name behind the module in whose code it stands."""
        node = cut.live[0]
        if cut.tensors > 1:
            # The module that was done last.
            until_cut = reversed(self.facts.nodes[: cut.place + 1])
            node = next((done for done in until_cut if done in self.paths), self.facts.nodes[cut.place])
        if node in self.paths:
            return min(self.paths[node], key=lambda path: (path.count("."), len(path)))
        scope = next(reversed(enclosing_modules(node)), "")
        return f"{scope}.{node.name}" if scope else node.name

    def at_names(self, names: Sequence[str]) -> list[Cut]:
        """The cuts for ``names``, in order, each once."""
        cuts = {cut.place: cut for cut in map(self._at_name, names)}
        return [cuts[place] for place in sorted(cuts)]

    def _at_name(self, name: str) -> Cut:
        node, why = self._end_of(name)
        if node is None:
            raise UserError(f"no exit can stand at '{name}': {why}")
        place = self.facts.place[node]
        if place >= self.tail.place or self.facts.macs_until[place] >= self.facts.macs_until[self.tail.place]:
            if why is not None:
                raise UserError(f"no exit can stand at '{name}': {why}")
            raise UserError(
                f"exit '{name}' stands at the end of the network, where the final exit already is: leave it out"
            )
        exact = [cut for cut in self.cuts if cut.live == (node,) or cut.place == place]
        single = [cut for cut in exact if cut.tensors == 1]
        if single and why is None:
            return single[0]
        share = self.facts.macs_until[place] / self.facts.total_macs

        def distance(cut: Cut) -> tuple[float, int]:
            return abs(cut.share - share), abs(cut.place - place)

        within = [cut for cut in self.cuts if distance(cut)[0] <= NEAR]
        near = sorted(self._representatives([cut for cut in within if cut.tensors == 1]), key=distance)
        near += sorted((cut for cut in within if cut.tensors > 1), key=distance)
        chosen = next((cut for cut in near if cut.tensors == 1), None) or next(iter([*exact, *near]), None)
        reason = why or "what is computed beside it is needed later too"
        if chosen is None:
            closest = min(self.cuts, key=distance, default=None)
            where = (
                "there is none"
                if closest is None
                else f"the nearest is '{self.name(closest)}' at {closest.share:.0%}"
            )
            raise UserError(
                f"no exit can stand at '{name}' (at {share:.0%} of the MACs): {reason}, and no place nearby lets everything "
                f"flow through: {where}"
            )
        if chosen not in exact or why is not None:
            # At most NEAR, beyond which a better tracer is tried too.
            self.distances.append(max(abs(chosen.share - share), NEAR * 1.01 if why is not None else 0.0))
            self.notes.append(
                f"no exit can stand at '{name}', at {share:.1%} of the MACs: {reason}; it stands at "
                f"'{self.name(chosen)}' instead, at {chosen.share:.1%}"
            )
        return chosen

    def _end_of(self, name: str) -> tuple[fx.Node | None, str | None]:
        """The node with the output of the module ``name``; or of the nearest around it that was traced, and why."""
        if name in self.trace.ends:
            return self.trace.ends[name], None
        # A list is never called itself: its last member is meant.
        module = self.trace.model.get_submodule(name)
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            called = [path for path in self.trace.ends if path.startswith(f"{name}.")]
            if called:
                last = max(called, key=lambda path: self.facts.place[self.trace.ends[path]])
                return self.trace.ends[last], None
        parts = name.split(".")
        for length in range(len(parts) - 1, 0, -1):
            outer = ".".join(parts[:length])
            if outer in self.trace.ends:
                return (
                    self.trace.ends[outer],
                    f"'{outer}' can only be run as a whole{self.opener.why_whole(outer)}",
                )
        return None, "the model does not call it when it classifies"

    # ------------------------------------------------------------ shares

    def at_shares(self, exits: int, at_most: bool) -> list[Cut]:
        """The cuts nearest to the wanted shares; several tensors flow only where no cut of a single tensor is near.

        With ``at_most`` there are fewer cuts rather than such of several tensors.
        """
        like_tail = [cut for cut in self.cuts if len(cut.shapes[0]) >= min(2, len(self.tail.shapes[0]))]
        single = self._representatives([cut for cut in like_tail if cut.tensors == 1])
        several = self._representatives([cut for cut in like_tail if cut.tensors > 1])
        places = {cut.share: cut for cut in single}
        for number in range(1, exits):
            share = wanted_share(number, exits, at_most)
            if min((abs(known - share) for known in places), default=1.0) > (
                NEAR if at_most else 0.4 / exits
            ):
                near = (cut for cut in several if abs(cut.share - share) <= 0.5 / exits)
                places |= {cut.share: cut for cut in near if cut.share not in places}
        if len(places) < (1 if at_most else exits - 1):
            for cut in several:
                places.setdefault(cut.share, cut)
        ordered = sorted(places.values(), key=lambda cut: cut.place)
        if at_most:
            exits = min(exits, len(ordered) + 1)
        if exits > len(ordered) + 1:
            raise UserError(
                f"exits={exits} is not possible on this model: expected 1 to {len(ordered) + 1}, the final one included"
                f"{self._why_so_few(exits)}"
            )
        chosen: list[Cut] = []
        for number in range(1, exits):
            share = wanted_share(number, exits, at_most)
            free = [cut for cut in ordered if not chosen or cut.place > chosen[-1].place]
            free = free[: len(free) - (exits - 1 - number)]
            # At the end of a block rather than inside it, unless that is far.
            ends = [
                cut for cut in free if self._ends_block(cut) and abs(cut.share - share) <= _BLOCK_END / exits
            ]
            chosen.append(min(ends or free, key=lambda cut: abs(cut.share - share)))
        return chosen

    def _why_so_few(self, exits: int) -> str:
        """The largest module with parts that stays whole, if exits would have had room in it."""
        whole = [
            (macs, str(node.target))
            for node, macs in zip(self.facts.nodes, self.facts.macs, strict=True)
            if node.op == "call_module" and any(True for _ in self.trace.lookup(str(node.target)).children())
        ]
        macs, path = max(whole, default=(0, ""))
        if not path or macs * 2 * exits < self.facts.total_macs:
            return ""
        share = macs / max(1, self.facts.total_macs)
        return f"; '{path}', {share:.0%} of the MACs, stays whole{self.opener.why_whole(path)}"

    def _ends_block(self, cut: Cut) -> bool:
        return self._preference(cut)[1] < _NO_BLOCK

    def _representatives(self, cuts: Sequence[Cut]) -> list[Cut]:
        """A single cut between the same layers: at the end of the outermost block; else the last, after activations."""
        groups: dict[int, list[Cut]] = {}
        for cut in cuts:
            groups.setdefault(self.facts.macs_until[cut.place], []).append(cut)
        return [min(group, key=self._preference) for group in groups.values()]

    def _preference(self, cut: Cut) -> tuple[int, int, int]:
        node = self.facts.nodes[cut.place] if cut.tensors > 1 else cut.live[0]
        blocks = [
            path.count(".")
            for path in self.paths.get(node, [])
            if any(True for _ in self.trace.model.get_submodule(path).children())
        ]
        return cut.tensors, min(blocks, default=_NO_BLOCK), -cut.place


def _several_places(shape: Sequence[int]) -> bool:
    # A map in either layout, or tokens: more than one number beside the channels.
    return sorted(shape)[-2] > 1 if len(shape) == 2 else sorted(shape)[1] > 1
