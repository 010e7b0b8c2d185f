"""How long a step of a pipeline takes under each schedule, and which schedule and how many microbatches are best. Pure.

Legend: p workers in line, v chunks in each, M microbatches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tricorn.mp.schedule import Action, needed, order, target

if TYPE_CHECKING:
    from tricorn.plan import Schedule

# Seconds that each forward and each backward take besides the arithmetic, on one core: calls, messages and their waits.
FIXED = 0.4e-3
MOST_PER_STAGE = 8
# Of what is slower than the fastest by no more than this, the simplest is taken: measured seconds are no better.
WORTH = 0.97


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


def most_in_flight(actions: Sequence[Action]) -> int:
    """How many microbatches' activations a worker holds at most; those of each chunk count."""
    flying = most = 0
    for action in actions:
        flying += {"F": 1, "I": 0, "B": -1, "W": -1}[action.kind]
        most = max(most, flying)
    return most


class Choice(NamedTuple):
    """How to run a step, and how long it should take."""

    schedule: Schedule
    microbatches: int
    seconds: float


def choose(
    batch: int,
    works: Sequence[Work],
    samples: int,
    *,
    stages: int,
    schedule: Schedule | None = None,
    microbatches: int | None = None,
    hop: float = 0.0,
    fixed: float = FIXED,
) -> Choice:
    """The fastest schedule and number of microbatches for batches of ``batch`` samples; what is given stays.

    ``works`` were measured of each of the v * p stages with ``samples`` samples; of each part, ``fixed`` seconds do
    not grow with them. Of what differs by less than the simulation can tell the simplest schedule is taken, and of
    microbatches the fewest. ``gpipe`` only where it is given: it holds all microbatches, and is seldom faster.
    """
    chunks = len(works) // stages
    schedules: tuple[Schedule, ...] = ("interleaved",) if chunks > 1 else ("1f1b", "zero-bubble")
    found = []
    for tried in (schedule,) if schedule else schedules:
        for count in (microbatches,) if microbatches else range(1, min(batch, MOST_PER_STAGE * stages) + 1):
            scaled = [_scaled(work, batch / count / samples, fixed) for work in works]
            orders = [order(tried, rank, stages, count, chunks) for rank in range(stages)]
            found.append(Choice(tried, count, simulate(orders, scaled, hop).seconds))
    fastest = min(choice.seconds for choice in found)
    return next(choice for choice in found if choice.seconds * WORTH <= fastest)


def _scaled(work: Work, ratio: float, fixed: float) -> Work:
    forward = fixed + max(0.0, work.forward - fixed) * ratio
    backward = work.input_gradient + work.weight_gradient
    grown = fixed + max(0.0, backward - fixed) * ratio
    share = work.weight_gradient / backward if backward else 0.0
    return Work(forward, grown * (1 - share), grown * share)
