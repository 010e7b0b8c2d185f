"""The best cut of a chain of blocks into stages: exact, by dynamic programming. Pure.

Legend: p stages, b blocks; a cut c (1 <= c < b) lies before block c; stage s has the blocks [start, stop).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from tricorn.errors import PlanError

if TYPE_CHECKING:
    from tricorn.plan import Plan

# The cuts that a plan gives number the blocks of a model that is looked into as for so many stages.
NUMBERED = 8

Fits = Callable[[int, int, int], bool]  # (stage, start, stop) -> whether the stage has room for these blocks


class Link(NamedTuple):
    """What it costs to hand a value to the next stage: ``latency`` seconds, and ``wire`` seconds a byte, pass while
    both go on computing, ``copy`` seconds a byte each of the two spends on it.
    """

    copy: float
    wire: float
    latency: float = 0.0


FREE = Link(0.0, 0.0)
SHARED = Link(copy=0.25e-9, wire=0.0)  # through shared memory: each side copies


def fineness(plan: Plan) -> int:
    """For how many stages a model is looked into at least."""
    return 0 if plan.cuts is None else NUMBERED


def everything_fits(stage: int, start: int, stop: int) -> bool:
    return True


def balanced(
    seconds: Sequence[float],
    slowness: Sequence[float],
    cuts: Sequence[int],
    handed_on: Sequence[int],
    link: Link = FREE,
    fits: Fits = everything_fits,
    *,
    keep: int = 1,
) -> list[tuple[int, ...]]:
    """The p - 1 of the legal ``cuts`` that make the slowest stage fastest, of equals the earliest; the ``keep`` best
    that fit, or as many as there are, the best first.

    ``seconds`` are those of each block, forward and backward, of one microbatch, and ``slowness`` how many times as
    long each of the p stages takes for them; ``handed_on`` the bytes that a block hands to the next and back. Raises
    PlanError if there are too few cuts.
    """
    before = [0.0, *accumulate(seconds)]
    edge = [0, *handed_on[:-1], 0]  # edge[c]: bytes that cross the cut c

    def cost(stage: int, start: int, stop: int) -> float:
        """What a stage computes and copies, or what its links take if that is longer."""
        if not fits(stage, start, stop):
            return inf
        busy = before[stop] - before[start] + link.copy * (edge[start] + edge[stop])
        return max(slowness[stage] * busy, link.wire * max(edge[start], edge[stop]))

    return [chosen for worst, chosen in minimax(cost, len(slowness), cuts, len(seconds), keep=keep) if worst < inf]


def minimax(
    cost: Callable[[int, int, int], float], stages: int, cuts: Sequence[int], blocks: int, *, keep: int = 1
) -> list[tuple[float, tuple[int, ...]]]:
    """The cuts whose costliest stage costs least, and what that is: the ``keep`` best, of equals the earliest.

    ``cost`` is of (stage, start, stop). Raises PlanError if there are too few cuts.
    """
    if len(cuts) < stages - 1:
        count = "1 stage" if not cuts else f"{len(cuts) + 1} stages"
        raise PlanError(f"a model that can be cut into {count} cannot make {stages}")
    edges = [*cuts, blocks]
    # rows[e]: the costliest stage, and the cuts, when the blocks before e make as many stages as there were rounds. The
    # best of the whole are made of the best of the parts, for no stage that is added makes the costliest cheaper.
    rows: dict[int, list[tuple[float, tuple[int, ...]]]] = {edge: [(cost(0, 0, edge), ())] for edge in edges}
    for stage in range(1, stages):
        rows = {
            edge: sorted(
                (max(costliest, added), (*chosen, last))
                for last, found in rows.items()
                if last < edge
                for added in [cost(stage, last, edge)]
                for costliest, chosen in found
            )[:keep]
            for edge in edges
            if min(rows) < edge
        }
    return rows[blocks]
