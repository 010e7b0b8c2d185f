"""Run a plan's own trainers for some steps, without a coordinator: what a step takes that is not computing.

The job is made of weights alone: its gradient costs next to nothing, so that what remains is the strategy's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
from torch import Tensor, nn

from tricorn import optim, strategy
from tricorn.comm.auth import new_secret
from tricorn.comm.listener import PeerListener
from tricorn.data.sources import arrays, as_source
from tricorn.engine.loading import prepare
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.planner.computing import rows_served
from tricorn.planner.crew import Line, crew, gather, tell
from tricorn.planner.figures import Figure
from tricorn.ps import sparse
from tricorn.state.flat import build_model
from tricorn.state.gradient import forward_backward
from tricorn.state.memory import peak_bytes
from tricorn.strategy import Batch, Context, Seat, Wishes
from tricorn.table import Table

PARTS = 8  # parameters of a made model
WARM_STEPS = 4
BATCHES = 8  # of a worker, of other rows each, that are gone through twice: at first their rows are new


class Chain(nn.Module):
    """Parameters of so many elements together, in a chain that can be cut anywhere and computes next to nothing."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.parts = nn.Sequential(*(Scale(max(1, elements // PARTS)) for _ in range(PARTS)))

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.parts(x)
        return made


class Scale(nn.Module):
    """Adds the sum of its parameter."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(elements))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weight.sum()


class Rows(nn.Module):
    """Tables, of each of which each sample reads one row."""

    def __init__(self, reads: Sequence[Read]) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(read.rows, read.dim, device="meta") for read in reads)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, ids_BT: Tensor) -> Tensor:
        sums = [table(ids_BT[:, index]).sum() for index, table in enumerate(self.tables)]
        return torch.stack(sums).sum() * self.scale


class Read(NamedTuple):
    """A made table of ``rows`` x ``dim``, and how many different ids of it a worker's step has."""

    rows: int
    dim: int
    ids: int


def chain(elements: int, width: int = 1) -> Job:
    """A job of so many weights in a chain that hands on ``width`` numbers a sample."""
    return _made(partial(Chain, elements), torch.zeros(64, width))


def rows(reads: Sequence[Read], plan: Plan, optimizer: optim.SGD | optim.Adagrad) -> Job:
    """A job of such tables, each step of which reads rows here and there."""
    drawn, samples = np.random.default_rng(0), max(read.ids for read in reads)
    shares = [
        np.stack([np.resize(drawn.choice(read.rows, read.ids, replace=False), samples) for read in reads], 1)
        for _ in range(BATCHES * plan.workers)
    ]
    tables = {f"tables.{index}": Table(std=0.0) for index in range(len(reads))}
    job = _made(partial(Rows, reads), torch.from_numpy(np.concatenate(shares)), tables, optimizer)
    return replace(job, batch_size=samples * (plan.workers if plan.synchronous else 1))


def _made(
    model: Callable[[], nn.Module], inputs: Tensor, tables: dict[str, Table] | None = None,
    optimizer: optim.SGD | optim.Adagrad | None = None,
) -> Job:  # fmt: skip
    data = arrays(inputs, torch.zeros(len(inputs)))
    return Job(
        model=model, loss=_loss, optimizer=optimizer or optim.SGD(lr=0.0), train=data, batch_size=len(inputs),
        epochs=1, tables=tables or {},
    )  # fmt: skip


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return output.mean()


class Found(NamedTuple):
    """Of one step: ``step`` altogether, of which ``compute`` is the made model's own forward and backward.

    ``first``: of steps on which the made data is gone through for the first time, ``step`` without rows. ``grown``: by
    how many bytes a worker grew at most since it was forked, and a server if there was one, in this job and those
    before it.
    """

    step: Figure
    first: Figure
    compute: Figure
    grown: dict[str, int]

    @property
    def exchange(self) -> Figure:
        return Figure(max(self.step.seconds - self.compute.seconds, 1e-6), self.step.scatter)


def warm() -> None:
    """Import and compile before forking what every fork would have to."""
    for plan in (Plan(strategy="dp"), Plan(strategy="ps", servers=1)):
        prepare(plan, "float32")
    for module in ("tricorn.dp.replicate", "tricorn.dp.shard", "tricorn.mp.trainer"):
        import_module(module)
    sparse.warm()


