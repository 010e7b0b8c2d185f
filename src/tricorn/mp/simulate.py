"""How long a step of a pipeline takes under each schedule. Pure.

Legend: p workers in line, v chunks in each, M microbatches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from tricorn.mp.schedule import Action, Parcel, needed, target


class Work(NamedTuple):
    """Seconds that one microbatch takes in one stage; the two halves of backward are together."""

    forward: float
    input_gradient: float
    weight_gradient: float

    def of(self, kind: str) -> float:
        """What an action of that kind takes."""
        return {
            "F": self.forward,
            "B": self.input_gradient + self.weight_gradient,
            "I": self.input_gradient,
            "W": self.weight_gradient,
        }[kind]


class Simulated(NamedTuple):
    """One step: its ``seconds``, the share of them that all workers together ``idle``, and how many microbatches'
    activations each worker holds at most (those of each chunk counted).
    """

    seconds: float
    idle: float
    in_flight: tuple[int, ...]


def simulate(orders: Sequence[Sequence[Action]], works: Sequence[Work], hop: float = 0.0) -> Simulated:
    """Carry out the orders of all workers on a virtual clock; ``works`` are of all stages, v for each worker.

    ``hop`` is the seconds from the end of an action to when what it sends has come. Raises ValueError if the workers
    wait for each other in a circle.
    """
    stages, chunks = len(orders), len(works) // len(orders)
    ends: dict[object, float] = {}
    at, clocks = [0] * stages, [0.0] * stages
    moved = True
    while moved:
        moved = False
        for rank, actions in enumerate(orders):
            for action in actions[at[rank] :]:
                parcel = needed(action, rank, stages, chunks)
                if parcel is not None and parcel not in ends:
                    break
                begin = clocks[rank] if parcel is None else max(clocks[rank], ends[parcel])
                clocks[rank] = begin + works[action.chunk * stages + rank].of(action.kind)
                if (sent := target(action, rank, stages, chunks)) is not None:
                    ends[sent] = clocks[rank] + hop
                at[rank] += 1
                moved = True
    if any(done < len(actions) for done, actions in zip(at, orders, strict=True)):
        raise ValueError(f"the workers wait for each other after {at} actions")
    seconds = max(clocks)
    busy = sum(
        works[action.chunk * stages + rank].of(action.kind) for rank, actions in enumerate(orders) for action in actions
    )
    idle = 1 - busy / (stages * seconds) if seconds else 0.0
    return Simulated(seconds, idle, tuple(most_in_flight(actions) for actions in orders))


def crowded(orders: Sequence[Sequence[Action]], works: Sequence[Work], cores: float) -> float:
    """As ``simulate``, the seconds of a step of workers on one host of fewer ``cores`` than there are workers.

    The system leaves each worker on one core, and moves none because another core is idle for a moment (measured:
    three even stages on two cores take a fifth longer than if they had equal parts of both). It comes to even the cores
    out: the busiest workers are placed first. So an uneven cut, in which the small stages share a core, may be faster.
    """
    stages, chunks = len(orders), len(works) // len(orders)
    core_of, speeds = _placed(orders, works, cores)
    done: set[Parcel | None] = {None}
    at, left = [0] * stages, dict[int, float]()  # seconds of work in what each rank is at
    now = 0.0
    while True:
        for rank, actions in enumerate(orders):
            if rank not in left and at[rank] < len(actions):
                action = actions[at[rank]]
                if needed(action, rank, stages, chunks) in done:
                    left[rank] = works[action.chunk * stages + rank].of(action.kind)
        if not left:
            return now
        sharing = Counter(core_of[rank] for rank in left)
        rates = {rank: speeds[core_of[rank]] / sharing[core_of[rank]] for rank in left}
        spent, first = min((seconds / rates[rank], rank) for rank, seconds in left.items())
        now += spent
        left = {rank: seconds - spent * rates[rank] for rank, seconds in left.items()}
        del left[first]
        done.add(target(orders[first][at[first]], first, stages, chunks))
        at[first] += 1


def _placed(
    orders: Sequence[Sequence[Action]], works: Sequence[Work], cores: float
) -> tuple[dict[int, int], list[float]]:
    """The core of each worker, and the speed of each core: the last may be a part of one."""
    speeds = [1.0] * int(cores) + ([cores % 1] if cores % 1 else [])
    busy = [sum(works[a.chunk * len(orders) + rank].of(a.kind) for a in each) for rank, each in enumerate(orders)]
    loads, core_of = [0.0] * len(speeds), dict[int, int]()
    for rank in sorted(range(len(orders)), key=busy.__getitem__, reverse=True):
        core = min(range(len(speeds)), key=lambda core: (loads[core] + busy[rank]) / speeds[core])
        core_of[rank] = core
        loads[core] += busy[rank]
    return core_of, speeds


def most_in_flight(actions: Sequence[Action]) -> int:
    """How many microbatches' activations a worker holds at most; those of each chunk count."""
    flying = most = 0
    for action in actions:
        flying += {"F": 1, "I": 0, "B": -1, "W": -1}[action.kind]
        most = max(most, flying)
    return most
