"""What exchanging costs on this machine: measured once for it, kept on disk, read by the costs.

Curves are named ``exchange/WAY/W`` (a whole step of W workers without its computing, by bytes of parameters),
``shared/OPERATION/P`` and ``tcp/OPERATION/P`` (one collective of P ranks, through the memory of one host or over
connections), ``coding/HOW/1`` (encoding a gradient for a sum), ``update/1`` and ``copy/1``. WAY is that of a plan:
``dp``, ``zero1`` to ``zero3``, ``ps``, ``asp``, ``mp`` (by microbatches instead).
"""

from __future__ import annotations

import msgspec

from tricorn.planner.figures import Curve


class Links(msgspec.Struct, frozen=True, kw_only=True):
    """Measured on ``cores`` cores, of which others took the share ``busy`` meanwhile.

    ``overhead``: bytes of what a role imports and by which it grows with next to no model, by ``WAY/worker`` and
    ``WAY/server``. ``beside``: how many times as long ``computing`` and ``exchanging`` over connections take at once as
    each alone.
    """

    cores: int
    curves: dict[str, Curve]
    overhead: dict[str, int] = {}
    beside: dict[str, float] = {}
    busy: float = 0.0

    def counts(self, name: str) -> list[int]:
        """For how many workers or ranks there is a curve of that name."""
        return sorted(int(key.rpartition("/")[2]) for key in self.curves if key.rpartition("/")[0] == name)

    def curve(self, name: str, among: int) -> Curve:
        """The curve of so many ranks, or of the nearest number that was measured. KeyError if there is none."""
        counts = self.counts(name)
        if not counts:
            raise KeyError(name)
        return self.curves[f"{name}/{min(counts, key=lambda count: (abs(count - among), count))}"]

    def seconds(self, name: str, among: int, size: float) -> float:
        """Seconds of the operation of that size among so many.

        Beyond what was measured of numbers it grows with them as between the last two.
        """
        counts = self.counts(name)
        at = self.curve(name, among).at(size)
        if among <= counts[-1] or len(counts) < 2:
            return at
        before = self.curves[f"{name}/{counts[-2]}"].at(size)
        return at + max(0.0, at - before) / (counts[-1] - counts[-2]) * (among - counts[-1])
