"""The page for people: its file, what guards it, and the state that it asks for."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import time
from importlib import resources
from typing import Any

from erde.common.environment import erde_version
from erde.runtime.monitor import Monitor
from erde.serving.models import Model
from erde.serving.service import Service

PATH, STATUS_PATH = "/", "/status"


def page() -> tuple[str, dict[str, str]]:
    """The HTML, and its headers: nothing runs or is loaded but what is written in the file itself."""
    content = (resources.files("erde.serving") / "page.html").read_text(encoding="utf-8")

    def allowed(tag: str) -> str:
        (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", content, re.S)
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    policy = (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; connect-src 'self'; "
        "img-src blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return content, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def status(service: Service) -> dict[str, Any]:
    """What the page shows, as JSON; ``seconds`` are since the start. The form is described in docs/serving.md."""
    now = time.perf_counter()
    return {
        "version": erde_version(),
        "ready": service.ready,
        "seconds": now - service.started,
        "queue": {"waiting": service.workers.queue_length, "most": service.workers.max_queue},
        "models": [_model(service, model, now) for model in service.models.values()],
        # Requests of which it is not known which model they were for.
        "unknown": service.recent[""].summary(now),
    }


def _model(service: Service, model: Model, now: float) -> dict[str, Any]:
    loaded, load = model.loaded, service.load
    manifest = loaded.session.manifest
    rungs = [] if load is None else [rung.name for rung in load.controller.rungs]
    expected = None if manifest.calibration is None else manifest.calibration.exit_rates
    return {
        "name": model.name,
        "version": loaded.version,
        "exits": [
            {"name": stage.exit_name, "macs": macs}
            for stage, macs in zip(manifest.stages, manifest.cost().exit_macs, strict=True)
        ],
        "no_exit_macs": manifest.no_exit_macs,
        "operating_points": [
            {
                "name": point.name,
                "kind": point.kind,
                "macs_saved": point.macs_saved,
                "promise": None
                if point.certificate is None
                else point.certificate.sentence(manifest.precision),
                "on_ladder": point.name in rungs,
            }
            for point in manifest.operating_points
        ],
        "bundle_operating_point": manifest.default_operating_point,
        "default_operating_point": model.current_default(loaded),
        "objective_ms": None if load is None else 1000 * load.controller.objective,
        "recent": service.recent[model.name].summary(now),
        # Of the bundle's own operating point.
        "expected_exit_rates": expected,
        "drift": None if loaded.monitor is None else _drift(loaded.monitor),
    }


def _drift(monitor: Monitor) -> dict[str, Any]:
    report = monitor.report()
    return {
        "drifted": report.drifted,
        "message": report.message,
        "images": report.images,
        "ignored": report.ignored,
        "p_value": report.p_value,
        "false_alarm": report.false_alarm,
        # JSON has no NaN.
        "exit_rates": [None if math.isnan(rate) else rate for rate in report.exit_rates],
        "score_histogram": report.score_histogram,
        "expected_score_histogram": report.expected_score_histogram,
    }
