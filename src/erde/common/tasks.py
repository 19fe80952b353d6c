"""Tasks of one command, several at a time: in processes of this machine, or in Ray's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import FrameType
from typing import Any, TypeVar

from erde.common.errors import UserError, in_one_line

Task = TypeVar("Task")
Result = TypeVar("Result")
# Commands that have no --resume, such as erde ledger, continue without.
AGAIN = "repeat the command, with --resume if it has that option"


def in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int, *, remedy: str = "fewer workers"
) -> Generator[Result, None, None]:
    """The results of ``tasks`` as they come, from processes that end with this generator and with this process.

    Args:
        workers: the most processes at a time.
        remedy: what takes less memory, for the error where a process was killed.

    Raises:
        UserError: a process was killed; and what ``work`` raises. The other processes are ended then.
    """
    with _processes(min(workers, max(1, len(tasks)))) as pool:
        try:
            with no_interrupts():
                submitted = [pool.submit(work, task) for task in tasks]
            for done in as_completed(submitted):
                yield done.result()
        except BrokenProcessPool as error:
            raise UserError(
                f"a worker process was killed, perhaps for want of memory: {AGAIN}, and {remedy}"
            ) from error


@contextmanager
def _processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that end with this one, and at once where the block fails."""
    others = set(multiprocessing.active_children())
    # Forked processes would have copies of a library's locks, and not its threads.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown()


@contextmanager
def no_interrupts() -> Iterator[None]:
    """Keep Ctrl-C from processes that this thread starts: all of a group get it, and the parent ends its own.

    In the main thread it waits for the end of the block, so that no process is half started.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # Where it starts with the first process, it unblocks the signal.
    resource_tracker.ensure_running()
    # The mask is for the processes, which inherit it. Here other threads take the signal, such as those of numpy.
    handler: Any = signal.getsignal(signal.SIGINT)
    came: list[tuple[int, FrameType | None]] = []
    holds = callable(handler) and threading.current_thread() is threading.main_thread()
    if holds:
        signal.signal(signal.SIGINT, lambda *given: came.append(given))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        if holds:
            signal.signal(signal.SIGINT, handler)
            if came:
                handler(*came[0])


def _end_with_parent() -> None:
    """Workers of a killed command would wait for tasks for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends the workers
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def import_ray() -> Any:
    """Ray, if it is installed; else :class:`UserError`."""
    # Else Ray reports its use to its makers over the network; whoever sets it to 1 is asked.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError as error:
        raise UserError(
            "--ray needs Ray, which is not installed: pip install 'erde[ray]', or leave --ray out"
        ) from error
    return ray


def in_ray(
    work: Callable[[Task], Result], tasks: Sequence[Task], workers: int, *, cpus: int = 1, gpus: int = 0
) -> Generator[Result, None, None]:
    """The same in the cluster of ``RAY_ADDRESS``, or else of this machine.

    Args:
        workers: the most tasks at a time.
        cpus: processors of a task, as Ray counts them.
        gpus: likewise.
    """
    ray = import_ray()
    started = not ray.is_initialized()
    if started:
        try:
            ray.init(log_to_driver=False)
        except (ConnectionError, ray.exceptions.RayError) as error:
            reason = in_one_line(str(error).strip().splitlines()[0])
            raise UserError(
                f"no way into Ray's cluster ({reason}): check RAY_ADDRESS and, where the cluster has a token, RAY_AUTH_TOKEN; "
                f"then {AGAIN}"
            ) from error
    try:
        remote = ray.remote(num_cpus=cpus, num_gpus=gpus)(_work_or_refuse)
        waiting = list(reversed(tasks))
        running: list[Any] = []
        while waiting or running:
            while waiting and len(running) < workers:
                running.append(remote.remote(work, waiting.pop()))
            ready, running = ray.wait(running)
            refusal, result = ray.get(ready[0])
            if refusal is not None:
                raise UserError(refusal)
            yield result
    except ray.exceptions.RayError as error:
        reason = in_one_line(str(error).strip().splitlines()[-1])
        raise UserError(f"Ray lost a task ({reason}): {AGAIN}") from error
    finally:
        if started:
            ray.shutdown()


def _work_or_refuse(work: Callable[[Task], Result], task: Task) -> tuple[str | None, Result | None]:
    """Ray would make many lines of an error."""
    try:
        return None, work(task)
    except UserError as error:
        return str(error), None
