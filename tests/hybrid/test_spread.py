"""Embeddings spread over workers come to the numbers of one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tricorn import Table, optim, strategy
from tricorn.dp import shard_sum, shard_units
from tricorn.errors import PeerLost
from tricorn.hybrid.division import divide
from tricorn.plan import Plan
from tricorn.state.flat import build_model

from .crew import Crew, distance, plain
from .jobs import DECLARED, Hashed, Padded, Tied, towers

Build = Callable[..., Crew]
STEPS = 20


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("how", ["rows", "columns", "tables"])
def test_same_numbers_as_one_process(crew: Build, how: str, workers: int) -> None:
    job = towers(tables=None, optimizer=optim.Adam(lr=0.02), clip_norm=0.5, schedule=lambda step: 1 / (1 + step / 9))
    team = crew(job, strategy="dp", workers=workers, embeddings=how)
    team.join("initial")
    team.train(0, STEPS)
    expected = plain(job, STEPS, lambda model: [torch.optim.Adam(model.parameters(), lr=0.02, fused=True)])
    assert distance(team.weights(STEPS), expected) <= 1e-10


@pytest.mark.parametrize(
    "plan", [{"zero": 1}, {"zero": 3, "microbatches": 2}, {"balance": True}, {"microbatches": 3}], ids=str
)
def test_options_of_the_dense_part_go_with_it(crew: Build, plan: dict[str, Any]) -> None:
    job = towers(tables=None, clip_norm=0.5)
    team = crew(job, strategy="dp", workers=2, embeddings="rows", **plan)
    team.join("initial")
    team.train(0, STEPS)
    expected = plain(job, STEPS, lambda model: [torch.optim.Adagrad(model.parameters(), lr=0.1)])
    assert distance(team.weights(STEPS), expected) <= 1e-10


@pytest.mark.parametrize("how", ["rows", "columns", "tables"])
@pytest.mark.parametrize("stages", [1, 2])
def test_replicas_of_a_pipeline_spread_their_stages_embeddings(crew: Build, how: str, stages: int) -> None:
    job = towers(tables=None, optimizer=optim.AdamW(lr=0.02), clip_norm=0.5)
    cuts = {1: (), 2: (1,)}[stages]
    team = crew(job, strategy="mp", workers=2 * stages, replicas=2, cuts=cuts, embeddings=how)
    team.join("initial")
    team.train(0, STEPS)
    expected = plain(job, STEPS, lambda model: [torch.optim.AdamW(model.parameters(), lr=0.02, fused=True)])
    assert distance(team.weights(STEPS), expected) <= 1e-10


@pytest.mark.parametrize("how", ["rows", "columns", "tables"])
@pytest.mark.parametrize(
    "optimizer", [optim.SGD(lr=0.1, momentum=0.9), optim.FTRL(lr=0.3, l1=0.01), optim.Adam(lr=0.02)]
)
def test_declared_tables_are_trained_by_rows_as_on_servers(crew: Build, how: str, optimizer: Any) -> None:
    job = towers(tables={name: Table(std=0.1, optimizer=optimizer) for name in DECLARED})
    weights = []
    for plan in ({"strategy": "ps+dp", "servers": 1}, {"strategy": "dp", "embeddings": how}):
        team = crew(job, workers=2, **plan)
        team.join("initial")
        team.train(0, 12)
        weights.append(team.weights(12))
    assert distance(*weights) <= 1e-10


@pytest.mark.parametrize("how", ["rows", "columns", "tables"])
@pytest.mark.parametrize("plan", [{}, {"zero": 1}, {"zero": 1, "microbatches": 2}], ids=str)
def test_ids_that_the_model_computes_are_asked_for_in_the_midst_of_forward(
    crew: Build, how: str, plan: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has no samples, as two workers in the last batch, has gradients to hand over before others have asked."""
    monkeypatch.setattr(shard_units, "BUCKET_BYTES", 1)
    monkeypatch.setattr(shard_sum, "UNDER_WAY", 0)
    job = towers(tables=None, model=Hashed)
    team = crew(job, strategy="dp", workers=3, embeddings=how, **plan)
    team.join("initial")
    team.train(0, 12)
    expected = plain(job, 12, lambda model: [torch.optim.Adagrad(model.parameters(), lr=0.1)])
    assert distance(team.weights(12), expected) <= 1e-10


