"""The command line. Everything but typer is imported inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from erde.cli import about, bundles, serving
from erde.cli.options import Json, finish
from erde.common.errors import UserError, nearest, printable

if TYPE_CHECKING:
    from erde.evaluation.results import Cascade, Results, RuntimeAgreement
    from erde.policy.points import Precision
    from erde.runs.folder import Run

# typer brings its own copy of click, or uses the real one: either way this is the base of usage errors.
ClickException: type[Any] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


class SystemRefusalError(Exception):
    """Carries an OSError past typer, which would end a broken pipe with exit code 1."""

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self.error = error


class _Commands(typer.core.TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except OSError as error:
            raise SystemRefusalError(error) from error


app = typer.Typer(
    name="erde",
    cls=_Commands,
    help="Early-exit image classifiers: distilled exit by exit, certified, and run without torch.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)

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
    _open_closed_streams()
    if os.environ.get("WORLD_SIZE", "1") == "1":  # torchrun ends its processes itself
        signal.signal(signal.SIGTERM, _on_termination)
    try:
        if "" in sys.argv[1:]:
            raise UserError("one of the arguments is empty: is a variable of the shell not set?")
        code = app(standalone_mode=False)
        sys.stdout.flush()
    except TerminationError:
        _print_stopped()
        # The parent process sees the signal that ended this one.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    except SystemExit as stopped:
        # rich ends with 1, which nothing else here does, where the reader of its output went away.
        sys.exit(141 if stopped.code == 1 else stopped.code)
    except SystemRefusalError as refusal:
        _refused_by_system(refusal.error)
    except OSError as error:
        _refused_by_system(error)
    except UserError as error:
        _fail(str(error))
    except ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":  # it has printed the help
            sys.exit(2)
        _fail(f"{error.format_message()} (see --help)")
    except (KeyboardInterrupt, typer.Abort):
        _print_stopped()
        sys.exit(130)
    except ModuleNotFoundError as error:
        extra = {
            "scipy": "analysis",
            "plotly": "analysis",
            "jinja2": "analysis",
            "matplotlib": "analysis",
            "starlette": "serve",
            "uvicorn": "serve",
            "grpc": "serve",
            "google": "serve",
        }.get(str(error.name).split(".")[0], "train")
        if str(error.name).split(".")[0] == "erde":
            raise
        _fail(f"this command needs {error.name}, which is not installed: pip install 'erde[{extra}]'")
    if code == 130:  # typer turns an interrupt into this code, without a word
        _print_stopped()
    sys.exit(code if isinstance(code, int) else 0)


class TerminationError(BaseException):
    """SIGTERM: no error, like an interrupt from the keyboard; unfinished files are removed."""


def _on_termination(*_: object) -> None:
    raise TerminationError


def _open_closed_streams() -> None:
    """Open /dev/null for streams closed from the start: the next file would get their number."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115


def _print_stopped() -> None:
    command = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "")
    advice = {
        "run": "; it continues with --resume",
        "train": "; it continues with --resume",
        "distill": "; the same command continues it",
        "export": "; the same command continues it",
        "predict": "; with --out it continues with --resume",
    }
    with contextlib.suppress(OSError):
        print(f"stopped{advice.get(command, '')}", file=sys.stderr)


def _refused_by_system(error: OSError) -> None:
    """Report an error of the system (a disk, a permission, a name) in one line; a closed pipe is no error."""
    try:
        # Python flushes again at its end: without stdout it would fail there.
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)
    places = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    reason = error.strerror or str(error) or type(error).__name__
    _fail(f"{f'{places}: ' if places else ''}{reason}: choose a place that can be read and written")


