"""How much memory a data parallel worker needs. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tricorn.state.footprint import state_bytes

if TYPE_CHECKING:
    from tricorn.plan import Plan


def worker_bytes(plan: Plan, weights: int, others: int, optimizer: Any, together: int = 1) -> int:
    """The least bytes of the state of one worker, for ``weights`` bytes that are trained and ``others`` that are not.

    Of ``together`` workers on one machine each counts its part of what they may hold once: all but the gradients. With
    ``zero`` a worker has its part of the optimizer's state alone, of gradients (2) and of weights (3). Activations
    come on top.
    """
    if plan.zero == 3:
        return state_bytes(-(-weights // plan.workers), others, optimizer)
    state = state_bytes(weights, others, optimizer, spread=plan.workers if plan.zero else 1)
    return weights + (state - weights) // together
