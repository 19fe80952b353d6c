"""``erde demo``: a folder with a page that runs a bundle in a browser, without a network."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
import tarfile
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from erde import bundle
from erde.bundle.manifest import Manifest
from erde.bundle.shipped import sample_images
from erde.common.errors import UserError, in_one_line
from erde.common.files import replacing_folder, write_json
from erde.common.images import load_image

# The runtime of the page, an npm package, of which two files are used: this version is tested.
PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
RUNTIME = {
    "ort.wasm.bundle.min.mjs": "11e64bd8ffe11bd1a2a2f0d6275fdfbbba7262f0b76b99b53d228a8a22ef3d90",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
FETCH = f"npm pack {PACKAGE}@{VERSION}"
PAGE = ("index.html", "style.css", "erde.js", "page.js")
NETWORK = "network.json"
MOST_SAMPLES = 24


def write_demo(bundle_folder: Path, out: Path, runtime: Path | None = None) -> Manifest:
    """Write a folder of static files: the page, the bundle's stages, its policy, and ONNX Runtime Web.

    ``runtime`` is the unpacked package (a folder) or the file that ``npm pack`` wrote; without it npm fetches the package.
    An older demo at ``out`` is replaced if nothing was added to it; the bundle's manifest is returned.

    Raises:
        UserError: whatever is wrong with the bundle or its samples; another version of the runtime, or none; ``out`` is
            something else.
    """
    manifest = bundle.read(bundle_folder)
    if out.exists() and not (out.is_dir() and (_is_a_demo(out) or not any(out.iterdir()))):
        raise UserError(
            f"{out} is there and is no demo, or more than that: choose another folder, which will be made"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing_folder(out) as partial:
        (partial / "runtime").mkdir()
        if runtime is not None:
            _copy_runtime(runtime, partial / "runtime")
        else:
            _fetch_runtime(partial / "runtime")
        for name in PAGE:
            (partial / name).write_bytes((files("erde.demo") / "page" / name).read_bytes())
        for stage in manifest.stages:
            shutil.copyfile(bundle_folder / stage.file, partial / stage.file)
            if bundle.file_hash(partial / stage.file) != manifest.files[stage.file]:
                raise UserError(
                    f"bundle {bundle_folder}: {stage.file} was changed while it was copied: try again"
                )
        write_json(partial / NETWORK, {**_about(manifest), "samples": _samples(bundle_folder, manifest)})
    return manifest


def _is_a_demo(folder: Path) -> bool:
    """Whether all files of a demo are in ``folder``, and nothing else: the folder is going to be removed."""
    own = {*PAGE, NETWORK, "runtime", *(f"runtime/{name}" for name in RUNTIME)}
    seen = set()
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if name not in own and not re.fullmatch(r"stage_\d+\.onnx", name):
            return False
        seen.add(name)
    return own <= seen


def _about(manifest: Manifest) -> dict[str, Any]:
    """What the page has to know of the bundle: its parts of the manifest, and promises in words."""
    fields = {
        "name", "classes", "input_shape", "precision", "stages", "score", "sharpness", "ensemble", "score_parameters",
        "temperatures", "default_operating_point", "reference_sample",
    }  # fmt: skip
    points = [
        {
            "name": point.name,
            "thresholds": point.thresholds,
            "note": point.note,
            "promise": point.certificate and point.certificate.sentence(manifest.precision),
        }
        for point in manifest.operating_points
    ]
    return {
        **manifest.model_dump(mode="json", include=fields),
        "rule": manifest.rule().in_words(),
        "operating_points": points,
        "seal": bundle.seal_of(manifest),
    }


def _samples(folder: Path, manifest: Manifest) -> list[dict[str, str]]:
    """The first images of the folder ``samples`` beside the stages, as the network takes them, each with its name."""
    return [
        {
            "name": path.stem,
            "image": base64.b64encode(load_image(path, manifest.input_shape).tobytes()).decode(),
        }
        for path in sample_images(folder)[:MOST_SAMPLES]
    ]


def _copy_runtime(source: Path, target: Path) -> None:
    """The two files of the package at ``source``, if they are those that are known."""
    for name, expected in RUNTIME.items():
        content = _member(source, name)
        if content is None or hashlib.sha256(content).hexdigest() != expected:
            problem = "has no" if content is None else "has another"
            raise UserError(
                f"{source} {problem} {name} of {PACKAGE} {VERSION}: give what `{FETCH}` wrote, or the folder that is in it"
            )
        (target / name).write_bytes(content)


def _member(source: Path, name: str) -> bytes | None:
    if source.is_dir():
        places = (source / "package" / "dist", source / "dist", source)
        path = next((place / name for place in places if (place / name).is_file()), None)
        return None if path is None else path.read_bytes()
    try:
        with tarfile.open(source) as package:
            # Read, not unpacked: no name inside it becomes a path.
            file = package.extractfile(f"package/dist/{name}")
            return None if file is None else file.read()
    except (tarfile.TarError, KeyError, OSError, EOFError):
        return None


def _fetch_runtime(target: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"the page needs {PACKAGE} {VERSION}, and npm, which would fetch it, is not here: run `{FETCH}` where npm is, and "
            "give the file that it writes as --runtime"
        )
    with tempfile.TemporaryDirectory() as scratch:
        command = [npm, "pack", f"{PACKAGE}@{VERSION}", "--pack-destination", scratch, "--ignore-scripts"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        packages = list(Path(scratch).glob("*.tgz"))
        if done.returncode or len(packages) != 1:
            reason = in_one_line(done.stderr.strip()[-300:]) or "no file"
            raise UserError(f"`{FETCH}` failed ({reason}): give the package as --runtime")
        _copy_runtime(packages[0], target)