def _fail(message: str) -> None:
    message = message if len(message) <= 2000 else f"{message[:2000]}..."
    # All processes of torchrun meet the same bad input: one line is enough. Once they are connected, an error may
    # be one process's own, from its part of the images or its memory.
    parallel = sys.modules.get("erde.training.parallel")
    if os.environ.get("LOCAL_RANK", "0") == "0" or (parallel is not None and parallel.processes() > 1):
        with contextlib.suppress(OSError):
            print(f"error: {printable(' '.join(message.split()))}", file=sys.stderr)
    sys.exit(2)


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
    from erde.runs.training import distill as distill_arms
    from erde.training import loop

    loop.keeps_memory = True
    with _existing(folder) as run:
        distill_arms(run, arm)
    _first_process_only()
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
    from erde.runs.exporting import export as export_arms
    from erde.runs.exporting import export_without_exits

    if plain is None:
        if arm is not None:
            raise UserError("--arm goes with --plain; without --plain all arms are exported")
        with _existing(folder) as run:
            export_arms(run)
        _next_step(folder, "export", "erde calibrate", as_json)
        return
    run = _existing(folder, read_only=True)
    arm = arm or run.config.export.arm
    if arm not in run.config.trained_arms:
        raise UserError(f"no arm '{arm}' in this run{nearest(arm, run.config.trained_arms)}")
    export_without_exits(run, arm, plain)
    print(f"{arm} without early exits: {plain} (input: uint8 images (N, H, W, C); output: logits)")
    finish(as_json, {"arm": arm, "path": str(plain)})


@app.command(epilog="Example: erde calibrate runs/a/bundle --data photos/ --max-risk 0.5% --confidence 95%")
def calibrate(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|BUNDLE|LOGITS.npz", help="A run, a sealed bundle, or saved logits.")
    ],
    data: Annotated[
        Path | None,
        typer.Option(
            help="For a bundle: labelled images, a sub-folder per class; for --guarantee disagreement any images."
        ),
    ] = None,
    labels_out: Annotated[
        Path | None,
        typer.Option(
            help="For a bundle: --data has no labels; write a CSV of the few images that need one, to fill in."
        ),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="For a bundle: the filled CSV; certifies on all images of --data.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The new bundle (BUNDLE-recalibrated), or the policy's JSON file.")
    ] = None,
    max_risk: Annotated[
        list[str] | None,
        typer.Option(help="To certify, such as 0.5%; repeat it for several, the default point first."),
    ] = None,
    confidence: Annotated[str | None, typer.Option(help="Of the certificates; 90% without it.")] = None,
    budget: Annotated[list[str] | None, typer.Option(help="A share of the MACs, such as 70%.")] = None,
    latency_budget: Annotated[
        list[str] | None, typer.Option(help="Mean time per image, such as 2ms; needs a profile.json.")
    ] = None,
    guarantee: Annotated[
        str | None,
        typer.Option(help="risk (the default), net_drop, expected_risk, or disagreement: no labels."),
    ] = None,
    score: Annotated[str | None, typer.Option(help="auto (the default), or one of erde list scores.")] = None,
    sharpness: Annotated[float | None, typer.Option(help="Of the score; chosen on tune without it.")] = None,
    ensemble: Annotated[
        str | None, typer.Option(help="auto (the default), none, arithmetic or geometric.")
    ] = None,
    tune_share: Annotated[
        str | None, typer.Option(help="Of the images, for tune, 50% without it; the rest certifies.")
    ] = None,
    macs: Annotated[
        str | None, typer.Option(help="For logits: cumulative MACs per exit, such as 5.2e6,8.9e6,12.5e6.")
    ] = None,
    no_exit_macs: Annotated[
        float | None, typer.Option(help="For logits: MACs of the network without exits.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the split into tune and certify.")] = None,
    as_json: Json = False,
) -> None:
    """Choose thresholds on one part of the images and certify them on the other.

    Of a RUN with its own recipe and splits; of a sealed BUNDLE on your own labelled images, without torch;
    of LOGITS that any program saved.
    """
    given: dict[str, Any] = {
        "--data": data, "--max-risk": max_risk, "--budget": budget, "--latency-budget": latency_budget,
        "--sharpness": sharpness, "--macs": macs, "--no-exit-macs": no_exit_macs, "--out": out,
        "--confidence": confidence, "--guarantee": guarantee, "--score": score, "--ensemble": ensemble,
        "--tune-share": tune_share, "--seed": seed, "--labels": labels, "--labels-out": labels_out,
    }  # fmt: skip
    kind = _kind_of(target)
    if kind == "run":
        _refuse(given, f"{target} is a run: its own recipe says what to calibrate")
        from erde.runs.calibrating import calibrate as calibrate_arms

        with _existing(target) as run:
            calibrate_arms(run)
        _next_step(target, "calibrate", "erde evaluate", as_json)
        return
    from erde.bundle.sealing import read as read_bundle
    from erde.calibration.recalibration import (
        parse_share,
        recalibrate_bundle,
        recalibrate_with_labels,
        settings_of,
    )

    few = labels is not None or labels_out is not None
    settings = settings_of({
        # A label costs somebody's time: no ladder of risks unless it is asked for.
        "max_risks": max_risk or (["1%"] if few else None),
        "confidence": confidence, "budgets": budget, "latency_budgets": latency_budget, "guarantee": guarantee,
        "score": score, "sharpness": sharpness, "ensemble": ensemble,
    })  # fmt: skip
    share = parse_share(tune_share or "50%", "--tune-share")
    precision: Precision = "fp32"
    if kind == "bundle":
        if data is None:
            raise UserError(
                f"{target} is a bundle: give labelled images with --data FOLDER, a sub-folder per class"
            )
        _refuse({key: given[key] for key in ("--macs", "--no-exit-macs")}, f"{target} knows its own MACs")
        resolved = target.resolve()
        out = out or resolved.with_name(f"{resolved.name}-recalibrated")
        if few:
            unused = {key: given[key] for key in ("--score", "--sharpness", "--ensemble")}
            _refuse(unused, "with few labels the bundle keeps its score, which was fitted where labels were")
        if labels_out is not None:
            _ask_for_labels(target, data, labels_out, settings, share, seed or 0, labels, as_json)
            return
        calibrated = (
            recalibrate_bundle(target, data, out, settings, share, seed or 0)
            if labels is None
            else recalibrate_with_labels(target, data, labels, out, settings, share, seed or 0)
        )
        precision = read_bundle(out).precision
        print(f"bundle: {out}")
    else:
        from erde.evaluation.logits_file import calibrate_file, default_policy_path

        _refuse(
            {"--data": data, "--labels": labels, "--labels-out": labels_out},
            f"{target} holds logits, not a bundle",
        )
        out = out or default_policy_path(target)
        per_exit = None if macs is None else _numbers(macs, "--macs")
        calibrated = calibrate_file(
            target, settings, out, macs=per_exit, no_exit_macs=no_exit_macs, tune_share=share, seed=seed or 0
        )
        print(f"policy: {out}")
    bundles.show_calibrated(calibrated, settings, out, precision)
    finish(as_json, {"out": str(out), **calibrated.summary()})


