"""Requests that processes answer: one that dies takes its own request along, and nothing else."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from erde.bundle import read, seal_of
from erde.serving.answering import Asked, Exchange
from erde.serving.errors import Reason, RequestError
from erde.serving.grpc_api import exchange_of
from erde.serving.log import Log
from erde.serving.messages import CLASSES
from erde.serving.workers import Processes, _Process
from tests.helpers.checks import user_error
from tests.helpers.served import Served, as_json, certified_bundle, serving, some_images, until

IMAGES = some_images(2)


def processes_of(pid: int) -> set[int]:
    """The ids of a server's processes that answer."""
    ids = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == pid and b"spawn_main" in folder.joinpath("cmdline").read_bytes():
                ids.add(int(folder.name))
        except OSError:  # it ended meanwhile
            continue
    return ids


def is_answered(server: Served) -> bool:
    return server.infer(as_json(IMAGES)).status == 200


def test_a_process_that_is_killed_costs_no_request(bundle_a: Path) -> None:
    with serving([bundle_a], "--processes", "--parallel", "2") as server, ThreadPoolExecutor(8) as pool:
        victim, other = processes_of(server.process.pid)
        for process in (victim, other):
            os.kill(process, signal.SIGSTOP)
        requests = [pool.submit(server.infer, as_json(IMAGES)) for _ in range(6)]
        time.sleep(0.5)  # two are with the processes now, four wait
        os.kill(victim, signal.SIGKILL)
        os.kill(other, signal.SIGCONT)
        assert [request.result().status for request in requests] == [200] * 6
        until(lambda: len(processes_of(server.process.pid)) == 2)
        assert other in processes_of(server.process.pid)
        # The new one answers as well: of two requests at once one is not the other's.
        os.kill(other, signal.SIGSTOP)
        late = [pool.submit(server.infer, as_json(IMAGES)) for _ in range(2)]
        until(lambda: any(request.done() for request in late))
        os.kill(other, signal.SIGCONT)
        assert [request.result().status for request in late] == [200] * 2
        code, out, err = server.stop()
        assert code == 0
        assert "stopped after 8 requests (8 answered)" in out
        assert err.count("the server: a process that answers died: another one starts") == 1
        assert err.count("the server: a new process answers") == 1


def test_a_stop_of_the_whole_group_waits_for_requests_under_way(bundle_a: Path) -> None:
    with serving([bundle_a], "--processes", "--parallel", "1") as server, ThreadPoolExecutor(1) as pool:
        (process,) = processes_of(server.process.pid)
        os.kill(process, signal.SIGSTOP)
        request = pool.submit(server.infer, as_json(IMAGES))
        time.sleep(0.5)
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(process, number)
            server.process.send_signal(number)
        os.kill(process, signal.SIGCONT)
        assert request.result().status == 200
        code, _, err = server.stop()
        assert code == 0
        assert "died" not in err
        assert not Path(f"/proc/{process}").exists()


def test_a_stop_ends_a_process_that_hangs(bundle_a: Path) -> None:
    with (
        serving([bundle_a], "--processes", "--parallel", "2", grace=1) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        processes = processes_of(server.process.pid)
        for process in processes:  # of which one gets the request
            os.kill(process, signal.SIGSTOP)
        try:
            request = pool.submit(server.infer, as_json(IMAGES))
            time.sleep(0.5)
            server.process.send_signal(signal.SIGTERM)
            server.process.wait(timeout=1 + 2)
        finally:
            for process in processes:
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
        assert request.result().status == 503
        assert request.result().json == {"error": "the server stops; try again later"}
        code, _, err = server.end()
    assert code == 0
    assert "Traceback" not in err
    assert "died" not in err


def test_an_interrupt_of_the_whole_group_while_processes_start(tmp_path: Path) -> None:
    # They start slowly: the interrupt comes before they are ready, however busy the machine is.
    slow = 'import sys, time\nif "--multiprocessing-fork" in sys.orig_argv:\n    time.sleep(10)\n'
    (tmp_path / "sitecustomize.py").write_text(slow)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "erde", "serve", "digits-demo", "--processes", "--parallel", "2"]
    process = subprocess.Popen(
        [*command, "--http-port", "0", "--grpc-port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": path},
        # A job in the background of a script ignores interrupts, and so would all that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        until(lambda: len(processes_of(process.pid)) == 2)
        processes = processes_of(process.pid)
        time.sleep(0.5)  # they import
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, out, err) == (130, "", "stopped\n")
    assert not any(Path(f"/proc/{number}").exists() for number in processes)


