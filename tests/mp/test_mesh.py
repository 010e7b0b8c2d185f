"""Meshes of replicas, stages and shards: places, and the same numbers whatever the mesh."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from tricorn import data, optim
from tricorn.control.resume import Source
from tricorn.errors import PeerLost
from tricorn.job import Job
from tricorn.mp.mesh import Mesh, Place
from tricorn.plan import Plan
from tricorn.strategy import Outcome

from . import models
from .crew import distance, run_plain_loop

SAMPLES, BATCH, EPOCHS = 13 * 2 + 1, 13, 4  # a last batch of one sample: all but one replica have none


@given(st.builds(Mesh, replicas=st.integers(1, 4), stages=st.integers(1, 4), tensor=st.integers(1, 4)))
def test_every_worker_has_a_place_of_its_own(mesh):
    places = [mesh.place(rank) for rank in range(mesh.size)]
    assert len(set(places)) == mesh.size
    assert [mesh.rank(place) for place in places] == list(range(mesh.size))
    for rank, place in enumerate(places):
        for axis, ranks in (("stage", mesh.line(rank)), ("shard", mesh.shards(rank)), ("replica", mesh.copies(rank))):
            assert ranks[getattr(place, axis)] == rank
            assert [mesh.place(other) for other in ranks] == [
                place._replace(**{axis: number}) for number in range(len(ranks))
            ]
        assert [other for other in range(mesh.size) if mesh.part(other) == mesh.part(rank)] == list(mesh.copies(rank))


def test_shards_are_neighbours_and_replicas_far_apart():
    mesh = Mesh.of(Plan(strategy="mp", workers=8, replicas=2, tensor=2))
    assert mesh.place(5) == Place(replica=1, stage=0, shard=1)
    assert (mesh.shards(5), mesh.line(5), mesh.copies(5)) == ((4, 5), (5, 7), (1, 5))
    assert mesh.part(5) == "stage0.shard1"
    spread = Mesh.of(Plan(strategy="mp", workers=4, replicas=2, zero=1))
    assert [spread.part(rank) for rank in range(4)] == ["stage0.copy0", "stage1.copy0", "stage0.copy1", "stage1.copy1"]


@pytest.fixture
def job():
    def make(model, **fields) -> Job:
        generator = torch.Generator().manual_seed(1)
        given = {
            "model": model, "loss": F.cross_entropy, "optimizer": optim.Adam(lr=0.01), "precision": "float64",
            "train": data.arrays(
                torch.randn(SAMPLES, 8, generator=generator), torch.randint(0, 4, (SAMPLES,), generator=generator)
            ),
            "batch_size": BATCH, "epochs": EPOCHS, "device": "cpu", "clip_norm": 0.5,
        }  # fmt: skip
        return Job(**(given | fields))

    return make


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.01, fused=True)


MESHES = {
    "dp2 x pp2": {"workers": 4, "replicas": 2}, "dp2 x pp2 zero": {"workers": 4, "replicas": 2, "zero": 1},
}  # fmt: skip


def test_computing_is_told_without_waiting(crew, job):
    class Slow(nn.Tanh):
        def forward(self, x):
            time.sleep(0.25)
            return super().forward(x)

    team = crew(job(lambda: nn.Sequential(nn.Linear(8, 8), Slow(), nn.Linear(8, 4))), 2, (1,), microbatches=2)
    team.join("initial")
    team.train(0, 1)
    quick, slow = (trainer.computed for trainer in team.trainers)
    assert 0 < quick < 0.5 <= slow


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_tied_weights_over_stages(crew, job, cuts, replicas, clip):
    inputs = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(2))
    train = data.arrays(inputs, torch.arange(SAMPLES) % 6)
    this = job(models.Tied, train=train, clip_norm=clip)
    team = crew(this, (len(cuts) + 1) * replicas, cuts, replicas=replicas)
    assert team.join("initial") == [None] * len(team.trainers)
    team.train()
    assert distance(team.weights(), run_plain_loop(this, adam)) <= 1e-10


@pytest.mark.parametrize(("mesh", "rank", "source"), [
    ("dp2 x pp2", 1, Source("peer", 3, {"stage1": 3})),
    ("dp2 x pp2", 2, Source("peer", 3, {"stage0": 0})),
    ("dp2 x pp2 zero", 1, Source("checkpoint", 2, {})),
])  # fmt: skip
def test_a_lost_worker_takes_its_part_from_its_copy_or_a_checkpoint(crew, job, tmp_path, mesh, rank, source):
    this = job(models.sequential)
    team = crew(this, cuts=(3,), **MESHES[mesh])
    team.join("initial")
    team.train(0, 2)
    team.save(tmp_path)
    team.train(2, 3)
    team.replace(rank)
    failed = team.step(3, *this.train.fetch(np.arange(BATCH)), but=rank)
    assert [type(error) for error in failed] == [PeerLost] * 3
    assert team.recover(tmp_path, 2) == source
    team.train(source.step)
    assert distance(team.weights(), run_plain_loop(this, adam)) <= 1e-10


def test_copies_of_two_stages_come_from_different_replicas(crew, job):
    this = job(models.sequential)
    team = crew(this, 4, (3,), replicas=2)
    team.join("initial")
    team.train(0, 3)
    team.replace(0)
    team.replace(3)
    assert team.recover() == Source("peer", 3, {"stage0": 2, "stage1": 1})
    assert [trainer._cuts for trainer in team.trainers] == [(3,)] * 4
    team.train(3)
    assert distance(team.weights(), run_plain_loop(this, adam)) <= 1e-10


def test_replicas_agree_on_what_forward_writes_into_buffers(crew, job):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)
            self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.seen += x.sum()
            return self.layer(x)

        def pipeline_blocks(self):
            return [self]

    team = crew(job(Counting), 2, (), replicas=2, microbatches=1)
    team.join("initial")
    assert all(isinstance(outcome, Outcome) for outcome in team.step(0, *team.job.train.fetch(np.arange(BATCH))))
    seen = {torch.Tensor.item(trainer._state.module.stages[0].blocks[0].seen) for trainer in team.trainers}
    assert len(seen) == 1
    assert seen.pop() == pytest.approx(team.job.train.inputs[: BATCH // 2].double().sum().item())
