"""A server in use: overload, metrics, a graceful stop, bundles that change."""

from __future__ import annotations

import asyncio
import http.client
import json
import math
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from erde.bundle import read, seal, seal_of
from erde.runtime import Session
from erde.serving import server as the_server
from erde.serving.log import Log
from erde.serving.messages import CLASSES, SERVICE
from erde.serving.models import Loaded, Model, open_models
from erde.serving.service import Load, Service
from erde.serving.workers import Workers
from tests.helpers.command import run_command
from tests.helpers.hand_made_bundle import convolution_bundle, pixel_bundle
from tests.helpers.served import (
    SLOW,
    Reply,
    Served,
    as_json,
    certified_bundle,
    serving,
    some_images,
    until,
)

IMAGES = some_images(2)
SLOW_IMAGES = IMAGES.copy()
SLOW_IMAGES[0, 0, 0, 0] = SLOW


def metrics(server: Served) -> dict[str, float]:
    """The samples by name and labels, as written."""
    reply = server.request("GET", "/metrics")
    assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    samples: dict[str, float] = {}
    kinds: dict[str, str] = {}
    for line in reply.body.decode().splitlines():
        if line.startswith("# "):
            match = re.fullmatch(r"# (HELP|TYPE) ([a-z_]+) (.+)", line)
            assert match is not None, line
            kinds[match[2]] = match[3]
            continue
        match = re.fullmatch(r'([a-z_]+)((?:\{(?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)+\})?) (\S+)', line)
        assert match is not None, line
        assert re.sub("_(bucket|sum|count)$", "", match[1]) in kinds
        samples[match[1] + match[2]] = float(match[3])
    return samples


def ask(server: Served, pixels: Any = IMAGES) -> Any:
    request = CLASSES["ModelInferRequest"](
        model_name="a",
        inputs=[{"name": "images", "datatype": "UINT8", "shape": pixels.shape}],
        raw_input_contents=[pixels.tobytes()],
    )
    with grpc.insecure_channel(server.grpc) as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/ModelInfer", response_deserializer=CLASSES["ModelInferResponse"].FromString
        )
        return call(request.SerializeToString(), timeout=30)


def test_above_the_queue_requests_are_refused_at_once(
    bundle_a: Path, session_a: Session, tmp_path: Path
) -> None:
    labels = session_a.predict(SLOW_IMAGES).labels.tolist()
    gate = tmp_path / "gate"
    with (
        serving([bundle_a], "--parallel", "1", "--max-queue", "2", gate=gate) as server,
        ThreadPoolExecutor(8) as clients,
    ):
        inside = [clients.submit(server.infer, as_json(SLOW_IMAGES)) for _ in range(2)]
        inside_grpc = clients.submit(ask, server, SLOW_IMAGES)
        until(lambda: metrics(server)["erde_queue_length"] == 2)
        reply = server.infer(as_json(IMAGES))
        assert reply.status == 503
        assert int(reply.headers["retry-after"]) >= 1
        assert "busy" in reply.json["error"]
        with pytest.raises(grpc.RpcError) as raised:
            ask(server)
        assert raised.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
        # Health does not wait.
        assert server.request("GET", "/v2/health/ready").status == 200
        with grpc.insecure_channel(server.grpc) as channel:
            ready = channel.unary_unary(f"/{SERVICE}/ServerReady")(b"", timeout=10)
        assert CLASSES["ServerReadyResponse"].FromString(ready).ready
        assert not any(future.done() for future in (*inside, inside_grpc))
        # Those that waited are answered.
        gate.touch()
        assert [future.result().json["outputs"][0]["data"] for future in inside] == [labels] * 2
        assert np.frombuffer(inside_grpc.result().raw_output_contents[0], dtype=np.int64).tolist() == labels
        samples = metrics(server)
        assert samples['erde_requests_total{model="a",outcome="answered"}'] == 3
        assert sum(value for name, value in samples.items() if 'outcome="overloaded"' in name) == 2
        assert samples["erde_queue_length"] == 0


