"""From where a membership epoch goes on: a pure decision from what its roles hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tricorn.control.messages import Ready


class Source(NamedTuple):
    """``step`` and who has its state: ``kind`` is keep (all), peer or lost (nobody).

    With peer, ``peers`` are the parts that somebody lacks, each with the rank of a worker that has it.
    """

    kind: str
    step: int
    peers: dict[str, int]


LOST = Source("lost", 0, {})


def resume_point(ready: Mapping[str, Ready]) -> Source:
    """The newest step of which every part of the state is held by somebody.

    A part held by several roles (a replica) can be copied from one that has it; a part that nobody holds at a
    step common to all parts is lost, and the run goes back to a checkpoint.
    """
    holders: dict[str, dict[str, set[int]]] = {}
    for role, report in ready.items():
        if report.part is not None:
            holders.setdefault(report.part, {})[role] = set(report.held)
    if not holders:
        return LOST
    common = set.intersection(*(set().union(*roles.values()) for roles in holders.values()))
    if not common:
        return LOST
    step = max(common)
    peers = {
        part: min(rank_of(role) for role, held in roles.items() if step in held)
        for part, roles in holders.items()
        if not all(step in held for held in roles.values())
    }
    return Source("peer" if peers else "keep", step, peers)


def rank_of(role: str) -> int:
    """The number in a role's name: ``worker-3`` has rank 3."""
    return int(role.rpartition("-")[2])
