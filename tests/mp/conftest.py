"""Small models of every kind that a pipeline meets, and stages that are threads of the test."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tricorn.comm.listener import PeerListener
from tricorn.data.sources import as_source
from tricorn.job import Job
from tricorn.mp.trainer import PipelineTrainer
from tricorn.plan import Plan
from tricorn.state.flat import build_model, call_model
from tricorn.state.gradient import placed
from tricorn.state.shards import write_shard
from tricorn.strategy import Batch, Context, Outcome, Seat, Wishes

SECRET = b"s" * 32
BUILDING = threading.Lock()


def sequential() -> nn.Module:
    return nn.Sequential(
        nn.Linear(8, 16),
        nn.ReLU(inplace=True),
        nn.Linear(16, 16),
        nn.Tanh(),
        nn.Linear(16, 12),
        nn.ReLU(inplace=True),
        nn.Linear(12, 4),
    )


def nested() -> nn.Module:
    return nn.Sequential(
        nn.Sequential(nn.Linear(8, 16), nn.Sequential(nn.Tanh(), nn.Linear(16, 16))), nn.ReLU(), nn.Linear(16, 4)
    )


class Chain(nn.Module):
    """A plain functional chain over images of 1 x 8 x 8."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.dropout = nn.Dropout(0.0)
        self.head = nn.Linear(6 * 4 * 4, 10)

    def forward(self, images):
        x = F.relu(self.conv1(images))
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        x = F.dropout(x, 0.0, training=self.training)
        return self.head(self.dropout(x))


class Residual(nn.Module):
    """Each block adds to what it was given: a cut can lie between blocks, not within one."""

    class Add(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x):
            return x + torch.tanh(self.inner(x))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.Add() for _ in range(4))
        self.scale = nn.Parameter(torch.full((4,), 2.0))
        self.register_buffer("shift", torch.arange(4.0))
        self.head = nn.Linear(8, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.scale + self.shift


class Listed(nn.Module):
    """Hands a pair from block to block, and lists its blocks, for its forward could not be followed."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, pair):
            x, y = pair
            return torch.relu(self.left(x)) + y, self.right(y)

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(self.Pair() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def pipeline_blocks(self):
        return [_twice, *self.parts, _joined, self.head]

    def forward(self, x):
        for block in self.pipeline_blocks():
            x = block(x)
        return x


def _twice(x):
    return x, x * 2


def _joined(pair):
    return pair[0] * pair[1]


class Language(nn.Module):
    """Predicts the next token from a mean over those so far; takes keyword arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 12)
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.head = nn.Linear(12, 11)

    def forward(self, tokens, offset):
        x = self.embedding(tokens) + offset.unsqueeze(-1)
        for layer in self.layers:
            x = torch.tanh(layer(x)).cumsum(1)
        return self.head(x).transpose(1, 2)


class Tied(nn.Module):
    """The first and last layer share their weight, so nothing between can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.first.weight

    def forward(self, x):
        return self.last(F.relu(self.middle(F.relu(self.first(x)))))


class Branching(nn.Module):
    """Two ways from the input to the output: no place where one value is all."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.left(x) * F.relu(self.right(x))


class Deciding(nn.Module):
    """What it does depends on the values it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


class Wide(nn.Module):
    """One submodule of the user's own, which has to be looked into to find enough blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Residual()

    def forward(self, x):
        return self.body(x)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.norm(self.first(x)))


