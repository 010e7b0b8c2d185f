"""What a step is made of: microbatches, buckets in the order of readiness, shares, buffers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tricorn.dp import buckets
from tricorn.dp.balance import PARTS
from tricorn.strategy import Context

from .test_numbers import OPTIMIZERS, job, language_job

SGD = OPTIMIZERS["sgd"][1]


@pytest.mark.parametrize("microbatches", [2, 5, 100])
@pytest.mark.parametrize("made", [job, language_job])
def test_microbatches_change_nothing(crew, plain_loop, made, microbatches):
    this = made(precision="float64", clip_norm=0.5)
    expected, losses = plain_loop(this, SGD)
    team = crew(this, 3, microbatches=microbatches)
    team.join("initial")
    assert team.train() == pytest.approx(losses, rel=1e-10)
    assert max(team.distances(expected)) <= 1e-10


class Backwards(nn.Module):
    """Made in another order than it is used in."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.middle, self.first = nn.Linear(8, 4), nn.Linear(8, 8), nn.Linear(6, 8)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.middle(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_are_laid_out_as_they_are_filled(crew, plain_loop, optimizer, apart, monkeypatch):
    monkeypatch.setattr(buckets, "BUCKET_BYTES", 100)
    declared, made = OPTIMIZERS[optimizer]
    this = job(model=Backwards, optimizer=declared, precision="float64")
    expected, _ = plain_loop(this, made)
    team = crew(this, 2)
    team.join("initial")
    team.train(0, 4)
    for trainer in team.trainers:
        layers = [entry.name.split(".")[0] for entry in trainer._state.entries]
        assert list(dict.fromkeys(layers)) == ["unused", "first", "middle", "last"]
    team.replace(1)  # who knows the module's order only
    team.join("peer", 4, peer=0)
    team.train(4)
    assert max(team.distances(expected)) <= 1e-10


def test_bucket_sizes_are_tried_and_the_choice_is_told(crew, apart, monkeypatch):
    monkeypatch.setattr(buckets, "SIZES", (100, 400, 1 << 20))
    monkeypatch.setattr(buckets, "ROUNDS", 2)
    told = []
    team = crew(job(), 2)
    for trainer in team.trainers:
        trainer._context = trainer._context._replace(measured=lambda *note: told.append(note))
    team.join("initial")
    team.train(0, 12)
    ((step, what, values),) = told
    assert (step, what) == (2 + 3 * 2 - 1, "buckets")
    assert set(values) == {"100 bytes", "400 bytes", "1048576 bytes", "chosen bytes"}
    first, second = (len(trainer._sum._buckets) for trainer in team.trainers)
    assert first == second


def test_any_shares_give_the_same_numbers(crew, plain_loop):
    this = job(precision="float64")
    expected, losses = plain_loop(this, SGD)
    team = crew(this, 3, balance=True)
    team.join("initial")
    for trainer in team.trainers:
        trainer._balance.weights = [PARTS, 7 * PARTS, 3 * PARTS]
    assert [trainer.share(13) for trainer in team.trainers] == [(0, 1), (1, 9), (9, 13)]
    assert team.train() == pytest.approx(losses, rel=1e-10)
    assert max(team.distances(expected)) <= 1e-10


def test_shares_follow_what_each_worker_took(crew):
    """All are told the same times, and draw the same conclusion from them."""
    told = []
    team = crew(job(epochs=10), 2, balance=True)
    for trainer in team.trainers:
        trainer._context = trainer._context._replace(measured=lambda *note: told.append(note))
    team.join("initial")
    inputs, target = (tensor[:13] for tensor in team.job.train.tensors)
    for step in range(40):
        team.step(step, inputs, target)
        for trainer, seconds in zip(team.trainers, (0.08, 0.02), strict=True):  # of a sample
            start, stop = trainer.share(13)
            trainer._busy = seconds * (stop - start)
    weights = [trainer._balance.weights for trainer in team.trainers]
    assert weights[0] == weights[1]
    assert weights[0][0] < weights[0][1]
    assert [what for _, what, _ in told].count("shares") >= 1
    assert all(sum(values.values()) == pytest.approx(1) for _, what, values in told if what == "shares")
    team.join("keep", 40)
    assert [trainer._balance.weights for trainer in team.trainers] == [[PARTS] * 2] * 2


class Remembering(nn.Module):
    """A buffer that depends on the samples, as moving averages do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("fixed", torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.mean.lerp_(x.detach().mean(0), 0.1)
        return self.head(x - self.mean * self.fixed)


@pytest.mark.parametrize("zero", [0, 2])
def test_buffers_stay_equal(crew, zero):
    """Also where the first of four workers has no sample of the last batch."""
    team = crew(job(model=Remembering), 4, zero=zero)
    team.join("initial")
    team.train()
    first, *others = (dict(trainer._module.named_buffers()) for trainer in team.trainers)
    assert first["mean"].abs().sum() > 0
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


def test_a_context_needs_nobody_who_listens():
    assert Context._field_defaults["measured"](1, "shares", {}) is None
