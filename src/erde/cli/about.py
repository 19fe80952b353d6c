"""The commands that need no run: costs of a network, and the names of recipes, keys, backbones, ..."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from erde.cli.options import Json, finish
from erde.common.errors import UserError, nearest

if TYPE_CHECKING:
    from erde.networks.cost import NetworkCost

# Characters of the line on which exits are drawn.
_LINE = 64


def cost(
    backbone: Annotated[str, typer.Argument(help="A backbone's name; timm/<name> for one of timm's.")],
    exits: Annotated[str, typer.Option(help="How many, names separated by commas, or auto.")] = "3",
    head: Annotated[str, typer.Option(help="auto, erde, linear, conv, tower or native.")] = "auto",
    classes: Annotated[int, typer.Option(min=2)] = 10,
    input_size: Annotated[
        str | None, typer.Option(help="Channels x height x width; 3x32x32, or what timm gives the model.")
    ] = None,
    as_json: Json = False,
) -> None:
    """MACs and parameters per exit, heads included, and where the exits stand, before anything is trained."""
    from rich.console import Console
    from rich.table import Table

    from erde.networks.attach import attach_exits
    from erde.networks.backbones import build_backbone
    from erde.networks.cost import head_macs, network_cost

    size = _input_size(backbone, input_size)
    # The table names the last exit too, which is always there.
    names = [name for name in exits.split(",") if name != "final"]
    where: int | str | list[str] = int(exits) if exits.isdecimal() and len(exits) < 10 else names or 1
    where = "auto" if exits == "auto" else where
    model = build_backbone(backbone, classes=classes, channels=size[0], image_size=size[1:])
    network = attach_exits(model, where, input_size=size, head=head)
    costs, heads = network_cost(network, size), head_macs(network, size)
    shape = "x".join(str(length) for length in size)
    table = Table(title=f"{backbone}, {classes} classes, input {shape}: cumulative, heads included")
    for column in ("exit", "after", "MACs", "of no-exit", "its head", "parameters"):
        table.add_column(column, justify="left" if column == "after" else "right")
    for index, name in enumerate(costs.exit_names):
        share = costs.macs[index] / costs.no_exit_macs
        table.add_row(
            str(index),
            name,
            f"{costs.macs[index]:,}",
            f"{share:.1%}",
            f"{heads[index]:,}",
            f"{costs.parameters[index]:,}",
        )
    table.add_row("", "no exits", f"{costs.no_exit_macs:,}", "100.0%", "", f"{costs.no_exit_parameters:,}")
    Console(width=None if sys.stdout.isatty() else 110).print(table)
    print(draw(costs))
    finish(
        as_json, {name: getattr(costs, name) for name in costs.__dataclass_fields__} | {"head_macs": heads}
    )


def _input_size(backbone: str, text: str | None) -> tuple[int, int, int]:
    from erde.networks.backbones.timm import default_input_size
    from erde.recipe.backbones import is_timm

    if text is None:
        return default_input_size(backbone) if is_timm(backbone) else (3, 32, 32)
    try:
        channels, height, width = (int(part) for part in text.lower().split("x"))
        if min(channels, height, width) < 1:
            raise ValueError("no image has such a size")
    except ValueError as error:
        raise UserError(
            f"--input-size is '{text}', expected channels x height x width, such as 3x32x32"
        ) from error
    return channels, height, width


def draw(cost: NetworkCost) -> str:
    """A line from 0 to the last exit's MACs, with the number of each exit at its place."""
    total = cost.macs[-1]
    line = ["-"] * (_LINE + 1)
    for index, macs in enumerate(cost.macs):
        line[_place(macs, total)] = str(index)[-1]
    shares = _under(cost.macs, total, cost.no_exit_macs)
    return f"MACs 0 |{''.join(line)}| {total:,}\n        {shares}"


def _place(macs: int, total: int) -> int:
    return round(_LINE * macs / max(1, total))


def _under(macs: Sequence[int], total: int, no_exit: int) -> str:
    """Labels under the exits: MACs as shares of the network without exits, if there is room."""
    text = ""
    for exit_macs in macs:
        label = f"{exit_macs / max(1, no_exit):.0%}"
        start = max(0, _place(exit_macs, total) - len(label) // 2)
        if start > len(text) or not text:
            text = text.ljust(start) + label
    return text


def _list_recipes() -> dict[str, str]:
    from importlib import resources

    from erde.recipe.load import shipped_recipes

    folder = resources.files("erde.recipe") / "shipped"
    # A recipe's first line says what it is.
    return {
        name: (folder / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for name in shipped_recipes()
    }


def _list_backbones() -> dict[str, str]:
    from erde.recipe.backbones import BACKBONES, TIMM

    return {
        **{name: entry.summary for name, entry in BACKBONES.items()},
        f"{TIMM}<name>": "any classifier of timm's; timm.list_models() names them",
    }


def _list_losses() -> dict[str, str]:
    from erde.recipe.losses import LOSSES

    return {name: config.summary for name, config in LOSSES.items()}


def _list_scores() -> dict[str, str]:
    from erde.policy.rule import OWN_SCORES, SCORES, HarmParameters, agreement_run

    described = {name: function.__doc__ for name, function in OWN_SCORES.items()}
    described |= {"patience": agreement_run.__doc__, "harm": HarmParameters.score.__doc__}
    return {name: str(described[name]).splitlines()[0].replace("``", "") for name in SCORES}


def _list_datasets() -> dict[str, str]:
    from erde.data.sources import SHIPPED

    return {name: source.hub_id if source else "comes with scikit-learn" for name, source in SHIPPED.items()}


def _list_keys() -> dict[str, str]:
    from erde.recipe.keys import SECTIONS, keys_of

    return {
        f"{place}.{key.name}".lstrip("."): f"{key.meaning} {f'Default: {key.default}' if key.default else ''}"
        for place, section in SECTIONS.items()
        for key in keys_of(section)
        if key.type != "section"
    }


LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "recipes": _list_recipes,
    "keys": _list_keys,
    "backbones": _list_backbones,
    "losses": _list_losses,
    "scores": _list_scores,
    "datasets": _list_datasets,
}


def list_names(
    kind: Annotated[
        str, typer.Argument(metavar="WHAT", help="recipes, keys, backbones, losses, scores or datasets.")
    ],
    as_json: Json = False,
) -> None:
    """List shipped recipes, keys of a recipe, backbones, losses, scores or data sets, by name."""
    if kind not in LISTS:
        raise UserError(f"nothing to list under '{kind}'{nearest(kind, LISTS)}")
    names = LISTS[kind]()
    width = max(len(name) for name in names)
    for name, summary in names.items():
        print(f"{name:{width}}  {summary}".rstrip())
    finish(as_json, names)
