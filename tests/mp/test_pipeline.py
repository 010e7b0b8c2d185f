"""Pipelines of threads, under every schedule, against the whole model."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tricorn import data, optim
from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener
from tricorn.errors import PlanError
from tricorn.job import Job
from tricorn.mp import deferred
from tricorn.mp.partition import Stage, blocks
from tricorn.mp.pipeline import Pipeline
from tricorn.mp.schedule import Parcel
from tricorn.mp.wire import Wire
from tricorn.strategy import Batch

SECRET = b"s" * 32
STEPS, BATCH, RATE = 20, 13, 0.05  # nothing divides 13, and the last step has 3 samples
CPU = torch.device("cpu")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zero-bubble")


class Pair(nn.Module):
    """Hands on two values, of which the second is only carried on, and is no float."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        x, signs = pair
        return x + torch.tanh(self.inner(x)) * signs, signs


def chain() -> nn.Module:
    layers = [layer for _ in range(8) for layer in (nn.Linear(8, 8), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers, nn.Linear(8, 4))


def pairs() -> nn.Module:
    return nn.Sequential(Signed(), *(Pair() for _ in range(8)), First())


class Signed(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x.sign().to(torch.int8)


class First(nn.Module):
    def forward(self, pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return pair[0]


def dropping() -> nn.Module:
    """Draws random numbers, and works in place on what it is given."""
    return nn.Sequential(*(layer for _ in range(5) for layer in (nn.Dropout(0.3, inplace=True), nn.Linear(8, 8))))


def normalised() -> nn.Module:
    return nn.Sequential(*(layer for _ in range(4) for layer in (nn.Linear(8, 8), nn.BatchNorm1d(8))))


def embedded() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 8), *(nn.Linear(8, 8) for _ in range(6)), nn.Linear(8, 11), Transposed())


class Transposed(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2)


@pytest.fixture(autouse=True)
def _defer_small_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """And put some microbatches together, some of them when a step ends."""
    monkeypatch.setattr(deferred, "FEWEST", 1)
    monkeypatch.setattr(deferred, "ENOUGH", 6)


@pytest.fixture
def line() -> Iterator[Callable[[int], list[Group]]]:
    """Builds the groups of so many ranks, which are threads of the test."""
    made: list[Group] = []
    listeners: list[PeerListener] = []

    def make(size: int) -> list[Group]:
        listeners.extend(PeerListener(SECRET) for _ in range(size))
        mine = listeners[-size:]
        for listener in mine:
            listener.announce(1)
        addresses = [listener.address for listener in mine]
        with ThreadPoolExecutor(size) as pool:
            groups = [
                pool.submit(
                    Group, rank=r, addresses=addresses, listener=mine[r], secret=SECRET, epoch=1, channel="line"
                )
                for r in range(size)
            ]
        made.extend(group.result() for group in groups)
        return [group.result() for group in groups]

    yield make
    for group in made:
        group.close()
    for listener in listeners:
        listener.close()


class Team:
    """The ranks of one pipeline, cut evenly; each a thread while it works."""

    def __init__(self, job: Job, groups: list[Group], chunks: int = 1, **options: Any) -> None:
        torch.manual_seed(0)
        self.job, self.model = job, job.model().to(torch.float64)
        size, stages = len(groups), len(groups) * chunks
        found = blocks(self.model, stages)
        edges = [len(found) * stage // stages for stage in range(stages + 1)]
        self.stages = [Stage(self.model, found, *edge, CPU) for edge in pairwise(edges)]
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.pipelines = [Pipeline(job, self.stages[rank::size], group, **options) for rank, group in enumerate(groups)]

    def each(self, function: Callable[[int, Pipeline], Any]) -> list[Any]:
        with ThreadPoolExecutor(len(self.pipelines)) as pool:
            futures = [pool.submit(function, rank, pipeline) for rank, pipeline in enumerate(self.pipelines)]
            return [future.result(20) for future in futures]

    def step(self, inputs: torch.Tensor, target: torch.Tensor) -> float:
        """One step of gradient descent; the mean loss."""
        results = self.each(lambda _, pipeline: pipeline.train(whole(self.job, inputs, target), len(target)))
        (total, count) = results[-1]
        assert results[:-1] == [(0.0, 0)] * (len(results) - 1)
        descend(self.model, count)
        return total / count


def whole(job: Job, inputs: torch.Tensor, target: torch.Tensor) -> Batch:
    return Batch(inputs, target, len(target), job.count(inputs, target) if job.count else len(target))


def descend(model: nn.Module, count: int) -> None:
    for parameter in model.parameters():
        parameter.data -= RATE / count * parameter.grad
        parameter.grad.zero_()


def job_of(model: Callable[[], nn.Module], *, classes: int = 4, **fields: Any) -> Job:
    given = data.arrays(torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64))
    return Job(model=model, loss=fields.pop("loss", F.cross_entropy), optimizer=optim.SGD(lr=RATE), train=given,
               batch_size=BATCH, epochs=1, precision="float64", device="cpu", **fields)  # fmt: skip


def steps(*, classes: int = 4) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        samples = 3 if step == STEPS - 1 else BATCH
        yield (
            torch.randn(samples, 8, generator=generator, dtype=torch.float64),
            torch.randint(0, classes, (samples,), generator=generator),
        )


def sentences() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Of a length that differs from step to step; in some microbatches no token counts."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        tokens = torch.randint(0, 11, (BATCH, 2 + step % 3), generator=generator)
        target = tokens.roll(-1, 1)
        target[::2] = -100
        yield tokens, target


def alone(job: Job, data: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> nn.Module:
    """The whole model after the same steps."""
    torch.manual_seed(0)
    model = job.model().to(torch.float64)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for inputs, target in data:
        batch = whole(job, inputs, target)
        (job.loss(model(inputs), target) * batch.count).backward()
        descend(model, batch.count)
    return model


def distance(ours: nn.Module, theirs: nn.Module) -> float:
    """Relative, in L2, of weights and buffers."""
    ours_N, theirs_N = (
        torch.cat([t.flatten().double() for t in (*m.parameters(), *m.buffers())]).detach() for m in (ours, theirs)
    )
    return float((ours_N - theirs_N).norm() / theirs_N.norm())


@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("model", [chain, pairs])
def test_same_numbers_as_the_whole_model(line, model, schedule, stages):
    job = job_of(model)
    chunks = 2 if schedule == "interleaved" else 1
    team = Team(job, line(stages), chunks, schedule=schedule, microbatches=5)
    losses = [team.step(*each) for each in steps()]
    assert losses[0] > losses[-2]
    assert distance(team.model, alone(job, steps())) <= 1e-10


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("microbatches", [1, 2, 13])
def test_any_number_of_microbatches_and_of_things_that_count(line, schedule, microbatches):
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(output, target, ignore_index=-100)

    job = job_of(embedded, loss=loss, count=lambda _, target: int((target != -100).sum()))
    chunks = 2 if schedule == "interleaved" else 1
    team = Team(job, line(3), chunks, schedule=schedule, microbatches=microbatches)
    for each in sentences():
        team.step(*each)
    assert distance(team.model, alone(job, sentences())) <= 1e-10


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_recomputing_changes_no_number(line, schedule):
    """Not even where random numbers are drawn, and layers work in place on what they are given."""
    made = []
    for recompute in (False, True):
        # One rank alone: the threads of a test would draw from one generator.
        team = Team(job_of(dropping), line(1), schedule=schedule, microbatches=3, recompute=recompute)
        torch.manual_seed(7)
        for each in steps():
            team.step(*each)
        made.append(team.model)
    assert distance(*made) == 0.0


def test_recomputing_counts_batch_statistics_once(line):
    job = job_of(normalised, loss=lambda output, target: F.cross_entropy(output, target))
    team = Team(job, line(2), schedule="gpipe", microbatches=1, recompute=True)
    for each in steps():
        team.step(*each)
    assert distance(team.model, alone(job, steps())) <= 1e-10


def test_recomputing_keeps_only_what_was_given(line):
    """After the forwards of a first stage, when it waits for the first gradient."""

    def kept(recompute: bool) -> int:
        team = Team(job_of(chain), line(2), schedule="gpipe", microbatches=4, recompute=recompute)
        batch = whole(team.job, *next(steps()))
        alive: list[weakref.ref[torch.Tensor]] = []
        counts: list[int] = []
        receive = Wire.receive

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            plain = tensor.detach()
            alive.append(weakref.ref(plain))
            return plain

        def count(wire: Wire, parcel: Parcel) -> Any:
            if parcel.kind == "B":
                counts.append(sum(each() is not None for each in alive))
            return receive(wire, parcel)

        def run(rank: int, pipeline: Pipeline) -> Any:
            watch = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with watch if rank == 0 else contextlib.nullcontext():
                return pipeline.train(batch, BATCH)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Wire, "receive", count)
            team.each(run)
        return counts[0]

    assert kept(recompute=True) == 0 < kept(recompute=False)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_evaluation_judges_every_sample_once_and_in_order(line, schedule):
    job = job_of(chain)
    chunks = 2 if schedule == "interleaved" else 1
    team = Team(job, line(2), chunks, schedule=schedule, microbatches=5)
    inputs, target = next(steps())
    judged: list[torch.Tensor] = []

    def run(_: int, pipeline: Pipeline) -> None:
        pipeline.evaluate(whole(job, inputs, target), len(target), lambda output, batch: judged.append(output))

    team.each(run)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(judged), team.model(inputs))
    assert team.model.training


