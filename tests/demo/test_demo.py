"""The page that runs a bundle in a browser: its folder, its server, and its answers against those of a session."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import queue
import re
import shutil
import subprocess
import tarfile
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

import erde
from erde.common.images import load_image
from erde.demo import server, writing
from erde.demo.writing import write_demo
from erde.policy import rule as policy
from erde.policy.rule import ExitRule
from erde.runtime.session import Session
from tests.helpers.browser import browsing
from tests.helpers.checks import entries, user_error
from tests.helpers.command import run_command
from tests.helpers.hand_made_bundle import convolution_bundle, pixel_bundle, some_harm
from tests.helpers.pages import needs_browser


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convolution_bundle(tmp_path_factory.mktemp("demo") / "bundle")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for the npm package, and its hashes for the real ones."""
    dist = tmp_path / "npm" / "package" / "dist"
    dist.mkdir(parents=True)
    for name in writing.RUNTIME:
        (dist / name).write_bytes(name.encode())
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in writing.RUNTIME}
    monkeypatch.setattr(writing, "RUNTIME", hashes)
    return dist.parent


def packed(package: Path) -> Path:
    path = package.parent / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(package, "package")
    return path


# ---------------------------------------------------------------- the folder


def test_the_folder_holds_all_that_the_page_needs(bundle: Path, package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    for runtime in (package, package / "dist", packed(package)):
        write_demo(bundle, folder, runtime)
        stages = [f"stage_{index}.onnx" for index in range(3)]
        assert entries(folder) == sorted([*writing.PAGE, writing.NETWORK, "runtime", *stages])
        assert entries(folder / "runtime") == sorted(writing.RUNTIME)
        assert all((folder / name).read_bytes() == (bundle / name).read_bytes() for name in stages)
    about = json.loads((folder / writing.NETWORK).read_text("utf-8"))
    manifest = Session(bundle).manifest
    assert [point["thresholds"] for point in about["operating_points"]] == [
        list(point.thresholds) for point in manifest.operating_points
    ]
    assert about["temperatures"] == list(manifest.temperatures)
    assert "provenance" not in about
    assert about["samples"] == []


def test_the_samples_of_a_bundle_come_with_it(package: Path, tmp_path: Path) -> None:
    session = erde.load("digits-demo", threads=1)
    write_demo(session.folder, tmp_path / "demo", package)
    about = json.loads((tmp_path / "demo" / writing.NETWORK).read_text("utf-8"))
    assert [sample["name"] for sample in about["samples"]] == [path.stem for path in session.samples()]
    assert len(about["samples"]) == 3
    for sample, path in zip(about["samples"], session.samples(), strict=True):
        pixels = load_image(path, session.manifest.input_shape)
        assert base64.b64decode(sample["image"]) == pixels.tobytes()


def test_of_many_samples_the_first_are_taken(bundle: Path, package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (copy / "samples").mkdir()
    for number in range(30):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(copy / "samples" / f"{number:02d}.png")
    write_demo(copy, tmp_path / "demo", package)
    about = json.loads((tmp_path / "demo" / writing.NETWORK).read_text("utf-8"))
    assert [sample["name"] for sample in about["samples"]] == [f"{number:02d}" for number in range(24)]
    (copy / "samples" / "00.png").write_bytes(b"none")
    with user_error(r"00\.png is not a readable image"):
        write_demo(copy, tmp_path / "demo", package)


def test_the_page_may_fetch_nothing_from_elsewhere(bundle: Path, package: Path, tmp_path: Path) -> None:
    write_demo(bundle, tmp_path / "demo", package)
    page = (tmp_path / "demo" / "index.html").read_text("utf-8")
    (rules,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert rules.startswith("default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; connect-src 'self';")
    assert "unsafe-inline" not in rules
    for name in writing.PAGE:
        text = (tmp_path / "demo" / name).read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text.replace("http-equiv", "")
        assert "innerHTML" not in text


def test_a_runtime_that_is_another(bundle: Path, package: Path, tmp_path: Path) -> None:
    name = "ort-wasm-simd-threaded.wasm"
    (package / "dist" / name).write_bytes(b"other")
    for runtime in (package, packed(package)):
        with user_error(
            rf"has another {name} of onnxruntime-web 1\.30\.0: give what `npm pack onnxruntime-web@1"
        ):
            write_demo(bundle, tmp_path / "demo", runtime)
    for runtime in (tmp_path / "nowhere", bundle, bundle / "manifest.json"):
        with user_error("has no ort.wasm.bundle.min.mjs"):
            write_demo(bundle, tmp_path / "demo", runtime)
    assert not (tmp_path / "demo").exists()


def test_npm_that_is_not_there_or_fails(
    bundle: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with user_error("npm, which would fetch it, is not here: run `npm pack .*--runtime"):
        write_demo(bundle, tmp_path / "demo")
    asked: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "", "npm error code ENOTFOUND\nnpm error network")

    monkeypatch.setattr(shutil, "which", lambda name: "/bin/npm")
    monkeypatch.setattr(subprocess, "run", run)
    with user_error("`npm pack onnxruntime-web@1.30.0` failed .*ENOTFOUND"):
        write_demo(bundle, tmp_path / "demo")
    assert asked[0][:3] == ["/bin/npm", "pack", "onnxruntime-web@1.30.0"]


def test_nothing_else_is_written_over(
    bundle: Path,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"mine")
    for out in (tmp_path / "photos", tmp_path / "photos" / "a.png"):
        with user_error("is there and is no demo"):
            write_demo(bundle, out, package)
    assert (tmp_path / "photos" / "a.png").read_bytes() == b"mine"
    assert (
        run_command(
            monkeypatch, "demo", str(bundle), "--out", str(tmp_path / "new"), "--runtime", str(package)
        )
        == 0
    )
    assert run_command(monkeypatch, "demo", str(bundle), "--out", "page", "--port", "80") == 2
    assert "--port is the server's: give --serve too" in capsys.readouterr().err
    assert run_command(monkeypatch, "demo", str(bundle)) == 2


def test_the_folder_where_the_command_runs_is_not_replaced(
    bundle: Path,
    package: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert run_command(monkeypatch, "demo", str(bundle), "--out", ".", "--runtime", str(package)) == 2
    assert ". has no name that a new file or folder could take" in capsys.readouterr().err
    assert entries(tmp_path / "here") == []


def test_a_demo_to_which_something_was_added_stays(bundle: Path, package: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    for name in ("images.json", "runtime/notes.txt", "more/stage_0.onnx"):
        write_demo(bundle, demo, package)
        (demo / name).parent.mkdir(exist_ok=True)
        (demo / name).write_bytes(b"mine")
        with user_error("is there and is no demo, or more than that: choose another folder"):
            write_demo(bundle, demo, package)
        assert (demo / name).read_bytes() == b"mine"
        shutil.rmtree(demo)
    other = tmp_path / "other"
    for names in ((writing.NETWORK,), (writing.NETWORK, "paper.tex")):
        other.mkdir()
        for name in names:
            (other / name).write_bytes(b"mine")
        with user_error("is there and is no demo"):
            write_demo(bundle, other, package)
        assert [(other / name).read_bytes() for name in names] == [b"mine"] * len(names)
        shutil.rmtree(other)


def test_a_damaged_bundle_makes_no_page(bundle: Path, package: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bundle, tmp_path / "bundle"))
    (copy / "stage_1.onnx").write_bytes((copy / "stage_1.onnx").read_bytes() + b"\0")
    with user_error("does not match its checksum"):
        write_demo(copy, tmp_path / "demo", package)
    assert not (tmp_path / "demo").exists()


# ---------------------------------------------------------------- the server


@pytest.fixture
def served(bundle: Path, package: Path, tmp_path: Path) -> str:
    write_demo(bundle, tmp_path / "demo", package)
    (tmp_path / "secret.txt").write_text("secret", encoding="utf-8")
    return serve(tmp_path / "demo")


def serve(folder: Path) -> str:
    """Serve a folder until the tests end; host and port."""
    ready: queue.Queue[str] = queue.Queue()
    threading.Thread(target=server.serve_folder, args=(folder, 0, ready.put), daemon=True).start()
    return ready.get(timeout=30).removeprefix("http://").rstrip("/")


def asked(place: str, path: str, host: str | None = None) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection(place, timeout=30)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    return connection.getresponse()


def test_what_is_served(served: str) -> None:
    types = {
        "/": "text/html; charset=utf-8",
        "/erde.js": "text/javascript",
        "/runtime/ort.wasm.bundle.min.mjs": "text/javascript",
        "/runtime/ort-wasm-simd-threaded.wasm": "application/wasm",
        "/stage_0.onnx": "application/octet-stream",
    }
    for path, kind in types.items():
        answer = asked(served, path)
        assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    for path in ("/runtime/", "/../secret.txt", "/%2e%2e/secret.txt", "/nothing"):
        answer = asked(served, path)
        assert answer.status == 404
        assert b"secret" not in answer.read().replace(b"secret.txt", b"")


def test_pages_of_other_names_are_refused(served: str) -> None:
    port = served.rpartition(":")[2]
    assert asked(served, "/", f"localhost:{port}").status == 200
    for host in (f"evil.example:{port}", "127.0.0.1", ""):
        assert asked(served, "/network.json", host).status == 403


def test_a_port_that_is_taken(served: str, tmp_path: Path) -> None:
    with user_error("cannot be used .*choose another --port"):
        server.serve_folder(tmp_path, int(served.rpartition(":")[2]), print)


# ---------------------------------------------------------------- a browser

EXITS = 3
RULES = {
    **{name: ExitRule(name, 1.0 if name == "energy" else 0.7) for name in policy.OWN_SCORES},
    "patience": ExitRule("patience"),
    "harm": ExitRule("harm", harm=some_harm(EXITS)),
    "arithmetic": ExitRule("margin", ensemble="arithmetic"),
    "geometric": ExitRule("entropy", ensemble="geometric"),
}


def networks(folder: Path, bundle: Path) -> dict[str, tuple[Path, NDArray[np.uint8]]]:
    generator = np.random.default_rng(1)
    pixels = generator.integers(0, 256, (40, EXITS, 5, 1), dtype=np.uint8)
    pixels[:, :, -1] = 0
    made = {name: pixel_bundle(folder / name, EXITS, rule) for name, rule in RULES.items()}
    made["chain"] = pixel_bundle(folder / "chain", EXITS, networks=(0, 2))
    colours = generator.integers(0, 256, (48, 8, 8, 3), dtype=np.uint8)
    return {"convolution": (bundle, colours), **{name: (path, pixels) for name, path in made.items()}}


SHOWN = """({
  heading: document.getElementById("heading").textContent,
  names: [...document.querySelectorAll("#samples button")].map((button) => button.textContent),
  titles: [...document.querySelectorAll("#samples button")].map((button) => button.title),
  pressed: document.querySelectorAll("#samples [aria-pressed=true]").length,
  label: document.getElementById("label").textContent,
  hidden: document.getElementById("result").hidden,
  state: document.getElementById("state").textContent,
  promise: document.getElementById("promise").textContent,
})"""


@pytest.mark.slow
@needs_browser
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed: nothing fetches the runtime")
def test_the_page_opens_on_the_samples_or_says_that_it_has_noise(bundle: Path, tmp_path: Path) -> None:
    session = erde.load("digits-demo", threads=1)
    write_demo(session.folder, tmp_path / "digits")
    write_demo(bundle, tmp_path / "none", tmp_path / "digits" / "runtime")
    seen = []
    with browsing(tmp_path) as browser:
        for name in ("digits", "none"):
            browser.open(f"http://{serve(tmp_path / name)}/")
            browser.until("document.documentElement.dataset.ready", 240)
            seen.append(browser.read(SHOWN))
        browser.read("document.querySelector('#samples button').click()")
        browser.until("!document.getElementById('result').hidden", 240)
    digits, noise = seen
    certificate = session.manifest.point(None).certificate
    assert certificate is not None
    assert digits == {
        "heading": "Samples beside the bundle", "names": ["2", "8", "9"], "titles": ["2", "8", "9"], "pressed": 1,
        "label": "2", "hidden": False, "state": "", "promise": certificate.sentence(),
    }  # fmt: skip
    assert noise["heading"] == "Noise, made for checking"
    assert noise["names"] == ["", ""]
    assert noise["titles"] == ["noise 1", "noise 2"]
    assert (noise["pressed"], noise["hidden"], noise["state"]) == (
        0,
        True,
        "No image yet: drop one, or click.",
    )


@pytest.mark.slow
@needs_browser
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed: nothing fetches the runtime")
def test_the_page_answers_as_the_session_does(bundle: Path, tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    write_demo(bundle, demo)
    cases = networks(tmp_path, bundle)
    for name, (path, images) in cases.items():
        write_demo(path, demo / name, demo / "runtime")
        (demo / name / "images.json").write_text(
            json.dumps({"images": images.reshape(len(images), -1).tolist()})
        )
    files = []
    for number, image in enumerate(cases["convolution"][1][:12]):
        Image.fromarray(image).save(demo / f"{number}.png")
        files.append(f"{number}.png")
    (demo / "asked.json").write_text(json.dumps({"files": files, "folders": list(cases)}))
    page = demo / "index.html"
    script = '<script type="module" src="check.js"></script></body>'
    page.write_text(page.read_text("utf-8").replace("</body>", script), "utf-8")
    shutil.copy(Path(__file__).with_name("check.js"), demo)
    with browsing(tmp_path) as browser:
        browser.open(f"http://{serve(demo)}/")
        browser.until("'report' in window", 240)
        report = browser.read("window.report")
    assert report["failed"] == []
    assert report["isolated"]
    for name, (path, images) in cases.items():
        session = Session(path, threads=1)
        logits = session.all_logits(images)
        for point in session.manifest.operating_points:
            expected = session.predict(images, operating_point=point.name)
            scores = session.rule.apply(logits)[1]
            sure = ~(policy.in_band(scores, point.thresholds) | policy.near_tie(logits))
            assert sure.sum() >= 0.8 * len(images)
            answers = np.array(report["answers"][name][point.name])[sure]
            assert [answer["label"] for answer in answers] == expected.labels[sure].tolist(), name
            assert [answer["exit"] for answer in answers] == expected.exits[sure].tolist(), name
            probabilities = np.array([answer["probabilities"] for answer in answers])
            assert np.abs(probabilities - expected.probabilities[sure]).max() < 1e-5
            assert np.allclose([answer["score"] for answer in answers], expected.scores[sure], atol=1e-5)
    chain = report["answers"]["chain"]["no-exit"]
    assert {answer["passed"] for answer in chain} == {1}  # the last network alone
    session = Session(bundle, threads=1)
    expected = session.predict(cases["convolution"][1][:12])
    assert len(set(expected.exits.tolist())) > 1
    assert [row["label"] for row in report["page"]] == expected.labels.tolist()
    assert [row["exit"] for row in report["page"]] == expected.exits.tolist()
    for row in report["page"]:
        assert row["name"] == session.classes[row["label"]]
        assert row["leaves"] == "leaves"
        assert row["unused"] == 2 - row["exit"]
        assert re.fullmatch(r"with exits[\d.]+ mswithout exits[\d.]+ ms", row["bars"])
        assert row["state"] == ""
