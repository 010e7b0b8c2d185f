"""Data parallel training whose workers are threads of the test, beside a plain PyTorch loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener
from tricorn.dp import strategy
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.state.flat import build_model, call_model
from tricorn.strategy import Batch, Context, Outcome, Seat, Wishes

SECRET = b"s" * 32


def batches(job: Job) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Epoch after epoch in plain order; the last batch of each is ragged."""
    inputs, target = job.train.tensors
    for _ in range(job.epochs):
        yield from zip(inputs.split(job.batch_size), target.split(job.batch_size), strict=True)


class Crew:
    """The workers of a run, each with a thread of its own."""

    def __init__(self, job: Job, workers: int, **options: Any) -> None:
        """``options`` are further fields of the plan."""
        self.job = job
        self.plan = Plan(strategy="dp", workers=workers, **options)
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="worker")
        self.epoch = 0
        self.listeners = [PeerListener(SECRET) for _ in range(workers)]
        # One after another: building a model draws from the generator that all threads share.
        self.trainers = [self.hire(rank) for rank in range(workers)]

    def hire(self, rank: int) -> Any:
        return strategy.trainer(Context(self.job, self.plan, rank, 1, SECRET, self.listeners[rank]))

    def replace(self, rank: int) -> None:
        """The worker of that rank dies, and a new one takes its place."""
        self.trainers[rank].close()
        self.trainers[rank] = self.hire(rank)

    def each(self, function: Callable[[int, Any], Any]) -> list[Any]:
        """What the function of (rank, trainer) returns or raises for each worker, all called at once."""
        futures = [self.pool.submit(function, rank, trainer) for rank, trainer in enumerate(self.trainers)]
        return [future.exception(30) or future.result() for future in futures]

    def join(self, source: str, step: int = 0, **fields: Any) -> list[Any]:
        self.epoch += 1
        addresses = tuple(listener.address for listener in self.listeners)
        seat = Seat(self.epoch, addresses, (), step, source, fields.get("peer", 0), fields.get("checkpoint"))
        return self.each(lambda _, trainer: trainer.join(seat))

    def step(self, step: int, inputs: torch.Tensor, target: torch.Tensor, **wishes: int) -> list[Any]:
        """The outcome, or the error, of one global batch for each worker; the wishes are those of rank 0."""

        def run(rank: int, trainer: Any) -> Outcome:
            batch = cut(self.job, inputs, target, *trainer.share(len(target)))
            return trainer.step(step, batch, len(target), Wishes(**wishes) if rank == 0 else Wishes())

        return self.each(run)

    def train(self, start: int = 0, stop: int | None = None) -> list[float]:
        """Steps [start, stop) of the run; the mean loss of each."""
        losses = []
        for step, (inputs, target) in enumerate(batches(self.job)):
            if start <= step and (stop is None or step < stop):
                first, *others = self.step(step, inputs, target)
                assert isinstance(first, Outcome), first
                assert others == [first] * len(others)
                losses.append(first.loss_sum / first.count)
        return losses

    def states(self) -> list[dict[str, torch.Tensor]]:
        """Each worker's whole state, as a checkpoint would hold it."""
        found = []
        for trainer in self.trainers:
            state = trainer._state
            found.append({**state.tensors(), **dict(state.module.named_buffers())})
        return found

    def distances(self, expected: dict[str, torch.Tensor]) -> list[float]:
        """For each worker, how far its weights are from the expected ones: relative, in L2."""
        theirs = torch.cat([weight.flatten().double() for weight in expected.values()])
        found = []
        for trainer in self.trainers:
            weights = dict(trainer._state.module.named_parameters())
            ours = torch.cat([weights[name].detach().flatten().double() for name in expected])
            found.append(float((ours - theirs).norm() / theirs.norm()))
        return found

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.close()
        for listener in self.listeners:
            listener.close()
        self.pool.shutdown()


def cut(job: Job, inputs: torch.Tensor, target: torch.Tensor, start: int, stop: int) -> Batch:
    if start == stop:
        return Batch(None, None, 0, 0)
    inputs, target = inputs[start:stop], target[start:stop]
    return Batch(inputs, target, stop - start, job.count(inputs, target) if job.count else stop - start)


def run_plain_loop(
    job: Job, optimizer: Callable[[Any], torch.optim.Optimizer]
) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The weights and losses of the same job in an ordinary PyTorch loop of one process."""
    model = build_model(job)
    optim = optimizer(model.parameters())
    rate, losses = optim.param_groups[0]["lr"], []
    dtype = next(model.parameters()).dtype
    for step, (inputs, target) in enumerate(batches(job)):
        for group in optim.param_groups:
            group["lr"] = rate * (job.schedule(step) if job.schedule else 1.0)
        optim.zero_grad(set_to_none=False)
        if inputs.is_floating_point():
            inputs, target = inputs.to(dtype), target.to(dtype) if target.is_floating_point() else target
        loss = job.loss(call_model(model, inputs), target)
        loss.backward()
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if job.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
        optim.step()
        losses.append(loss.item())
    return {name: p.detach() for name, p in model.named_parameters()}, losses


@pytest.fixture(scope="session")
def plain_loop() -> Callable[..., tuple[dict[str, torch.Tensor], list[float]]]:
    return run_plain_loop


@pytest.fixture
def apart(monkeypatch) -> None:
    """Workers see no memory of each other's, as if they were on different hosts."""
    monkeypatch.setattr(Group, "expose", lambda *_: None)


@pytest.fixture
def crew() -> Iterator[Callable[[Job, int], Crew]]:
    """Builds the workers of a run."""
    made: list[Crew] = []

    def make(job: Job, workers: int, **options: Any) -> Crew:
        made.append(Crew(job, workers, **options))
        return made[-1]

    yield make
    for each in made:
        each.close()
