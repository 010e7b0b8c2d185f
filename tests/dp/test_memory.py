"""What replicas that send less need, beside the 238 MB of one with next to no model, as was seen on one machine."""

from __future__ import annotations

import pytest

from tricorn import optim
from tricorn.dp.memory import resident_bytes
from tricorn.plan import Plan
from tricorn.planner.ground import ENCODED

ADAM, MOMENTUM = optim.AdamW(lr=0.1), optim.SGD(lr=0.1, momentum=0.9)
# The optimizer, MB of weights and of the largest matrix, and the peak of the fullest of two workers.
PEAKS = [
    (ADAM, 9.4, 9.0, {"compress": "bf16"}, 405), (ADAM, 9.4, 9.0, {"compress": "int8"}, 380),
    (ADAM, 9.4, 9.0, {"compress": "topk"}, 366), (ADAM, 9.4, 9.0, {"compress": "powersgd"}, 371),
    (ADAM, 9.4, 9.0, {"local_steps": 8}, 363), (ADAM, 9.4, 9.0, {"local_steps": 8, "outer": "average"}, 344),
    (ADAM, 9.4, 9.0, {"local_steps": 8, "compress": "int8"}, 411),
    (MOMENTUM, 36.8, 36.0, {"compress": "bf16"}, 623), (MOMENTUM, 36.8, 36.0, {"compress": "int8"}, 570),
    (MOMENTUM, 36.8, 36.0, {"compress": "topk"}, 555), (MOMENTUM, 36.8, 36.0, {"compress": "powersgd"}, 466),
    (MOMENTUM, 36.8, 36.0, {"local_steps": 8}, 574),
    (MOMENTUM, 36.8, 36.0, {"local_steps": 8, "outer": "average"}, 500),
    (MOMENTUM, 36.8, 36.0, {"local_steps": 8, "compress": "int8"}, 750),
]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "weights", "largest", "options", "measured"), PEAKS, ids=str)
def test_what_sending_less_needs_is_known_to_a_tenth(optimizer, weights, largest, options, measured):
    plan = Plan(strategy="dp", **options)
    found = resident_bytes(
        plan, 1e6 * weights, 0, len(optimizer.slots), largest=1e6 * largest, kept=0, encoded=ENCODED[plan.compress]
    )
    assert 238 + found / 1e6 == pytest.approx(measured, rel=0.1)