def test_clients_that_go_away_leave_their_place(bundle_a: Path) -> None:
    with serving([bundle_a], "--parallel", "1", "--max-queue", "1") as server:
        request = CLASSES["ModelInferRequest"](
            model_name="a",
            inputs=[{"name": "images", "datatype": "UINT8", "shape": SLOW_IMAGES.shape}],
            raw_input_contents=[SLOW_IMAGES.tobytes()],
        ).SerializeToString()
        with grpc.insecure_channel(server.grpc) as channel:
            call = channel.unary_unary(f"/{SERVICE}/ModelInfer")
            for _ in range(6):
                with pytest.raises(grpc.RpcError):
                    call(request, timeout=0.05)
        until(lambda: server.infer(as_json(IMAGES)).status == 200)
        samples = metrics(server)
        assert samples["erde_queue_length"] == 0
        assert sum(value for name, value in samples.items() if 'outcome="cancelled"' in name) >= 1


def test_metrics_count_what_happened(bundle_a: Path, session_a: Session) -> None:
    images = some_images(8)
    exits = session_a.predict(images).exits
    early = int(exits.argmin())
    assert exits[early] < exits.max()
    with serving([bundle_a]) as server:
        server.infer(as_json(images))
        server.infer(as_json(images[early : early + 1]))
        server.infer(as_json(images, parameters={"operating_point": "no-exit"}))
        server.infer(b"")
        ask(server, images)
        server.infer(b"", model="b")
        samples = metrics(server)
    counts = np.bincount([*exits, *exits, exits[early], *[2] * 8], minlength=3)
    for index, count in enumerate(counts):
        assert samples.get(f'erde_exits_total{{model="a",exit="{index}"}}', 0) == count
    assert samples['erde_operating_points_total{model="a",operating_point="risk-1"}'] == 17
    assert samples['erde_operating_points_total{model="a",operating_point="no-exit"}'] == 8
    assert samples['erde_default_operating_point{model="a",operating_point="risk-1"}'] == 1
    assert samples['erde_requests_total{model="a",outcome="answered"}'] == 4
    assert samples['erde_requests_total{model="a",outcome="refused"}'] == 1
    # The time of a request is that of the image which went furthest.
    counted = {("risk-1", str(exits.max())): 2, ("risk-1", str(exits[early])): 1, ("no-exit", "2"): 1}
    for (point, exit), count in counted.items():
        labels = f'model="a",operating_point="{point}",exit="{exit}"'
        assert samples[f"erde_request_seconds_count{{{labels}}}"] == count
        buckets = [
            (float(match[1]), value)
            for name, value in samples.items()
            if (match := re.fullmatch(rf'erde_request_seconds_bucket\{{{labels},le="([^"]+)"\}}', name))
        ]
        assert buckets == sorted(buckets)
        assert buckets[-1] == (math.inf, count)
        assert samples[f"erde_request_seconds_sum{{{labels}}}"] > 0
    assert sum("seconds_count" in name for name in samples) == len(counted)
    assert samples['erde_drift_images{model="a"}'] == 17
    assert samples['erde_drift_alarm{model="a"}'] == 0
    assert samples['erde_drift_p_value{model="a"}'] == 1
    assert not any(name.startswith("erde_latency_objective_seconds{") for name in samples)


def test_drift_is_counted_logged_once_and_ends_with_the_bundle(bundle_a: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bundle_a, tmp_path / "a"))
    black = as_json(np.zeros((32, 8, 8, 3), dtype=np.uint8))
    with serving([folder], "--slo-ms", "2000", "--floor", "risk-5") as server:
        for _ in range(10):
            server.infer(black)
        server.infer({**black, "parameters": {"operating_point": "early"}})
        until(lambda: " drift " in server.err)
        time.sleep(0.5)  # some more looks
        samples = metrics(server)
        assert samples['erde_drift_alarm{model="a"}'] == 1
        assert samples['erde_drift_images{model="a"}'] == 320
        assert samples['erde_drift_p_value{model="a"}'] <= 0.01
        assert samples['erde_latency_objective_seconds{model="a"}'] == 2
        assert any('operating_point="early"' in name for name in samples)
        # A bundle without that point: what was counted of it is dropped, and the watch begins anew.
        manifest = read(folder)
        kept = [point for point in manifest.operating_points if point.name != "early"]
        seal(folder, manifest.model_copy(update={"operating_points": kept}))
        until(lambda: metrics(server)['erde_drift_alarm{model="a"}'] == 0)
        until(lambda: not any('operating_point="early"' in name for name in metrics(server)))
        assert any('operating_point="risk-1"' in name for name in metrics(server))
        _, _, err = server.stop()
    (alarm,) = [line for line in err.splitlines() if " drift " in line]
    assert alarm.startswith("a: drift after ")
    assert "erde calibrate" in alarm


