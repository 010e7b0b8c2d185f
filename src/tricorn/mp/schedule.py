"""When each stage does what: microbatches, and the order one-forward-one-backward. Pure.

Legend: p stages, M microbatches, n samples.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tricorn.plan import Plan

Action = tuple[Literal["F", "B"], int]  # forward or backward of which microbatch

PER_STAGE = 2
FEWEST_SAMPLES = 4


def microbatches_of(plan: Plan, batch_size: int) -> int:
    """How many microbatches a whole batch is cut into: what the plan says, else ``choose_microbatches``."""
    return plan.microbatches or choose_microbatches(batch_size, plan.workers)


def choose_microbatches(samples: int, stages: int) -> int:
    """How many microbatches to cut a batch into when the plan does not say.

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


def one_forward_one_backward(stage: int, stages: int, microbatches: int) -> list[Action]:
    """The 1F1B order of one stage (Narayanan et al. 2019, PipeDream): at most p - stage microbatches in flight.

    Forwards and backwards each go in the order of the microbatches, so messages between neighbours need no label.
    """
    ahead = min(stages - 1 - stage, microbatches)
    order: list[Action] = [("F", i) for i in range(ahead)]
    for i in range(ahead, microbatches):
        order += [("F", i), ("B", i - ahead)]
    return order + [("B", i) for i in range(microbatches - ahead, microbatches)]
