"""The stages of a run as threads of the test, beside a plain PyTorch loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
