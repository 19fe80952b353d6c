"""The command line. Everything but typer is imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erde.errors import UserError, nearest

if TYPE_CHECKING:
    from erde.results import Arm, Results

# typer brings its own copy of click, or uses the real one: either way this is the base of usage errors.
ClickException: type[Any] = next(
    one for one in typer.BadParameter.__mro__ if one.__name__ == "ClickException"
)

app = typer.Typer(
    name="erde",
    help="Early-exit image classifiers: distilled exit by exit, certified, and run without torch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
bundle_app = typer.Typer(no_args_is_help=True, help="Verify, describe and compare bundles.")
app.add_typer(bundle_app, name="bundle")

Json = Annotated[bool, typer.Option("--json", help="Print a machine-readable JSON object as the last line.")]
Recipe = Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe, such as train.epochs=30.")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="The run folder; runs/<recipe>-seed<seed> without it.")
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Continue the run in --out, exactly where it was killed.")
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN", help="A run folder, as erde run or erde train made it.")
]


def main() -> None:
    """The console script: one line and exit code 2 for bad input; a traceback is a bug of erde's."""
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # it has printed the help
            sys.exit(2)
        _fail(f"{error.format_message()} (see --help)")
    except (KeyboardInterrupt, typer.Abort):
        print("stopped; a run continues with --resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away; closing stderr keeps Python from saying so again.
        sys.stderr.close()
        sys.exit(141)
    except ModuleNotFoundError as error:
        extra = {"scipy": "analysis", "plotly": "analysis"}.get(str(error.name).split(".")[0], "train")
        if str(error.name).split(".")[0] == "erde":
            raise
        _fail(f"this command needs {error.name}, which is not installed: pip install 'erde[{extra}]'")
    if code == 130:  # typer turns an interrupt into this code, without a word
        print("stopped; a run continues with --resume", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _finish(as_json: bool, value: dict[str, Any]) -> None:
    if as_json:
        print(json.dumps(value))


# ---------------------------------------------------------------- the chain


@app.command(epilog="Example: erde run digits train.epochs=20 --out runs/demo")
def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Run the whole chain: train, distill, export, calibrate, evaluate, seal the bundle, write the report."""
    folder = _run(recipe, overrides, out, resume, "evaluate")
    _show_results(folder, as_json)


@app.command(epilog="Example: erde train cifar10-subset --out runs/a")
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Start a run and train its teacher; erde distill comes next."""
    folder = _run(recipe, overrides, out, resume, "train")
    _next_step(folder, "train", "erde distill", as_json)


@app.command(epilog="Example: erde distill runs/a --arm erde")
def distill(
    folder: RunFolder,
    arm: Annotated[str | None, typer.Option(help="Only this arm of the recipe.")] = None,
    as_json: Json = False,
) -> None:
    """Train the arms of a run from its teacher."""
    _existing(folder).distill(arm)
    _next_step(folder, "distill", "erde export", as_json)


@app.command(epilog="Example: erde export runs/a --plain student.onnx --arm erde")
def export(
    folder: RunFolder,
    plain: Annotated[
        Path | None, typer.Option(help="Write one arm as a single ordinary ONNX file without early exits.")
    ] = None,
    arm: Annotated[
        str | None, typer.Option(help="With --plain: which arm; the recipe's export.arm without it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write every arm's ONNX stages, checked against torch, and their logits on the held-out splits."""
    run = _existing(folder)
    if plain is None:
        if arm is not None:
            raise UserError("--arm goes with --plain; without --plain all arms are exported")
        run.export()
        _next_step(folder, "export", "erde calibrate", as_json)
        return
    arm = arm or run.config.export.arm
    if arm not in run.arms:
        raise UserError(f"no arm '{arm}' in this run{nearest(arm, run.arms)}")
    run.export_plain(arm, plain)
    print(f"{arm} without early exits: {plain} (input: uint8 images (N, H, W, C); output: logits)")
    _finish(as_json, {"arm": arm, "path": str(plain)})


@app.command(epilog="Example: erde calibrate runs/a")
def calibrate(folder: RunFolder, as_json: Json = False) -> None:
    """Fit scores, temperatures and thresholds of a run on tune, and certify them on certify."""
    _existing(folder).calibrate()
    _next_step(folder, "calibrate", "erde evaluate", as_json)


@app.command(epilog="Example: erde evaluate runs/a --json")
def evaluate(folder: RunFolder, as_json: Json = False) -> None:
    """Measure a run on the test split, seal its bundle, and write results.json and report.html anew."""
    _existing(folder).evaluate(again=True)
    _show_results(folder, as_json)


def _run(recipe: str, overrides: list[str] | None, out: Path | None, resume: bool, until: str) -> Path:
    from erde.config import load_config
    from erde.pipeline import run as run_chain

    config = load_config(recipe, overrides or [])
    folder = out or Path("runs") / f"{config.name}-seed{config.seed}"
    run_chain(config, folder, resume=resume, until=until)
    return folder


def _existing(folder: Path) -> Any:
    from erde.pipeline import Run

    return Run.existing(folder)


def _next_step(folder: Path, phase: str, following: str, as_json: bool) -> None:
    print(f"{phase}: done. Next: {following} {folder}")
    _finish(as_json, {"run": str(folder), "phase": phase})


def _show_results(folder: Path, as_json: bool) -> None:
    from erde.results import Results

    results = Results.read(folder / "results.json")
    _print_results(results)
    print(f"bundle: {folder / 'bundle'}\nreport: {folder / 'report.html'}")
    _finish(as_json, _summary(results, folder))


def _default_point(arm: Arm) -> Any:
    return next(point for point in arm.operating_points if point.name == arm.default_operating_point)


def _print_results(results: Results) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"{results.name}, seed {results.seed}: test split, {results.agreement.images:,} images"
    )
    table.add_column("arm", no_wrap=True)
    table.add_column("backbone", no_wrap=True)
    for column in (
        "MACs (M)",
        "exits alone, %",
        "no early exit, %",
        "at",
        "accuracy, %",
        "MACs saved",
        "risk",
    ):
        table.add_column(column, justify="right", no_wrap=column in ("exits alone, %", "at"))
    for name, arm in results.arms.items():
        point = _default_point(arm)
        exits = " / ".join(f"{one.accuracy * 100:.1f}" for one in arm.exits)
        row = [
            name,
            arm.backbone,
            f"{arm.no_exit_macs / 1e6:.2f}",
            exits,
            f"{arm.exits[-1].accuracy * 100:.2f}",
        ]
        if len(arm.exits) > 1:
            state = point.name if point.certificate or point.kind != "risk" else f"{point.name} (none)"
            test = point.test
            row += [state, f"{test.accuracy * 100:.2f}", f"{test.macs_saved:.1%}", f"{test.risk:.2%}"]
        table.add_row(*row)
    # Piped output has no width of its own: let the table take what it needs.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    point = _default_point(results.arms[results.exported_arm])
    print(f"{results.exported_arm}: {point.certificate.sentence() if point.certificate else point.note}")
    for other in results.arms[results.exported_arm].operating_points:
        if other.kind == "risk" and other.certificate is None and other is not point:
            print(f"{results.exported_arm}, {other.name}: {other.note}")
    agreement = results.agreement
    print(
        f"runtime against evaluation: {agreement.disagreements} disagreements in {agreement.images:,} images at "
        f"{len(agreement.operating_points)} operating points ({agreement.band} images within "
        f"{agreement.band_width:g} of a threshold); torch against evaluation: {agreement.torch_disagreements}"
    )


def _summary(results: Results, folder: Path) -> dict[str, Any]:
    arms = {}
    for name, arm in results.arms.items():
        point = _default_point(arm)
        arms[name] = {
            "exit_accuracy": [one.accuracy for one in arm.exits],
            "operating_point": point.name,
            "certified": point.certificate is not None,
            "accuracy": point.test.accuracy if point.test else None,
            "macs_saved": point.test.macs_saved if point.test else None,
        }
    return {
        "run": str(folder),
        "exported_arm": results.exported_arm,
        "arms": arms,
        "agreement": results.agreement.model_dump(),
        "bundle_seal": results.bundle_seal,
    }


# ---------------------------------------------------------------- bundles


@app.command(epilog="Example: erde predict runs/a/bundle photos/ --out answers.csv")
def predict(
    bundle: Annotated[Path, typer.Argument(help="A bundle's folder.")],
    images: Annotated[list[Path], typer.Argument(help="Image files, or folders that are searched for them.")],
    out: Annotated[
        Path | None, typer.Option(help="A .csv or .jsonl file; without it JSON lines go to the terminal.")
    ] = None,
    operating_point: Annotated[
        str | None, typer.Option(help="By name; the bundle's default without it.")
    ] = None,
    max_exit: Annotated[int | None, typer.Option(help="The last exit that may run.")] = None,
    max_macs: Annotated[float | None, typer.Option(help="The same, as MACs per image.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    as_json: Json = False,
) -> None:
    """Classify image files with a bundle; needs the base install only."""
    from erde.prediction import predict_files

    summary = predict_files(
        bundle,
        images,
        out,
        operating_point=operating_point,
        max_exit=max_exit,
        max_macs=max_macs,
        batch_size=batch_size,
        threads=threads,
    )
    if out is not None:
        print(f"{summary['images']:,} images: {out}")
    _finish(as_json, summary)


@bundle_app.command("verify", epilog="Example: erde bundle verify runs/a/bundle")
def bundle_verify(bundle: Path, as_json: Json = False) -> None:
    """Check the seal, every checksum, and that the stages give the logits of the reference sample."""
    from erde.bundle import canonical_hash
    from erde.runtime import Session

    session = Session(bundle)
    seal = canonical_hash(session.manifest.model_dump(mode="json"))
    print(f"{bundle}: intact, {len(session.manifest.stages)} stages run here as sealed ({seal[:12]})")
    _finish(as_json, {"bundle": str(bundle), "seal": seal})


@bundle_app.command("info", epilog="Example: erde bundle info runs/a/bundle")
def bundle_info(bundle: Path, as_json: Json = False) -> None:
    """Describe a bundle: exits, costs, operating points, promises."""
    from rich.console import Console
    from rich.markdown import Markdown

    from erde.bundle import model_card, read

    manifest = read(bundle)
    Console(width=None if sys.stdout.isatty() else 120).print(Markdown(model_card(manifest)))
    _finish(as_json, manifest.model_dump(mode="json", exclude={"reference_sample"}))


@bundle_app.command("diff", epilog="Example: erde bundle diff runs/a/bundle runs/b/bundle")
def bundle_diff(first: Path, second: Path, as_json: Json = False) -> None:
    """List the fields in which two bundles differ."""
    from erde.bundle import differences, read

    found = differences(read(first), read(second))
    for key, (before, after) in found.items():
        print(f"{key}: {_short(before)} -> {_short(after)}")
    if not found:
        print("the bundles are the same")
    _finish(as_json, {"differences": len(found)})


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------- what there is


@app.command(epilog="Example: erde cost resnet56 --exits 4")
def cost(
    backbone: Annotated[str, typer.Argument(help="A backbone's name.")],
    exits: Annotated[str, typer.Option(help="How many, or names separated by commas.")] = "3",
    head: Annotated[str, typer.Option(help="erde or linear.")] = "erde",
    classes: Annotated[int, typer.Option(min=2)] = 10,
    input_size: Annotated[str, typer.Option(help="Channels x height x width.")] = "3x32x32",
    as_json: Json = False,
) -> None:
    """MACs and parameters per exit, heads included, before anything is trained."""
    from rich.console import Console
    from rich.table import Table

    from erde.backbones import build_backbone
    from erde.cost import network_cost
    from erde.exits import attach_exits

    try:
        channels, height, width = (int(part) for part in input_size.lower().split("x"))
    except ValueError as error:
        raise UserError(
            f"--input-size is '{input_size}', expected channels x height x width, such as 3x32x32"
        ) from error
    size = (channels, height, width)
    where: int | list[str] = int(exits) if exits.isdigit() else exits.split(",")
    network = attach_exits(
        build_backbone(backbone, classes=classes, channels=channels), where, input_size=size, head=head
    )
    found = network_cost(network, size)
    table = Table(title=f"{backbone}, {classes} classes, input {input_size}: cumulative, heads included")
    for column in ("exit", "after", "MACs", "of no-exit", "parameters"):
        table.add_column(column, justify="left" if column == "after" else "right")
    for index, name in enumerate(found.exit_names):
        share = found.macs[index] / found.no_exit_macs
        table.add_row(
            str(index), name, f"{found.macs[index]:,}", f"{share:.1%}", f"{found.parameters[index]:,}"
        )
    table.add_row("", "no exits", f"{found.no_exit_macs:,}", "100.0%", f"{found.no_exit_parameters:,}")
    Console(width=None if sys.stdout.isatty() else 100).print(table)
    _finish(as_json, {name: getattr(found, name) for name in found.__dataclass_fields__})


def _list_recipes() -> dict[str, str]:
    from importlib import resources

    from erde.config import shipped_recipes

    folder = resources.files("erde") / "recipes"
    # A recipe's first line says what it is.
    return {
        name: (folder / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
        for name in shipped_recipes()
    }


def _list_backbones() -> dict[str, str]:
    from erde.backbones import BACKBONES

    return dict.fromkeys(BACKBONES, "")


def _list_losses() -> dict[str, str]:
    from erde.losses import LOSSES

    return {name: spec.summary for name, spec in LOSSES.items()}


def _list_scores() -> dict[str, str]:
    from erde.policy import SCORES

    return {
        name: str(function.__doc__).splitlines()[0].replace("``", "") for name, function in SCORES.items()
    }


def _list_datasets() -> dict[str, str]:
    from erde.sources import SHIPPED

    return {name: source.hub_id if source else "comes with scikit-learn" for name, source in SHIPPED.items()}


LISTS: dict[str, Callable[[], dict[str, str]]] = {
    "recipes": _list_recipes,
    "backbones": _list_backbones,
    "losses": _list_losses,
    "scores": _list_scores,
    "datasets": _list_datasets,
}


@app.command("list", epilog="Example: erde list recipes")
def list_names(
    what: Annotated[str, typer.Argument(help="recipes, backbones, losses, scores or datasets.")],
    as_json: Json = False,
) -> None:
    """What is shipped, by name."""
    if what not in LISTS:
        raise UserError(f"nothing to list under '{what}'{nearest(what, LISTS)}")
    found = LISTS[what]()
    width = max(len(name) for name in found)
    for name, summary in found.items():
        print(f"{name:{width}}  {summary}".rstrip())
    _finish(as_json, found)


if __name__ == "__main__":
    main()
