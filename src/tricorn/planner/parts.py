"""What a step consists of, role by role: what the cost equations and the simulator both start from.

Legend: m workers, s servers.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING

import msgspec

from tricorn.mp.schedule import Action
from tricorn.mp.simulate import Work

if TYPE_CHECKING:
    from tricorn.plan import Plan
    from tricorn.planner.ground import Ground

LOCAL_PENALTY = 1.15  # updates to the same loss, beside a run that meets every step (docs/planning.md)
QUARTILE = NormalDist().inv_cdf(0.75)  # a scatter is half the middle half: so many standard deviations
# Seconds that the end of a host costs: of silence before it is noticed, and of the start of new roles (engine/base.py).
NOTICING, STARTING = 10.0, 3.0
BETWEEN_CHECKPOINTS = 30.0


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """A pipeline: what each of its workers does, and how long one microbatch takes in each stage."""

    orders: tuple[tuple[Action, ...], ...]
    works: tuple[Work, ...]  # of all stages, chunks counted
    hop: float  # seconds from a stage to the next
    replicas: int
    granted: tuple[float, ...]  # by stage, the share of a step for which its workers may compute
    working: tuple[float, ...]  # by stage, seconds for which its processors work after the last microbatch

    def least(self, busy: Sequence[float]) -> float:
        """Seconds, less what comes after the last microbatch, of a step in which stages are busy for so long."""
        stages = zip(busy, self.working, self.granted, strict=True)
        return max((seconds + after) / share for seconds, after, share in stages) - max(self.working)


class Served(msgspec.Struct, frozen=True, kw_only=True):
    """The fullest server, in seconds for one worker's message one way."""

    link: float  # of its link, which all workers share
    own: float  # of the worker's link
    latency: float
    remote: int  # workers on other hosts
    busy: float  # of its processor for one update, or one step of all


class Parts(msgspec.Struct, frozen=True, kw_only=True):
    """Of one step, or of one worker's update where they are asynchronous.

    ``computing``: by worker, forward and backward, whose measurements scatter by ``scatter``; empty with a ``line``.
    ``loading``: waiting for a batch. ``after``: what all spend, by term, when the slowest is done, or what an
    asynchronous worker spends beside computing; ``meeting``: after how many steps.
    """

    computing: tuple[float, ...]
    scatter: float
    loading: float
    after: dict[str, float]
    meeting: int = 1
    line: Line | None = None
    served: Served | None = None


def deviation(scatter: float) -> float:
    """The standard deviation of measurements that scatter so."""
    return scatter / QUARTILE


def waiting(seconds: Sequence[float], scatter: float, stalls: Sequence[tuple[float, float]], steps: int = 1) -> float:
    """By how much the slowest of all is expected to take longer than the mean, with (share, times) ``stalls`` of each.

    Of normally distributed durations the largest of n is as far out as Blom's rank says (Statistical Estimates and
    Transformed Beta-Variables, 1958). ``steps`` are made before all meet; seconds are of one.
    """
    mean, most = sum(seconds) / len(seconds), max(seconds)
    spread = deviation(scatter) * most / steps**0.5
    rivals = sum(each >= most - 2 * spread for each in seconds)
    jitter = spread * NormalDist().inv_cdf((rivals - 0.375) / (rivals + 0.25)) if rivals > 1 else 0.0
    calm, longest = 1.0, 0.0
    for each, (share, times) in zip(seconds, stalls, strict=True):
        calm *= (1 - share) ** steps
        longest = max(longest, each * times if share else 0.0)
    return most - mean + jitter + (1 - calm) * max(0.0, longest - most) / steps


def stalls_of(plan: Plan, ground: Ground) -> list[tuple[float, float]]:
    """Of each worker the share of its steps that stall, and how many times as long they take."""
    return [(ground.host(host).stalls, ground.host(host).stall_times) for host in ground.places(plan)[0]]


def stretched(seconds: Sequence[float], stalls: Sequence[tuple[float, float]]) -> list[float]:
    """What each takes on average."""
    return [each * (1 + share * (times - 1)) for each, (share, times) in zip(seconds, stalls, strict=True)]


def rolls_back(plan: Plan, role: str) -> bool:
    """Whether the end of a worker, or of a server, sends the run back to a checkpoint: nobody else has its state."""
    if role == "server" or plan.strategy == "ps":
        return role == "server"
    if plan.workers == 1 or plan.zero > 0 or plan.embeddings != "whole":
        return True
    return plan.dense == "mp" and plan.replicas == 1


def lost(plan: Plan, ground: Ground) -> float:
    """The share of the time that failures are expected to cost, at the rates that the cluster file states."""
    workers, servers = ground.places(plan)
    cost: dict[int, float] = {}  # of a host's end: its roles are replaced at once
    for role, hosts in (("worker", workers), ("server", servers)):
        each = NOTICING + STARTING + BETWEEN_CHECKPOINTS / 2 * rolls_back(plan, role)
        for host in hosts:
            cost[host] = max(cost.get(host, 0.0), each)
    return sum(ground.host(host).failures_per_day / 86400 * each for host, each in cost.items())
