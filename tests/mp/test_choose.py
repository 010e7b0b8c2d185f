"""The choice of a cut: from measurements, within a worker's memory, or as the plan says."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tricorn import data, optim
from tricorn.errors import PlanError
from tricorn.job import Job
from tricorn.mp.choose import choose, fewest_workers
from tricorn.mp.cut import SHARED, Link
from tricorn.mp.measure import Cost
from tricorn.mp.memory import Held, stage_bytes
from tricorn.plan import Plan
from tricorn.state.footprint import state_bytes
from tricorn.state.memory import give_back, own_bytes

CPU = torch.device("cpu")
WIDTH = 600
LAYER = WIDTH * WIDTH * 4


def job(model=None, **fields) -> Job:
    given = {
        "model": model or (lambda: nn.Sequential(*[nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(6)])),
        "loss": F.mse_loss, "optimizer": optim.Adam(lr=0.01), "device": "cpu", "batch_size": 16, "epochs": 1,
        "train": data.arrays(torch.randn(16, WIDTH), torch.randn(16, WIDTH)),
    }  # fmt: skip
    return Job(**(given | fields))


def chosen(plan: Plan, this: Job | None = None):
    return choose(this or job(), plan, plan.stages, 4, 4, CPU)


def test_pinned_cuts_are_taken_or_refused():
    assert chosen(Plan(strategy="mp", workers=3, cuts=(1, 4))).cuts == (1, 4)
    with pytest.raises(PlanError, match="cuts are 1, but 3 stages have 2; give that many"):
        chosen(Plan(strategy="mp", workers=3, cuts=(1,)))
    with pytest.raises(PlanError, match=r"no stage can begin with block 9; cut before any of 1 \(1\), 2 \(2\)"):
        chosen(Plan(strategy="mp", workers=2, cuts=(9,)))


def test_a_slow_worker_gets_as_much_less_to_do():
    plan = Plan(strategy="mp", workers=2, schedule="1f1b")
    for slowness, cuts in (([1.0, 5.0], {(4,), (5,)}), ([5.0, 1.0], {(1,), (2,)})):
        assert choose(job(), plan, 2, 4, 4, CPU, slowness=slowness).cuts in cuts


@pytest.fixture
def cut(monkeypatch):
    """The cuts of blocks that take and hand on so much, into as many stages, on hosts of some cores and roles."""
    from tricorn.mp import choose as module

    def cut(stages, link, *, cores, roles, seconds=(1e-3,) * 6, handed_on=(0,) * 6):
        costs = [Cost(each, each, each, size, 0, 0, None) for each, size in zip(seconds, handed_on, strict=True)]
        monkeypatch.setattr(module, "measure", lambda *_: costs)
        monkeypatch.setattr(module, "update_seconds", lambda *_: 0.0)
        monkeypatch.setattr(module, "sharing", lambda: roles)
        monkeypatch.setattr(module.cores, "usable", lambda: cores)
        return choose(job(), Plan(strategy="mp", workers=stages, schedule="1f1b"), stages, 4, 4, CPU, link).cuts

    return cut


def test_stages_on_hosts_of_their_own_share_no_cores(cut):
    away = Link(SHARED.copy, 0.0, 1e-4)
    assert cut(3, away, cores=2, roles=1) == (2, 4)
    assert cut(3, SHARED, cores=3, roles=3) == (2, 4)
    assert cut(3, SHARED, cores=2, roles=3) != (2, 4)  # one has a core to itself, the others share one


@pytest.mark.parametrize("roles", [1, 2])
def test_what_crosses_a_slow_link_counts_on_hosts_of_one_core(cut, roles):
    def chosen_with(wire, large):
        seconds, handed_on = (1e-3, 1e-3, 1e-3, 2e-4, 1e-3, 1.9e-3), [1_000_000 * (at == large) for at in range(1, 7)]
        return cut(2, Link(0.0, wire, 1e-9), cores=1, roles=roles, seconds=seconds, handed_on=handed_on)

    (quick,) = chosen_with(0.0, 0)
    assert quick in (3, 4)  # as even as it gets
    assert chosen_with(2e-9, quick) == (7 - quick,)


def test_the_estimate_grows_with_the_state():
    first, second = chosen(Plan(strategy="mp", workers=2, cuts=(1,))).bytes
    # Five layers beside one: weights, gradients, two slots, and a copy of weights and slots; one more temporary.
    assert abs(second - first - (4 * 7 + 1) * LAYER) < LAYER / 4


def test_what_does_not_fit_is_refused_with_the_numbers():
    give_back()
    small = own_bytes()  # no room for any model
    with pytest.raises(
        PlanError, match=r"does not fit 2 stages: stage [01] needs .* MB, .* and a worker may have .* MB"
    ):
        chosen(Plan(strategy="mp", workers=2, memory=small))
    with pytest.raises(PlanError, match="leave its cuts out of the plan"):
        chosen(Plan(strategy="mp", workers=2, memory=small, cuts=(1,)))


class Active(nn.Module):
    """Nothing but activations, after one small weight."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Sequential(*[nn.Sequential(nn.Tanh(), nn.Sigmoid()) for _ in range(10)])

    def pipeline_blocks(self):
        return [self.scale, *self.body]


