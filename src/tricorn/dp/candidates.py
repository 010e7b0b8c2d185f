"""Data parallel plans that are worth a thought. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from tricorn.plan import Plan

if TYPE_CHECKING:
    from tricorn.planner.ground import Ground

_ZEROS: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)


def candidates(workers: int, ground: Ground, room: int) -> Iterator[Plan]:
    """With so many workers. ``room``: bytes that a worker may have."""
    kept = ground.profile.kept_bytes * ground.profile.batch_size / workers
    for zero in _ZEROS[: 1 if workers == 1 else None]:
        yield Plan(strategy="dp", workers=workers, zero=zero)
        if kept > room / 4:  # gradients of parts of a batch, one after another, keep less
            yield from (Plan(strategy="dp", workers=workers, zero=zero, microbatches=parts) for parts in (4, 16))
    if workers == 1:
        return
    if ground.unlike:
        yield Plan(strategy="dp", workers=workers, balance=True)
    if ground.slow_links:
        yield from (Plan(strategy="dp", workers=workers, compress=how) for how in ("bf16", "int8", "topk", "powersgd"))
        yield Plan(strategy="dp", workers=workers, local_steps=16)
        yield Plan(strategy="dp", workers=workers, local_steps=16, compress="int8")
