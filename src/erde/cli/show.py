"""What the commands print of results and of calibrated bundles."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from erde.cli.options import finish

if TYPE_CHECKING:
    from erde.calibration.policy_file import CalibratedPolicy
    from erde.calibration.settings import Settings
    from erde.evaluation.results import Cascade, Results, RuntimeAgreement
    from erde.policy.points import Precision


def show_calibrated(
    calibrated: CalibratedPolicy, settings: Settings, out: Path, precision: Precision
) -> None:
    """Print what was chosen and certified, and warn where nothing leaves early by default."""
    from erde.calibration.logits import point_name
    from erde.calibration.recalibration import describe

    for line in describe(calibrated, precision):
        print(line)
    if calibrated.default == "no-exit":
        others = [point.name for point in calibrated.points if point.name != "no-exit"]
        asked = point_name(settings.max_risks[0])
        named = f"name {' or '.join(others)} where you use it, or " if others else ""
        print(
            f"warning: {asked} could not be certified, so the default operating point is no-exit: {out} never leaves early "
            f"by default; {named}give more images or a larger risk",
            file=sys.stderr,
        )


def show_results(folder: Path, as_json: bool) -> None:
    """Print a run's results, and where its bundle and report are."""
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
