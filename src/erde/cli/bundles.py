"""The commands that take a bundle. Everything but typer is imported inside them, so that ``--help`` is quick."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from erde.cli.options import Bundle, Engine, Json, finish, parse_share, settings_of
from erde.cli.show import show_calibrated
from erde.common.errors import MAX_SEED, UserError, printable

# More than any machine has, and more than anybody waits for.
MAX_THREADS, MAX_IMAGES, MAX_ROUNDS = 1024, 1_000_000, 1_000_000

bundle_app = typer.Typer(no_args_is_help=True, help="Verify, describe and compare bundles.")


def predict(
    bundle: Bundle,
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Image files, or folders that are searched for them; the bundle's own samples without any. Or shards: "
            "Parquet files, or with --workers folders of them."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A .csv or .jsonl file; without it JSON lines go to the terminal. For shards a folder."
        ),
    ] = None,
    operating_point: Annotated[
        str | None, typer.Option(help="By name; the bundle's default without it.")
    ] = None,
    max_exit: Annotated[int | None, typer.Option(help="The last exit that may run.")] = None,
    max_macs: Annotated[float | None, typer.Option(help="The same, as MACs per image.")] = None,
    deadline_ms: Annotated[
        float | None,
        typer.Option(help="The same, as milliseconds per batch, by the profile.json in the bundle's folder."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help="Images at a time.")] = 32,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads; 1 per worker for shards.")
    ] = None,
    engine: Engine = "onnxruntime",
    workers: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="Shards at a time, each in a process.")
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help="Shards: let Ray's processes do it (the extra ray).")
    ] = False,
    image_column: Annotated[str, typer.Option(help="Shards: the column of images.")] = "image",
    keep: Annotated[
        list[str] | None, typer.Option(help="Shards: a column to copy to the answers; may be repeated.")
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Continue what was stopped; without this, begun output is refused."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Classify image files, or the rows of Parquet shards, with a bundle.

    Images that cannot be read or answered are skipped and listed at the end, or rows with a reason in shards; the
    exit code is then 3.
    """
    from erde.bundle.sealing import read_manifest
    from erde.bundle.shipped import sample_images

    images = images or sample_images(bundle)
    if not images:
        # A wrong name, or a folder of images in the bundle's place, is told as such.
        read_manifest(bundle)
        raise UserError("no images: give image files, or folders that are searched for them")
    limits: dict[str, Any] = {
        "operating_point": operating_point, "max_exit": max_exit, "max_macs": max_macs,
        "batch_size": batch_size, "engine": engine, "resume": resume,
    }  # fmt: skip
    if workers is not None or ray or any(path.suffix == ".parquet" for path in images):
        from erde.runtime.predict_shards import predict_shards

        if out is None or out.suffix in (".csv", ".jsonl"):
            raise UserError(
                f"--out is {out or 'not given'}, expected a folder for the answers to Parquet shards"
            )
        if deadline_ms is not None:
            raise UserError("--deadline-ms is not for Parquet shards: give --max-macs or --max-exit")
        summary = predict_shards(
            bundle, images, out, column=image_column, keep=keep or (), threads=threads or 1, workers=workers or 1,
            ray=ray, **limits,
        )  # fmt: skip
        skipped, word = summary["failed"], "failed"
    else:
        from erde.runtime.predict_files import predict_files

        if keep or image_column != "image":
            option = "--keep" if keep else "--image-column"
            raise UserError(
                f"{option} is for Parquet shards: give files that end in .parquet, or a folder of them with --workers"
            )
        summary = predict_files(bundle, images, out, deadline_ms=deadline_ms, threads=threads, **limits)
        skipped, word = summary["skipped"], "skipped"
    if out is not None:
        print(f"{summary['images']:,} images{f' ({skipped:,} {word})' if skipped else ''}: {out}")
    finish(as_json, summary)
    if skipped:
        raise typer.Exit(3)


