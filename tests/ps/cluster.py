"""Servers and workers as threads of the test, over real sockets, beside a plain PyTorch loop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from tricorn.comm.listener import PeerListener
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.ps import strategy
from tricorn.ps.server import Server
from tricorn.state.flat import build_model, call_model
from tricorn.state.shards import Piece, write_shard
from tricorn.strategy import Batch, Context, Outcome, Seat, Wishes

SECRET = b"s" * 32
SAMPLES = 53

torch.set_num_threads(1)


def net() -> torch.nn.Module:
    """Its weights come from a generator of their own: workers that are threads share the global one."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.4, 0.4, generator=generator)
    return model


def data(samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(samples, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (samples,), generator=generator)


def make_job(**changes: Any) -> Job:
    from tricorn import optim

    fields: dict[str, Any] = {
        "model": net,
        "loss": torch.nn.functional.cross_entropy,
        "optimizer": optim.SGD(lr=0.1, momentum=0.9),
        "train": torch.utils.data.TensorDataset(*data()),
        "batch_size": 11,  # no number of workers divides it, and it does not divide the samples
        "epochs": 4,
        "precision": "float64",
    }
    return Job(**fields | changes)


def batches(job: Job) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Epoch after epoch in plain order; the last batch of each is ragged."""
    inputs, target = job.train.tensors
    return list(zip(inputs.split(job.batch_size), target.split(job.batch_size), strict=True)) * job.epochs


def share_of(inputs: torch.Tensor, target: torch.Tensor, start: int, stop: int) -> Batch:
    return Batch(inputs[start:stop], target[start:stop], stop - start, stop - start)


def plain(job: Job, steps: int, optimizer: Callable[..., torch.optim.Optimizer], **options: Any) -> torch.Tensor:
    """The weights that one process with torch.optim comes to, flat."""
    model = build_model(job)
    stepper = optimizer(model.parameters(), lr=job.optimizer.lr, **options)
    dtype = next(model.parameters()).dtype
    for step, (inputs, target) in enumerate(batches(job)[:steps]):
        stepper.zero_grad()
        job.loss(call_model(model, inputs.to(dtype)), target).backward()
        if job.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
        for group in stepper.param_groups:
            group["lr"] = job.optimizer.lr * (job.schedule(step) if job.schedule else 1.0)
        stepper.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


class Cluster:
    """Servers and workers of one run, each with a thread; the test is the coordinator."""

    def __init__(self, job: Job, *, workers: int, servers: int, folder: Path, **plan: Any) -> None:
        self.job = job
        self.plan = Plan(strategy="ps", workers=workers, servers=servers, **plan)
        self.folder = folder
        self.applied: list[list[int]] = [[] for _ in range(servers)]
        self.epoch = 0
        self.servers: list[Server] = []
        self.threads: list[threading.Thread] = []
        for index in range(servers):
            self.servers.append(self._hire_server(index))
        self.listeners = [PeerListener(SECRET) for _ in range(workers)]
        self.trainers: list[Any] = [self._hire_worker(rank, 1) for rank in range(workers)]
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="worker")

    def _hire_worker(self, rank: int, incarnation: int) -> Any:
        return strategy.trainer(Context(self.job, self.plan, rank, incarnation, SECRET, self.listeners[rank]))

    def _hire_server(self, index: int) -> Server:
        def snapshot(step: int, pieces: list[Piece]) -> None:
            write_shard(self.folder / str(step), f"server{index}.safetensors", pieces)

        server = Server(SECRET, on_snapshot=snapshot, on_applied=self.applied[index].extend)
        thread = threading.Thread(target=server.serve_forever, name=f"server-{index}")
        thread.start()
        self.threads.append(thread)
        return server

    def replace_server(self, index: int) -> None:
        self.servers[index].stop()
        self.servers[index] = self._hire_server(index)

    def replace_worker(self, rank: int) -> None:
        self.trainers[rank].close()
        self.trainers[rank] = self._hire_worker(rank, self.epoch + 2)

    def regroup(self) -> list[list[int]]:
        return [server.regroup() for server in self.servers]

    def begin(self, source: str, step: int = 0, **fields: Any) -> Seat:
        """Begin a membership epoch on the servers; returns the seat for the workers."""
        self.epoch += 1
        checkpoint = self.folder / str(step) if source == "checkpoint" else None
        for server in self.servers:
            server.begin(
                epoch=self.epoch,
                step=step,
                source="keep" if source == "peer" else source,
                checkpoint=checkpoint,
                workers=len(self.trainers),
                generation=fields.get("generation", 0),
                applied=fields.get("applied", ()),
            )
        addresses = tuple(server.address for server in self.servers)
        workers = tuple(listener.address for listener in self.listeners)
        return Seat(self.epoch, workers, addresses, step, source, fields.get("peer", 0), checkpoint)

    def each(self, function: Callable[..., Any], *arguments: Sequence[Any]) -> list[Any]:
        """What the function of (trainer, ...) returns for each worker, all called at once; raises what one raises."""
        futures = [self.pool.submit(function, *row) for row in zip(self.trainers, *arguments, strict=False)]
        return [future.result(60) for future in futures]

    def join(self, source: str, step: int = 0, **fields: Any) -> None:
        seat = self.begin(source, step, **fields)
        self.each(lambda trainer: trainer.join(seat))

    def train(self, start: int, stop: int) -> list[list[Outcome]]:
        """Run synchronous steps [start, stop) on all workers; the outcomes by worker."""
        todo = batches(self.job)

        def work(trainer: Any) -> list[Outcome]:
            return [step_of(trainer, step, *todo[step]) for step in range(start, stop)]

        return self.each(work)

    def weights(self, rank: int = 0) -> torch.Tensor:
        """The newest dense weights of a worker."""
        self.trainers[rank]._pull()
        return self.trainers[rank]._flat.weights_N.clone()

    def close(self) -> None:
        for trainer in self.trainers:
            trainer.close()
        for server in self.servers:
            server.stop()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive()
        self.pool.shutdown()
        for listener in self.listeners:
            listener.close()


NONE = Wishes()


def step_of(trainer: Any, step: int, inputs: torch.Tensor, target: torch.Tensor, wishes: Wishes = NONE) -> Outcome:
    samples = len(target)
    return trainer.step(step, share_of(inputs, target, *trainer.share(samples)), samples, wishes)
