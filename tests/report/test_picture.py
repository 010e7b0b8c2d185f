"""Plans drawn as text: who holds what, and who talks to whom."""

from __future__ import annotations

import io

import pytest

from tricorn.mp.mesh import Mesh
from tricorn.plan import Plan
from tricorn.report.picture import picture
from tricorn.report.progress import Progress


def test_a_mesh():
    plan = Plan(strategy="mp", workers=8, replicas=2, tensor=2, zero=1)
    assert picture(plan, layers=("embedding to layer 3", "layer 4 to head")) == (
        "           stage 0                 stage 1\n"
        "           embedding to layer 3    layer 4 to head\n"
        "replica 0  worker-0 + worker-1  -> worker-2 + worker-3\n"
        "replica 1  worker-4 + worker-5  -> worker-6 + worker-7\n"
        "->  activations of microbatches go forward, their gradients come back\n"
        "+   2 workers share each layer, and sum within it\n"
        "|   replicas share each batch, and at each step those below each other sum gradients, and each updates its "
        "part of the weights"
    )


def test_what_is_elsewhere_is_no_part_of_a_replica():
    assert "each has the model but for its tables" in picture(Plan(strategy="ps+dp", workers=2, servers=1))
    assert "some rows of each embedding" in picture(Plan(strategy="dp", workers=2, embeddings="rows"))


def test_a_long_line_is_shortened():
    first, second, *_ = picture(Plan(strategy="mp", workers=20)).splitlines()
    assert first.split() == [word for n in range(6) for word in ("stage", str(n))] + ["...", "stage", "19"]
    assert second.endswith("worker-5 -> ... -> worker-19")


PLANS = [
    Plan(strategy="dp", workers=1), Plan(strategy="dp", workers=3, zero=3), Plan(strategy="ps", workers=2, servers=2),
    Plan(strategy="ps+dp", workers=2, servers=1), Plan(strategy="ps+mp", workers=4, servers=1, replicas=2),
    Plan(strategy="mp", workers=6, replicas=3), Plan(strategy="mp", workers=2, tensor=2),
]  # fmt: skip


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_every_role_is_drawn_once(plan):
    drawn = picture(plan).split()
    roles = [f"worker-{n}" for n in range(plan.workers)] + [f"server-{n}" for n in range(plan.servers)]
    assert sorted(word for word in drawn if word.rpartition("-")[0] in ("worker", "server")) == sorted(roles)
    assert all(len(line) <= 120 for line in picture(plan).splitlines())


def test_a_run_of_a_mesh_begins_with_its_picture():
    out = io.StringIO()
    plan = Plan(strategy="mp", workers=4, replicas=2)
    Progress(out).started(plan, total_steps=10, epochs=1)
    assert out.getvalue() == f"mp with 4 workers: 10 steps\n{picture(plan)}\n"
    assert Mesh.of(plan).stages == 2
