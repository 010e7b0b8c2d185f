"""How long a step of a pipeline takes under each schedule. Pure.

Legend: p workers in line, v chunks in each, M microbatches.
"""

from __future__ import annotations

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

    Those that have something to do get equal parts of the cores. So it counts less how long the slowest stage works,
    and more how soon all cores have something to do.
    """
    stages, chunks = len(orders), len(works) // len(orders)
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
        spent = min(left.values())
        now += spent * max(1.0, len(left) / cores)
        for rank in [rank for rank, seconds in left.items() if seconds <= spent]:
            del left[rank]
            done.add(target(orders[rank][at[rank]], rank, stages, chunks))
            at[rank] += 1
        left = {rank: seconds - spent for rank, seconds in left.items()}


def most_in_flight(actions: Sequence[Action]) -> int:
    """How many microbatches' activations a worker holds at most; those of each chunk count."""
    flying = most = 0
    for action in actions:
        flying += {"F": 1, "I": 0, "B": -1, "W": -1}[action.kind]
        most = max(most, flying)
    return most
