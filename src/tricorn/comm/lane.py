"""A thread that runs functions one after another, and the handle one waits on for each."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

_thread = threading.local()


def aside() -> bool:
    """Whether the caller is in a lane, and so beside a thread that may well compute."""
    return getattr(_thread, "in_lane", False)


class Handle:
    """Something under way in a lane."""

    def __init__(self) -> None:
        self._running = threading.Lock()
        self._running.acquire()
        self._error: BaseException | None = None

    @property
    def done(self) -> bool:
        return not self._running.locked()

    def wait(self) -> None:
        """Block until it is done; raise what it raised. May be called again."""
        with self._running:
            if self._error is not None:
                raise self._error

    def run(self, function: Callable[[], None]) -> Handle:
        """Run the function here and be done."""
        try:
            function()
        except BaseException as error:  # raised again by wait(), in the thread that cares
            self._error = error
        self._running.release()
        return self


class Lane:
    """First in, first out. The thread starts with the first function that needs it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[tuple[Handle, Callable[[], None]] | None] = queue.SimpleQueue()
        self._mutex = threading.Lock()  # of the end: nothing is queued behind it
        self._closed = False
        self._thread: threading.Thread | None = None
        self._last = Handle().run(lambda: None)

    @property
    def idle(self) -> bool:
        """Whether nothing is queued or under way."""
        return self._last.done

    def start(self, function: Callable[[], None]) -> Handle:
        """Queue the function. In a closed lane it runs at once."""
        handle = Handle()
        with self._mutex:
            if not self._closed:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._serve, name=self._name, daemon=True)
                    self._thread.start()
                self._last = handle
                self._queue.put((handle, function))
                return handle
        return handle.run(function)

    def run(self, function: Callable[[], None]) -> None:
        """Run the function after all that is queued; in this thread, which saves two switches, if nothing is."""
        if self.idle:
            function()
        else:
            self.start(function).wait()

    def close(self) -> None:
        """Run what is queued, then end the thread. May be called again."""
        with self._mutex:
            self._closed = True
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()

    def _serve(self) -> None:
        _thread.in_lane = True
        while work := self._queue.get():
            handle, function = work
            handle.run(function)
