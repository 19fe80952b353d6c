"""The model card of a bundle: network, promises, costs, use."""

from __future__ import annotations

from erde.bundle.manifest import Manifest
from erde.common.errors import in_one_line, printable


def model_card(manifest: Manifest) -> str:
    """The bundle's README, in Markdown; it needs the base install only."""
    height, width, channels = manifest.input_shape
    lines = [
        f"# {manifest.name}",
        "",
        f"An image classifier with {len(manifest.stages)} exits, {len(manifest.classes)} classes, for images of "
        f"{height}x{width} pixels and {channels} channel{'s' if channels > 1 else ''} ({_precision_in_words(manifest)}).",
        "",
        "| exit | name | MACs (cumulative, heads included) | parameters |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {index} | {stage.exit_name} | {stage.macs:,} | {stage.parameters:,} |"
        for index, stage in enumerate(manifest.stages)
    ]
    lines += [
        "",
        f"The same network without exits: {manifest.no_exit_macs:,} MACs, {manifest.no_exit_parameters:,} parameters.",
        "",
        "## Operating points",
        "",
        "| name | thresholds | test accuracy | MACs saved | exit rates |",
        "|---|---|---|---|---|",
    ]
    for point in manifest.operating_points:
        thresholds = ", ".join(
            "off" if threshold is None else f"{threshold:.4f}" for threshold in point.thresholds
        )
        measured = "- | - | -"
        if point.test is not None:
            rates = " / ".join(f"{rate:.1%}" for rate in point.test.exit_rates)
            measured = f"{point.test.accuracy:.2%} | {point.test.macs_saved:.1%} | {rates}"
        default = " (default)" if point.name == manifest.default_operating_point else ""
        lines.append(f"| {point.name}{default} | {thresholds} | {measured} |")
    lines += ["", "## What is promised", ""]
    certified = [point for point in manifest.operating_points if point.certificate is not None]
    lines += [
        f"- **{point.name}**: {point.certificate.sentence(manifest.precision)}"
        for point in certified
        if point.certificate
    ]
    if certified and certified[0].certificate:
        lines += ["", f"Assumed: {certified[0].certificate.assumptions}."]
    else:
        lines.append("Nothing: no operating point is certified.")
    if manifest.left_out:
        lines += ["", "Asked for and left out:", ""]
        lines += [f"- {missing.name}: {missing.note}" for missing in manifest.left_out]
    lines += [
        "",
        "## Use",
        "",
        "```python",
        "from erde.runtime import Session",
        "",
        'session = Session("path/to/this/folder")',
        "answer = session.predict(images)  # uint8, (N, H, W, C)",
        "answer.labels, answer.probabilities, answer.exits",
        "```",
        "",
        "## Data and limits",
        "",
        *_data_in_words(manifest),
        "- A promise holds for images drawn like those it was certified on, and for the operating points above as they are: "
        "other thresholds, a cap on exits or a deadline have none. For other images: `erde calibrate BUNDLE --data FOLDER`.",
        "- `session.monitor()` says, without labels, when images are no longer like those.",
        "- MACs are counts. What they are worth in time depends on the machine: `erde bench BUNDLE` measures it.",
        "",
    ]
    # Names are free: another program may seal a bundle whose names would move the cursor of a terminal.
    return "\n".join(map(printable, lines))


def _data_in_words(manifest: Manifest) -> list[str]:
    # Provenance is free: another program may seal a bundle that says nothing of it.
    recipe, splits = manifest.provenance.get("recipe"), manifest.provenance.get("splits")
    lines = []
    data = recipe.get("data") if isinstance(recipe, dict) else None
    name = data.get("name") if isinstance(data, dict) else None
    if isinstance(name, str) and isinstance(splits, dict):
        sizes = ", ".join(
            f"{split} {info['size']:,}"
            for split, info in splits.items()
            if isinstance(info, dict) and isinstance(info.get("size"), int)
        )
        lines.append(
            f"- Data set `{in_one_line(name)}`; images: {sizes}. Recipe, versions and fingerprints: `manifest.json`."
        )
    attribution = manifest.provenance.get("attribution")
    if isinstance(attribution, str):
        lines.append(f"- Source of the images: {in_one_line(attribution)}.")
    if manifest.precision == "int8":
        lines.append("- The full network that promises speak of is this one, in int8.")
    if manifest.calibration is not None:
        seen = manifest.calibration
        lines.append(
            f"- Thresholds were chosen on {seen.tune_images:,} images and certified on {seen.certify_images:,} others."
        )
    return lines


def _precision_in_words(manifest: Manifest) -> str:
    if manifest.precision == "fp32":
        return "fp32"
    quantisation = manifest.provenance.get("quantisation")
    # Provenance is free: another program may seal a bundle that says nothing of it.
    kept = quantisation.get("kept_in_float") if isinstance(quantisation, dict) else None
    if not isinstance(kept, list):
        return manifest.precision
    layers = {"first": "the first convolution", "last": "the linear layers of the heads"}
    said = " and ".join(layers.get(str(layer), str(layer)) for layer in kept)
    return f"{manifest.precision}, logits in float{f'; {said} kept in float' if said else ''}"
