"""Workers and servers of any plan as threads of the test, beside a plain PyTorch loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tricorn import strategy
from tricorn.comm.listener import PeerListener
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.ps.server import Server
from tricorn.state.flat import build_model, call_model
from tricorn.state.gradient import rows
from tricorn.state.shards import write_shard
from tricorn.state.whole_rows import open_checkpoint
from tricorn.strategy import Batch, Context, Outcome, Seat, Wishes

SECRET = b"s" * 32


def batches(job: Job) -> list[tuple[Any, torch.Tensor]]:
    """Epoch after epoch in plain order; the last batch of each may be ragged."""
    source, size = job.train, job.batch_size
    starts = range(0, len(source), size)
    return [source.fetch(torch.arange(low, min(low + size, len(source))).numpy()) for low in starts] * job.epochs


class Crew:
    """The roles of a run, each with a thread of its own; the test is the coordinator."""

    def __init__(self, job: Job, plan: Plan, folder: Path) -> None:
        self.job, self.plan, self.folder = job, plan, folder
        self.todo = batches(job)
        self.epoch = 0
        self._building, self._built = threading.Lock(), threading.Barrier(plan.workers)
        self.pool = ThreadPoolExecutor(plan.workers, thread_name_prefix="worker")
        self.listeners = [PeerListener(SECRET) for _ in range(plan.workers)]
        self.threads: list[threading.Thread] = []
        self.servers = [self._serve(index) for index in range(plan.servers)]
        # One after another: building a model draws from the generator that all threads share.
        self.trainers: list[Any] = [self._hire(rank) for rank in range(plan.workers)]

    def _hire(self, rank: int) -> Any:
        context = Context(self.job, self.plan, rank, self.epoch + 1, SECRET, self.listeners[rank])
        trainer: Any = strategy.find(self.plan).trainer(context)
        if self.plan.dense == "mp":
            trainer._cuts = self.plan.cuts
            build = trainer._build

            def build_alone(*args: Any) -> Any:
                # torch.fx takes part in whatever any thread of the process does with a tensor meanwhile.
                self._built.wait(60)
                with self._building:
                    built = build(*args)
                self._built.wait(60)
                return built

            trainer._build = build_alone
        return trainer

    def _serve(self, index: int) -> Server:
        def snapshot(step: int, pieces: list[Any]) -> None:
            write_shard(self.folder / str(step), f"server-{index}.safetensors", pieces)

        server = Server(SECRET, on_snapshot=snapshot, on_applied=lambda _: None)
        self.threads.append(threading.Thread(target=server.serve_forever, name=f"server-{index}"))
        self.threads[-1].start()
        return server

    def replace(self, rank: int) -> None:
        """The worker of that rank dies, and a new one takes its place."""
        self.trainers[rank].close()
        self.trainers[rank] = self._hire(rank)

    def each(self, function: Callable[[Any], Any]) -> list[Any]:
        """What the function of a trainer returns or raises for each worker, all called at once."""
        futures = [self.pool.submit(function, trainer) for trainer in self.trainers]
        return [future.exception(60) or future.result() for future in futures]

    def regroup(self) -> list[list[int]]:
        """What each server could go on from."""
        return [server.regroup() for server in self.servers]

    def join(self, source: str, step: int = 0, *, peer: int = 0, checkpoint: Path | None = None) -> None:
        self.epoch += 1
        for server in self.servers:
            server.begin(
                epoch=self.epoch, step=step, source="keep" if source == "peer" else source, checkpoint=checkpoint,
                workers=self.plan.workers,
            )  # fmt: skip
        addresses = tuple(listener.address for listener in self.listeners)
        served = tuple(server.address for server in self.servers)
        seat = Seat(self.epoch, addresses, served, step, source, peer, checkpoint)
        failures: list[BaseException] = []

        def join(trainer: Any) -> None:
            try:
                trainer.join(seat)
            except BaseException as error:
                failures.append(error)
                for each in self.trainers:
                    each.interrupt()

        self.each(join)
        for first in failures[:1]:
            raise first

    def step(self, step: int, following: int | None = None) -> list[Any]:
        """The outcome, or the error, of each worker."""
        samples = len(self.todo[step][1])

        def run(trainer: Any) -> Outcome:
            if following is not None and getattr(trainer, "foresees", False):
                trainer.foresee(following, self._share(trainer, following))
            return trainer.step(step, self._share(trainer, step), samples, Wishes())

        return self.each(run)

    def train(self, start: int, stop: int) -> list[float]:
        """Steps [start, stop) of the run; the mean loss of each."""
        losses = []
        for step in range(start, stop):
            first, *others = self.step(step, step + 1 if step + 1 < stop else None)
            assert isinstance(first, Outcome), first
            assert others == [first] * len(others)
            losses.append(first.loss_sum / first.count)
        return losses

    def judged(self, samples: int) -> float:
        """The sum of the outputs for the first samples of the data, as all workers judge them together."""
        inputs, target = self.job.train.fetch(torch.arange(samples).numpy())
        found: list[float] = []

        def judge(trainer: Any) -> None:
            low, high = trainer.share(samples)
            batch = _cut(self.job, inputs, target, low, high)
            trainer.evaluate(batch, samples, lambda output, _: found.append(float(output.sum())))

        assert self.each(judge) == [None] * self.plan.workers
        return sum(found)

    def save(self, step: int) -> Path:
        """Write a checkpoint of that step, which all have reached; its folder."""
        folder = self.folder / str(step)
        for rank, trainer in enumerate(self.trainers):
            pieces = trainer.pieces()
            if pieces:
                write_shard(folder, f"worker-{rank}.safetensors", pieces)
        return folder

    def weights(self, step: int) -> torch.Tensor:
        """All weights, flat, of a model that reads what is saved."""
        return read(self.job, self.save(step), step)

    def _share(self, trainer: Any, step: int) -> Batch:
        inputs, target = self.todo[step]
        return _cut(self.job, inputs, target, *trainer.share(len(target)))

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.close()
        for server in self.servers:
            server.stop()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        for listener in self.listeners:
            listener.close()
        self.pool.shutdown()


def _cut(job: Job, inputs: Any, target: torch.Tensor, start: int, stop: int) -> Batch:
    if start == stop:
        return Batch(None, None, 0, 0)
    inputs, target = rows(inputs, start, stop), target[start:stop]
    return Batch(inputs, target, stop - start, job.count(inputs, target) if job.count else stop - start)


def read(job: Job, folder: Path, step: int) -> torch.Tensor:
    """The weights of a checkpoint, flat."""
    reader = open_checkpoint(job, folder, step)
    found = [reader.read_whole(f"param/{name}", p.shape) for name, p in build_model(job).named_parameters()]
    return torch.cat(found)


def plain(job: Job, steps: int, optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]]) -> torch.Tensor:
    """The weights that one process with ``torch.optim`` comes to, flat."""
    model = build_model(job)
    stepping = optimizers(model)
    rates = [group["lr"] for optimizer in stepping for group in optimizer.param_groups]
    for step, (inputs, target) in enumerate(batches(job)[:steps]):
        model.zero_grad()
        job.loss(call_model(model, inputs), target).backward()
        if job.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
        for rate, group in zip(rates, [g for o in stepping for g in o.param_groups], strict=True):
            group["lr"] = rate * (job.schedule(step) if job.schedule else 1.0)
        for optimizer in stepping:
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Relative in L2."""
    return float((a - b).norm() / b.norm())
