"""The page for people: what it is told, what it is allowed, and what it shows in a browser."""

from __future__ import annotations

import json
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from erde.runtime import Session
from erde.serving.metrics import MOST, WINDOW, Recent
from tests.helpers.browser import browsing
from tests.helpers.hand_made_bundle import pixel_bundle
from tests.helpers.pages import Page, needs_browser
from tests.helpers.served import SLOW, Served, as_json, serving, some_images


def test_the_state_tells_what_happened(bundle_a: Path, session_a: Session, tmp_path: Path) -> None:
    images = some_images(8)
    prediction = session_a.predict(images)
    uncalibrated = pixel_bundle(tmp_path / "gray")
    with serving([bundle_a, uncalibrated], "--max-queue", "5") as server:
        server.infer(as_json(images))
        server.infer(as_json(images, parameters={"operating_point": "no-exit"}))
        server.infer(b"")
        server.infer(b"", model="b")
        reply = server.request("GET", "/status")
    assert reply.headers["cache-control"] == "no-store"
    status = reply.json
    assert status["ready"]
    assert status["queue"] == {"waiting": 0, "most": 5}
    assert status["unknown"]["requests"] == {"refused": 1}
    model, gray = status["models"]
    recent = model["recent"]
    assert recent["requests"] == {"answered": 2, "refused": 1}
    assert recent["exits"] == np.bincount([*prediction.exits, *[2] * 8], minlength=3).tolist()
    assert 0 < recent["p50_ms"] <= recent["p99_ms"] < 1000 * status["seconds"]
    assert 1 <= recent["seconds"] <= WINDOW
    manifest = session_a.manifest
    assert model["default_operating_point"] == model["bundle_operating_point"] == "risk-1"
    assert model["objective_ms"] is None
    promises = {point["name"]: point["promise"] for point in model["operating_points"]}
    certificate = manifest.point("risk-5").certificate
    assert certificate is not None
    assert promises["risk-5"] == certificate.sentence()
    assert promises["early"] is None
    # Only answers at the bundle's own point are held against its calibration.
    assert (model["drift"]["images"], model["drift"]["ignored"], model["drift"]["drifted"]) == (8, 8, False)
    assert sum(model["drift"]["score_histogram"]) == 8
    assert (gray["drift"], gray["expected_exit_rates"], gray["recent"]["p99_ms"]) == (None, None, None)


def _form(value: Any) -> Any:
    """The keys of a JSON value, lists by their first item."""
    if isinstance(value, dict):
        # By outcome: those that there were.
        return {key: {} if key == "requests" else _form(item) for key, item in value.items()}
    return _form(value[0]) if isinstance(value, list) and value and isinstance(value[0], dict) else None


def test_the_document_shows_the_state_as_it_is(server: Served) -> None:
    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    example, _ = re.findall(r"^```json\n(.*?)^```$", text, re.M | re.S)
    assert _form(json.loads(example)) == _form(server.request("GET", "/status").json)
    assert f"{MOST:,}" in text


def test_rates_and_quantiles_of_the_last_seconds() -> None:
    recent = Recent(since=100.0)
    assert recent.summary(100.1) == {
        "seconds": 1.0,
        "requests": {},
        "p50_ms": None,
        "p99_ms": None,
        "exits": [],
    }
    recent.add(100.5, "answered", 9.0, [9])
    for number in range(200):
        recent.add(110 + number / 1000, "answered", (number + 1) / 1000, [1, 0, number % 2])
    recent.add(110.3, "overloaded", 0.0, ())
    summary = recent.summary(111)
    # The first request was longer ago. A quantile is the least that is not exceeded by so many.
    assert summary["requests"] == {"answered": 200, "overloaded": 1}
    assert summary["exits"] == [200, 0, 100]
    assert summary["seconds"] == 10
    assert summary["p50_ms"] == pytest.approx(100)
    assert summary["p99_ms"] == pytest.approx(198)
    # More than are kept: the rate is still right.
    for number in range(2 * MOST):
        recent.add(112 + number / 4096, "answered", 0.001, [1])
    summary = recent.summary(114)
    assert summary["requests"]["answered"] / summary["seconds"] == pytest.approx(4096, rel=0.01)


