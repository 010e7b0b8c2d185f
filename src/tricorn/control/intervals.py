"""Sets of whole numbers kept as ordered, disjoint, non-adjacent intervals [start, stop)."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator


class Intervals:
    """A growing set of numbers, compact when they are mostly consecutive.

    >>> done = Intervals([(0, 3)])
    >>> done.add(3), done.add(5), done.add(5)
    (True, True, False)
    >>> done.pairs, 4 in done, done.first_gap(), len(done)
    ([(0, 4), (5, 6)], False, 4, 5)
    """

    def __init__(self, pairs: Iterable[tuple[int, int]] = ()) -> None:
        self._starts: list[int] = []
        self._stops: list[int] = []
        for start, stop in pairs:
            self.add_range(start, stop)

    def add(self, number: int) -> bool:
        """Add one number; False if it was there already."""
        if number in self:
            return False
        self.add_range(number, number + 1)
        return True

    def add_range(self, start: int, stop: int) -> None:
        if start >= stop:
            return
        low, high = bisect_left(self._stops, start), bisect_right(self._starts, stop)
        if low < high:
            start, stop = min(start, self._starts[low]), max(stop, self._stops[high - 1])
        self._starts[low:high] = [start]
        self._stops[low:high] = [stop]

    def first_gap(self, start: int = 0) -> int:
        """The smallest number from ``start`` on that is not in the set."""
        at = bisect_right(self._starts, start) - 1
        return max(start, self._stops[at]) if at >= 0 else start

    def missing(self, start: int, stop: int) -> Iterator[int]:
        """The numbers of [start, stop) that are not in the set, in order."""
        at = self.first_gap(start)
        while at < stop:
            yield at
            at = self.first_gap(at + 1)

    def common(self, other: Intervals) -> Intervals:
        """The numbers that are in both."""
        found = Intervals()
        for start, stop in self.pairs:
            for low, high in other.pairs:
                found.add_range(max(start, low), min(stop, high))
        return found

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, self._stops, strict=True))

    def __contains__(self, number: int) -> bool:
        at = bisect_right(self._starts, number) - 1
        return at >= 0 and number < self._stops[at]

    def __len__(self) -> int:
        return sum(self._stops) - sum(self._starts)