def bench(
    bundle: Bundle,
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder of images, or a data set; the test split of the bundle's own one without it."
        ),
    ] = None,
    against: Annotated[
        list[Path] | None,
        typer.Option(help="Bundles and plain ONNX files; what lies beside the bundle in its run without it."),
    ] = None,
    point: Annotated[
        list[str] | None, typer.Option(help="Only this operating point; may be repeated.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Images per call.")] = "1,8,32,128",
    threads: Annotated[str, typer.Option(help="CPU threads.")] = "1,2",
    rounds: Annotated[int, typer.Option(min=2, max=MAX_ROUNDS, help="Rounds in which all take turns.")] = 20,
    images: Annotated[int, typer.Option(min=1, max=MAX_IMAGES, help="Images to draw from.")] = 2000,
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the draw of images and of the order of turns.")
    ] = 0,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            help="onnxruntime (without it) or openvino; repeat it to time both, each with all contenders."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="A .json file for all that was measured; the figure goes beside it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Time a bundle beside the same network without exits and smaller ones, taking turns on real images."""
    from erde.bench import race as benches
    from erde.bench.real_images import load_images
    from erde.bench.show import show, write_figure
    from erde.bundle.shipped import bundle_folder
    from erde.common.files import make_folder

    if out is not None and out.suffix != ".json":
        raise UserError(f"--out is {out}, expected a name that ends in .json")
    if out is not None and not os.access(make_folder(out.parent), os.W_OK):
        raise UserError(f"{out} cannot be written: choose a folder that you may write to")
    sizes = _whole_numbers("--batch-sizes", batch_sizes)
    counts = _whole_numbers("--threads", threads, MAX_THREADS)
    against = [bundle_folder(path) for path in against] if against else None
    pool, source = load_images(bundle, data, images, seed)
    result = benches.bench(
        bundle, pool, data=source, against=against, points=point,
        batch_sizes=sizes, threads=counts, rounds=rounds, seed=seed, engines=engine or ["onnxruntime"],
    )  # fmt: skip
    show(result)
    if out is not None:
        result.write(out)
        figure = write_figure(result, out.with_suffix(".png"))
        print(f"{out}" + (f" and {figure}" if figure else " (no figure: pip install 'erde[analysis]')"))
    finish(as_json, result.model_dump(mode="json"))