def test_all_judge_together(crew: Build) -> None:
    job = towers(tables=None)
    team = crew(job, strategy="dp", workers=3, embeddings="rows")
    team.join("initial")
    team.train(0, 2)
    model = build_model(job)
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(team.weights(2), model.parameters())
        for samples in (31, 2):
            expected = model(job.train.fetch(torch.arange(samples).numpy())[0]).sum().item()
            assert abs(team.judged(samples) - expected) <= 1e-12


def test_who_dies_in_a_step_leaves_the_others_at_its_beginning(crew: Build) -> None:
    job = towers(tables=None)
    team = crew(job, strategy="dp", workers=2, embeddings="rows")
    team.join("initial")
    team.train(0, 4)
    folder = team.save(4)
    team.trainers[1]._finish_sum = lambda status: team.trainers[1]._beside._peers.give_up() or _raise()
    assert {type(error) for error in team.step(4)} == {PeerLost}
    team.replace(1)
    team.join("checkpoint", 4, checkpoint=folder)
    team.train(4, STEPS)
    expected = plain(job, STEPS, lambda model: [torch.optim.Adagrad(model.parameters(), lr=0.1)])
    assert distance(team.weights(STEPS), expected) <= 1e-10


def test_a_step_that_broke_off_says_nothing_of_where_ids_come_from(crew: Build) -> None:
    job = towers(tables=None, clip_norm=0.5)
    team = crew(job, strategy="mp", workers=4, replicas=2, microbatches=2, cuts=(1,), embeddings="rows")
    team.join("initial")
    team.train(0, 4)
    team.trainers[0]._pipeline._wire.send = lambda *_: _raise()  # between the look-ups of two microbatches
    assert {type(error) for error in team.step(4)} == {PeerLost}
    team.join("keep", 4)
    team.train(4, STEPS)
    expected = plain(job, STEPS, lambda model: [torch.optim.Adagrad(model.parameters(), lr=0.1)])
    assert distance(team.weights(STEPS), expected) <= 1e-10


def _raise() -> None:
    raise PeerLost("the line is cut")


@pytest.mark.parametrize("how", ["rows", "columns", "tables"])
def test_blocks_cover_every_table_once(how: Any) -> None:
    shapes = [(7, 3), (1, 5), (23, 1), (4, 4), (2, 2)]
    for workers in (1, 2, 3, 5):
        for (rows, dim), blocks in zip(shapes, divide(shapes, how, workers), strict=True):
            times = torch.zeros(rows, dim)
            for block in blocks:
                times[block.first : block.last, block.left : block.right] += 1
                flat = torch.arange(rows * dim).view(rows, dim)[block.first : block.last, block.left : block.right]
                if block.rows:
                    assert block.runs(dim).positions().tolist() == flat.flatten().tolist()
            assert (times == 1).all()


def test_whole_tables_go_to_whoever_has_least() -> None:
    blocks = divide([(10, 1), (8, 1), (7, 1), (6, 1)], "tables", 2)
    assert [[block.rows for block in table] for table in blocks] == [[10, 0], [0, 8], [0, 7], [6, 0]]


MISTAKES = {
    "another part of the model has the same weight": {"model": Tied},
    "max_norm changes rows when they are read": {"model": lambda: nn.Sequential(nn.Embedding(4, 2, max_norm=1.0))},
    "which only servers keep; use --strategy ps+dp": {"tables": {"users": Table(ttl=3)}},
    "one number for a whole row": {"tables": {"users": Table(optimizer=optim.RowwiseAdagrad(lr=0.1))}},
    "no nn.Embedding": {"model": lambda: nn.Linear(2, 2), "tables": None},
    "the row of its padding_idx is not zero": {"model": Padded, "tables": None, "optimizer": optim.AdamW(lr=0.1)},
}


@pytest.mark.parametrize("reason", MISTAKES)
def test_what_cannot_be_spread_says_why(reason: str) -> None:
    job = towers(**{"tables": None} | MISTAKES[reason])
    plan = Plan(strategy="dp", workers=2, embeddings="rows")
    assert reason in (strategy.find(plan).why_not(job, plan) or "")
