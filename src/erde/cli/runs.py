"""Commands on runs and on logits: train, distill, export, calibrate, evaluate, compare."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from erde.cli.options import Json, finish, parse_share, settings_of
from erde.cli.show import show_calibrated, show_results
from erde.common.environment import check_one_process
from erde.common.errors import MAX_SEED, UserError, nearest

if TYPE_CHECKING:
    from erde.policy.points import Precision
    from erde.runs.folder import Run

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


def run(
    recipe: Recipe,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    as_json: Json = False,
) -> None:
    """Run the whole chain: train, distill, export, calibrate, evaluate, seal the bundle, write the report."""
    folder = _run(recipe, overrides, out, resume, "evaluate")
    show_results(folder, as_json)


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
        with _existing_alone(folder, "export") as run:
            export_arms(run)
        _next_step(folder, "export", "erde calibrate", as_json)
        return
    run = _existing_alone(folder, "export", read_only=True)
    arm = arm or run.config.export.arm
    if arm not in run.config.trained_arms:
        raise UserError(f"no arm '{arm}' in this run{nearest(arm, run.config.trained_arms)}")
    export_without_exits(run, arm, plain)
    print(f"{arm} without early exits: {plain} (input: uint8 images (N, H, W, C); output: logits)")
    finish(as_json, {"arm": arm, "path": str(plain)})


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
    seed: Annotated[
        int | None, typer.Option(min=0, max=MAX_SEED, help="Of the split into tune and certify.")
    ] = None,
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
    from erde.bundle.shipped import bundle_folder

    # The new bundle of a name lies here, and not beside the folder that the name stands for.
    named, target = target, bundle_folder(target)
    kind = _kind_of(target)
    if kind == "run":
        _refuse(given, f"{target} is a run: its own recipe says what to calibrate")
        from erde.runs.calibrating import calibrate as calibrate_arms

        with _existing_alone(target, "calibrate") as run:
            calibrate_arms(run)
        _next_step(target, "calibrate", "erde evaluate", as_json)
        return
    from erde.bundle.sealing import read as read_bundle
    from erde.calibration.recalibration import recalibrate_bundle, recalibrate_with_labels

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
        resolved = target.resolve() if named == target else Path(target.name).resolve()
        if labels_out is not None:
            _refuse({"--out": out}, "--labels-out writes a list of images, and no bundle")
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
        from erde.evaluation.logits_file import LogitsFile, calibrate_file, default_policy_path

        _refuse(
            {"--data": data, "--labels": labels, "--labels-out": labels_out},
            f"{target} holds logits, not a bundle",
        )
        out = out or default_policy_path(target)
        per_exit = None if macs is None else _numbers(macs, "--macs")
        if LogitsFile(target).has("tune"):
            _refuse({"--tune-share": tune_share, "--seed": seed}, f"{target} has its tune and certify images")
        calibrated = calibrate_file(
            target, settings, out, macs=per_exit, no_exit_macs=no_exit_macs, tune_share=share, seed=seed or 0
        )
        print(f"policy: {out}")
    show_calibrated(calibrated, settings, out, precision)
    finish(as_json, {"out": str(out), **calibrated.summary()})


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

        with _existing_alone(target, "evaluate") as run:
            evaluate_arms(run, again=True)
        if formats is not None:
            _write_figures([target], target / "figures", formats)
        show_results(target, as_json)
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
            elif point.certificate.guarantee == "disagreement":
                promise = f"promised: at most {point.certificate.max_risk:.2%} other answers, which are not counted here"
        print(
            f"{point.name}: accuracy {measured.accuracy:.2%}, MACs saved {measured.macs_saved:.1%}, "
            f"{measure} {share:.2%} ({promise})"
        )
    finish(as_json, evaluated.to_json())


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
    from erde.common.files import make_folder
    from erde.evaluation.run_folder import compare_runs, read_results
    from erde.report.compare_page import write_comparison

    results = read_results(runs)
    if len(results) < 2:
        raise UserError("give two runs or more to compare")
    make_folder(out.parent)
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
    if listed:
        print(
            f"labels: {listed:,} of {images:,} certify images need one; fill the column 'label' of {labels_out}, then give it "
            "with --labels and the same options"
        )
    else:
        print(
            f"labels: 0 of {images:,} certify images need one; give {labels_out} as it is with --labels and the same options"
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


def _existing_alone(folder: Path, command: str, read_only: bool = False) -> Run:
    """The run for a command that is one process."""
    check_one_process(command)
    return _existing(folder, read_only)


def _first_process_only() -> None:
    """End all processes of torchrun but the first: their work is done."""
    from erde.training import parallel

    if not parallel.is_first():
        sys.exit(0)


def _next_step(folder: Path, phase: str, following: str, as_json: bool) -> None:
    print(f"{phase}: done. Next: {following} {folder}")
    finish(as_json, {"run": str(folder), "phase": phase})
