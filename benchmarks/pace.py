"""How fast the cores are just now: neighbours on the same hardware slow them down by half and more, for seconds."""

from __future__ import annotations

import os
import statistics
import threading
import time
from itertools import cycle

EVERY = 0.02  # seconds
WARM, WORK = 500, 10_000  # numbers that are added up, before and while time is taken


class Pace:
    """A context, in which a thread goes from core to core, and takes the time of the same little work on each.

    ``seconds`` of the processor, on average; a hundredth of what the cores can do goes into it.
    """

    def __init__(self) -> None:
        self._taken: list[float] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Pace:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        return statistics.mean(self._taken)

    def _look(self) -> None:
        for core in cycle(sorted(os.sched_getaffinity(0))):
            os.sched_setaffinity(threading.get_native_id(), {core})
            sum(range(WARM))
            began = time.thread_time()
            sum(range(WORK))
            self._taken.append(time.thread_time() - began)
            if self._ended.wait(EVERY):
                return
