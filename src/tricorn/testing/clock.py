"""Time as a parameter: a clock that moves only when a test says so."""

from __future__ import annotations


class VirtualClock:
    """Stands in for ``time.monotonic``: pass ``clock.now`` where a function of no argument tells the seconds."""

    def __init__(self, start: float = 0.0) -> None:
        self._now = start

    def now(self) -> float:
        """Seconds since an arbitrary moment."""
        return self._now

    def advance(self, seconds: float) -> None:
        """Let that much time pass. Raises ValueError if it is negative: no clock here runs backwards."""
        if seconds < 0:
            raise ValueError(f"the clock cannot go back by {-seconds} seconds")
        self._now += seconds
