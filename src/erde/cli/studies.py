"""``erde study`` and ``erde ledger``. Everything but typer is imported inside, so that ``--help`` is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from erde.cli.bundles import MAX_THREADS
from erde.cli.options import Json, finish

if TYPE_CHECKING:
    from erde.evaluation.ledger import Ledger, Planned

Workers = Annotated[
    int | None,
    typer.Option(min=1, max=MAX_THREADS, help="Seeds at a time, each in a process; one without it."),
]
WithRay = Annotated[
    bool,
    typer.Option("--ray", help="Run the seeds in Ray's processes (the extra ray); all without --workers."),
]


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
    workers: Workers = None,
    ray: WithRay = False,
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
            summary = run_study(loaded, folder, overrides or [], resume=resume, workers=workers, ray=ray)
    except TimeIsUpError:
        print(f"stopped after {minutes:g} minutes; erde study {file} --out {folder} --resume continues it")
        finish(as_json, {"study": str(folder), "finished": False})
        return
    print((folder / TEXT).read_text(encoding="utf-8"))
    print(f"study: {folder}")
    finish(as_json, {"study": str(folder), "finished": True, "seeds": summary.seeds})


def ledger(
    file: Annotated[Path, typer.Argument(metavar="LEDGER.yaml", help="The studies whose runs are planned.")],
    run: Annotated[bool, typer.Option("--run", help="Train the seeds that have unfilled rows.")] = False,
    minutes: Annotated[
        float | None,
        typer.Option(min=0.1, help="The same, for so long; the same command continues what was cut."),
    ] = None,
    study: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this study; may be repeated.")
    ] = None,
    results: Annotated[Path, typer.Option(help="The folder of the rows' files.")] = Path("results"),
    runs: Annotated[Path, typer.Option(help="The folder of run folders.")] = Path("runs/ledger"),
    workers: Workers = None,
    ray: WithRay = False,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE.md", help="Write the tables of all filled seeds as Markdown.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Print which planned runs are filled, train the next ones, and make the tables from the rows' files.

    A row is an arm of a study with one seed; its file in --results is all that the tables need.
    """
    from erde.common.errors import UserError, nearest
    from erde.common.files import make_folder, write_text
    from erde.common.time_limit import TimeIsUpError, time_limit
    from erde.evaluation.ledger import Ledger
    from erde.recipe.study import load_ledger

    config = load_ledger(file)
    names = [planned.name for planned in config.studies]
    for name in study or ():
        if name not in names:
            raise UserError(f"--study: no study '{name}' in {file}{nearest(name, names)}")
    if study:
        config = config.model_copy(
            update={"studies": [planned for planned in config.studies if planned.name in study]}
        )
    if table is not None:
        make_folder(table.parent)
    read, finished = Ledger.read(config, results), True
    if run or minutes is not None:
        from erde.runs.study import fill_ledger
        from erde.training import loop

        loop.keeps_memory = True
        try:
            with time_limit(minutes):
                fill_ledger(read, results, runs, workers=workers, ray=ray)
        except TimeIsUpError:
            finished = False
        read = Ledger.read(config, results)
    _print_rows(read)
    if table is not None:
        from erde.report.ledger_text import ledger_text

        write_text(table, ledger_text(read))
        print(f"tables: {table}")
    if not finished:
        print(f"stopped after {minutes:g} minutes; the same command continues")
    finish(as_json, _summary_of(read, finished))


def _print_rows(ledger: Ledger) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in ("study", "arm"):
        table.add_column(column, no_wrap=True)
    for column in ("seed", "exits alone, %", "MACs saved", "at", "training, min"):
        table.add_column(column, justify="right", no_wrap=True)
    before = ledger.planned[0].study
    for planned in ledger.planned:
        if planned.study is not before:
            table.add_section()
        before = planned.study
        table.add_row(planned.study.name, planned.arm, str(planned.seed), *_cells(ledger, planned))
    # Piped output has no width of its own: let the table take what it needs.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    print(f"filled: {len(ledger.rows)} of {len(ledger.planned)} rows")


def _cells(ledger: Ledger, planned: Planned) -> list[str]:
    row = ledger.row(planned)
    if row is None:
        expected = ledger.expected_seconds(planned)
        return ["empty", "", "", "" if expected is None else f"about {expected / 60:.0f}"]
    saved = row.macs_saved
    return [
        " / ".join(f"{100 * measured.accuracy:.1f}" for measured in row.exits),
        "" if saved is None else f"{saved:.1%}",
        "" if saved is None else row.default_operating_point,
        "" if row.seconds is None else f"{row.seconds / 60:.1f}",
    ]


def _summary_of(ledger: Ledger, finished: bool) -> dict[str, object]:
    return {
        "planned": len(ledger.planned),
        "filled": len(ledger.rows),
        "finished": finished,
        "empty": [planned.file for planned in ledger.planned if planned.file not in ledger.rows],
    }
