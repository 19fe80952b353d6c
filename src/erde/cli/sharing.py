"""``erde push`` and ``erde pull``. Everything but typer is imported inside, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from erde.cli.options import Bundle, Json, finish
from erde.common.errors import UserError, printable

if TYPE_CHECKING:
    from erde.bundle.hub import Place

Repository = Annotated[str, typer.Argument(metavar="OWNER/NAME", help="A model repository of the hub.")]


def push(
    bundle: Bundle,
    repository: Repository,
    private: Annotated[
        bool, typer.Option("--private", help="Nobody else may see it; a public one that is there is refused.")
    ] = False,
    branch: Annotated[str | None, typer.Option(help="Made if it is not there; main without it.")] = None,
    message: Annotated[
        str | None, typer.Option(help="Of the commit; the bundle's name and seal without it.")
    ] = None,
    license_name: Annotated[
        str | None, typer.Option("--license", help="For the page, as the hub names it, such as apache-2.0.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Send a bundle to the Hugging Face hub: verified, in one commit, with its card as the page.

    The repository is made if it is not there. Needs the extra hub, and a token that may write (hf auth login).
    """
    from erde.bundle import hub
    from erde.bundle.sealing import seal_of

    place = _place(repository, branch, "--branch")
    address, manifest = hub.push(bundle, place, private=private, message=message, license_name=license_name)
    print(f"{place}: {address}\nseal: {seal_of(manifest)}")
    finish(as_json, {"bundle": str(place), "url": address, "seal": seal_of(manifest)})


def pull(
    repository: Repository,
    out: Annotated[Path, typer.Option(help="The new folder.")],
    revision: Annotated[
        str | None, typer.Option(help="A branch, a tag or a commit; main without it.")
    ] = None,
    seal: Annotated[
        str | None, typer.Option(help="Take no other bundle than the one with this seal.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Download a bundle from the Hugging Face hub into a new folder; what is not as sealed is refused.

    Needs the extra hub.
    """
    from erde.bundle import hub
    from erde.bundle.sealing import seal_of

    manifest = hub.pull(_place(repository, revision, "--revision"), out, seal)
    print(f"{out}: {printable(manifest.name)}, intact, seal {seal_of(manifest)}")
    finish(as_json, {"out": str(out), "seal": seal_of(manifest)})


def _place(repository: str, revision: str | None, option: str) -> Place:
    from erde.bundle.hub import Place

    place = Place.named(repository)
    if revision is None:
        return place
    if place.revision is not None:
        raise UserError(f"{repository} names a revision, and {option} is {revision}: give it once")
    return Place.named(f"{place.repository}@{revision}")