def active() -> Job:
    return job(Active, train=data.arrays(torch.randn(16, 100, WIDTH), torch.randn(16, 100, WIDTH)))


def test_activations_are_computed_again_only_where_they_do_not_fit():
    keeping, again = (
        chosen(Plan(strategy="mp", workers=2, schedule="gpipe", recompute=recompute), active())
        for recompute in (False, True)
    )
    assert (keeping.recompute, again.recompute) == (False, True)
    assert max(again.bytes) < max(keeping.bytes)


def test_a_faster_schedule_that_does_not_fit_is_not_taken(monkeypatch):
    from tricorn.mp import choose as module

    monkeypatch.setattr(module, "own_bytes", lambda: 0)
    monkeypatch.setattr(module, "resident_bytes", lambda: 0)
    monkeypatch.setattr(module._Pace, "step", lambda self, cuts, schedule: 1.0 if schedule == "zero-bubble" else 2.0)

    def tried(**fields):
        return chosen(Plan(strategy="mp", workers=2, cuts=(1,), recompute=False, **fields), active())

    faster, smaller = tried(), tried(schedule="1f1b")
    assert faster.schedule == "zero-bubble"
    assert faster.bytes[1] > smaller.bytes[1] > smaller.bytes[0]  # two microbatches at a time instead of one
    between = (faster.bytes[1] + smaller.bytes[1]) // 2 + module.COPIED
    assert tried(memory=between).schedule == "1f1b"


def test_one_stage_is_not_measured():
    assert chosen(Plan(strategy="mp", workers=1)) == ((), False, "1f1b", ())


def test_the_fewest_workers_that_have_room(monkeypatch):
    from tricorn.mp import choose as module

    monkeypatch.setattr(module, "own_bytes", lambda: 0)
    room = module.FIRST_STEP + module.COPIED
    monkeypatch.setattr(module, "limit_bytes", lambda: room + 24 * LAYER)
    assert fewest_workers(job()) == 2
    monkeypatch.setattr(module, "limit_bytes", lambda: room + 12 * LAYER)
    assert fewest_workers(job()) == 6
    monkeypatch.setattr(module, "limit_bytes", lambda: room + 5 * LAYER)
    assert fewest_workers(job()) is None


def cost(handed_on, kept, both):
    return Cost(1.0, 1.0, 1.0, handed_on, kept, both, None)


def test_bytes_of_stages():
    weights = [
        Held(weights={1: 100}, others={}),
        Held(weights={2: 10}, others={9: 4}),
        Held(weights={1: 100}, others={}),
    ]
    needed = stage_bytes(weights, [cost(5, 50, 5), cost(7, 30, 0), cost(1, 20, 0)], optim.SGD(lr=0.1))
    # State: weights and gradients, a copy to save; the two largest gradients while they are made.
    assert needed(0, 1, 1, False) == 300 + 100 + (0 + 50) + (2 * 5 + 0 + 5)
    assert needed(0, 1, 3, False) == 300 + 100 + 3 * 50 + 15
    assert needed(1, 2, 2, False) == 30 + 8 + 10 + 2 * (5 + 30 + 7) + (2 * 7 + 5 + 7)
    assert needed(1, 2, 2, True) == 30 + 8 + 10 + 2 * 5 + 37 + 26
    assert needed(0, 3, 1, False) == 330 + 8 + 110 + (50 + 30 + 20 + 1) + (2 * 7 + 1)  # tied weights count once


def test_bytes_of_the_state():
    assert state_bytes(100, 8, optim.Adam(lr=0.1)) == 200 + 200 + 8 + 308
    assert state_bytes(100, 0, optim.Adam(lr=0.1), spread=2) == 200 + 100 + 150
    assert state_bytes(100, 0, optim.FTRL(lr=0.1)) == 200 + 200 + 300