def test_a_stop_tells_those_that_it_does_not_wait_for(bundle_a: Path, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    with (
        serving([bundle_a], "--parallel", "1", gate=gate, grace=1) as server,
        ThreadPoolExecutor(4) as clients,
    ):
        # One is answered, two wait.
        known_as = {"X-Request-Id": "mine"}
        over_http = [clients.submit(server.infer, as_json(SLOW_IMAGES), known_as) for _ in range(2)]
        over_grpc = clients.submit(ask, server, SLOW_IMAGES)
        until(lambda: metrics(server)["erde_queue_length"] == 2)
        server.process.send_signal(signal.SIGTERM)
        for reply in (future.result() for future in over_http):
            assert reply.status == 503
            assert reply.json == {"error": "the server stops; try again later"}
            assert reply.headers["x-request-id"] == "mine"
        with pytest.raises(grpc.RpcError):
            over_grpc.result()
        gate.touch()
        code, out, err = server.end()
    assert code == 0
    assert "stopped after 3 requests (3 cancelled)" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(("number", "over"), [(signal.SIGTERM, "http"), (signal.SIGINT, "grpc")])
def test_a_stop_waits_for_requests_under_way(
    bundle_a: Path, session_a: Session, number: int, over: str, tmp_path: Path
) -> None:
    labels = session_a.predict(SLOW_IMAGES).labels.tolist()
    gate = tmp_path / "gate"

    def answer(server: Served) -> Any:
        if over == "http":
            return server.infer(as_json(SLOW_IMAGES)).json["outputs"][0]["data"]
        content = ask(server, SLOW_IMAGES).raw_output_contents[0]
        return np.frombuffer(content, dtype=np.int64).tolist()

    def is_ready() -> bool:
        try:
            return server.request("GET", "/v2/health/ready").status == 200
        except OSError:
            return False

    with (
        serving([bundle_a], "--parallel", "1", "--json", gate=gate) as server,
        ThreadPoolExecutor(4) as clients,
    ):
        # One is answered, two wait.
        inside = [clients.submit(answer, server) for _ in range(3)]
        until(lambda: metrics(server)["erde_queue_length"] == 2)
        server.process.send_signal(number)
        until(lambda: not is_ready())
        gate.touch()
        code, out, err = server.end()
        assert [future.result() for future in inside] == [labels] * 3
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "stopped after 3 requests (3 answered)",
        '{"models": 1, "requests": {"answered": 3}}',
    ]


def _replace(folder: Path, new: Path) -> None:
    """As a deployment does it: aside, in place, away."""
    aside = folder.with_name(f"{folder.name}.old")
    os.replace(folder, aside)
    os.replace(new, folder)
    shutil.rmtree(aside)


def test_a_changed_bundle_is_exchanged_without_a_lost_request(tmp_path: Path) -> None:
    folder = convolution_bundle(tmp_path / "a", seed=0)
    new = convolution_bundle(tmp_path / "new", seed=1)
    expected = {
        seal_of(session.manifest)[:12]: session.predict(IMAGES).probabilities.astype(np.float32)
        for session in (Session(folder, threads=1), Session(new, threads=1))
    }
    old_version, new_version = expected
    with serving([folder]) as server:
        replies: list[Reply] = []
        stopped = threading.Event()

        def keep_asking() -> None:
            while not stopped.is_set():
                replies.append(server.infer(as_json(IMAGES)))

        with ThreadPoolExecutor(2) as clients:
            askers: list[Future[None]] = [clients.submit(keep_asking) for _ in range(2)]
            try:
                until(lambda: len(replies) > 10)
                _replace(folder, new)
                until(lambda: replies[-1].json["model_version"] == new_version)
            finally:
                stopped.set()
            for asker in askers:
                asker.result()
        assert {reply.status for reply in replies} == {200}
        assert {reply.json["model_version"] for reply in replies} == {old_version, new_version}
        for reply in replies:
            output = next(output for output in reply.json["outputs"] if output["name"] == "probabilities")
            given = np.reshape(output["data"], output["shape"])
            assert np.allclose(given, expected[reply.json["model_version"]], atol=1e-6)
        _, _, err = server.stop()
    assert err.splitlines() == [f"a: bundle {new_version} in place of {old_version}"]


