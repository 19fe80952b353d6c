"""``erde serve`` and ``erde demo``. Everything but typer is imported inside, so that ``--help`` is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from erde.cli.options import Bundle, Json, finish
from erde.common.errors import UserError


def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE...",
            help="Bundles, digits-demo or hf://OWNER/NAME too; NAME=BUNDLE gives a model another name.",
        ),
    ],
    host: Annotated[
        str, typer.Option(help="The address to listen on; 0.0.0.0 for all of this machine.")
    ] = "127.0.0.1",
    http_port: Annotated[int, typer.Option(min=0, max=65535, help="Of HTTP; 0 for a free one.")] = 8000,
    grpc_port: Annotated[int, typer.Option(min=0, max=65535, help="Of gRPC; 0 for a free one.")] = 8001,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="CPU threads for a request.")] = 1,
    parallel: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Requests answered at once; CPUs divided by --threads without it."
        ),
    ] = None,
    max_batch: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Images in a request; more are refused.")
    ] = 32,
    max_queue: Annotated[
        int, typer.Option(min=0, max=1_000_000, help="Requests that may wait; more are told to come back.")
    ] = 64,
    max_body: Annotated[int, typer.Option(min=1, max=1024, help="Size of a request, in MiB.")] = 32,
    slo_ms: Annotated[
        float | None,
        typer.Option(
            min=0.1, help="Answer within so many milliseconds, waiting included: accuracy gives way first."
        ),
    ] = None,
    floor: Annotated[
        str | None, typer.Option(help="With --slo-ms: the cheapest operating point that may answer.")
    ] = None,
    processes: Annotated[
        bool,
        typer.Option(
            "--processes", help="Answer in processes, not threads: a crash of one is no crash of the server."
        ),
    ] = False,
    log_json: Annotated[
        bool,
        typer.Option("--log-json", help="Log in JSON, one line for each event and each request, on stderr."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer requests by the Open Inference Protocol v2, over HTTP and gRPC, until stopped; no torch.

    SIGTERM and Ctrl-C end it gracefully: requests under way are answered.
    """
    from erde.serving.server import Settings
    from erde.serving.server import serve as serve_bundles

    def when_ready(models: list[str], http: int, grpc: int) -> None:
        place = f"[{host}]" if ":" in host else host
        print(f"serving {', '.join(models)}: http://{place}:{http}, gRPC {place}:{grpc}", flush=True)

    settings = Settings(
        host, http_port, grpc_port, threads, parallel, max_batch, max_queue, max_body * 2**20,
        None if slo_ms is None else slo_ms / 1000, floor, log_json, processes,
    )  # fmt: skip
    outcomes = serve_bundles(bundles, settings, when_ready)
    total = sum(outcomes.values())
    parts = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(outcomes.items()))
    print(f"stopped after {total:,} requests{f' ({parts})' if parts else ''}")
    finish(as_json, {"models": len(bundles), "requests": outcomes})


def demo(
    bundle: Bundle,
    out: Annotated[
        Path | None,
        typer.Option(help="A folder for the page and all that it needs; not needed with --serve."),
    ] = None,
    runtime: Annotated[
        Path | None,
        typer.Option(
            help="The npm package onnxruntime-web, packed or unpacked; npm fetches it without this."
        ),
    ] = None,
    serve: Annotated[
        bool, typer.Option("--serve", help="Serve the folder on this machine, until stopped.")
    ] = False,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="With --serve: 8080 without it, 0 for a free one.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a page that runs a bundle in a browser: which exit an image takes, and what that saves.

    Its folder needs no network, and any web server can hold it.
    """
    import tempfile

    from erde.demo.server import serve_folder
    from erde.demo.writing import write_demo

    if port is not None and not serve:
        raise UserError("--port is the server's: give --serve too, or leave it out")
    if out is None and not serve:
        raise UserError("nowhere to write the page: give --out FOLDER, or --serve to look at it at once")
    with tempfile.TemporaryDirectory(prefix="erde-demo-") as scratch:
        folder = out or Path(scratch) / "demo"
        write_demo(bundle, folder, runtime)
        if out is not None:
            print(f"{out / 'index.html'} (a browser wants it from a web server: --serve is one)")
        if serve:
            serve_folder(
                folder,
                8080 if port is None else port,
                lambda address: print(f"serving {address} (Ctrl-C stops it)", flush=True),
            )
    finish(as_json, {"bundle": str(bundle), "out": None if out is None else str(out)})