def test_the_page_is_one_file_that_may_load_nothing(server: Served) -> None:
    reply = server.request("GET", "/")
    assert reply.status == 200
    assert reply.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[kind])
    assert (policy["connect-src"], policy["img-src"]) == ("'self'", "blob: data:")
    page = Page(reply.body.decode())
    links = [value for _, name, value in page.attributes if name in ("src", "href", "action", "srcset")]
    assert links == ["data:,", "metrics"]
    assert len(page.scripts) == len(page.styles) == 1
    assert "url(" not in page.styles[0]
    assert "@import" not in page.styles[0]
    # The only other address names a kind of element.
    addresses = set(re.findall(r"https?://[^\"' ]+", reply.body.decode()))
    assert addresses == {"http://www.w3.org/2000/svg"}


@needs_browser
def test_the_page_shows_the_state_and_the_way_of_an_image(
    bundle_a: Path, session_a: Session, tmp_path: Path
) -> None:
    images = some_images(8)
    picture = tmp_path / "some image.png"
    Image.fromarray(images[0]).save(picture)
    prediction = session_a.predict(images[:1], operating_point="risk-5")
    options = ("--slo-ms", "2000", "--floor", "risk-5", "--parallel", "1")
    with serving([bundle_a], *options) as server, browsing(tmp_path) as browser:
        browser.look(1200)
        browser.open(f"http://{server.http}/")
        browser.until("document.getElementById('state').textContent === 'ready'")
        text = "document.getElementById('{}').innerText".format
        assert "0 a second" in browser.read(text("answered"))
        assert browser.read(text("point-name")) == "risk-1"
        assert browser.read(text("drift-mark")) == "too few images yet"
        server.infer(b"")
        for _ in range(5):
            server.infer(as_json(images))
        browser.until(f"{text('answered-note')}.startsWith('40 images')")
        assert "bad requests" in browser.read(text("refused-note"))
        assert browser.read(text("p50")).endswith("ms")
        rates = np.bincount(session_a.predict(images).exits, minlength=3) / 8
        legend = browser.read(text("exits-key"))
        for exit, rate in enumerate(rates):
            assert f"exit {exit}: {100 * rate:.{int(0 < rate < 1)}f}\N{NARROW NO-BREAK SPACE}%" in legend
        # Too much: the point gives way, and the promise is the cheaper point's.
        slow = images[:1].copy()
        slow[0, 0, 0, 0] = SLOW
        with ThreadPoolExecutor(6) as clients:
            list(clients.map(lambda _: server.infer(as_json(slow)), range(6)))
        current = "document.querySelector('#ladder [aria-current] b').innerText"
        parts = f"[{text('point-mark')}, {text('promise')}, {current}]"
        browser.until(f"{text('point-name')} === 'risk-5' && (window.seen = {parts})")
        mark, promise, rung = browser.read("window.seen")
        assert "given way to the load" in mark
        assert "at most 5 % of images" in promise
        assert rung == "risk-5"
        browser.read(
            "document.getElementById('try-point').value = 'risk-5', "
            "document.getElementById('try-point').dispatchEvent(new Event('change'))"
        )
        browser.until(f"{text('queue')} === '0'")
        browser.choose_file("#file", picture)
        browser.until("!!document.querySelector('.way')")
        answer = browser.read(text("answer")).replace("\N{NARROW NO-BREAK SPACE}", " ")
        label, exit = int(prediction.labels[0]), int(prediction.exits[0])
        assert f"class {label}, probability {100 * prediction.probabilities[0, label]:.1f} %" in answer
        assert f"It took {prediction.macs[0]} MACs" in answer
        assert "Decided at risk-5, which is certified." in answer
        steps = browser.read("[...document.querySelectorAll('.way li')].map((step) => step.className)")
        assert steps == ["ran"] * exit + ["left"] + [""] * (2 - exit)
        # All of it fits a phone.
        for dark in (False, True):
            browser.look(360, dark=dark)
            browser.until("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        # No exception, nothing that the policy had to stop.
        assert browser.complaints == []
        # A file that is no image, and a server that is gone, are said.
        (tmp_path / "no.png").write_bytes(b"no image")
        browser.choose_file("#file", tmp_path / "no.png")
        browser.until(f"{text('answer')}.includes('not answered: image 0 of the request')")
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        browser.until("document.getElementById('state').textContent === 'no answer'")
        stopping.join()


@needs_browser
def test_the_page_chooses_among_models(server: Served, tmp_path: Path) -> None:
    with browsing(tmp_path) as browser:
        browser.open(f"http://{server.http}/")
        browser.until("document.getElementById('model').options.length === 2")
        browser.read(
            "document.getElementById('model').value = 'gray', "
            "document.getElementById('model').dispatchEvent(new Event('change'))"
        )
        assert browser.read("document.getElementById('point-name').innerText") == "half"
        assert browser.read("document.getElementById('drift-mark').innerText") == "not watched"
        assert browser.complaints == []