def test_a_broken_replacement_is_logged_and_the_old_bundle_goes_on(tmp_path: Path) -> None:
    folder = convolution_bundle(tmp_path / "a", seed=0)
    new = convolution_bundle(tmp_path / "new", seed=1)
    version = seal_of(read(folder))[:12]
    with (new / "stage_1.onnx").open("ab") as file:
        file.write(b"!")
    with serving([folder]) as server:
        _replace(folder, new)
        until(lambda: "is not taken" in server.err)
        time.sleep(0.5)  # some more looks
        assert server.infer(as_json(IMAGES)).json["model_version"] == version
        # And is repaired.
        content = (folder / "stage_1.onnx").read_bytes()
        (folder / "stage_1.onnx").write_bytes(content[:-1])
        until(lambda: server.infer(as_json(IMAGES)).json["model_version"] != version)
        _, _, err = server.stop()
    first, second = err.splitlines()
    assert first.startswith(
        f"a: the changed bundle is not taken, {version} stays: bundle {folder}: stage_1.onnx does not match"
    )
    assert second.endswith(f"in place of {version}")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Missing argument"),
        (("nowhere", "--http-port", "0", "--grpc-port", "0"), "no bundle at nowhere"),
        (("{a}", "{a}", "--http-port", "0", "--grpc-port", "0"), "two models are called 'a'"),
        (("{a}", "a={a}", "--http-port", "0", "--grpc-port", "0"), "two models are called 'a'"),
        (("{a}", "--http-port", "{taken}", "--grpc-port", "0"), "cannot be listened on"),
        (("{a}", "--http-port", "0", "--grpc-port", "{taken}"), "cannot be listened on"),
        (("{a}", "--http-port", "8001"), "both to have port 8001"),
        (("{a}", "--host", "nobody.invalid"), "cannot be listened on"),
        (("{a}", "--threads", "0"), "--threads"),
    ],
)
def test_a_server_that_cannot_start_says_so(
    bundle_a: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    says: str,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        given = (text.format(a=bundle_a, taken=port) for text in arguments)
        assert run_command(monkeypatch, "serve", *given) == 2
    out, err = capfd.readouterr()
    assert err.startswith("error: ")
    assert says in err
    assert len(err.splitlines()) == 1
    assert out == ""


def test_an_equals_sign_in_a_path_that_is_there_is_the_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("lr=0.1").mkdir()
    folder = certified_bundle(Path("lr=0.1") / "bundle")
    models = open_models([str(folder), f"lr={folder}"], 1, Log())
    assert {name: model.path for name, model in models.items()} == {"bundle": folder, "lr": folder}


def test_without_its_extra_the_command_names_it(
    bundle_a: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "erde.serving.server", raising=False)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run_command(monkeypatch, "serve", str(bundle_a)) == 2
    assert "pip install 'erde[serve]'" in capsys.readouterr().err


def test_what_changes_beside_the_seal_leaves_the_alarm_and_load_control(
    bundle_a: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(bundle_a, tmp_path / "a"))
    version = seal_of(read(folder))[:12]
    black = as_json(np.zeros((32, 8, 8, 3), dtype=np.uint8))
    with serving([folder], "--slo-ms", "2000", "--floor", "risk-5") as server:
        for _ in range(10):
            server.infer(black)
        (folder / "bench.json").write_text("{}")
        until(lambda: " drift " in server.err and " opened again" in server.err)
        time.sleep(0.5)  # some more looks
        samples = metrics(server)
        assert samples['erde_drift_alarm{model="a"}'] == 1
        assert samples['erde_drift_images{model="a"}'] == 320
        _, _, err = server.stop()
    assert err.count(" drift after ") == 1
    assert err.count(f"a: bundle {version} opened again: its folder changed") == 1
    assert "in place of" not in err


def test_the_same_bundle_again_is_no_exchange(tmp_path: Path) -> None:
    folder = certified_bundle(tmp_path / "a")
    model = Model("a", folder, threads=1)
    old = model.loaded
    (folder / "bench.json").write_text("{}")
    assert not model.refresh()
    # A profile may have come.
    assert model.loaded.session is not old.session
    assert model.loaded.monitor is old.monitor


def test_a_bundle_that_was_refused_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, new = certified_bundle(tmp_path / "a"), certified_bundle(tmp_path / "new", seed=1)
    model = Model("a", folder, threads=1)
    _replace(folder, new)

    def no_memory(*_: Any) -> Loaded:
        raise MemoryError("no memory")

    monkeypatch.setattr("erde.serving.models.RETRY_SECONDS", 0.0)
    with monkeypatch.context() as short:
        short.setattr(Loaded, "open", no_memory)
        assert not model.refresh()
        assert not model.refresh()
    assert model.refresh()
    lines = capsys.readouterr().err.splitlines()
    assert ["no memory" in line for line in lines] == [True, False]


def test_a_bundle_that_is_copied_slowly_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = certified_bundle(tmp_path / "a")
    model = Model("a", folder, threads=1)
    content = (folder / "stage_1.onnx").read_bytes()

    def lines_while_copied() -> int:
        for part in (1, len(content) // 2, len(content) - 1):
            (folder / "stage_1.onnx").write_bytes(content[:part])
            assert not model.refresh()
        return capsys.readouterr().err.count("is not taken")

    assert lines_while_copied() == 1
    (folder / "stage_1.onnx").write_bytes(content)
    assert not model.refresh()  # complete, and the same as before
    assert "opened again" in capsys.readouterr().err
    assert lines_while_copied() == 1  # a new story


def test_after_a_roll_back_the_next_refused_bundle_is_logged_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = certified_bundle(tmp_path / "a")
    model = Model("a", folder, threads=1)
    for name in ("bad", "worse"):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "stage_1.onnx").write_bytes(b"torn")
    for new, old in (("bad", "good"), ("good", "bad"), ("worse", "good")):
        folder.rename(tmp_path / old)
        (tmp_path / new).rename(folder)
        assert not model.refresh()
    assert capsys.readouterr().err.count("is not taken") == 2


def test_a_look_that_fails_is_logged_once_and_the_next_one_comes(
    bundle_a: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model("a", bundle_a, threads=1)
    load = Load(model, "risk-5", 1.0, 1)
    looks: list[None] = []

    def look(*_: Any) -> None:
        looks.append(None)
        raise RuntimeError("it fails")

    monkeypatch.setattr(load, "look", look)
    monkeypatch.setattr(model, "refresh", look)
    monkeypatch.setattr(the_server, "POLL_SECONDS", 0.01)

    async def some_looks() -> None:
        workers = Workers(1, 1)
        service = Service({"a": model}, workers, 8, 2**20)
        for loop in (the_server._control(load, workers), the_server._watch(service)):
            looks.clear()
            task = asyncio.create_task(loop)
            while len(looks) < 3:
                assert not task.done()
                await asyncio.sleep(0.01)
            task.cancel()
        workers.close()

    asyncio.run(some_looks())
    line = "a: an error of the server: RuntimeError: it fails"
    assert capsys.readouterr().err.splitlines() == [line] * 2


def test_a_failing_bundle_is_the_servers_fault_and_no_traceback(tmp_path: Path) -> None:
    folder = pixel_bundle(tmp_path / "a")
    images = np.zeros((1, 3, 5, 1), dtype=np.uint8)
    bomb = images.copy()
    bomb[:, 0, -1] = 1
    with serving([folder]) as server:
        reply = server.infer(as_json(bomb))
        assert reply.status == 500
        assert "stage 0 fails on a batch of 1" in reply.json["error"]
        assert server.infer(as_json(images)).status == 200
        _, _, err = server.stop()
    assert len(err.splitlines()) == 1
    assert err.startswith("a: stage 0 fails")


def test_the_default_point_is_moved_in_one_place(tmp_path: Path) -> None:
    model = Model("a", certified_bundle(tmp_path / "a"), threads=1)

    def chosen(name: str | None, max_risk: float | None) -> str:
        return model.point_for(model.loaded, name, max_risk).name

    assert chosen(None, None) == "risk-1"
    model.default_point = "risk-5"
    assert chosen(None, None) == "risk-5"
    # What a request asks for stays what it gets.
    assert chosen("risk-1", None) == "risk-1"
    assert chosen(None, 0.01) == "risk-1"
    model.default_point = "gone"
    assert chosen(None, None) == "risk-1"


def test_an_answer_is_sent_at_once(server: Served) -> None:
    """Not when the client has acknowledged its first part, which takes 40 ms."""
    body = json.dumps(as_json(IMAGES))
    connection = http.client.HTTPConnection("127.0.0.1", server.http_port, timeout=30)
    seconds = []
    for _ in range(30):
        started = time.perf_counter()
        connection.request("POST", "/v2/models/a/infer", body)
        assert connection.getresponse().read()
        seconds.append(time.perf_counter() - started)
    connection.close()
    assert np.quantile(seconds, 0.2) < 0.03
