"""How much memory a worker's state needs, whatever part of the model it has. Pure."""

from __future__ import annotations

from typing import Any

from tricorn.state.memory import KEPT

# What the first step brings in besides tensors: code of libraries, stacks, pools. Measured with a model of no size.
FIRST_STEP = 16 << 20
# What a fork comes to have for itself of the memory that it shared at first, with the coordinator's. Measured alike.
COPIED = 80 << 20


def state_bytes(weights: int, others: int, optimizer: Any, *, spread: int = 1) -> int:
    """Bytes of ``weights`` bytes that are trained, with their gradients and slots, and of ``others`` that are not.

    Of ``spread`` workers each has its part of the optimizer's state. A copy of all that is saved is made to be written
    while training goes on.
    """
    slots = len(optimizer.slots) * weights // spread
    saved = weights // spread + slots + others
    return 2 * weights + slots + others + saved


def peak_bytes(held: float, passing: float, saved: float, largest: float) -> float:
    """The most bytes of who holds a state all the time, what passes in a step, and after it a copy to be written.

    What passes stays with the process for the next step, unless the ``largest`` tensors of it are too large for that.
    """
    return held + (passing + saved if largest < KEPT else max(passing, saved))
