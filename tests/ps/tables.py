"""A job with two embeddings that are tables, trained by a cluster and by one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import tricorn
from tricorn import Table, optim
from tricorn.state.flat import FlatState, build_model, call_model
from tricorn.state.whole_rows import open_checkpoint
from tricorn.strategy import Batch

from .cluster import Cluster, step_of

SAMPLES, IDS, STEPS = 40, 30, 12


class Scorer(nn.Module):
    """A table of pairs of ids, a bag of three, and a dense part."""

    def __init__(self, dim: int = 3) -> None:
        super().__init__()
        self.pairs = nn.Embedding(IDS, dim, padding_idx=0)
        self.bags = nn.EmbeddingBag(IDS, dim, mode="mean")
        self.head = nn.Linear(2 * dim, 1)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():  # workers that are threads of the test share the global generator
            for parameter in self.parameters():
                parameter.uniform_(-0.5, 0.5, generator=generator)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        pairs = self.pairs(ids[:, :2])
        return self.head(torch.cat([pairs.prod(1) + pairs.sum(1), self.bags(ids[:, 2:])], 1)).squeeze(1)


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    ids = (torch.rand(SAMPLES, 5, generator=generator) ** 2 * IDS).long()
    return ids, torch.randn(SAMPLES, generator=generator, dtype=torch.float64)


DECLARED = {"pairs": Table(std=0.3), "bags": Table(std=0.1)}


def make_job(**changes: Any) -> tricorn.Job:
    fields: dict[str, Any] = {
        "model": Scorer, "loss": nn.functional.mse_loss, "optimizer": optim.SGD(lr=0.2), "tables": DECLARED,
        "train": torch.utils.data.TensorDataset(*samples()), "batch_size": 7, "epochs": 4, "precision": "float64",
    }  # fmt: skip
    return tricorn.Job(**fields | changes)


def batches(job: tricorn.Job) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, target = job.train.tensors
    return list(zip(inputs.split(job.batch_size), target.split(job.batch_size), strict=True)) * job.epochs


def train(run: Cluster, start: int, stop: int) -> None:
    todo = batches(run.job)

    def work(trainer: Any) -> None:
        for step in range(start, stop):
            if trainer.foresees and step + 1 < stop:
                inputs, target = todo[step + 1]
                low, high = trainer.share(len(target))
                trainer.foresee(step + 1, Batch(inputs[low:high], target[low:high], high - low, high - low))
            step_of(trainer, step, *todo[step])

    run.each(work)


def one_process(job: tricorn.Job, steps: int) -> FlatState:
    """What data parallel does, in a loop of its own."""
    state = FlatState(build_model(job), job.optimizer, torch.device("cpu"))
    for step, (inputs, target) in enumerate(batches(job)[:steps]):
        job.loss(call_model(state.module, inputs), target).backward()
        if job.clip_norm is not None:
            nn.utils.clip_grad_norm_(state.module.parameters(), job.clip_norm)
        state.update(lr=job.optimizer.lr * (job.schedule(step) if job.schedule else 1.0))
    return state


def whole(run: Cluster, step: int) -> dict[str, torch.Tensor]:
    """All weights of the run, read back from a checkpoint."""
    if run.plan.synchronous:
        run.each(lambda trainer: trainer.pieces())
    else:
        for server in run.servers:
            server.snapshot(step)
        run.regroup()  # comes after the snapshots
    model = build_model(run.job)
    reader = open_checkpoint(run.job, run.folder / str(step), step)
    return {name: reader.read_whole(f"param/{name}", p.shape).view(p.shape) for name, p in model.named_parameters()}


def assert_same(found: dict[str, torch.Tensor], module: nn.Module, bound: float) -> None:
    for name, expected in module.named_parameters():
        assert (found[name] - expected).norm() / expected.norm() <= bound, name