class Named(nn.Module):
    """Passes a dict on after its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def pipeline_blocks(self):
        return [self.first, _named, _unnamed, self.last]


def _named(x):
    return {"x": x}


def _unnamed(value):
    return value["x"]


class Crew:
    """The stages of a run, each with a thread of its own."""

    def __init__(self, job: Job, workers: int, cuts: tuple[int, ...] | None = None, **options: Any) -> None:
        self.job = job
        self.plan = Plan(strategy="mp", workers=workers, **options)
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="stage")
        self.epoch = 0
        self.listeners = [PeerListener(SECRET) for _ in range(workers)]
        self.trainers = [self.hire(rank) for rank in range(workers)]
        self.trainers[0]._cuts = cuts  # None: to be measured

    def hire(self, rank: int) -> PipelineTrainer:
        trainer = PipelineTrainer(Context(self.job, self.plan, rank, 1, SECRET, self.listeners[rank]))
        build = trainer._build

        def build_alone(*args: Any) -> None:
            # The generator of initial weights, and what torch.fx replaces, are one for all threads of a process.
            with BUILDING:
                build(*args)

        trainer._build = build_alone
        return trainer

    def replace(self, rank: int) -> None:
        """The worker of that stage dies, and a new one takes its place."""
        self.trainers[rank].close()
        self.trainers[rank] = self.hire(rank)

    def each(self, function: Callable[[int, PipelineTrainer], Any]) -> list[Any]:
        """What the function of (rank, trainer) returns or raises for each stage, all called at once."""
        futures = [self.pool.submit(function, rank, trainer) for rank, trainer in enumerate(self.trainers)]
        return [future.exception(30) or future.result() for future in futures]

    def join(self, source: str, step: int = 0, checkpoint: Path | None = None) -> list[Any]:
        self.epoch += 1
        addresses = tuple(listener.address for listener in self.listeners)
        seat = Seat(self.epoch, addresses, (), step, source, 0, checkpoint)
        return self.each(lambda _, trainer: trainer.join(seat))

    def step(self, step: int, inputs: Any, target: torch.Tensor, **wishes: int) -> list[Any]:
        """The outcome, or the error, of one global batch for each stage; the wishes are those of the last."""

        def run(rank: int, trainer: PipelineTrainer) -> Outcome:
            batch = whole(self.job, inputs, target, trainer)
            return trainer.step(
                step, batch, len(target), Wishes(**wishes) if trainer is self.trainers[-1] else Wishes()
            )

        return self.each(run)

    def train(self, start: int = 0, stop: int | None = None) -> list[float]:
        """Steps [start, stop) of the run; the mean loss of each."""
        losses = []
        for step, (inputs, target) in enumerate(batches(self.job)):
            if start <= step and (stop is None or step < stop):
                first, *others = self.step(step, inputs, target)
                assert isinstance(first, Outcome), first
                assert others == [first] * len(others)
                assert first.samples == len(target)
                losses.append(first.loss_sum / first.count)
        return losses

    def weights(self) -> dict[str, torch.Tensor]:
        """The weights of all stages together."""
        return {name: p.detach().clone() for trainer in self.trainers for name, p in trainer._stage.named_parameters()}

    def save(self, folder: Path) -> Path:
        for trainer in self.trainers:
            write_shard(folder, f"{trainer.part}.safetensors", trainer.pieces())
        return folder

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.close()
        for listener in self.listeners:
            listener.close()
        self.pool.shutdown()


def whole(job: Job, inputs: Any, target: torch.Tensor, trainer: PipelineTrainer) -> Batch:
    """The share of a stage: the whole batch or nothing of it."""
    if trainer.share(len(target)) == (0, 0):
        return Batch(None, None, 0, 0)
    return Batch(inputs, target, len(target), job.count(inputs, target) if job.count else len(target))


def batches(job: Job) -> Iterator[tuple[Any, torch.Tensor]]:
    """Epoch after epoch in plain order; the last batch of each is ragged."""
    ids = np.arange(len(job.train))
    for _ in range(job.epochs):
        for start in range(0, len(ids), job.batch_size):
            yield as_source(job.train).fetch(ids[start : start + job.batch_size])


def run_plain_loop(job: Job, optimizer: Callable[[Any], torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """The weights that the same job has after an ordinary PyTorch loop in one process."""
    model = build_model(job)
    optim = optimizer(model.parameters())
    rate = optim.param_groups[0]["lr"]
    for step, (inputs, target) in enumerate(batches(job)):
        optim.param_groups[0]["lr"] = rate * (job.schedule(step) if job.schedule else 1.0)
        optim.zero_grad(set_to_none=False)
        cpu = torch.device("cpu")
        job.loss(call_model(model, placed(job, inputs, cpu)), placed(job, target, cpu)).backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if job.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
        optim.step()
    return {name: p.detach() for name, p in model.named_parameters()}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Between two sets of weights: relative, in L2."""
    assert ours.keys() == theirs.keys()
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return (difference / sum(float(weight.double().square().sum()) for weight in theirs.values())) ** 0.5


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def models() -> ModuleType:
    """This file's models and helpers, by name."""
    return sys.modules[__name__]


@pytest.fixture
def crew() -> Iterator[Callable[..., Crew]]:
    """Builds the stages of a run; no thread of theirs may be left afterwards."""
    before = set(threading.enumerate())
    made: list[Crew] = []

    def make(job: Job, workers: int, cuts: tuple[int, ...] | None = None, **options: Any) -> Crew:
        made.append(Crew(job, workers, cuts, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
    assert set(threading.enumerate()) <= before
