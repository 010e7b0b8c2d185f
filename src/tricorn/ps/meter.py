"""Cheap counters of what a server does, for ``tricorn ps stats``."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

_REMEMBERED = 1024  # newest requests, from which the percentiles are


class Meter:
    def __init__(self) -> None:
        self.requests = 0
        self.bytes_received = 0
        self.bytes_sent = 0
        self._began = time.monotonic()
        self._seconds: deque[float] = deque(maxlen=_REMEMBERED)

    def answered(self, seconds: float) -> None:
        self.requests += 1
        self._seconds.append(seconds)

    def read(self) -> dict[str, Any]:
        """Totals since the start, and percentiles (seconds) of the time from a request's arrival to its answer."""
        ordered = sorted(self._seconds)
        p50, p99 = (ordered[int(len(ordered) * part)] if ordered else None for part in (0.5, 0.99))
        return {
            "seconds": time.monotonic() - self._began, "requests": self.requests, "p50": p50, "p99": p99,
            "bytes_received": self.bytes_received, "bytes_sent": self.bytes_sent,
        }  # fmt: skip
