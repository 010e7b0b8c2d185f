"""What a collective of ``torch.distributed`` returns: something to wait for."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tricorn.errors import PeerLost

_FOREVER = timedelta(0)


class FarWork(dist.Work):
    """An operation over Gloo; ``lost`` says what its error means."""

    def __init__(self, inner: dist.Work, lost: Callable[[BaseException], str]) -> None:
        super().__init__()
        self._inner, self._lost = inner, lost
        for name in ("is_completed", "is_success", "exception", "result", "source_rank", "_source_rank", "get_future"):
            setattr(self, name, getattr(inner, name))

    def wait(self, timeout: timedelta = _FOREVER) -> bool:
        """As of the operation; raises PeerLost."""
        try:
            return self._inner.wait(timeout)
        except RuntimeError as error:
            raise PeerLost(self._lost(error)) from error

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()


class Work(dist.Work):
    """``tensors`` are its result. ``follow`` has to be called with its handle once there is one."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        super().__init__()
        self._tensors = list(tensors)
        self._running = threading.Lock()  # a tenth of the time of an Event
        self._running.acquire()
        self._done = False
        self._mutex = threading.Lock()
        self._error: BaseException | None = None
        self._future: torch.futures.Future[Any] | None = None
        self._source = -1

    def finish(self, error: BaseException | None = None, source: int = -1) -> None:
        """Called once, by whoever did it."""
        with self._mutex:
            self._error, self._source = error, source
            self._done = True
            self._running.release()
            future = self._future
        if future is not None:
            self._settle(future)

    def run(self, work: Callable[[], object]) -> Work:
        """Do it here and now; an error is raised by ``wait``."""
        try:
            work()
        except BaseException as error:
            self.finish(error)
            if not isinstance(error, Exception):
                raise
        else:
            self.finish()
        return self

    def wait(self, timeout: timedelta = _FOREVER) -> bool:
        """Block until it is done; raise what it raised, or PeerLost after the timeout (0: that of the group)."""
        if not self._done:
            seconds = timeout.total_seconds()
            if not self._running.acquire(timeout=seconds if seconds > 0 else -1):
                raise PeerLost(
                    f"the operation was not over after {seconds:g} s", remedy="Wait for longer, or without a limit."
                )
            self._running.release()
        if self._error is not None:
            raise self._error
        return True

    def is_completed(self) -> bool:
        return self._done

    def is_success(self) -> bool:
        return self.is_completed() and self._error is None

    def exception(self) -> BaseException | None:
        return self._error

    def result(self) -> list[Tensor]:
        return self._tensors

    def source_rank(self) -> int:
        return self._source

    _source_rank = source_rank

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def get_future(self) -> torch.futures.Future[Any]:
        with self._mutex:
            if self._future is None:
                self._future = torch.futures.Future()
                if self._done:
                    self._settle(self._future)
            return self._future

    def _settle(self, future: torch.futures.Future[Any]) -> None:
        if self._error is None:
            future.set_result(self._tensors)
        else:
            future.set_exception(self._error)