def rehearse(jobs: Sequence[Job], plan: Plan, steps: Sequence[int]) -> list[Found]:
    """Some steps of all roles of the plan, as processes of this machine, for each job in turn.

    ``steps``: how many of each; an asynchronous step is one update.
    """
    secret = new_secret()
    bodies = [partial(_work, jobs, plan, rank, secret, steps) for rank in range(plan.workers)]
    bodies += [partial(_serve, len(jobs), plan, secret) for _ in range(plan.servers)]
    with crew(bodies) as lines:
        return [_rehearsed(plan, lines) for _ in jobs]


def _rehearsed(plan: Plan, lines: Sequence[Line]) -> Found:
    workers = lines[: plan.workers]
    tell(workers, gather(lines))
    taken = gather(workers)
    tell(lines, "end")
    peaks = gather(lines)
    grown = {"worker": max(peaks[: plan.workers]), **({"server": max(peaks[plan.workers :])} if plan.servers else {})}
    shared = 1 if plan.synchronous else plan.workers
    compute = Figure.of([seconds / shared for found in taken for seconds in found["compute"]])
    slowest = [max((found[when] for found in taken), key=median) for when in ("steps", "first")]
    step, first = (Figure.of([seconds / shared for seconds in each]) for each in slowest)
    return Found(step, first, compute, grown)


def _work(jobs: Sequence[Job], plan: Plan, rank: int, secret: bytes, steps: Sequence[int], line: Line) -> None:
    began_with = psutil.Process().memory_info().rss
    torch.set_num_threads(1)
    for job, count in zip(jobs, steps, strict=True):
        _train(job, plan, rank, secret, count, line)
        line.say(peak_bytes() - began_with)


def _train(job: Job, plan: Plan, rank: int, secret: bytes, steps: int, line: Line) -> None:
    listener = PeerListener(secret)
    line.say(listener.address)
    addresses = [(host, port) for host, port in line.hear()]
    batches = _batches(job, *_share(job, plan, rank))
    compute = _computing(job, batches[0], steps) if plan.dense != "mp" else [0.0]
    trainer = strategy.find(plan).trainer(Context(job, plan, rank, 1, secret, listener))
    trainer.join(Seat(1, tuple(addresses[: plan.workers]), tuple(addresses[plan.workers :]), 0, "initial", 0, None))
    taken = []
    for count in range(WARM_STEPS + steps):
        step = count if plan.synchronous else count * plan.workers + rank
        following = step + 1 if plan.synchronous else step + plan.workers
        began = time.perf_counter()
        if isinstance(trainer, strategy.Foreseeing) and trainer.foresees:
            trainer.foresee(following, batches[following % len(batches)])
        trainer.step(step, batches[step % len(batches)], job.batch_size, Wishes())
        taken.append(time.perf_counter() - began)
    known = BATCHES if job.tables else WARM_STEPS
    line.say({"steps": taken[known:], "first": taken[WARM_STEPS:known] or taken[known:], "compute": compute})
    line.hear()
    trainer.close()
    listener.close()


def _serve(jobs: int, plan: Plan, secret: bytes, line: Line) -> None:
    began_with = psutil.Process().memory_info().rss
    torch.set_num_threads(1)
    for _ in range(jobs):
        _hold(plan, secret, line)
        line.say(peak_bytes() - began_with)


def _hold(plan: Plan, secret: bytes, line: Line) -> None:
    from tricorn.ps.server import Server

    server = Server(secret, on_snapshot=_ignore, on_applied=_ignore)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        server.begin(epoch=1, step=0, source="initial", checkpoint=None, workers=plan.workers)
        line.say(server.address)
        line.hear()
    finally:
        server.stop()
        thread.join()


def _ignore(*_: Any) -> None:
    """Nobody keeps a rehearsal."""


def _share(job: Job, plan: Plan, rank: int) -> tuple[int, int]:
    if not plan.synchronous or plan.dense == "mp":
        return 0, job.batch_size
    return strategy.even_share(job.batch_size, rank, plan.workers)


def _batches(job: Job, start: int, stop: int) -> list[Batch]:
    """A worker's share of each batch of the data."""
    source = as_source(job.train)
    shares = [np.arange(low + start, low + stop) for low in range(0, len(source), job.batch_size)]
    return [Batch(*source.fetch(ids), len(ids), len(ids)) for ids in shares]


def _computing(job: Job, batch: Batch, steps: int) -> list[float]:
    run = rows_served(job)[0] if job.tables else partial(forward_backward, job, build_model(job))
    taken = []
    for _ in range(2 + min(steps, 10)):
        began = time.perf_counter()
        run(batch)
        taken.append(time.perf_counter() - began)
    return taken[2:]
