"""What is measured, in forks of this process: a job, a strategy's steps, and collectives."""

from __future__ import annotations

import os
import threading
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import tricorn
from tricorn.control.messages import HEADER
from tricorn.errors import ProtocolError, UserCodeError
from tricorn.plan import Plan
from tricorn.planner import computing, profiler, splitting
from tricorn.planner.beside import beside
from tricorn.planner.crew import Line, crew, gather, tell
from tricorn.planner.load import Quiet
from tricorn.planner.profiler import crowds, profile, shares
from tricorn.planner.rehearse import Found, Read, chain, rehearse, rows
from tricorn.planner.surveyor import why_not
from tricorn.planner.sweep import collectives

SAMPLES = 64


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forks need a process of one thread; and a few rounds do."""
    assert threading.active_count() == 1
    monkeypatch.setattr(computing, "POINT_SECONDS", 0.005)
    monkeypatch.setattr(splitting, "MOST_TRIES", 1)
    monkeypatch.setattr(profiler, "Quiet", partial(Quiet, patience=0.0))


def job(model: Any, inputs: torch.Tensor, **more: Any) -> tricorn.Job:
    fields = {"loss": nn.functional.mse_loss, "optimizer": tricorn.optim.Adam(lr=0.1), "batch_size": 16, "epochs": 2}
    return tricorn.Job(
        model=model, train=tricorn.data.arrays(inputs, torch.zeros(len(inputs), 4)), **{**fields, **more}
    )


def layered() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4))


class Branching(nn.Module):
    """Does another thing for other data, so that it cannot be followed from layer to layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if x.sum() > 0 else self.layer(-x)


class Broken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("nothing works")


