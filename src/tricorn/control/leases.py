"""Leases: which worker trains on which step of an asynchronous run, and when a step is committed.

A step is lent to one worker, and committed once every server has applied it. A step whose worker died is lent
again; servers that had applied it drop the repetition (ps/asynchronous.py), so it still counts once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from functools import reduce

from tricorn.control.intervals import Intervals


class Leases:
    """Pure bookkeeping of the steps of one membership epoch. Steps are lent in order, below ``limit``, 0 at first.

    ``applied`` says for each server which steps it holds; ``committed`` are those that all hold.
    """

    def __init__(self, applied: Mapping[str, Intervals]) -> None:
        self.committed = reduce(Intervals.common, applied.values())
        self.limit = 0
        self._servers = frozenset(applied)
        self._next = 0
        self._credit: dict[str, int] = {}
        self._turns: deque[str] = deque()
        self._lent: dict[int, str] = {}
        self._applied: dict[int, set[str]] = {}
        for server, steps in applied.items():
            for start, stop in steps.pairs:
                self.applied(server, list(self.committed.missing(start, stop)))

    @property
    def outstanding(self) -> int:
        """How many steps are lent and not yet committed."""
        return len(self._lent)

    def want(self, worker: str, steps: int) -> None:
        """The worker can take that many steps more."""
        if worker not in self._credit:
            self._credit[worker] = 0
            self._turns.append(worker)
        self._credit[worker] += steps

    @property
    def torn(self) -> bool:
        """Whether some servers hold a step that others lack: a state that must not be saved."""
        return bool(self._applied)

    def grants(self, *, torn_only: bool = False) -> dict[str, list[int]]:
        """Lend what can be lent now, one step at a time in turn: worker -> steps.

        ``torn_only`` lends no step that no server has yet, so that the run can come to rest.
        """
        granted: dict[str, list[int]] = {}
        idle = 0
        while self._turns and idle < len(self._turns):
            worker = self._turns[0]
            self._turns.rotate(-1)
            if not self._credit[worker]:
                idle += 1
                continue
            step = self._next_torn() if torn_only else self._next_free()
            if step is None:
                break
            idle = 0
            self._credit[worker] -= 1
            self._lent[step] = worker
            granted.setdefault(worker, []).append(step)
        return granted

    def _next_torn(self) -> int | None:
        return min((step for step in self._applied if step not in self._lent), default=None)

    def _next_free(self) -> int | None:
        self._next = self.committed.first_gap(self._next)
        while self._next in self._lent:
            self._next = self.committed.first_gap(self._next + 1)
        return self._next if self._next < self.limit else None

    def applied(self, server: str, steps: list[int]) -> list[int]:
        """The server has applied these steps; returns those that are committed by it."""
        done = []
        for step in steps:
            if step in self.committed:
                continue
            holders = self._applied.setdefault(step, set())
            holders.add(server)
            if holders >= self._servers:
                del self._applied[step]
                self._lent.pop(step, None)
                self.committed.add(step)
                done.append(step)
        return done
