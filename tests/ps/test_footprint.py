"""What workers and servers need, beside theirs with next to no model (235 and 225 MB), as was seen on one machine."""

from __future__ import annotations

import pytest

from tricorn import optim
from tricorn.plan import Plan
from tricorn.planner.ground import ENCODED
from tricorn.ps.footprint import server_bytes, worker_bytes

ADAM, MOMENTUM = optim.AdamW(lr=0.1), optim.SGD(lr=0.1, momentum=0.9)
# The optimizer, MB of weights and of the largest matrix, and the peaks of the fullest of two workers and of servers.
PEAKS = [
    (ADAM, 9.4, 9.0, 1, {}, 299, 319), (ADAM, 9.4, 9.0, 1, {"compress": "bf16"}, 340, 315),
    (ADAM, 9.4, 9.0, 1, {"compress": "int8"}, 333, 299), (ADAM, 9.4, 9.0, 1, {"compress": "topk"}, 330, 302),
    (ADAM, 9.4, 9.0, 1, {"local_steps": 8}, 360, 300), (ADAM, 9.4, 9.0, 2, {}, 301, 273),
    (ADAM, 9.4, 9.0, 2, {"compress": "int8"}, 327, 266), (ADAM, 9.4, 9.0, 2, {"local_steps": 8}, 360, 263),
    (MOMENTUM, 36.8, 36.0, 1, {}, 430, 520), (MOMENTUM, 36.8, 36.0, 1, {"compress": "bf16"}, 578, 482),
    (MOMENTUM, 36.8, 36.0, 1, {"compress": "int8"}, 532, 438),
    (MOMENTUM, 36.8, 36.0, 1, {"compress": "topk"}, 506, 413),
    (MOMENTUM, 36.8, 36.0, 1, {"local_steps": 8}, 543, 519), (MOMENTUM, 36.8, 36.0, 2, {}, 430, 372),
    (MOMENTUM, 36.8, 36.0, 2, {"compress": "int8"}, 524, 350), (MOMENTUM, 36.8, 36.0, 2, {"local_steps": 8}, 545, 372),
]  # fmt: skip


@pytest.mark.parametrize(("optimizer", "weights", "largest", "servers", "options", "worker", "server"), PEAKS, ids=str)
def test_what_roles_need_is_known_to_a_tenth(optimizer, weights, largest, servers, options, worker, server):
    plan = Plan(strategy="ps", servers=servers, **options)
    n, slots = 1e6 * weights, len(optimizer.slots)
    found = worker_bytes(plan, n, 0, slots, largest=1e6 * largest, passing=0, encoded=ENCODED[plan.compress])
    assert 235 + found / 1e6 == pytest.approx(worker, rel=0.1)
    assert 225 + server_bytes(plan, n, slots, 0, beside=2) / 1e6 == pytest.approx(server, rel=0.1)
