"""Meshes of replicas, stages and shards: places, and the same numbers whatever the mesh."""

from __future__ import annotations

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
    "dp2": {"workers": 2, "replicas": 2}, "dp3": {"workers": 3, "replicas": 3},
    "dp2 zero": {"workers": 2, "replicas": 2, "zero": 1}, "dp3 zero": {"workers": 3, "replicas": 3, "zero": 1},
    "dp2 x pp2": {"workers": 4, "replicas": 2}, "dp2 x pp2 zero": {"workers": 4, "replicas": 2, "zero": 1},
    "tp2": {"workers": 2, "tensor": 2}, "tp3": {"workers": 3, "tensor": 3}, "tp4": {"workers": 4, "tensor": 4},
    "dp2 x tp2": {"workers": 4, "replicas": 2, "tensor": 2}, "pp2 x tp2": {"workers": 4, "tensor": 2},
    "dp2 x tp2 zero": {"workers": 4, "replicas": 2, "tensor": 2, "zero": 1},
    "dp2 x pp2 x tp2": {"workers": 8, "replicas": 2, "tensor": 2},
}  # fmt: skip
CUTS = {1: (), 2: (3,)}


def cuts_of(mesh: str) -> tuple[int, ...]:
    return CUTS[Plan(strategy="mp", **MESHES[mesh]).stages]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", ["sequential", "Residual"])
def test_every_mesh_follows_the_plain_loop(crew, models, job, mesh, model):
    this = job(getattr(models, model))
    team = crew(this, cuts=cuts_of(mesh), **MESHES[mesh])
    assert team.join("initial") == [None] * len(team.trainers)
    team.train()
    assert models.distance(team.weights(), models.run_plain_loop(this, adam)) <= 1e-10


class Text(nn.Module):
    """A transformer whose head has the weight of its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True) for _ in range(2))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.linear(x, self.embedding.weight).transpose(1, 2)


class Towers(nn.Module):
    """A user and an item, each by a table and a few layers, scored by their product."""

    def __init__(self) -> None:
        super().__init__()
        self.user, self.item = nn.Embedding(20, 8), nn.Embedding(30, 8)
        self.left = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))
        self.right = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, users, items):
        return (self.left(self.user(users)) * self.right(self.item(items))).sum(-1)


@pytest.mark.parametrize("mesh", ["dp2 x pp2", "dp2 x tp2 zero", "pp2 x tp2"])
@pytest.mark.parametrize("model", [Text, Towers])
def test_text_and_recommender_follow_the_plain_loop(crew, models, job, mesh, model):
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 11, (SAMPLES, 5), generator=generator)
    pairs = torch.arange(SAMPLES) % 20, torch.arange(SAMPLES).flip(0)
    text = {"train": data.arrays(tokens, tokens.roll(-1, 1))}
    rated = {"train": data.arrays(pairs, torch.randn(SAMPLES, generator=generator)), "loss": F.mse_loss}
    this = job(model, **(text if model is Text else rated))
    team = crew(this, **MESHES[mesh])
    assert team.join("initial") == [None] * len(team.trainers)
    team.train()
    assert models.distance(team.weights(), models.run_plain_loop(this, adam)) <= 1e-10


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zero-bubble"])
def test_every_schedule_in_replicas(crew, models, job, schedule):
    this = job(models.Residual)
    team = crew(this, 4, (1, 3, 4) if schedule == "interleaved" else (3,), replicas=2, schedule=schedule)
    assert team.join("initial") == [None] * len(team.trainers)
    team.train()
    assert models.distance(team.weights(), models.run_plain_loop(this, adam)) <= 1e-10


@pytest.mark.parametrize("cuts", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_tied_weights_over_stages(crew, models, job, cuts, replicas, clip):
    inputs = torch.randn(SAMPLES, 6, generator=torch.Generator().manual_seed(2))
    train = data.arrays(inputs, torch.arange(SAMPLES) % 6)
    this = job(models.Tied, train=train, clip_norm=clip)
    team = crew(this, (len(cuts) + 1) * replicas, cuts, replicas=replicas)
    assert team.join("initial") == [None] * len(team.trainers)
    team.train()
    assert models.distance(team.weights(), models.run_plain_loop(this, adam)) <= 1e-10


@pytest.mark.parametrize(("mesh", "rank", "source"), [
    ("dp2 x pp2", 1, Source("peer", 3, {"stage1": 3})),
    ("dp2 x pp2", 2, Source("peer", 3, {"stage0": 0})),
    ("dp2 x pp2 zero", 1, Source("checkpoint", 2, {})),
])  # fmt: skip
def test_a_lost_worker_takes_its_part_from_its_copy_or_a_checkpoint(crew, models, job, tmp_path, mesh, rank, source):
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
    assert models.distance(team.weights(), models.run_plain_loop(this, adam)) <= 1e-10


def test_copies_of_two_stages_come_from_different_replicas(crew, models, job):
    this = job(models.sequential)
    team = crew(this, 4, (3,), replicas=2)
    team.join("initial")
    team.train(0, 3)
    team.replace(0)
    team.replace(3)
    assert team.recover() == Source("peer", 3, {"stage0": 2, "stage1": 1})
    assert [trainer._cuts for trainer in team.trainers] == [(3,)] * 4
    team.train(3)
    assert models.distance(team.weights(), models.run_plain_loop(this, adam)) <= 1e-10


def test_replicas_agree_on_what_forward_writes_into_buffers(crew, models, job):
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
