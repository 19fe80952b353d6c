"""The page of a chain: what it gains, what is promised, where images leave, and what each network costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources

from markupsafe import Markup

from erde.bundle.manifest import Manifest
from erde.policy.cost import Cost
from erde.policy.points import Agreement, Measured
from erde.report.rendering import environment


@dataclass(frozen=True)
class ChainExit:
    """An exit of the chain: how many images leave there, and what they have cost by then."""

    name: str
    network: str
    rate: float
    macs: int
    milliseconds: float | None


@dataclass(frozen=True)
class ClockRow:
    """Milliseconds of a contender for one image a call, and its share of the last network's time."""

    name: str
    mean: float
    median: float
    percentile_95: float
    time_share: float


def chain_page(
    manifest: Manifest,
    cost: Cost,
    test: Measured | Agreement,
    gain: str,
    clock: Sequence[ClockRow],
    about_clock: str,
) -> str:
    """The page, in HTML, of the chain's default operating point as it was measured on ``test``.

    ``gain`` is a sentence or two, ``about_clock`` says of which machine and images the times are.
    """
    times = cost.exit_milliseconds or (None,) * len(manifest.stages)
    exits = [
        ChainExit(stage.exit_name, stage.network or manifest.name, rate, stage.macs, milliseconds)
        for stage, rate, milliseconds in zip(manifest.stages, test.exit_rates, times, strict=True)
    ]
    networks: dict[str, list[ChainExit]] = {}
    for chain_exit in exits:
        networks.setdefault(chain_exit.network, []).append(chain_exit)
    starts = manifest.networks()
    own = {}
    for name, start in zip(networks, starts, strict=True):
        last = start + len(networks[name]) - 1
        before = (manifest.stages[start - 1].macs, times[start - 1]) if start else (0, 0.0)
        ends = times[last]
        own[name] = (
            manifest.stages[last].macs - before[0],
            None if ends is None or before[1] is None else ends - before[1],
        )
    reached = {
        name: sum(other.rate for other in exits[start:]) for name, start in zip(networks, starts, strict=True)
    }
    style = (resources.files("erde.report") / "assets" / "report.css").read_text(encoding="utf-8")
    return (
        environment()
        .get_template("chain.html.j2")
        .render(
            style=Markup(style),
            manifest=manifest,
            point=manifest.point(None),
            test=test,
            labelled=isinstance(test, Measured),
            gain=gain,
            networks=networks,
            own=own,
            reached=reached,
            exits=exits,
            clock=clock,
            about_clock=about_clock,
        )
    )
