"""Run a plan's own trainers for some steps, without a coordinator: what a step takes that is not computing.

The job is made of weights alone: its gradient costs next to nothing, so that what remains is the strategy's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor, nn

from tricorn import optim, strategy
from tricorn.comm.auth import new_secret
from tricorn.comm.listener import PeerListener
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.planner.computing import rows_served
from tricorn.planner.crew import Line, crew, gather, tell
from tricorn.planner.figures import Figure
from tricorn.state.flat import build_model
from tricorn.state.gradient import forward_backward
from tricorn.state.memory import peak_bytes
from tricorn.strategy import Batch, Context, Seat, Wishes
from tricorn.table import Table

PARTS = 8  # parameters of a made model
WIDTH = 64  # of made layers
TABLE, DIM = 1 << 16, 16  # rows of a made table, and their width
WARM_STEPS = 4


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
    """A table, of which each sample reads one row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(TABLE, DIM)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, ids: Tensor) -> Tensor:
        made: Tensor = self.rows(ids).sum() * self.scale
        return made


def chain(elements: int, width: int = 1) -> Job:
    """A job of so many weights in a chain that hands on ``width`` numbers a sample."""
    return _made(partial(Chain, elements), torch.zeros(64, width))


def pairs(count: int) -> Job:
    """A job of so many pairs of small layers that workers can split."""
    return _made(partial(_paired, count), torch.zeros(64, WIDTH))


def _paired(count: int) -> nn.Module:
    layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)) for _ in range(count)]
    return nn.Sequential(*layers)


def rows(count: int) -> Job:
    """A job of a table, of which each step reads so many rows."""
    return _made(Rows, torch.arange(count), tables={"rows": Table(std=0.0)})


def _made(model: Callable[[], nn.Module], inputs: Tensor, tables: dict[str, Table] | None = None) -> Job:
    data = torch.utils.data.TensorDataset(inputs, torch.zeros(len(inputs)))
    return Job(
        model=model, loss=_loss, optimizer=optim.SGD(lr=0.0), train=data, batch_size=len(inputs), epochs=1,
        tables=tables or {},
    )  # fmt: skip


def _loss(output: Tensor, target: Tensor) -> Tensor:
    return output.mean()


class Found(NamedTuple):
    """Of one step: ``step`` altogether, of which ``compute`` is the made model's own forward and backward.

    ``grown``: by how many bytes a worker grew at most since it was forked, and a server if there was one, in this job
    and those before it.
    """

    step: Figure
    compute: Figure
    grown: dict[str, int]

    @property
    def exchange(self) -> Figure:
        return Figure(max(self.step.seconds - self.compute.seconds, 1e-6), self.step.scatter)


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
    slowest = max((found["steps"] for found in taken), key=median)
    shared = 1 if plan.synchronous else plan.workers
    compute = Figure.of([seconds / shared for found in taken for seconds in found["compute"]])
    return Found(Figure.of([seconds / shared for seconds in slowest]), compute, grown)


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
    batch = _batch(job, *_share(job, plan, rank))
    compute = _computing(job, batch, steps) if plan.dense != "mp" else [0.0]
    trainer = strategy.find(plan).trainer(Context(job, plan, rank, 1, secret, listener))
    trainer.join(Seat(1, tuple(addresses[: plan.workers]), tuple(addresses[plan.workers :]), 0, "initial", 0, None))
    taken = []
    for count in range(WARM_STEPS + steps):
        step = count if plan.synchronous else count * plan.workers + rank
        following = step + 1 if plan.synchronous else step + plan.workers
        began = time.perf_counter()
        if isinstance(trainer, strategy.Foreseeing) and trainer.foresees:
            trainer.foresee(following, batch)
        trainer.step(step, batch, job.batch_size, Wishes())
        taken.append(time.perf_counter() - began)
    line.say({"steps": taken[WARM_STEPS:], "compute": compute})
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


def _batch(job: Job, start: int, stop: int) -> Batch:
    inputs, target = job.train.tensors
    return Batch(inputs[start:stop], target[start:stop], stop - start, stop - start)


def _computing(job: Job, batch: Batch, steps: int) -> list[float]:
    run = rows_served(job)[0] if job.tables else partial(forward_backward, job, build_model(job))
    taken = []
    for _ in range(2 + min(steps, 10)):
        began = time.perf_counter()
        run(batch)
        taken.append(time.perf_counter() - began)
    return taken[2:]
