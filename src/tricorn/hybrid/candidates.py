"""Plans that are worth a thought whose tables are on servers, or spread over the workers. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from tricorn.plan import Embeddings, Plan

if TYPE_CHECKING:
    from tricorn.planner.ground import Ground

_SPREAD: tuple[Embeddings, ...] = ("rows", "columns", "tables")


def candidates(workers: int, ground: Ground, room: int) -> Iterator[Plan]:
    """With so many workers. ``room``: bytes that a worker may have."""
    if not ground.profile.tables:
        return
    for servers in ground.server_counts(workers):
        yield Plan(strategy="ps+dp", workers=workers, servers=servers)
        yield Plan(strategy="ps+dp", workers=workers, servers=servers, sparse_consistency="asp")
        if workers > 1:
            for microbatches in (workers, 2 * workers):
                yield Plan(strategy="ps+mp", workers=workers, servers=servers, microbatches=microbatches)
    if workers > 1:
        yield from (Plan(strategy="dp", workers=workers, embeddings=how) for how in _SPREAD)
    if workers > 2 and workers % 2 == 0:
        yield Plan(strategy="mp", workers=workers, replicas=2, microbatches=workers, embeddings="rows")
