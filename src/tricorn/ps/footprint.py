"""How much memory workers and servers of parameter server training need. Pure.

Legend: n bytes of the dense part.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tricorn.state.footprint import peak_bytes

if TYPE_CHECKING:
    from tricorn.plan import Plan


def worker_bytes(
    plan: Plan, n: float, others: float, slots: int, *, largest: float, passing: float, encoded: float
) -> float:
    """The most resident bytes of a worker, beside what it has without a model.

    It has the weights, those that come next, and gradients; from several servers weights come into memory of their own.
    With local steps it has a state of its own, and that with which the round began. Beside a gradient that travels
    encoded, as ``encoded`` of its bytes, is what encoding lost and what is to be encoded. ``others``: of buffers;
    ``largest``: of the largest parameter; ``passing``: of activations and rows.
    """
    held, saved = (3 if plan.servers == 1 else 4) * n, 0.0
    if plan.local_steps > 1:
        held, saved = (4 + 2 * slots) * n, slots * n
    if plan.compress != "none":
        held += (2 + 4 * encoded) * n
    return peak_bytes(held + others, 2 * largest + passing, saved, largest)


def server_bytes(plan: Plan, n: float, slots: int, rows: float, *, beside: int) -> float:
    """The same of a server, which ``beside`` workers share a host with.

    It has its part of the state, what each worker sends of a step, and, as each of several servers, what each worker
    has still to read; a single one sees what workers beside it send where they put it. Tables, of ``rows`` bytes, are
    copied to be saved as the dense part is.
    """
    s, sums = plan.servers, plan.workers if plan.synchronous else 1
    if plan.local_steps > 1:  # the outer optimizer's
        slots = 1 if plan.outer == "nesterov" else 0
    state = n * (1 + slots) + rows
    reading = n * sums if s > 1 else 0
    seen = n * min(sums, beside) if s == 1 and plan.compress == "none" else 0
    return peak_bytes((state + reading) / s + seen, n * sums / s, state / s, 0)
