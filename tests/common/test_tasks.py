"""Tasks in processes, and in a stand-in for Ray: what comes back, and what becomes of those that fail."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import types
from contextlib import closing
from multiprocessing.process import BaseProcess
from typing import Any

import pytest

from erde.common import progress
from erde.common.errors import UserError
from erde.common.tasks import in_processes, in_ray, no_interrupts
from tests.helpers.checks import user_error


def double(number: int) -> int:
    if number < 0:
        raise UserError(f"{number} is too small")
    if number == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def nap(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def test_processes_give_what_the_function_gives() -> None:
    others = set(multiprocessing.active_children())
    assert sorted(in_processes(double, [1, 2, 3], 2)) == [2, 4, 6]
    assert list(in_processes(double, [], 2)) == []
    with user_error("-1 is too small"):
        list(in_processes(double, [1, -1], 2))
    with user_error("a worker process was killed.*repeat the command, with --resume"):
        list(in_processes(double, [7], 2))
    # One is at work when the results are given up: with nothing to do it could end by itself.
    with closing(in_processes(nap, [0, 600], 1)) as results:
        assert next(results) == 0
        workers = set(multiprocessing.active_children()) - others
    assert workers
    # They were told to end, not waited for.
    for process in workers:
        assert exit_code(process) == -signal.SIGTERM


def blocked(_: int) -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_an_interrupt_does_not_reach_a_process_that_starts() -> None:
    assert list(in_processes(blocked, [0], 1)) == [True]
    assert not blocked(0)


def test_an_interrupt_waits_until_processes_have_started() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    ended, started = threading.Event(), []

    def start() -> None:
        with no_interrupts():
            subprocess.run(["kill", "-INT", str(os.getpid())], check=True)
            time.sleep(0.2)
            started.append("whole")

    # The system gives the signal to any thread that takes it, such as those of numpy.
    threading.Thread(target=ended.wait).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            start()
        assert started
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        ended.set()
        signal.signal(signal.SIGINT, before)


def exit_code(process: BaseProcess) -> int | None:
    """What a process ended with. The pool's thread waits for it too, and may be told a moment earlier."""
    deadline = time.monotonic() + 30
    while process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.01)
    return process.exitcode


class RayStandIn(types.ModuleType):
    """Ray's calls that are used, in this process; a task runs when it is waited for."""

    class exceptions:  # noqa: N801  # Ray's name
        """Its errors."""

        class RayError(Exception):
            """Ray's own."""

    def __init__(self) -> None:
        super().__init__("ray")
        self.calls: list[str] = []
        self.options: dict[str, int] = {}
        self.most = 0
        self.lost = self.unreachable = False

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: Any) -> None:
        if self.unreachable:
            raise ConnectionError("no cluster\nat this address")
        self.calls.append("init")

    def shutdown(self) -> None:
        self.calls.append("shutdown")

    def remote(self, **options: int) -> Any:
        self.options = options
        return lambda function: types.SimpleNamespace(remote=lambda *arguments: (function, arguments))

    def wait(self, running: list[Any]) -> tuple[list[Any], list[Any]]:
        self.most = max(self.most, len(running))
        return running[-1:], running[:-1]

    def get(self, task: Any) -> Any:
        if self.lost:
            raise self.exceptions.RayError("many lines\nthe worker died")
        function, arguments = task
        return function(*arguments)


def test_ray_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = RayStandIn()
    monkeypatch.setitem(sys.modules, "ray", ray)
    assert sorted(in_ray(double, [1, 2, 3, 4], 2, cpus=3, gpus=1)) == [2, 4, 6, 8]
    assert (ray.calls, ray.most) == (["init", "shutdown"], 2)
    assert ray.options == {"num_cpus": 3, "num_gpus": 1}
    with user_error("-1 is too small"):
        list(in_ray(double, [-1], 2))
    ray.lost = True
    with user_error(r"Ray lost a task \(the worker died\): repeat the command, with --resume"):
        list(in_ray(double, [1], 2))
    assert ray.calls[-1] == "shutdown"
    ray.unreachable = True
    with user_error(r"no way into Ray's cluster \(no cluster\): check RAY_ADDRESS"):
        list(in_ray(double, [1], 2))
    monkeypatch.setitem(sys.modules, "ray", None)
    with user_error("--ray needs Ray, which is not installed"):
        list(in_ray(double, [1], 2))


def test_lines_of_a_process_beside_others_say_whose_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "prefix", "seed 3: ")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress.task("kd", 10) as task:
        task.update(5)
    assert capsys.readouterr().err == "seed 3: kd: 5/10\n"
