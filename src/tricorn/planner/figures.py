"""Measured figures, and what is read between them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from statistics import median, quantiles
from typing import NamedTuple

import msgspec


class Figure(NamedTuple):
    """A duration in seconds, and how far its measurements scatter around it, as a share.

    It is half the middle half of them; of fewer than four, half of their range.
    """

    seconds: float
    scatter: float = 0.0

    @classmethod
    def of(cls, taken: Sequence[float]) -> Figure:
        """The median of some durations, at least one."""
        middle = median(taken)
        if middle <= 0:
            return cls(middle, 0.0)
        low, high = (min(taken), max(taken)) if len(taken) < 4 else quantiles(taken, n=4)[::2]
        return cls(middle, (high - low) / 2 / middle)


class Point(NamedTuple):
    """What an operation of size ``x`` (bytes or samples) took."""

    x: float
    seconds: float
    scatter: float


class Curve(msgspec.Struct, frozen=True):
    """Seconds of an operation by its size, measured at ``points`` with ascending ``x``, at least one of them."""

    points: tuple[Point, ...]

    @property
    def scatter(self) -> float:
        """Typical scatter of its measurements."""
        return median(point.scatter for point in self.points)

    def at(self, x: float) -> float:
        """Seconds at size ``x``: on straight lines between points, the outermost of which go on beyond them.

        Below the smallest size, and where a line would fall, the nearest point counts.
        """
        points = self.points
        if len(points) == 1 or x <= points[0].x:
            return points[0].seconds
        right = min(max(bisect_left(points, x, key=lambda point: point.x), 1), len(points) - 1)
        low, high = points[right - 1], points[right]
        slope = max(0.0, (high.seconds - low.seconds) / (high.x - low.x))
        return low.seconds + slope * (x - low.x)
