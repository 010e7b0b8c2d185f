"""When each worker of a pipeline does what: microbatches, and the order of forwards and backwards. Pure.

A worker has one stage, or several *chunks* when it is interleaved: chunk c of rank r is stage c * p + r of them all.

Legend: p workers in line, v chunks in each, M microbatches, n samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from tricorn.plan import Plan, Schedule

PER_STAGE = 2
FEWEST_SAMPLES = 4


class Action(NamedTuple):
    """``F``: forward. ``B``: backward; or in two, ``I``: as much as the stage before waits for, ``W``: what is left."""

    kind: Literal["F", "B", "I", "W"]
    chunk: int
    microbatch: int


class Parcel(NamedTuple):
    """What comes to a stage from another: the values of a microbatch (``F``), or the gradients of its own (``B``)."""

    kind: Literal["F", "B"]
    stage: int
    microbatch: int


def microbatches_of(plan: Plan, batch_size: int) -> int:
    """How many microbatches a whole batch is cut into: what the plan says, else ``choose_microbatches``."""
    return plan.microbatches or choose_microbatches(batch_size, plan.stages)


def choose_microbatches(samples: int, stages: int) -> int:
    """How many microbatches to cut a batch into when neither the plan says it nor any measurement.

    A pipeline idles (p - 1) / (M + p - 1) of its time (Huang et al. 2019, GPipe), and every microbatch costs each
    stage a fixed overhead. Two for each stage keep the idle part under a third; fewer than 4 samples in each would
    make the overhead outweigh the work. One stage has nothing to overlap.
    """
    if stages == 1:
        return 1
    return max(1, min(PER_STAGE * stages, samples // FEWEST_SAMPLES))


def split(samples: int, microbatches: int) -> list[tuple[int, int]]:
    """Cut samples [0, n) into ranges [start, stop) whose sizes differ by at most 1, none of them empty.

    With fewer samples than microbatches there are as many ranges as samples. No sample is padded or left out.
    """
    parts = min(microbatches, samples)
    return list(pairwise(samples * part // parts for part in range(parts + 1)))


def order(schedule: Schedule, rank: int, stages: int, microbatches: int, chunks: int = 1) -> list[Action]:
    """What the worker ``rank`` of ``stages`` in line does, one after another. Only ``interleaved`` has chunks.

    - ``gpipe``: all forwards, then all backwards (Huang et al. 2019): M microbatches in flight.
    - ``1f1b``: a backward after each forward, as soon as there is one (Narayanan et al. 2019): min(p - r, M) in flight.
    - ``interleaved``: the same over v chunks, in groups of p microbatches (Narayanan et al. 2021): idles 1/v as long,
      with v times the messages.
    - ``zero-bubble``: ZB-H1 (Qi et al. 2023): weight gradients wait for where 1F1B would idle, min(p, M) in flight.

    Towards the end of a step others wait for each gradient, so that 1F1B, interleaved or not, hands on its last ones
    before it computes those of the weights: this idles (p - 1) times a weight gradient less. Earlier it would gain
    nothing where stages are even, and cost the cache what backward still has there.
    """
    match schedule:
        case "gpipe":
            return [Action(kind, 0, i) for kind in _FB for i in range(microbatches)]
        case "1f1b":
            actions = _alternating(*_units(stages, microbatches, 1), ahead=stages - 1 - rank)
        case "interleaved":
            first = -(-microbatches // max(1, microbatches // stages))
            ahead = 2 * (stages - 1 - rank) + (chunks - 1) * first
            actions = _alternating(*_units(stages, microbatches, chunks), ahead=ahead)
        case "zero-bubble":
            actions = _zero_bubble(rank, stages, microbatches)
    return _hurried(actions, rank, stages * chunks)


_FB: tuple[Literal["F"], Literal["B"]] = ("F", "B")


def _hurried(actions: Sequence[Action], rank: int, count: int) -> list[Action]:
    """Split the last ``count`` backwards in two, but for those whose gradient nobody waits for."""
    made: list[Action] = []
    for action in reversed(actions):
        late = count > 0 and (rank, action.chunk) != (0, 0)
        made += [action._replace(kind="W"), action._replace(kind="I")] if action.kind == "B" and late else [action]
        count -= action.kind == "B"
    return made[::-1]


def _units(stages: int, microbatches: int, chunks: int) -> tuple[list[Action], list[Action]]:
    """The forwards and the backwards of a worker, each in their order."""
    groups = [range(*part) for part in split(microbatches, max(1, microbatches // stages))]
    forwards = [Action("F", chunk, i) for group in groups for chunk in range(chunks) for i in group]
    backwards = [Action("B", chunk, i) for group in groups for chunk in reversed(range(chunks)) for i in group]
    return forwards, backwards


def _alternating(forwards: Sequence[Action], backwards: Sequence[Action], ahead: int) -> list[Action]:
    ahead = min(ahead, len(forwards))
    pairs = zip(forwards[ahead:], backwards, strict=False)
    return [*forwards[:ahead], *(action for pair in pairs for action in pair), *backwards[len(forwards) - ahead :]]


def _zero_bubble(rank: int, stages: int, microbatches: int) -> list[Action]:
    ahead = min(stages - 1 - rank, microbatches)
    if rank == 0:  # nobody waits for its gradients
        return _alternating(*_units(stages, microbatches, 1), ahead=ahead)
    actions = [Action("F", 0, i) for i in range(ahead)]
    for i in range(microbatches):
        actions += [Action("F", 0, i + ahead)] if i + ahead < microbatches else []
        actions += [Action("I", 0, i)]
        actions += [Action("W", 0, i - rank)] if i >= rank else []
    return actions + [Action("W", 0, i) for i in range(max(0, microbatches - rank), microbatches)]


def gathered(actions: Sequence[Action], together: Sequence[int]) -> list[Action]:
    """The order as it takes time, where the weight gradients of microbatches are put together (deferred.py).

    ``together`` says of each chunk how many. They are computed when the last of these is, or at the end of the step:
    who has no successor that computes meanwhile keeps all others waiting then.
    """
    made: list[Action] = []
    waiting: list[list[Action]] = [[] for _ in together]
    for action in actions:
        held = waiting[action.chunk]
        if action.kind in "FI":
            made.append(action)
        elif len(held) + 1 < together[action.chunk]:
            made += [action._replace(kind="I")] if action.kind == "B" else []
            held.append(action._replace(kind="W"))
        else:
            made += [*held, action]
            held.clear()
    return [*made, *(action for held in waiting for action in held)]


def target(action: Action, rank: int, stages: int, chunks: int) -> Parcel | None:
    """What becomes of an action for another stage, None if nothing does; worker ``stage % stages`` has that stage."""
    stage = action.chunk * stages + rank
    if action.kind == "F" and stage < stages * chunks - 1:
        return Parcel("F", stage + 1, action.microbatch)
    if action.kind in "BI" and stage > 0:
        return Parcel("B", stage - 1, action.microbatch)
    return None


def needed(action: Action, rank: int, stages: int, chunks: int) -> Parcel | None:
    """What an action cannot begin without, None if it needs nothing of another stage."""
    stage = action.chunk * stages + rank
    if action.kind == "F" and stage > 0:
        return Parcel("F", stage, action.microbatch)
    if action.kind in "BI" and stage < stages * chunks - 1:
        return Parcel("B", stage, action.microbatch)
    return None


def arrivals(orders: Sequence[Sequence[Action]], rank: int, chunks: int) -> dict[int, list[Parcel]]:
    """What comes to ``rank`` from each of its neighbours, in the order in which it is sent: parcels need no label."""
    found: dict[int, list[Parcel]] = {}
    for peer, actions in enumerate(orders):
        for action in actions:
            parcel = target(action, peer, len(orders), chunks)
            if parcel is not None and parcel.stage % len(orders) == rank:
                found.setdefault(peer, []).append(parcel)
    return found
