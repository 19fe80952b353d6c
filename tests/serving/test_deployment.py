"""What an operator copies: curl lines, a Grafana dashboard, a manifest for KServe."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from PIL import Image

from erde.bundle import FORMAT_VERSION
from erde.serving.metrics import Metrics
from tests.helpers.served import Served, as_json, serving, some_images

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "serving"


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_lines_of_the_document_run(server: Served, tmp_path: Path) -> None:
    text = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\$ (curl .*?)(?=\n\$ |\n```)", text, re.M | re.S)
    assert len(lines) == 4
    (tmp_path / "photos").mkdir()
    Image.fromarray(some_images(1)[0]).save(tmp_path / "photos" / "0.png")
    replies = []
    for line in lines:
        line = line.replace("localhost:8000", server.http).replace("models/bundle", "models/a")
        done = subprocess.run(line, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True)
        replies.append(done.stdout)
    infer, health, model, metrics = replies
    assert [output["name"] for output in json.loads(infer)["outputs"]] == ["labels", "exit"]
    assert json.loads(health) == {"ready": True}
    assert json.loads(model)["name"] == "a"
    assert "erde_requests_total" in metrics


def _samples(server: Served) -> dict[str, set[str]]:
    """Names of the labels of each metric, as Prometheus would see them."""
    text = server.request("GET", "/metrics").body.decode()
    samples: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^(\w+)(?:\{(.*)\})? \S+$", text, re.M):
        samples.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return samples


def test_the_dashboard_asks_for_metrics_that_are_there(bundle_a: Path) -> None:
    with serving([bundle_a], "--slo-ms", "2000", "--floor", "risk-5") as server:
        server.infer(as_json(some_images(2)))
        samples = _samples(server)
    board = json.loads((EXAMPLES / "grafana.json").read_text(encoding="utf-8"))
    asked = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            expression, legend = target["expr"], target["legendFormat"]
            (name,) = re.findall(r"erde_\w+", expression)
            assert name in samples, expression
            asked.add(re.sub("_bucket$", "", name))
            filtered = set(re.findall(r"(\w+)=~", expression))
            grouped = {
                label for text in re.findall(r"by \(([^)]*)\)", expression) for label in text.split(", ")
            }
            shown = set(re.findall(r"\{\{(\w+)\}\}", legend)) - {"instance"}
            assert filtered | grouped | shown <= samples[name], expression
            # After an aggregation only its own labels are left.
            assert not grouped or shown <= grouped, expression
            # Counters and histograms are rates; gauges are not.
            assert ("rate(" in expression) == name.endswith(("_total", "_bucket")), expression
    # Every metric is on it.
    assert asked == set(re.findall(r"^# TYPE (\w+)", Metrics().text(0, {}, {}, {}), re.M))


def test_the_dashboard_has_a_place_for_every_panel() -> None:
    panels = json.loads((EXAMPLES / "grafana.json").read_text(encoding="utf-8"))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert not cells & taken
        assert x + w <= 24
        taken |= cells


def test_the_manifest_starts_a_server_that_kserve_finds(bundle_a: Path) -> None:
    runtime, service = yaml.safe_load_all((EXAMPLES / "kserve.yaml").read_text(encoding="utf-8"))
    assert (runtime["kind"], service["kind"]) == ("ServingRuntime", "InferenceService")
    (container,) = runtime["spec"]["containers"]
    assert container["name"] == "kserve-container"
    # Both speak of the same protocol and format.
    predictor = service["spec"]["predictor"]
    assert [predictor["model"]["protocolVersion"]] == runtime["spec"]["protocolVersions"] == ["v2"]
    (known,) = runtime["spec"]["supportedModelFormats"]
    assert known["name"] == predictor["model"]["modelFormat"]["name"]
    assert known["version"] == str(FORMAT_VERSION)
    (port,) = container["ports"]
    numbers = {
        port["containerPort"],
        int(runtime["spec"]["annotations"]["prometheus.kserve.io/port"]),
        *(container[probe]["httpGet"]["port"] for probe in ("readinessProbe", "livenessProbe")),
    }
    options = dict(text.split("=") for text in container["args"] if text.startswith("--") and "=" in text)
    assert numbers == {int(options["--http-port"])}
    assert options["--host"] == "0.0.0.0"
    assert int(options["--parallel"]) * int(options["--threads"]) == int(
        container["resources"]["limits"]["cpu"]
    )
    # As KServe starts it, on this machine and free ports only.
    command, model, *rest = container["args"]
    assert command == "serve"
    bundle = model.replace("{{.Name}}", service["metadata"]["name"]).replace("/mnt/models", str(bundle_a))
    kept = [text for text in rest if not re.match("--(host|http-port|grpc-port)=", text)]
    with serving([bundle], *kept) as server:
        for probe in ("readinessProbe", "livenessProbe"):
            assert server.request("GET", container[probe]["httpGet"]["path"]).status == 200
        assert server.infer(as_json(some_images(1)), model=service["metadata"]["name"]).status == 200
        assert (
            server.request("GET", runtime["spec"]["annotations"]["prometheus.kserve.io/path"]).status == 200
        )