def cascade(
    networks: Annotated[
        list[Path],
        typer.Argument(
            help="Bundles and ONNX files, the cheapest first; the last one answers what the others are not sure of."
        ),
    ],
    data: Annotated[
        Path, typer.Option(help="A folder of images; sub-folders named by classes make them labelled.")
    ],
    out: Annotated[Path, typer.Option(help="The new bundle.")],
    max_risk: Annotated[
        list[str] | None,
        typer.Option(
            help="To certify, such as 0.5%, 1% without it; repeat it for several, the default point first."
        ),
    ] = None,
    confidence: Annotated[str | None, typer.Option(help="Of the certificates; 90% without it.")] = None,
    guarantee: Annotated[
        str | None,
        typer.Option(
            help="disagreement: labels are not looked at. With labels also risk (the default), net_drop or expected_risk."
        ),
    ] = None,
    preprocessing: Annotated[
        list[Path] | None,
        typer.Option(
            help="Of the ONNX files, in their order: a JSON file, such as preprocessor_config.json. One is for all."
        ),
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="A text file with a class name per line, in the order of the logits.")
    ] = None,
    tune_share: Annotated[
        str | None, typer.Option(help="Of the images, for tune, 50% without it; the rest certifies.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MAX_SEED, help="Of the split into tune and certify.")] = 0,
    as_json: Json = False,
) -> None:
    """Put networks that exist already one behind another, and certify how often their answers change. No training.

    Without labels the promise is about answers that differ from those of the last network.
    """
    from erde.bundle.sealing import read
    from erde.bundle.shipped import bundle_folder
    from erde.chains.cascading import cascade as build
    from erde.chains.cascading import read_class_names
    from erde.chains.preprocessing import read_preprocessing

    settings = settings_of({
        "max_risks": max_risk or ["1%"], "confidence": confidence, "guarantee": guarantee,
    })  # fmt: skip
    calibrated = build(
        [bundle_folder(path) for path in networks],
        data,
        out,
        settings=settings,
        preprocessing=[read_preprocessing(path) for path in preprocessing or ()],
        classes=None if classes is None else read_class_names(classes),
        tune_share=parse_share(tune_share or "50%", "--tune-share"),
        seed=seed,
    )
    print(f"bundle: {out}")
    show_calibrated(calibrated, settings, out, read(out).precision)
    finish(as_json, {"out": str(out), **calibrated.summary()})


def accelerate(
    model: Annotated[Path, typer.Argument(help="An ONNX classifier.")],
    images: Annotated[
        Path,
        typer.Option(
            help="A folder of images; no labels are needed. Sub-folders named by classes give some."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="A folder for the new bundle, its report, and what training leaves.")
    ],
    held_out: Annotated[
        Path | None,
        typer.Option(
            help="Other images to calibrate and measure on: needed if the model was trained on --images."
        ),
    ] = None,
    max_risk: Annotated[str, typer.Option(help="To certify.")] = "1%",
    minutes: Annotated[float, typer.Option(min=1, help="For all of it, roughly.")] = 60,
    preprocessing: Annotated[
        Path | None, typer.Option(help="Of the model: a JSON file, such as preprocessor_config.json.")
    ] = None,
    classes: Annotated[
        Path | None, typer.Option(help="A text file with a class name per line, in the order of the logits.")
    ] = None,
    loss: Annotated[str, typer.Option(help="By which the front is trained; erde list losses.")] = "kd",
    seed: Annotated[
        int, typer.Option(min=0, max=MAX_SEED, help="Of the split, the first weights and the data order.")
    ] = 0,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what was stopped.")] = False,
    as_json: Json = False,
) -> None:
    """Make somebody's ONNX classifier quicker: train a small network in front of it, and certify what changes.

    The classifier is not touched: it answers what the front is not sure of. Needs no labels.
    """
    from erde.acceleration.work import accelerate as work
    from erde.chains.cascading import read_class_names
    from erde.chains.preprocessing import read_preprocessing
    from erde.policy.points import Agreement

    result = work(
        model,
        images,
        out,
        held_out=held_out,
        max_risk=parse_share(max_risk, "--max-risk"),
        minutes=minutes,
        preprocessing=None if preprocessing is None else read_preprocessing(preprocessing),
        classes=None if classes is None else read_class_names(classes),
        loss=loss,
        seed=seed,
        resume=resume,
    )
    print(f"bundle: {result.bundle}\nreport: {out / 'report.html'}")
    if isinstance(result.test, Agreement) and result.gains:
        print(
            "labels of the few images where the networks differ give a promise about accuracy: "
            f"erde calibrate {result.bundle} --data OTHERS --labels-out ask.csv (OTHERS: images that trained neither network, "
            "and that this command has not seen)"
        )
    for line in result.lines():
        print(line)
    finish(as_json, {
        "bundle": str(result.bundle), "operating_point": result.point.name, "before_ms": result.before_ms,
        "after_ms": result.after_ms, "median_times": result.median_times, "test": result.test.model_dump(mode="json"),
    })  # fmt: skip


def _whole_numbers(option: str, text: str, highest: int = 100_000) -> list[int]:
    try:
        numbers = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UserError(f"{option} is '{text[:100]}', expected whole numbers such as 1,8,32") from error
    if numbers[0] < 1 or numbers[-1] > highest:
        raise UserError(f"{option} is '{text[:100]}', expected numbers from 1 to {highest:,}")
    return numbers


@bundle_app.command("verify", epilog="Example: erde bundle verify runs/a/bundle")
def bundle_verify(bundle: Bundle, as_json: Json = False) -> None:
    """Check the seal, every checksum, and that the stages give the logits of the reference sample."""
    from erde.bundle.sealing import seal_of
    from erde.runtime.session import Session

    session = Session(bundle)
    seal = seal_of(session.manifest)
    print(f"{bundle}: intact, {len(session.manifest.stages)} stages run here as sealed ({seal[:12]})")
    finish(as_json, {"bundle": str(bundle), "seal": seal})


@bundle_app.command("info", epilog="Example: erde bundle info runs/a/bundle")
def bundle_info(bundle: Bundle, as_json: Json = False) -> None:
    """Describe a bundle: exits, costs, operating points, promises."""
    from rich.console import Console
    from rich.markdown import Markdown

    from erde.bundle.card import model_card
    from erde.bundle.sealing import read

    manifest = read(bundle)
    Console(width=None if sys.stdout.isatty() else 120).print(Markdown(model_card(manifest)))
    finish(as_json, manifest.model_dump(mode="json", exclude={"reference_sample"}))


@bundle_app.command(
    "onnx", epilog="Example: erde bundle onnx runs/a/bundle model.onnx --operating-point risk-2"
)
def bundle_onnx(
    bundle: Bundle,
    out: Annotated[Path, typer.Argument(help="The .onnx file to write.")],
    operating_point: Annotated[
        str | None, typer.Option(help="By name; the bundle's default without it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a bundle as one ONNX file for single images, with preprocessing and exits inside, for any language.

    Its exits are branches, of which ONNX Runtime runs only the one that is taken.
    """
    from erde.chains.single_file import OUTPUTS, write_single_file

    point = write_single_file(bundle, out, operating_point)
    print(f"{out}: {point.name}; images uint8 (1, H, W, C) to {', '.join(OUTPUTS)}")
    finish(as_json, {"file": str(out), "operating_point": point.name})


@bundle_app.command("profile", epilog="Example: erde bundle profile runs/a/bundle --threads 1")
def bundle_profile(
    bundle: Bundle,
    threads: Annotated[
        int | None, typer.Option(min=1, max=MAX_THREADS, help="CPU threads, as the bundle will run with.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Images per call.")] = "1,2,4,8,16,32",
    rounds: Annotated[int, typer.Option(min=1, max=MAX_ROUNDS, help="Rounds; the median counts.")] = 30,
    engine: Engine = "onnxruntime",
    as_json: Json = False,
) -> None:
    """Time every stage on this machine and leave a profile.json in the bundle's folder, outside its seal.

    With it there are deadlines and latency budgets, and batches are thinned out only where that is quicker.
    """
    from erde.runtime.session import Session

    sizes = _whole_numbers("--batch-sizes", batch_sizes)
    profile = Session(bundle, threads=threads, engine=engine).profile(batch_sizes=sizes, rounds=rounds)
    for size, times in profile.milliseconds.items():
        stages = " + ".join(f"{milliseconds:.3f}" for milliseconds in times)
        print(f"{size:4} image{'s' if size > 1 else ' '} a call: {stages} = {sum(times):.3f} ms")
    print(f"{bundle / 'profile.json'}: {profile.machine}, threads {profile.threads or 'as the engine likes'}")
    finish(as_json, profile.model_dump(mode="json"))


@bundle_app.command("diff", epilog="Example: erde bundle diff runs/a/bundle runs/b/bundle")
def bundle_diff(first: Bundle, second: Bundle, as_json: Json = False) -> None:
    """List the fields in which two bundles differ."""
    from erde.bundle.sealing import differences, read

    changes = differences(read(first), read(second))
    for key, (before, after) in changes.items():
        print(f"{printable(key)}: {_short(before)} -> {_short(after)}")
    if not changes:
        print("the bundles are the same")
    fields = {key: {"first": before, "second": after} for key, (before, after) in changes.items()}
    finish(as_json, {"differences": len(changes), "fields": fields})


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