def test_a_stop_kills_a_process_that_is_starting(
    bundle_a: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    others = processes_of(os.getpid())
    processes = Processes([str(bundle_a)], threads=1, max_batch=4, count=1, poll=60.0, log=Log())
    try:
        (first,) = processes_of(os.getpid()) - others
        wait = _Process.wait_until_ready

        def stop_and_wait(process: _Process) -> None:
            assert process._process.pid is not None
            os.kill(process._process.pid, signal.SIGSTOP)
            wait(process)

        monkeypatch.setattr(_Process, "wait_until_ready", stop_and_wait)
        os.kill(first, signal.SIGKILL)
        until(lambda: processes_of(os.getpid()) - others - {first})
        (second,) = processes_of(os.getpid()) - others - {first}
    finally:
        processes.kill()
        processes.close()
    until(lambda: second not in processes_of(os.getpid()))
    time.sleep(0.2)
    assert capsys.readouterr().err == "the server: a process that answers died: another one starts\n"


def test_an_interrupt_ends_a_process_that_has_just_started(
    bundle_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def interrupted() -> Iterator[None]:
        yield
        raise KeyboardInterrupt

    others = processes_of(os.getpid())
    monkeypatch.setattr("erde.serving.workers.no_interrupts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Processes([str(bundle_a)], threads=1, max_batch=4, count=1, poll=60.0, log=Log())
    assert processes_of(os.getpid()) == others


def test_processes_end_with_a_server_that_is_killed(bundle_a: Path) -> None:
    with serving([bundle_a], "--processes", "--parallel", "2") as server:
        processes = processes_of(server.process.pid)
        server.process.kill()
        server.process.wait()
        until(lambda: not any(Path(f"/proc/{process}").exists() for process in processes))


def test_no_process_can_be_started_in_the_place_of_a_dead_one(tmp_path: Path) -> None:
    folder = certified_bundle(tmp_path / "a")
    stage = folder / "stage_1.onnx"
    content = stage.read_bytes()
    with serving([folder], "--processes", "--parallel", "1") as server:

        def is_ready() -> bool:
            return server.request("GET", "/v2/health/ready").status == 200

        for _ in range(2):
            assert is_ready()
            stage.write_bytes(content + b"!")
            (process,) = processes_of(server.process.pid)
            os.kill(process, signal.SIGKILL)
            # This one waits until it is known that there will be none.
            reply = server.infer(as_json(IMAGES))
            assert (reply.status, reply.headers["retry-after"]) == (503, "1")
            assert "have died, and none can be started" in reply.json["error"]
            assert not is_ready()
            started = time.monotonic()
            assert server.infer(as_json(IMAGES)).status == 503
            assert time.monotonic() - started < 5
            stage.write_bytes(content)
            until(is_ready)
            assert is_answered(server)
        stage.write_bytes(content + b"!")
        (process,) = processes_of(server.process.pid)
        os.kill(process, signal.SIGKILL)
        until(lambda: not is_ready())
        code, out, err = server.stop()
    assert code == 0
    assert "stopped after 6 requests (2 answered, 4 overloaded)" in out
    assert "Traceback" not in err
    # Said once, however often it is tried; and then by the server and the process that see the folder change.
    missing = [line for line in err.splitlines() if "no process starts in its place" in line]
    assert len(missing) == 3
    assert "stage_1.onnx does not match its checksum" in missing[0]


def test_a_process_that_cannot_open_a_changed_bundle_says_so(tmp_path: Path) -> None:
    folder = certified_bundle(tmp_path / "a")
    with serving([folder], "--processes", "--parallel", "1") as server:
        (process,) = processes_of(server.process.pid)
        with (folder / "stage_1.onnx").open("ab") as file:
            file.write(b"!")
        until(lambda: server.err.count("is not taken") == 2)
        time.sleep(0.5)  # some more looks
        assert is_answered(server)
        _, _, err = server.stop()
    assert len(err.splitlines()) == 2, err
    of_server, of_process = sorted(err.splitlines(), key=lambda line: ": process " in line)
    assert of_server.startswith("a: the changed bundle is not taken")
    assert of_process.startswith(f"a: process {process}: the changed bundle is not taken")


def test_processes_take_a_changed_bundle(tmp_path: Path) -> None:
    old, new = certified_bundle(tmp_path / "a"), certified_bundle(tmp_path / "new", seed=1)
    with serving([old], "--processes", "--parallel", "2") as server:
        assert is_answered(server)
        shutil.move(old, tmp_path / "old")
        shutil.move(new, old)
        version = seal_of(read(old))[:12]

        def are_new() -> bool:
            versions = {server.infer(as_json(IMAGES)).json["model_version"] for _ in range(6)}
            return versions == {version}

        until(are_new)
        until(lambda: server.request("GET", "/v2/models/a").json["versions"] == [version])
        # Each exchanges its own, but it is said once.
        err = server.stop()[2]
        assert err.count("in place of") == 1


def test_a_version_that_the_server_knows_already(tmp_path: Path) -> None:
    old, new = certified_bundle(tmp_path / "a"), certified_bundle(tmp_path / "new", seed=1)
    processes = Processes([str(old)], threads=1, max_batch=4, count=1, poll=60.0, log=Log())
    try:
        before = seal_of(read(old))[:12]
        shutil.move(old, tmp_path / "old")
        shutil.move(new, old)
        version = seal_of(read(old))[:12]
        # The process has not looked yet.
        assert processes.respond(exchange_of("r"), request_bytes(), {})[1].version == before
        assert processes.respond(exchange_of("r"), request_bytes(version), {})[1].version == version
        with pytest.raises(RequestError, match=f"no version '{before}': it has {version}"):
            processes.respond(exchange_of("r"), request_bytes(before), {})
    finally:
        processes.close()


def test_two_threads_that_close_a_process_close_its_connection_once(
    bundle_a: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = Processes([str(bundle_a)], threads=1, max_batch=4, count=1, poll=60.0, log=Log())
    close = Connection._close  # type: ignore[attr-defined]

    def slowly(connection: Connection) -> None:
        time.sleep(0.5 if threading.current_thread() is threading.main_thread() else 0.2)
        close(connection)

    monkeypatch.setattr(Connection, "_close", slowly)
    processes.kill()  # its keeper sees that it died, and closes it as well
    processes.close()


def test_what_crashed_is_counted_and_the_drift_watch_sees_all_answers(bundle_a: Path) -> None:
    with serving([bundle_a], "--processes", "--parallel", "2") as server:
        for _ in range(4):
            assert is_answered(server)
        text = server.request("GET", "/metrics").body.decode()
        assert 'erde_operating_points_total{model="a",operating_point="risk-1"} 8' in text
        assert 'erde_requests_total{model="a",outcome="answered"} 4' in text


@pytest.fixture
def processes(bundle_a: Path) -> Iterator[Processes]:
    started = Processes([str(bundle_a)], threads=1, max_batch=4, count=1, poll=60.0, log=Log())
    yield started
    started.close()


def request_bytes(version: str = "") -> bytes:
    message = CLASSES["ModelInferRequest"](
        model_name="a",
        model_version=version,
        inputs=[{"name": "images", "datatype": "UINT8", "shape": IMAGES.shape}],
        raw_input_contents=[IMAGES.tobytes()],
    )
    return bytes(message.SerializeToString())


@pytest.mark.parametrize("point", ["risk-5", None])
def test_the_point_that_load_control_has_set(processes: Processes, point: str | None) -> None:
    _, answer, seconds = processes.respond(exchange_of("r"), request_bytes(), {"a": point})
    assert answer.point == (point or "risk-1")
    assert answer.outputs == {}
    assert seconds > 0


def test_a_refusal_comes_with_its_reason_and_its_model(processes: Processes) -> None:
    exchange = exchange_of("r")
    with pytest.raises(RequestError, match="no ModelInferRequest") as caught:
        processes.respond(exchange, b"\xff", {})
    assert (caught.value.reason, exchange.model) == (Reason.BAD, "")
    request = CLASSES["ModelInferRequest"](model_name="a", id="mine")
    with pytest.raises(RequestError, match="the request has 0 inputs"):
        processes.respond(exchange, request.SerializeToString(), {})
    assert (exchange.model, exchange.id) == ("a", "mine")


def test_a_request_does_not_wait_where_no_process_will_come() -> None:
    processes = object.__new__(Processes)
    processes._closed, processes._missing = threading.Event(), [True, True]
    # It has no line of processes: to wait there would be another error.
    with pytest.raises(RequestError, match="have died, and none can be started") as caught:
        processes.respond(exchange_of("r"), request_bytes(), {})
    assert caught.value.reason is Reason.BUSY


def test_processes_that_died_while_they_had_nothing_to_do(processes: Processes) -> None:
    for dead in (1, 2):
        (process,) = processes_of(os.getpid())
        os.kill(process, signal.SIGKILL)
        # The dead ones stay in line until somebody asks.
        until(lambda dead=dead: processes._idle.qsize() == dead + 1)
    assert processes.respond(exchange_of("r"), request_bytes(), {})[1].point == "risk-1"


class Slow:
    """A request whose copy takes long; meanwhile the process that gets it is killed."""

    def __init__(self, content: bytes, victims: set[int]) -> None:
        self.content, self.victims = content, victims

    def __reduce__(self) -> Any:
        while self.victims:
            os.kill(self.victims.pop(), signal.SIGKILL)
            time.sleep(0.5)  # its keeper sees that it died
        return bytes, (self.content,)


def test_a_process_that_dies_while_it_is_sent_a_request(processes: Processes) -> None:
    content: Any = Slow(request_bytes(), processes_of(os.getpid()))
    assert processes.respond(exchange_of("r"), content, {})[1].point == "risk-1"


def test_a_process_that_dies_while_it_is_looked_at(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (process,) = processes_of(os.getpid())
    poll = Connection.poll

    def slowly(connection: Connection, timeout: float = 0.0) -> bool:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)
        time.sleep(0.5)
        return poll(connection, timeout)

    monkeypatch.setattr(Connection, "poll", slowly)
    assert processes.respond(exchange_of("r"), request_bytes(), {})[1].point == "risk-1"


def _unreached(*_: Any) -> bytes:
    raise AssertionError


def die(_: bytes) -> Asked:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_request_that_kills_fails_at_the_second_process(processes: Processes) -> None:
    with pytest.raises(RequestError, match="two processes died while they answered this request") as caught:
        processes.respond(Exchange(die, _unreached), b"", {})
    assert caught.value.reason is Reason.FAILED
    assert processes.respond(exchange_of("r"), request_bytes(), {})[1].point == "risk-1"


def test_a_process_that_may_have_got_half_of_a_request_is_replaced(
    processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("multiprocessing.connection.Connection.send", _no_memory)
        with pytest.raises(MemoryError):
            processes.respond(exchange_of("r"), request_bytes(), {})
    assert processes.respond(exchange_of("r"), request_bytes(), {})[1].point == "risk-1"


def _no_memory(*_: Any) -> None:
    raise MemoryError


def test_a_process_that_does_not_start(tmp_path: Path) -> None:
    with user_error("a process of the server did not start: no bundle at "):
        Processes([str(tmp_path / "nothing")], threads=1, max_batch=4, count=2, poll=60.0, log=Log())