@app.command(epilog="Example: erde evaluate runs/a --json")
def evaluate(
    target: Annotated[Path, typer.Argument(metavar="RUN|LOGITS.npz", help="A run, or saved logits.")],
    policy: Annotated[
        Path | None,
        typer.Option(help="For logits: what erde calibrate wrote; LOGITS.policy.json without it."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="For logits: write all measures to this JSON file.")
    ] = None,
    formats: Annotated[
        str | None,
        typer.Option("--format", help="For a run: also figures and tables, of png,svg,csv,json."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure a run on the test split, seal its bundle, and write results.json and report.html anew.

    Of LOGITS with a policy: measure it on the test logits of the file.
    """
    if _kind_of(target) == "run":
        _refuse({"--policy": policy, "--out": out}, f"{target} is a run: its results stay in its folder")
        from erde.runs.evaluating import evaluate as evaluate_arms

        with _existing(target) as run:
            evaluate_arms(run, again=True)
        if formats is not None:
            _write_figures([target], target / "figures", formats)
        _show_results(target, as_json)
        return
    if _kind_of(target) == "bundle":
        raise UserError(
            f"{target} is a bundle: erde evaluate takes its run, or saved logits; erde calibrate takes a bundle"
        )
    _refuse({"--format": formats}, f"{target} holds logits, not a run")
    from erde.evaluation.logits_file import default_policy_path, evaluate_file

    evaluated = evaluate_file(target, policy or default_policy_path(target), out)
    for point, measured in evaluated.measured():
        measure, share, promise = "risk", measured.risk, "not certified"
        if point.certificate is not None:
            promise = f"promised: at most {point.certificate.max_risk:.2%}"
            if point.certificate.guarantee == "net_drop":
                measure, share = "net drop", measured.net_drop
        print(
            f"{point.name}: accuracy {measured.accuracy:.2%}, MACs saved {measured.macs_saved:.1%}, "
            f"{measure} {share:.2%} ({promise})"
        )
    finish(as_json, evaluated.to_json())


@app.command(epilog="Example: erde compare runs/a runs/b --out comparison.html")
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or results.json files.")],
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("comparison.html"),
    formats: Annotated[
        str | None,
        typer.Option("--format", help="Also figures and tables beside it, of png,svg,csv,json."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Runs side by side on one page, seeds grouped, with paired intervals where the test images are the same."""
    from erde.evaluation.run_folder import compare_runs, read_results
    from erde.report.compare_page import write_comparison

    results = read_results(runs)
    if len(results) < 2:
        raise UserError("give two runs or more to compare")
    comparisons = compare_runs(runs, results)
    write_comparison(results, out, comparisons)
    print(f"{len(runs)} runs, {len(comparisons)} paired comparisons between them: {out}")
    if formats is not None:
        _write_figures(runs, out.with_suffix(""), formats)
    finish(as_json, {"out": str(out), "runs": list(results), "comparisons": len(comparisons)})


def _ask_for_labels(
    bundle: Path,
    data: Path,
    labels_out: Path,
    settings: Any,
    share: float,
    seed: int,
    labels: Path | None,
    as_json: bool,
) -> None:
    from erde.calibration.recalibration import ask_for_labels

    listed, images = ask_for_labels(bundle, data, labels_out, settings, share, seed, labels)
    print(
        f"labels: {listed:,} of {images:,} certify images need one; fill the column 'label' of {labels_out}, then give it with "
        "--labels and the same options"
    )
    finish(as_json, {"labels_out": str(labels_out), "asked": listed, "certify_images": images})


def _write_figures(runs: list[Path], folder: Path, formats: str) -> None:
    from erde.evaluation.run_folder import read_results
    from erde.report import figures

    names = [name for part in formats.split(",") if (name := part.strip())]
    written = figures.write(read_results(runs), folder, names)
    print(f"figures and tables: {len(written)} files in {folder}")


def _kind_of(target: Path) -> str:
    """The kind of ``target``: a run, a bundle or a file of logits."""
    if target.suffix == ".npz" or target.is_file():
        return "logits"
    if (target / "manifest.json").exists():
        return "bundle"
    if (target / "config.yaml").exists():
        return "run"
    raise UserError(
        f"{target} is neither a run (config.yaml), nor a bundle (manifest.json), nor a file of logits (.npz)"
    )


def _refuse(given: dict[str, Any], why: str) -> None:
    for option, value in given.items():
        if value is not None:
            raise UserError(f"{option} does not apply: {why}")


def _numbers(text: str, option: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option} is '{text}': expected numbers separated by commas") from error


def _run(recipe: str, overrides: list[str] | None, out: Path | None, resume: bool, until: str) -> Path:
    from erde.recipe.load import load_config
    from erde.runs.chain import run as run_chain
    from erde.training import loop

    config = load_config(recipe, overrides or [])
    loop.keeps_memory = True
    name = f"{config.name}-seed{config.seed}"
    if out is None and Path(name).name != name:
        raise UserError(
            f"the recipe's name is '{config.name}', which cannot name a folder: name one with --out"
        )
    folder = out or Path("runs") / name
    run_chain(config, folder, resume=resume, until=until)
    _first_process_only()
    return folder


def _existing(folder: Path, read_only: bool = False) -> Run:
    from erde.runs.opening import existing_run

    return existing_run(folder, read_only=read_only)


def _first_process_only() -> None:
    """End all processes of torchrun but the first: their work is done."""
    from erde.training import parallel

    if not parallel.is_first():
        sys.exit(0)


def _next_step(folder: Path, phase: str, following: str, as_json: bool) -> None:
    print(f"{phase}: done. Next: {following} {folder}")
    finish(as_json, {"run": str(folder), "phase": phase})


def _show_results(folder: Path, as_json: bool) -> None:
    from erde.evaluation.results import Results

    results = Results.read(folder / "results.json")
    _print_results(results)
    print(f"bundle: {folder / 'bundle'}")
    if results.quantised is not None:
        quantised = results.quantised
        print(
            f"bundle in int8: {folder / 'bundle-int8'} ({quantised.bytes / quantised.fp32_bytes:.0%} of the size)"
        )
    print(f"report: {folder / 'report.html'}")
    finish(as_json, _summary(results, folder))


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
        point = arm.default_point()
        exits = " / ".join(f"{measured.accuracy * 100:.1f}" for measured in arm.exits)
        row = [
            name,
            arm.backbone,
            f"{arm.no_exit_macs / 1e6:.2f}",
            exits,
            f"{arm.exits[-1].accuracy * 100:.2f}",
        ]
        test = point.test
        if len(arm.exits) > 1 and test is not None:
            row += [point.name, f"{test.accuracy * 100:.2f}", f"{test.macs_saved:.1%}", f"{test.risk:.2%}"]
        table.add_row(*row)
    # Piped output has no width of its own: let the table take what it needs.
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    sealed: list[tuple[str, RuntimeAgreement]] = [(results.exported_arm, results.agreement)]
    if results.quantised is not None:
        sealed.append((results.quantised.arm, results.quantised.agreement))
    for name, agreement in sealed:
        _print_promise(results, name)
        print(
            f"{name}, runtime against evaluation: {agreement.disagreements} disagreements in {agreement.images:,} images "
            f"at {len(agreement.operating_points)} operating points ({agreement.band} images within "
            f"{agreement.band_width:g} of a threshold)"
        )
    print(f"{results.exported_arm}, torch against evaluation: {results.agreement.torch_disagreements}")
    if results.cascade is not None:
        _print_cascade(results.cascade)


def _print_cascade(cascade: Cascade) -> None:
    """The exported front's chain: what it saves and promises."""
    point = cascade.fronts[cascade.front].default_point()
    saved = f"{100 * point.test.macs_saved:.1f} % of its MACs saved on test. " if point.test else ""
    said = point.certificate.sentence() if point.certificate else "Nothing is promised."
    print(
        f"{cascade.front} before the {cascade.fallback}, against the {cascade.fallback} alone: {saved}{said}"
    )


def _print_promise(results: Results, name: str) -> None:
    arm = results.arms[name]
    certificate = arm.default_point().certificate
    print(
        f"{name}: {certificate.sentence(arm.precision) if certificate else 'nothing is promised, no image leaves early'}"
    )
    for left_out in arm.left_out:
        print(f"{name}, {left_out.name} left out: {left_out.note}")


def _summary(results: Results, folder: Path) -> dict[str, Any]:
    arms = {}
    for name, arm in results.arms.items():
        point = arm.default_point()
        arms[name] = {
            "exit_accuracy": [measured.accuracy for measured in arm.exits],
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
        "quantised": results.quantised.model_dump() if results.quantised else None,
        "cascade": results.cascade.model_dump(mode="json") if results.cascade else None,
    }


# ---------------------------------------------------------------- bundles

app.command(epilog="Example: erde predict runs/a/bundle photos/ --out answers.csv")(bundles.predict)
app.command(epilog="Example: erde accelerate model.onnx --images photos/ --out fast --minutes 60")(
    bundles.accelerate
)
app.command(epilog="Example: erde cascade front/bundle model.onnx --data photos/ --max-risk 1% --out chain")(
    bundles.cascade
)
app.command(epilog="Example: erde bench runs/a/bundle --out bench.json")(bundles.bench)
app.command(epilog="Example: erde serve runs/a/bundle digits=other/bundle --http-port 8000")(serving.serve)
app.add_typer(bundles.bundle_app, name="bundle")


# ---------------------------------------------------------------- what there is

app.command(epilog="Example: erde cost timm/efficientnet_b0 --exits 4")(about.cost)
app.command("list", epilog="Example: erde list recipes")(about.list_names)


if __name__ == "__main__":
    main()
