"""On how many of timm's models exits can be put: draws some by a fixed seed, tries each, writes a table.

    python benchmarks/attach_coverage.py                    # attach all that are drawn, and compare with the model
    python benchmarks/attach_coverage.py --export 60        # then export the first 60 of them

Each model is tried in a process of its own with a time limit. Weights are random: what is looked at is whether the
network with exits computes what the model computes, in evaluation and in training, and whether its ONNX stages do.
Images are as small as the model takes. What is done already stands in the JSON file and is not tried again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from erde.common.errors import UserError
from erde.exporting.onnx_files import export_stages
from erde.networks.attach import attach_exits
from erde.networks.backbones.timm import import_timm, timm_model
from erde.recipe.backbones import TIMM

RESULTS = Path(__file__).parent / "results"
SEED, COUNT = 20, 200
MOST_PARAMETERS, LARGEST_SIDE = 50_000_000, 256
SIDES = (64, 128)
EXITS, CLASSES = 3, 10
TOLERANCE = 1e-5
NOISE = 0.02


def in_process(work: Callable[[str], dict[str, Any]], name: str, seconds: float) -> dict[str, Any]:
    """``work(name)`` in a process of its own, which cannot take this one down."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def run() -> None:
        try:
            send.send(work(name))
        except Exception as error:
            # A bug: it must not look like a refusal.
            send.send(
                {"reason": f"BUG {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}
            )

    process = context.Process(target=run)
    process.start()
    try:
        if receive.poll(seconds):
            return dict(receive.recv())
        return {"reason": f"took more than {seconds:.0f} s"}
    except EOFError:
        return {"reason": "the process ended without an answer, most likely for want of memory"}
    finally:
        process.kill()
        process.join()


def describe(name: str) -> dict[str, Any]:
    """Parameters with timm's own classes, without making weights."""
    timm = import_timm()
    with torch.device("meta"):
        model = timm.create_model(name)
    return {"parameters": sum(one.numel() for one in model.parameters())}


def draw(count: int) -> list[dict[str, Any]]:
    """``count`` models by the seed, among those of at most 50 M parameters and 256 pixels a side."""
    timm = import_timm()
    names = sorted(timm.list_models())
    random.Random(SEED).shuffle(names)
    drawn: list[dict[str, Any]] = []
    for name in names:
        side = max(timm.get_pretrained_cfg(name).input_size[1:])
        if side > LARGEST_SIDE:
            continue
        found = in_process(describe, name, 120)
        if found.get("parameters", 0) > MOST_PARAMETERS:
            continue
        drawn.append({"name": name, "own_side": side, **found})
        if len(drawn) == count:
            break
    return drawn


def build(name: str, own_side: int) -> tuple[torch.nn.Module, int]:
    """The model for the smallest images that it takes, and their side."""
    for side in (*(one for one in SIDES if one < own_side), own_side):
        try:
            torch.manual_seed(SEED)
            model = timm_model(TIMM + name, classes=CLASSES, image_size=(side, side))
            with torch.no_grad():
                # Many branches and classifiers start at zero: nothing would be compared.
                for one in model.parameters():
                    one.add_(NOISE * torch.randn_like(one))
                model.eval()(torch.zeros(2, 3, side, side))
        except Exception:
            if side == own_side:
                raise
        else:
            return model, side
    raise AssertionError


def attach(name: str, own_side: int) -> dict[str, Any]:
    """Attached, and the largest difference of the final logits in evaluation and in training, relative."""
    started = time.perf_counter()
    model, side = build(name, own_side)
    found: dict[str, Any] = {"side": side, "attached": False, "equal": False}
    try:
        network = attach_exits(model, EXITS, input_size=(3, side, side))
    except UserError as error:
        return {**found, "reason": str(error), "seconds": round(time.perf_counter() - started, 1)}
    images = torch.randn(3, 3, side, side, generator=torch.Generator().manual_seed(1))
    differences = []
    for training in (False, True):
        with torch.no_grad():
            torch.manual_seed(2)
            expected = model.train(training)(images)
            torch.manual_seed(2)
            got = network.train(training).forward_final(images)
        differences.append(float((got - expected).abs().max() / expected.abs().max().clamp(min=1)))
    with torch.no_grad():
        crossing = [
            1 if isinstance(one, torch.Tensor) else len(one)
            for one in network.eval()._stage_outputs(images[:1])
        ]
    return {
        **found,
        "attached": True,
        "equal": max(differences) <= TOLERANCE,
        "difference": max(differences),
        "spread": float(expected.std(dim=0).max()),
        "exits": network.exit_names,
        "tensors": max(crossing),
        "reason": "" if max(differences) <= TOLERANCE else "other logits than the model's",
        "seconds": round(time.perf_counter() - started, 1),
    }


def export(name: str, own_side: int) -> dict[str, Any]:
    """Exported: stage by stage the same as torch, for every exit and batch size (erde checks that itself)."""
    started = time.perf_counter()
    model, side = build(name, own_side)
    network = attach_exits(model, EXITS, input_size=(3, side, side))
    try:
        with tempfile.TemporaryDirectory() as folder:
            export_stages(network, (side, side, 3), (0.5,) * 3, (0.25,) * 3, Path(folder) / "stages")
    except UserError as error:
        return {
            "exported": False,
            "export_reason": str(error),
            "export_seconds": round(time.perf_counter() - started, 1),
        }
    return {"exported": True, "export_reason": "", "export_seconds": round(time.perf_counter() - started, 1)}


def totals(rows: list[dict[str, Any]]) -> list[str]:
    """The shares, in words."""
    tried = [row for row in rows if "attached" in row or row.get("reason")]
    attached = [row for row in tried if row.get("attached")]
    equal = [row for row in tried if row.get("equal")]
    exported = [row for row in rows if "exported" in row]
    good = [row for row in exported if row["exported"]]
    lines = [f"attached {len(attached)} of {len(tried)}, attached and equal {len(equal)} of {len(tried)}"]
    if tried:
        lines[0] += f" ({len(equal) / len(tried):.1%})"
    if exported:
        lines.append(
            f"exported {len(good)} of {len(exported)} that were tried ({len(good) / len(exported):.1%})"
        )
    return lines


def to_markdown(rows: list[dict[str, Any]], timm_version: str) -> str:
    """The table for people: totals, failures with their reasons, then every model."""
    lines = [
        "# Exits on timm's models",
        "",
        f"{len(rows)} models drawn by seed {SEED} from timm {timm_version}'s, at most {MOST_PARAMETERS:,} parameters and "
        f"{LARGEST_SIDE} pixels a side; torch {torch.__version__}; {EXITS} exits, random weights. Made by "
        "`benchmarks/attach_coverage.py`.",
        "",
        *(f"- {line}" for line in totals(rows)),
        "",
        "| model | pixels | attached | equal | tensors | exported | why not |",
        "|---|---:|---|---|---:|---|---|",
    ]
    signs = {True: "yes", False: "**no**", None: ""}
    for row in sorted(rows, key=lambda row: row["name"]):
        why = " ".join(filter(None, (row.get("reason"), row.get("export_reason")))).replace("|", "\\|")
        lines.append(
            f"| {row['name']} | {row.get('side', '')} | {signs[row.get('attached')]} | {signs[row.get('equal')]} | "
            f"{row.get('tensors', '')} | {signs[row.get('exported')]} | {why} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=RESULTS / "attach-coverage.json")
    parser.add_argument("--count", type=int, default=COUNT)
    parser.add_argument("--export", type=int, default=0, help="export this many of them, the first drawn")
    parser.add_argument(
        "--part", default="0/1", help="with 1/2, the second half: for two processes with an --out each"
    )
    parser.add_argument("--seconds", type=float, default=300, help="for each model")
    parser.add_argument("--again", action="store_true", help="try those again that failed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    timm_version = import_timm().__version__
    rows: list[dict[str, Any]] = []
    if arguments.out.exists():
        rows = json.loads(arguments.out.read_text(encoding="utf-8"))["models"]
    if len(rows) != arguments.count:
        rows = draw(arguments.count)

    def save() -> None:
        value = {
            "seed": SEED,
            "timm": timm_version,
            "torch": torch.__version__,
            "totals": totals(rows),
            "models": rows,
        }
        arguments.out.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
        arguments.out.with_suffix(".md").write_text(to_markdown(rows, timm_version), encoding="utf-8")

    part, parts = (int(one) for one in arguments.part.split("/"))
    save()
    for number, row in enumerate(rows):
        if number % parts != part:
            continue
        side = row["own_side"]
        if "seconds" not in row or (arguments.again and not row.get("equal")):
            row.update(seconds=arguments.seconds, reason="")
            row.update(in_process(partial(attach, own_side=side), row["name"], arguments.seconds))
            print(f"{number} {row['name']}: equal {row.get('equal')} {row['reason']}", flush=True)
            save()
        wanted = number < arguments.export and row.get("equal")
        if wanted and ("exported" not in row or (arguments.again and not row["exported"])):
            row.update(exported=False, export_reason="")
            found = in_process(partial(export, own_side=side), row["name"], arguments.seconds)
            row.update({"export_reason": found.pop("reason", ""), **found})
            print(f"{number} {row['name']}: exported {row['exported']} {row['export_reason']}", flush=True)
            save()
    for line in totals(rows):
        print(line)


if __name__ == "__main__":
    main()
