"""Batch normalisation over all workers' shares equals that of one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tricorn.dp import strategy
from tricorn.errors import PlanError
from tricorn.plan import Plan
from tricorn.state.flat import build_model

from .test_numbers import OPTIMIZERS, job

SGD = OPTIMIZERS["sgd"][1]


def flat() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 8), nn.BatchNorm1d(8, affine=False, momentum=None),
        nn.Tanh(), nn.Linear(8, 4),
    )  # fmt: skip


class Images(nn.Module):
    """Convolutions of the six numbers as an image of 2 x 3, and a layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 3, 2, padding=1), nn.BatchNorm2d(3, track_running_stats=False)
        self.head, self.twice = nn.Linear(36, 4), nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.twice(self.head(torch.relu(self.norm(self.conv(x.view(-1, 1, 2, 3)))).flatten(1)))
        return self.twice(x * x)


def plain_buffers(this) -> dict[str, torch.Tensor]:
    """The buffers after a plain loop of the same job."""
    model = build_model(this)
    optimizer = SGD(model.parameters())
    inputs, target = this.train.tensors
    for _ in range(this.epochs):
        for x, y in zip(inputs.split(this.batch_size), target.split(this.batch_size), strict=True):
            optimizer.zero_grad()
            this.loss(model(x), y).backward()
            optimizer.step()
    return dict(model.named_buffers())


@pytest.mark.parametrize("model", [flat, Images])
@pytest.mark.parametrize(("workers", "options"), [(1, {}), (2, {}), (3, {"zero": 2}), (4, {})])
def test_same_numbers(crew, plain_loop, model, workers, options):
    """With 4 workers, two of them have no sample of the last batch."""
    this = job(model=model, precision="float64")
    expected, losses = plain_loop(this, SGD)
    team = crew(this, workers, **options)
    team.join("initial")
    assert team.train() == pytest.approx(losses, rel=1e-8)
    if not options:
        assert max(team.distances(expected)) <= 1e-10
    for trainer in team.trainers:
        for name, buffer in trainer._module.named_buffers():
            torch.testing.assert_close(buffer, plain_buffers(this)[name], rtol=1e-9, atol=1e-12, msg=name)


def test_bfloat16(crew):
    team = crew(job(model=flat, precision="bfloat16"), 2)
    team.join("initial")
    losses = team.train()
    assert sum(losses[-5:]) < sum(losses[:5])


def test_a_share_that_does_not_count_is_part_of_the_statistics(crew, plain_loop):
    """As where no pixel of an image has a label."""
    labelled = job().train.tensors[1].clone()
    labelled[torch.arange(len(labelled)) % 13 < 7] = -100  # the whole share of the first of two workers
    loss = nn.CrossEntropyLoss(ignore_index=-100)
    data = torch.utils.data.TensorDataset(job().train.tensors[0][:52], labelled[:52])
    this = job(
        model=flat, precision="float64", loss=loss, train=data, count=lambda _, target: int((target != -100).sum())
    )
    expected, _ = plain_loop(this, SGD)
    team = crew(this, 2)
    team.join("initial")
    team.train()
    assert max(team.distances(expected)) <= 1e-10


class Choosy(nn.Module):
    """Which layer a share goes through depends on its samples."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.BatchNorm1d(6), nn.BatchNorm1d(6)])
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers[int(x[0, 0] > 0)](x))


def test_shares_that_go_different_ways_are_an_error(crew):
    team = crew(job(model=Choosy), 2)
    team.join("initial")
    inputs = torch.tensor([[1.0]] * 2 + [[-1.0]] * 2).expand(4, 6).contiguous()
    errors = team.step(0, inputs, torch.zeros(4, dtype=torch.int64))
    assert any(isinstance(error, PlanError) and "different batch normalisation" in str(error) for error in errors)
    assert all(isinstance(error, Exception) for error in errors)


class Mine(nn.BatchNorm1d):
    """A layer whose forward may be anything."""


@pytest.mark.parametrize(
    ("model", "fields", "expected"),
    [
        (flat, {"workers": 4}, None),
        (flat, {"workers": 1, "microbatches": 2}, "layer '1' .* microbatches is 2; leave it out"),
        (flat, {"zero": 3}, "layer '1' .* use zero=2"),
        (flat, {"local_steps": 4}, "layer '1' .* local_steps is 4; leave it out"),
        (lambda: nn.Sequential(Mine(6), nn.Linear(6, 4)), {}, "layer '0' .* each of the 2 workers sees only its share"),
        (lambda: nn.Sequential(Mine(6), nn.Linear(6, 4)), {"workers": 1}, None),
        (Images, {"evaluate": True}, "layer 'norm' judges with the statistics of a batch"),
        (Images, {}, None),
    ],
)
def test_why_not(model, fields, expected):
    fields = dict(fields)
    this = job(model=model, evaluate=job().train if fields.pop("evaluate", False) else None)
    reason = strategy.why_not(this, Plan(strategy="dp", **fields))
    if expected is None:
        assert reason is None
    else:
        import re

        assert re.search(expected, reason)
