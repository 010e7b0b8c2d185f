"""Small models of every kind that a pipeline meets, and stages that are threads of the test."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tricorn.comm.listener import PeerListener
from tricorn.control.messages import Begin, Ready
from tricorn.control.resume import LOST, Source, resume_point
from tricorn.data.sources import as_source
from tricorn.job import Job
from tricorn.mp.trainer import MeshTrainer
from tricorn.plan import Plan
from tricorn.state.flat import build_model, call_model
from tricorn.state.gradient import placed, rows
from tricorn.state.shards import write_shard
from tricorn.state.slabs import Slab, slab_of
from tricorn.strategy import Batch, Context, Outcome, Wishes, find
from tricorn.worker.loop import seat_of

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
        self.plan = Plan(**{"strategy": "mp", "workers": workers} | options)
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="stage")
        self.epoch = 0
        self.still = threading.Barrier(workers)
        self.listeners = [PeerListener(SECRET) for _ in range(workers)]
        self.trainers = [self.hire(rank) for rank in range(workers)]
        # Measured before there are threads: what torch.fx replaces meanwhile is one for all of a process.
        chief = self.trainers[0]
        if isinstance(chief, MeshTrainer):
            chief._cuts = chief._choose(self.plan.stages * chief._chunks) if cuts is None else cuts

    def hire(self, rank: int) -> Any:
        trainer: Any = find(self.plan).trainer(Context(self.job, self.plan, rank, 1, SECRET, self.listeners[rank]))
        if not isinstance(trainer, MeshTrainer):
            return trainer
        build, agree, join_beside = trainer._build, trainer._agree_on_cuts, trainer._beside.join

        # The generator of initial weights, and what torch.fx replaces in torch and all modules, are one for all threads
        # of a process: while one builds, no other does anything.

        def agree_and_stand_still(*args: Any) -> Any:
            with self.stop_all():
                agreed = agree(*args)
            self.still.wait(30)
            return agreed

        def build_alone(*args: Any) -> Any:
            with BUILDING, self.stop_all():
                return build(*args)

        def go_on_when_all_have(*args: Any) -> None:
            self.still.wait(30)
            join_beside(*args)

        trainer._agree_on_cuts, trainer._build = agree_and_stand_still, build_alone
        trainer._beside.join = go_on_when_all_have
        return trainer

    @contextmanager
    def stop_all(self) -> Iterator[None]:
        """Let nobody wait in vain for who fails here."""
        try:
            yield
        except BaseException:
            self.still.abort()
            raise

    def replace(self, rank: int) -> None:
        """The worker of that stage dies, and a new one takes its place."""
        self.trainers[rank].close()
        self.trainers[rank] = self.hire(rank)

    def each(self, function: Callable[[int, MeshTrainer], Any], but: int | None = None) -> list[Any]:
        """What the function of (rank, trainer) returns or raises for each worker ``but`` one, all called at once."""
        futures = [
            self.pool.submit(function, rank, trainer) for rank, trainer in enumerate(self.trainers) if rank != but
        ]
        if stuck := wait(futures, 30).not_done:
            errors = [future.exception() for future in futures if future not in stuck]
            raise TimeoutError(f"{len(stuck)} workers are stuck; the others raised {errors}")
        return [future.exception() or future.result() for future in futures]

    def join(self, source: str, step: int = 0, checkpoint: Path | None = None) -> list[Any]:
        return self._join(Source(source, step, {}), checkpoint)

    def recover(self, checkpoint: Path | None = None, saved: int = 0) -> Source:
        """Go on from what all hold, as the coordinator would decide."""
        addresses = [listener.address for listener in self.listeners]
        ready = {
            f"worker-{rank}": Ready(
                epoch=1,
                part=trainer.part,
                held=[] if trainer.held() is None else [trainer.held()],
                address=addresses[rank],
            )
            for rank, trainer in enumerate(self.trainers)
        }
        source = resume_point(ready)
        if source == LOST:
            source = Source("checkpoint" if checkpoint else "initial", saved, {})
        assert self._join(source, checkpoint if source.kind == "checkpoint" else None) == [None] * len(self.trainers)
        return source

    def _join(self, source: Source, checkpoint: Path | None) -> list[Any]:
        self.epoch += 1
        self.still = threading.Barrier(len(self.trainers))
        begin = Begin(
            epoch=self.epoch, workers=[listener.address for listener in self.listeners], servers=[], step=source.step,
            source=source.kind, peers=source.peers, checkpoint=str(checkpoint) if checkpoint else None, generation=0,
            applied=[], evaluate=False, saved=0,
        )  # fmt: skip
        return self.each(lambda _, trainer: trainer.join(seat_of(begin, trainer.part)))

    def step(self, step: int, inputs: Any, target: torch.Tensor, *, but: int | None = None, **wishes: int) -> list[Any]:
        """The outcome, or the error, of one global batch for each worker ``but`` one; the wishes are the last's."""

        def run(rank: int, trainer: MeshTrainer) -> Outcome:
            batch = share_of(self.job, inputs, target, trainer)
            return trainer.step(
                step, batch, len(target), Wishes(**wishes) if trainer is self.trainers[-1] else Wishes()
            )

        return self.each(run, but)

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
        """The weights of all together; what several have must be equal bit for bit."""
        found: dict[str, torch.Tensor] = {}
        for trainer in self.trainers:
            for name, parameter in trainer._state.module.named_parameters():
                here = parameter.detach() if parameter.ndim else parameter.detach().view(1)
                slab = slab_of(parameter) or Slab(tuple(here.shape), 0, ((0, len(here)),))
                whole = found.setdefault(name, torch.full(slab.shape, float("nan"), dtype=here.dtype))
                parts = here.split([high - low for low, high in slab.ranges], slab.dim)
                for (low, high), part in zip(slab.ranges, parts, strict=True):
                    place = whole.narrow(slab.dim, low, high - low)
                    assert torch.equal(place, part) or place.isnan().all(), name
                    place.copy_(part)
        return found

    def save(self, folder: Path) -> Path:
        for rank, trainer in enumerate(self.trainers):
            write_shard(folder, f"worker-{rank}.safetensors", trainer.pieces())
        return folder

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.close()
        for listener in self.listeners:
            listener.close()
        self.pool.shutdown()


def share_of(job: Job, inputs: Any, target: torch.Tensor, trainer: MeshTrainer) -> Batch:
    """The share of a worker: its replica's part of the batch, or nothing of it."""
    start, stop = trainer.share(len(target))
    if start == stop:
        return Batch(None, None, 0, 0)
    inputs, target = rows(inputs, start, stop), target[start:stop]
    return Batch(inputs, target, stop - start, job.count(inputs, target) if job.count else stop - start)


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


@pytest.fixture(scope="session")
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
