"""Any number of workers follows the trajectory of an ordinary PyTorch loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tricorn import optim
from tricorn.dp import buckets
from tricorn.job import Job

# No worker count above 1 divides 13, and the last batch of each epoch has 2 samples: fewer than 3 or 4 workers.
SAMPLES, BATCH, EPOCHS = 13 * 4 + 2, 13, 6

OPTIMIZERS = {
    "sgd": (optim.SGD(lr=0.05, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)),
    "adam": (optim.Adam(lr=0.01), lambda p: torch.optim.Adam(p, lr=0.01, fused=True)),
}
BOUNDS = {("sgd", "float32"): 1e-5, ("adam", "float32"): 1e-4, ("sgd", "float64"): 1e-10, ("adam", "float64"): 1e-10}


def classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 4))


class Tied(nn.Module):
    """A tiny language model whose output layer is its embedding; frozen and never used parameters on top."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens_BL: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.mix(self.frozen(self.embedding(tokens_BL)))))


def token_loss(output_BLV: torch.Tensor, target_BL: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output_BLV.flatten(0, 1), target_BL.flatten(), ignore_index=-100)


def job(**fields) -> Job:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES, 6, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 4, (SAMPLES,), generator=generator)
    given = {
        "model": classifier,
        "loss": F.cross_entropy,
        "optimizer": OPTIMIZERS["sgd"][0],
        "train": torch.utils.data.TensorDataset(inputs, target),
        "batch_size": BATCH,
        "epochs": EPOCHS,
        "device": "cpu",
    }
    return Job(**(given | fields))


def language_job(**fields) -> Job:
    """Sentences of unequal length: the first two of every batch hold nearly all of its tokens, some hold none."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, 11, (SAMPLES, 7), generator=generator)
    target = tokens.roll(-1, 1)
    lengths = torch.tensor([7, 6, 0, 1, 0, 2, 1]).repeat(SAMPLES)[:SAMPLES]
    target[torch.arange(7) >= lengths[:, None]] = -100
    return job(
        model=Tied,
        loss=token_loss,
        train=torch.utils.data.TensorDataset(tokens, target),
        count=lambda _, target: int((target != -100).sum()),
        **fields,
    )


@pytest.fixture(params=["shared memory", "few buckets", "many buckets"])
def way(request, monkeypatch) -> None:
    if request.param != "shared memory":
        request.getfixturevalue("apart")
    if request.param == "many buckets":
        monkeypatch.setattr(buckets, "BUCKET_BYTES", 300)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_numbers(crew, plain_loop, name, precision, workers):
    declared, made = OPTIMIZERS[name]
    this = job(optimizer=declared, precision=precision)
    expected, losses = plain_loop(this, made)
    team = crew(this, workers)
    team.join("initial")
    assert team.train() == pytest.approx(losses, rel=1e-10 if precision == "float64" else 1e-4)
    assert max(team.distances(expected)) <= BOUNDS[name, precision]


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_clip_norm_and_schedule(crew, plain_loop, name, workers):
    declared, made = OPTIMIZERS[name]
    this = job(optimizer=declared, precision="float64", clip_norm=0.3, schedule=lambda step: 1.0 / (1 + step))
    expected, _ = plain_loop(this, made)
    unclipped, _ = plain_loop(job(optimizer=declared, precision="float64", schedule=this.schedule), made)
    team = crew(this, workers)
    team.join("initial")
    team.train()
    assert max(team.distances(expected)) <= 1e-10
    assert min(team.distances(unclipped)) > 1e-3  # it was clipped indeed


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_counted_tokens_tied_frozen_and_unused_weights(crew, plain_loop, way, name, workers):
    declared, made = OPTIMIZERS[name]
    this = language_job(optimizer=declared, precision="float64")
    expected, losses = plain_loop(this, made)
    team = crew(this, workers)
    team.join("initial")
    assert team.train() == pytest.approx(losses, rel=1e-10)
    assert max(team.distances(expected)) <= 1e-10


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_replicas_stay_equal_bit_for_bit(crew, way, workers):
    team = crew(job(optimizer=OPTIMIZERS["adam"][0]), workers)
    team.join("initial")
    team.train()
    first, *others = team.states()
    for other in others:
        assert all(torch.equal(first[key], other[key]) for key in first)


class Branching(nn.Module):
    """Which of its halves a sample uses depends on the sample, so ranks fill different buckets."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = [self.left(row) if row[0] > 0 else self.right(row) for row in x]
        return torch.stack(rows)


def test_ranks_that_use_different_parameters(crew, plain_loop, way):
    this = job(model=Branching, precision="float64", batch_size=3)
    expected, _ = plain_loop(this, OPTIMIZERS["sgd"][1])
    team = crew(this, 3)
    team.join("initial")
    team.train()
    assert max(team.distances(expected)) <= 1e-10


def test_bfloat16_keeps_float32_weights_and_learns(crew):
    team = crew(job(precision="bfloat16"), 2)
    team.join("initial")
    losses = team.train()
    assert sum(losses[-5:]) < sum(losses[:5])
    assert team.trainers[0]._state.weights_N.dtype == torch.float32
