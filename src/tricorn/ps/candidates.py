"""Plans of the parameter server that are worth a thought. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tricorn.plan import Plan

if TYPE_CHECKING:
    from tricorn.planner.ground import Ground


def candidates(workers: int, ground: Ground, room: int) -> Iterator[Plan]:
    """With so many workers; servers are placed on the hosts after theirs. ``room``: bytes that a worker may have."""
    for servers in ground.server_counts(workers):
        for consistency in ("bsp", "ssp", "asp"):
            if consistency == "bsp" or workers > 1:
                yield Plan(strategy="ps", workers=workers, servers=servers, consistency=consistency)
        if ground.profile.tables:
            yield Plan(strategy="ps", workers=workers, servers=servers, sparse_consistency="asp")
        if workers > 1 and ground.slow_links:
            yield Plan(strategy="ps", workers=workers, servers=servers, local_steps=16)
            yield Plan(strategy="ps", workers=workers, servers=servers, compress="int8")
            yield Plan(strategy="ps", workers=workers, servers=servers, consistency="asp", compress="int8")
