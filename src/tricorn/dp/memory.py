"""How much memory a data parallel worker needs. Pure.

Of workers on one host the least counts what they share once, for that is what has to fit; the most is what a process
is seen to have resident, which counts all pages of shared memory that it has touched.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tricorn.state.footprint import peak_bytes, state_bytes
from tricorn.state.memory import KEPT

if TYPE_CHECKING:
    from tricorn.plan import Plan

GATHERED = 6  # units of zero=3 that are whole at a time: fetched ahead, in use, and their gradients. Measured


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


def resident_bytes(
    plan: Plan, weights: float, others: float, slots: int, *, largest: float, kept: float, hosts: int = 1,
    encoded: float = 1.0,
) -> float:  # fmt: skip
    """The most resident bytes of the fullest worker, beside what it has without a model.

    That is the first of replicas, which writes the checkpoints. ``largest``: bytes of the largest block's weights;
    ``kept``: of activations; ``encoded``: the part of a gradient's bytes that travels.
    """
    p = plan.workers
    own = weights / p if plan.zero else weights
    passing = largest  # a gradient is taken as soon as autograd has made it
    if plan.zero == 3:
        held, passing = (2 + slots) * own, min(GATHERED * largest, 2 * weights)
    elif plan.zero or hosts > 1 or plan.local_steps > 1 or plan.compress != "none":
        held = 2 * weights + slots * own
    else:  # gradients are added up in one place and given to the others in another, of which they read their part
        held = (3 + slots) * weights + (p - 1) / p * weights
    saved = (1 + slots) * own + others
    if plan.local_steps > 1:
        outer = weights if plan.outer == "nesterov" else 0
        held += saved + outer  # as the round began
        saved += outer
    if plan.compress == "powersgd":
        held, passing = held + weights, passing + 2 * largest
    elif plan.compress != "none":
        held += 2 * weights  # what was lost of its own part, and of the sum
        # Of a part in turn what is to be encoded, the sum, and what comes; twice what is sent and received, and as much
        # where processes of one host see it. The largest magnitudes are looked for in a copy.
        encoding = largest * (3 / p + 6 * encoded + (1 if plan.compress == "topk" else 0))
        if largest / p < KEPT:
            held += encoding  # which stays with the process
        else:
            passing += encoding
    return peak_bytes(held + others, passing + kept, saved, largest)
