"""The planner's picture of a pipeline: as the pipeline itself goes about its work."""

from __future__ import annotations

import pytest
from msgspec.structs import replace
from planner.world import ground, profile

from tricorn.mp.cost import parts, predict
from tricorn.mp.schedule import gathered, order
from tricorn.plan import Plan

PLAN = Plan(strategy="mp", workers=2, microbatches=8)  # of 8 samples, while layers were measured with 16


@pytest.mark.parametrize(("measured", "now"), [(1, 1), (2, 4), (5, 10)])
def test_weight_gradients_of_small_microbatches_are_put_together(measured, now):
    job = profile(batch=1.0)
    small = replace(job, layers=tuple(replace(layer, together=measured) for layer in job.layers))
    line = parts(PLAN, ground(small)).line
    assert line.orders == tuple(tuple(gathered(order("1f1b", rank, 2, 8), [now])) for rank in range(2))
    # What waits is a few rows, and no activations.
    assert predict(PLAN, ground(small)).memory == predict(PLAN, ground(job)).memory
