"""One of the workers of a pipeline that try every cut of random uneven models.

Arguments: rank, workers, first and last model. Writes its address to standard output, reads those of all ranks from
standard input, as JSON, and rank 0 prints a line for each model: the cut that Tricorn chooses, the best of all, the
milliseconds of a step with each, those of the chosen cut in a pipeline built anew, and those of the worst.

Which is the best is found in every second step, and what it takes in the others: the least of several medians is
partly luck, and would make all others look slow.
"""

import json
import random
import sys
import time
from itertools import combinations, pairwise
from statistics import median

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from tricorn import data, optim
from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener
from tricorn.job import Job
from tricorn.mp.choose import choose
from tricorn.mp.partition import Stage, blocks_of
from tricorn.mp.pipeline import Pipeline
from tricorn.plan import Plan
from tricorn.state.flat import FlatState, build_model
from tricorn.state.memory import allow, keep_freed
from tricorn.strategy import Batch

SECRET = b"benchmark, on the loopback only."
CPU = torch.device("cpu")
LAYERS, BATCH, MICROBATCHES = 7, 128, 4
WARM, LOOK, LONG = 1, 5, 50  # steps
AGAIN = 3  # of the other cuts, those that looked best


class Uneven(nn.Module):
    """Layers of random widths."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths))

    def pipeline_blocks(self) -> list[nn.Module]:
        return list(self.layers)


def job_of(number: int) -> Job:
    chance = random.Random(number)
    widths = [chance.choice([64, 256, 512, 1024, 1536]) for _ in range(LAYERS + 1)]
    generator = torch.Generator().manual_seed(number)
    inputs = torch.randn(BATCH, widths[0], generator=generator)
    target = torch.randint(0, widths[-1], (BATCH,), generator=generator)
    return Job(
        model=lambda: Uneven(widths), loss=cross_entropy, optimizer=optim.SGD(lr=1e-3), device="cpu",
        train=data.arrays(inputs, target), batch_size=BATCH, epochs=1, seed=number,
    )  # fmt: skip


def pipeline_of(job: Job, cuts: tuple[int, ...], group: Group) -> tuple[Pipeline, FlatState]:
    model = build_model(job)
    found = blocks_of(job, model, group.size)
    start, stop = list(pairwise((0, *cuts, len(found))))[group.rank]
    stage = Stage(model, found, start, stop, CPU)
    state = FlatState(stage, job.optimizer, CPU)
    return Pipeline(job, [stage], group, schedule="1f1b", microbatches=MICROBATCHES), state


def steps(job: Job, runs: list[tuple[Pipeline, FlatState]], count: int, group: Group) -> list[list[float]]:
    """Milliseconds of ``count`` steps of each, taken in turn, as rank 0 found them."""
    inputs, target = job.train.inputs, job.train.target
    times: list[list[float]] = [[] for _ in runs]
    for step in range(WARM + count):
        for (pipeline, state), row in zip(runs, times, strict=True):
            group.barrier()
            began = time.perf_counter()
            pipeline.train(Batch(inputs, target, BATCH, BATCH), BATCH)
            state.grads_N.div_(BATCH)
            state.update(lr=1e-3)
            group.barrier()
            if step >= WARM:
                row.append(1e3 * (time.perf_counter() - began))
    taken = torch.tensor(times, dtype=torch.float64)
    group.broadcast(taken, 0)
    return taken.tolist()


def compared(job: Job, group: Group) -> list:
    stages = group.size
    told = torch.zeros(stages - 1, dtype=torch.int64)
    if group.rank == 0:
        plan = Plan(strategy="mp", workers=stages, microbatches=MICROBATCHES, schedule="1f1b")
        told = torch.tensor(choose(job, plan, stages, BATCH // MICROBATCHES, MICROBATCHES, CPU).cuts)
    group.broadcast(told, 0)
    chosen = tuple(told.tolist())
    every = list(combinations(range(1, LAYERS), stages - 1))
    looked = steps(job, [pipeline_of(job, cuts, group) for cuts in every], LOOK, group)
    looks = dict(zip(every, map(median, looked), strict=True))
    others = sorted((cuts for cuts in every if cuts != chosen), key=looks.__getitem__)[:AGAIN]
    runs = [chosen, *others, chosen]
    *took, again = steps(job, [pipeline_of(job, cuts, group) for cuts in runs], LONG, group)
    found, judged = ({cuts: median(row[half::2]) for cuts, row in zip(runs, took, strict=False)} for half in (0, 1))
    best = min(found, key=found.__getitem__)
    return [chosen, best, judged[chosen], judged[best], median(again[1::2]), max(looks.values())]


def main() -> None:
    rank, ranks, start, stop = map(int, sys.argv[1:5])
    torch.set_num_threads(1)
    keep_freed()
    allow(None, ranks)  # as the workers of a run are told how many share the host
    listener = PeerListener(SECRET)
    listener.announce(1)
    print(json.dumps(listener.address), flush=True)
    addresses = [tuple(address) for address in json.loads(sys.stdin.readline())]
    group = Group(rank=rank, addresses=addresses, listener=listener, secret=SECRET, epoch=1, channel="line")
    for number in range(start, stop):
        found = compared(job_of(number), group)
        if rank == 0:
            print(json.dumps(found), flush=True)
            print(f"{ranks} stages, model {number}: {found}", file=sys.stderr, flush=True)
    group.barrier()
    group.close()
    listener.close()


if __name__ == "__main__":
    main()
