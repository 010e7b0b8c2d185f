"""How much memory the stages of a pipeline need. Pure.

Legend: p stages; stage s has the blocks [start, stop).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from tricorn.state.footprint import state_bytes

if TYPE_CHECKING:
    from tricorn.mp.measure import Cost


@dataclass(frozen=True, kw_only=True)
class Held:
    """What a block has in memory: tensors, by anything that tells one from another, and their bytes."""

    weights: dict[int, int]  # trained
    others: dict[int, int]  # frozen ones, and buffers


def stage_bytes(
    held: Sequence[Held], costs: Sequence[Cost], optimizer: Any, *, spread: int = 1, split: int = 1
) -> Callable[..., int]:
    """A function ``(start, stop, in_flight, recompute)``: the bytes that a stage of these blocks needs at most.

    ``in_flight`` is the number of microbatches whose activations are kept at a time. Of ``spread`` replicas each has
    its part of the optimizer's state; ``split`` workers share each layer.
    """

    @cache
    def state(start: int, stop: int) -> int:
        weights = {key: size for block in held[start:stop] for key, size in block.weights.items()}
        others = {key: size for block in held[start:stop] for key, size in block.others.items()}
        # A gradient is made before it is added to the sum: autograd may have made the next one by then.
        making = sum(sorted(weights.values())[-2:])
        return (
            state_bytes(sum(weights.values()) // split, sum(others.values()), optimizer, spread=spread)
            + making // split
        )

    def needed(start: int, stop: int, in_flight: int, recompute: bool) -> int:
        mine = costs[start:stop]
        given = costs[start - 1].handed_on if start else 0
        made = mine[-1].handed_on
        kept = sum(cost.kept for cost in mine) // split + made - mine[-1].kept_handed_on
        flying = in_flight * given + kept if recompute else in_flight * (given + kept)
        # On the way through: what a block hands to the next, its gradient, and messages that are being sent.
        passing = 2 * max(cost.handed_on for cost in mine) + given + made
        return state(start, stop) + flying + passing

    return needed