class Recommender(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows, self.layer = nn.Embedding(50, 8), nn.Linear(8, 4)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.layer(self.rows(ids).mean(1))


def test_a_plain_job() -> None:
    told: list[str] = []
    plain = job(layered, torch.randn(SAMPLES, 8))
    drawn = torch.get_rng_state()
    found = profile(plain, "plain", 2, told.append)
    assert found.name == "plain"
    assert (found.samples, found.batch_size, found.steps) == (SAMPLES, 16, 4)
    assert found.elements == 8 * 32 + 32 + 32 * 32 + 32 + 32 * 4 + 4
    assert (found.slots, found.parameters, found.element_bytes) == (2, 6, 4)
    assert found.shapes == ((32, 8), (32,), (32, 32), (32,), (4, 32), (4,))
    assert found.gathered == 2 * found.elements - 288  # nothing before the first layer wants a gradient
    assert set(found.compute) == {"1x2", "2x1", "1x1"} == set(found.update)
    assert [point.x for point in found.compute["1x1"].points] == [2, 8, 16]
    assert all(0 < point.seconds < 1 for curve in found.compute.values() for point in curve.points)
    assert [layer.elements for layer in found.layers if layer.elements] == [288, 1056, 132]
    assert found.layers[0].output_bytes == 4 * 32 * 4
    assert found.input_bytes == 32
    assert found.splitting is not None
    assert found.splitting.steps is not None
    assert [point.x for point in found.splitting.steps.points] == [4, 16]
    assert 288 <= found.kept_bytes < 500  # its inputs, what each Tanh makes, and what the loss needs
    assert not found.unmeasured
    assert told
    assert torch.equal(torch.get_rng_state(), drawn)  # what is measured draws nothing from who measures


def test_a_job_that_cannot_be_followed_is_measured_whole() -> None:
    found = profile(job(Branching, torch.randn(SAMPLES, 8)), "branching", 1, str)
    assert found.compute
    assert not found.layers or not any(layer.cut_after for layer in found.layers)


def test_less_data_than_a_batch_is_measured_as_it_is() -> None:
    found = profile(job(layered, torch.randn(5, 8)), "small", 1, str)
    assert [point.x for point in found.compute["1x1"].points] == [1, 3, 5]
    assert [point.x for point in found.load.points] == [1, 5]
    assert found.splitting is not None
    assert found.splitting.steps is None  # where two workers would only take turns
    assert found.computing(1, 1, 5)[0] > 0


def test_a_job_that_fails_says_why() -> None:
    found = profile(job(Broken, torch.randn(SAMPLES, 8)), "broken", 1, str)
    assert not found.compute
    assert "nothing works" in found.unmeasured
    assert found.no_layers == found.unmeasured


def test_a_model_that_cannot_be_built_is_the_persons_to_mend() -> None:
    def model() -> nn.Module:
        raise ValueError("no such file")

    with pytest.raises(UserCodeError, match="no such file") as caught:
        profile(job(model, torch.randn(SAMPLES, 8)), "unbuilt", 1, str)
    assert "test_measure.py" in caught.value.where


def test_the_ids_of_a_table_are_counted() -> None:
    ids = torch.arange(SAMPLES * 2).view(SAMPLES, 2) % 20
    recommender = job(
        Recommender, ids, optimizer=tricorn.optim.Adagrad(lr=0.1), tables={"rows": tricorn.Table(std=0.1)}
    )
    found = profile(recommender, "recommender", 1, str)
    (table,) = found.tables
    assert (table.name, table.rows, table.dim) == ("rows", 50, 8)
    assert table.unique[:3] == ((4, 8.0), (8, 16.0), (16, 20.0))
    assert table.unique[-1] == (64, 20.0)
    assert found.new_rows == 20 / (20 * found.steps * found.epochs)
    assert set(found.compute) == {"1x1", "rows 1x1"}
    assert set(found.rows) == {f"{kind}/{way}/1" for kind in ("known", "new") for way in ("ps", "asp", "served")}
    assert all(point.seconds > 0 for curve in found.rows.values() for point in curve.points)


def test_a_refusal_says_what_to_do() -> None:
    untold = job(partial(nn.Embedding, 50, 8, device="meta"), torch.zeros(SAMPLES, dtype=torch.long))
    refusal = why_not(untold, Plan(strategy="mp", workers=2, tensor=2))
    assert refusal is not None
    assert "has no weights; Declare it" in refusal


def test_what_a_fork_raises_is_raised_here() -> None:
    def body(line: Line) -> None:
        raise KeyError("lost")

    with pytest.raises(UserCodeError, match="KeyError: 'lost'"), crew([body]) as lines:
        gather(lines)


def test_a_fork_that_is_gone_is_an_error() -> None:
    with pytest.raises(UserCodeError, match="is gone"), crew([lambda line: os._exit(9)]) as lines:
        gather(lines)


def test_a_fork_that_says_what_cannot_be_read_is_an_error() -> None:
    def body(line: Line) -> None:
        line._sock.sendall(HEADER.pack(3) + b'"\xff"')

    with pytest.raises(ProtocolError, match="cannot be read"), crew([body]) as lines:
        gather(lines)


def test_forks_do_what_they_are_told_at_once() -> None:
    def body(line: Line) -> None:
        line.say(line.hear() + 1)

    with crew([body] * 3) as lines:
        tell(lines, 41)
        assert gather(lines) == [42] * 3


@pytest.mark.parametrize(
    "plan",
    [
        Plan(strategy="dp", workers=2),
        Plan(strategy="dp", workers=2, zero=3),
        Plan(strategy="ps", workers=2, servers=1),
        Plan(strategy="ps", workers=2, servers=1, consistency="asp"),
        Plan(strategy="mp", workers=2, microbatches=2),
    ],
    ids=lambda plan: f"{plan.strategy}{plan.zero}{plan.consistency}",
)
def test_a_rehearsal_runs_the_plans_own_trainers(plan: Plan) -> None:
    for found in rehearse([chain(1024), chain(2048)], plan, [4, 5]):
        _judge(found)


def _judge(found: Found) -> None:
    assert 0 < found.step.seconds < 1
    assert 0 < found.exchange.seconds <= found.step.seconds


def test_a_rehearsal_reads_rows() -> None:
    plan = Plan(strategy="ps", workers=1, servers=1)
    (found,) = rehearse([rows([Read(500, 8, 64), Read(20, 4, 7)], plan, tricorn.optim.Adagrad(lr=0.0))], plan, [8])
    assert 0 < found.step.seconds < 2
    assert 0 < found.first.seconds < 2


@pytest.mark.parametrize("apart", [False, True])
def test_collectives_are_swept_by_size(apart: bool) -> None:
    found = collectives(2, apart=apart)
    assert set(found) == {"all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send"}
    for curve in found.values():
        assert [point.x for point in curve.points] == [1 << 10, 1 << 16, 1 << 20, 1 << 23]
        assert all(point.seconds > 0 for point in curve.points)


def test_computing_and_exchanging_slow_each_other() -> None:
    found = beside()
    assert set(found) == {"computing", "exchanging"}
    assert all(1 <= times < 100 for times in found.values())


def test_crowds_use_all_cores_and_one() -> None:
    assert crowds(1) == [(1, 1)]
    assert crowds(2) == [(1, 2), (2, 1), (1, 1)]
    assert crowds(6) == [(1, 6), (2, 3), (4, 1), (6, 1), (1, 1)]


def test_shares_begin_with_a_quarter_of_a_workers() -> None:
    assert shares(100, 2) == [12, 50, 100]
    assert shares(1, 4) == [1]
