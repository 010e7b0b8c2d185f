"""Synchronous steps on a virtual clock: all workers meet before the next one begins.

Legend: K steps, m workers, p stages, R replicas, t shards of a layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from tricorn.mp.schedule import Action, Parcel, needed, target
from tricorn.plan import Plan
from tricorn.planner.parts import Line, Parts, Served
from tricorn.planner.prediction import WIRE
from tricorn.planner.simulation.noise import Floats, Noise
from tricorn.planner.simulation.trace import Trace
from tricorn.ps.consistency import Bsp, Verdict


def run(plan: Plan, parts: Parts, noise: Noise, steps: int) -> Trace:
    """So many steps of the plan, to whole meetings."""
    steps = -(-steps // parts.meeting) * parts.meeting
    after = parts.loading + sum(parts.after.values())
    if parts.line is not None:
        return _piped(plan, parts.line, noise, steps, after)
    if parts.served is not None:
        return _served(plan, parts, parts.served, noise, steps)
    return _shared(parts, noise, steps, after)


def _shared(parts: Parts, noise: Noise, steps: int, after: float) -> Trace:
    """Data parallel: what follows begins when the slowest has computed, once in ``meeting`` steps."""
    found: list[float] = []
    busy = whole = 0.0
    for factors_Km in noise.blocks(steps, parts.meeting):
        seconds_Km = factors_Km * parts.computing
        rounds = seconds_Km.reshape(-1, parts.meeting, seconds_Km.shape[1]).sum(1)
        slowest = rounds.max(1) / parts.meeting + after
        found += slowest.tolist()
        busy += rounds.mean(1).sum() / parts.meeting + after * len(rounds)
        whole += slowest.sum()
    return Trace(found, {"worker": 1 - busy / whole}, {})


def _piped(plan: Plan, line: Line, noise: Noise, steps: int, after: float) -> Trace:
    """Pipelines: each replica's line by its orders, all of them and all steps at once."""
    p, found, busy, whole = len(line.orders), list[float](), 0.0, 0.0
    works = [_microbatches(line) * sum(map(sum, line.works[rank::p])) for rank in range(p)]
    work, least = sum(works) / p, line.least(works)
    all_moves = moves(line)
    for factors_Km in noise.blocks(steps):
        # Shards of a layer wait for the slowest of them.
        factors = factors_Km.reshape(len(factors_Km), line.replicas, p, plan.tensor).max(3)
        ends = carried_out(line, all_moves, factors)
        seconds_K = np.maximum(ends.max(1), least) + after
        found += seconds_K.tolist()
        busy += float(factors.mean((1, 2)).sum()) * work + after * len(seconds_K)
        whole += float(seconds_K.sum())
    return Trace(found, {"worker": max(0.0, 1 - busy / whole)}, {})


def _microbatches(line: Line) -> int:
    return 1 + max(action.microbatch for action in line.orders[0])


def moves(line: Line) -> list[tuple[int, Action]]:
    """All actions of all ranks, each after what it needs. Raises ValueError if they wait for each other in a circle."""
    p = len(line.orders)
    chunks = len(line.works) // p
    waiting, made = [deque(actions) for actions in line.orders], set[Parcel]()
    found: list[tuple[int, Action]] = []
    while any(waiting):
        before = len(found)
        for rank, actions in enumerate(waiting):
            while actions and ((parcel := needed(actions[0], rank, p, chunks)) is None or parcel in made):
                action = actions.popleft()
                found.append((rank, action))
                if (sent := target(action, rank, p, chunks)) is not None:
                    made.add(sent)
        if len(found) == before:
            raise ValueError("the workers wait for each other")
    return found


def carried_out(line: Line, moves: Sequence[tuple[int, Action]], factors_KRp: Floats) -> Floats:
    """When the last worker of each replica ends each step, [K, R]."""
    p = len(line.orders)
    chunks = len(line.works) // p
    clocks = [np.zeros(factors_KRp.shape[:2]) for _ in range(p)]
    ends: dict[Parcel, Floats] = {}
    for rank, action in moves:
        begin = clocks[rank]
        if (parcel := needed(action, rank, p, chunks)) is not None:
            begin = np.maximum(begin, ends.pop(parcel))
        clocks[rank] = begin + line.works[action.chunk * p + rank].of(action.kind) * factors_KRp[:, :, rank]
        if (sent := target(action, rank, p, chunks)) is not None:
            ends[sent] = clocks[rank] + line.hop
    last: Floats = np.maximum.reduce(clocks)
    return last


def _served(plan: Plan, parts: Parts, served: Served, noise: Noise, steps: int) -> Trace:
    """Parameter servers: the fullest one's link is shared by whoever sends, and it decides as a real one does."""
    bsp = Bsp(plan.workers, 0)
    m, remote = plan.workers, served.remote
    begin, now = np.zeros(m), 0.0
    found: list[float] = []
    busy = whole = 0.0
    at_server = sum(seconds for term, seconds in parts.after.items() if term != WIRE)
    for factors_Km in noise.blocks(steps):
        for computing in factors_Km * parts.computing:
            computed = begin + parts.loading + computing
            arrived = _sent(computed, served, remote)
            for worker in np.argsort(arrived, kind="stable").tolist():
                assert bsp.judge(bsp.version, worker) is Verdict.TAKE
                complete = bsp.contribute(bsp.version, worker)
            assert complete
            assert bsp.pull(bsp.version + 1)
            bsp.advance()
            applied = float(arrived.max()) + at_server
            begin = _sent(np.full(m, applied), served, remote)
            ended = float(begin.max())
            found.append(ended - now)
            busy += float(computing.mean()) + parts.loading + at_server
            whole += ended - now
            now = ended
    shares = {"worker": max(0.0, 1 - busy / whole), "server": max(0.0, 1 - at_server * len(found) / whole)}
    return Trace(found, shares, {"0": float(len(found) * m)})


def _sent(begun_m: Floats, served: Served, remote: int) -> Floats:
    """When messages that all workers begin to send have passed the links; the last ones of m are on other hosts."""
    if not remote and not served.own:
        return begun_m
    ended_m = begun_m.copy()
    order = np.argsort(begun_m[-remote:], kind="stable") + len(begun_m) - remote if remote else np.arange(0)
    ended_m[order] = fair(begun_m[order].tolist(), served.link)
    return np.maximum(ended_m, begun_m + served.own) + served.latency


def fair(begun: Sequence[float], seconds: float) -> list[float]:
    """When messages have passed a link that those under way share equally, each of which needs so long alone.

    ``begun`` is ascending; so is what is returned, for all are of one size.
    """
    ended: list[float] = []
    under_way: deque[float] = deque()  # how much of the link each has had when it is through
    now = had = 0.0  # the clock, and how much each of those under way has had since the beginning
    for begin in [*begun, float("inf")]:
        while under_way and now + (under_way[0] - had) * len(under_way) <= begin:
            now += (under_way[0] - had) * len(under_way)
            had = under_way.popleft()
            ended.append(now)
        if under_way:
            had += (begin - now) / len(under_way)
        now = begin
        under_way.append(had + seconds)
    return ended
