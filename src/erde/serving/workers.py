"""The threads that answer, and the bounded queue before them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from erde.serving.errors import Reason, RequestError

Result = TypeVar("Result")


class Workers:
    """``parallel`` threads, and at most ``max_queue`` requests that wait for one. Belongs to one event loop."""

    def __init__(self, parallel: int, max_queue: int) -> None:
        self._parallel, self.max_queue = parallel, max_queue
        self._inside = 0
        self._free = asyncio.Semaphore(parallel)
        self._pool = ThreadPoolExecutor(parallel, thread_name_prefix="erde-serve")

    @property
    def queue_length(self) -> int:
        """Requests that wait, or whose body is still being read, beyond those that are answered."""
        return max(0, self._inside - self._parallel)

    @contextmanager
    def place(self) -> Iterator[None]:
        """A place in the queue, for as long as the request takes; :class:`RequestError` at once if there is none."""
        if self._inside >= self._parallel + self.max_queue:
            raise RequestError(
                Reason.BUSY, f"the server is busy: {self.queue_length} requests wait; try again later"
            )
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def run(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` in a thread, as soon as one is free."""
        # Waiting takes place here and not in the pool: it would keep what was cancelled, bodies too.
        await self._free.acquire()
        loop = asyncio.get_running_loop()
        future = self._pool.submit(function)
        future.add_done_callback(lambda _: loop.call_soon_threadsafe(self._free.release))
        return await asyncio.wrap_future(future)

    def close(self) -> None:
        """Wait until the last function has returned."""
        self._pool.shutdown(wait=True)
