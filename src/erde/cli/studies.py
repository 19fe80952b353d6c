"""``erde study``. Everything but typer is imported inside, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erde.cli.options import Json, finish


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.yaml", help="Recipe, seeds and reference.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe, such as train.epochs=3."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The study's folder; runs/<name> without it.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue what was stopped, or a study that got more seeds.")
    ] = False,
    minutes: Annotated[
        float | None, typer.Option(min=0.1, help="Stop after so long; --resume continues.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a recipe with several seeds, and hold its arms against one of them: means, intervals, paired tests.

    Writes study.json and study.md into the study's folder, and a run folder for each seed.
    """
    from erde.common.time_limit import TimeIsUpError, time_limit
    from erde.recipe.study import load_study
    from erde.runs.study import TEXT, run_study
    from erde.training import loop

    loop.keeps_memory = True
    loaded = load_study(file)
    folder = out or Path("runs") / loaded.name
    try:
        with time_limit(minutes):
            summary = run_study(loaded, folder, overrides or [], resume=resume)
    except TimeIsUpError:
        print(f"stopped after {minutes:g} minutes; erde study {file} --out {folder} --resume continues it")
        finish(as_json, {"study": str(folder), "finished": False})
        return
    print((folder / TEXT).read_text(encoding="utf-8"))
    print(f"study: {folder}")
    finish(as_json, {"study": str(folder), "finished": True, "seeds": summary.seeds})