def test_a_kind_of_value_is_announced_once(line, monkeypatch):
    headers = []
    take = Wire._take

    def watched(self: Wire, peer: int, shape: Any, dtype: torch.dtype, on: Any = None) -> torch.Tensor:
        headers.extend([peer] if dtype == torch.int64 and tuple(shape) != (1,) else [])
        return take(self, peer, shape, dtype, on)

    monkeypatch.setattr(Wire, "_take", watched)
    team = Team(job_of(chain), line(2), schedule="1f1b", microbatches=5)
    for each in steps():
        team.step(*each)
    assert len(headers) == 3  # microbatches of 2, 3 and 1 samples


def test_chunks_need_a_schedule_that_has_them(line):
    with pytest.raises(PlanError, match="interleaved"):
        Team(job_of(chain), line(2), 2, schedule="1f1b", microbatches=2)


def test_layers_whose_weights_are_deferred_are_freed_as_soon_as_they_are_dropped():
    layers = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)
    deferral = deferred.Deferral()
    deferral.install(layers)
    deferral.waiting = []
    layers(torch.ones(2, 4)).sum().backward()
    assert not any(parameter.grad.any() for parameter in layers.parameters())
    while deferral.waiting:
        deferral.waiting.pop()()
    deferral.finish()
    assert all(parameter.grad.any() for parameter in layers.parameters())
    left = [weakref.ref(layer) for layer in layers]
    del layers, parameter
    assert not any(layer() for layer in left)
