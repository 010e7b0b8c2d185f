"""One rank of a pipeline of Tricorn's: a model of pipeline.py, cut as the peer's is, its steps as a worker makes them.

Arguments: ``run`` or ``alone``, model, schedule, microbatches, rank, ranks. Writes its address to standard output,
and reads those of all ranks from standard input, as JSON.

``run`` prints the milliseconds of a step, of which the first half is left out. ``alone`` prints what one microbatch
takes in each of this rank's stages, in seconds: forward, backward for the stage before, backward for the weights; and
an update. All ranks compute at the same time then, but never wait for each other.
"""

import json
import sys
import time
from itertools import pairwise
from statistics import median

import pipeline
import torch
from torch.nn.functional import cross_entropy

from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener
from tricorn.mp.deferred import Deferral
from tricorn.mp.partition import Block, Stage
from tricorn.mp.passage import Passage
from tricorn.mp.pipeline import Pipeline
from tricorn.state.flat import FlatState
from tricorn.strategy import Batch

SECRET = b"benchmark, on the loopback only."
CPU = torch.device("cpu")


def build(name: str, rank: int, ranks: int, chunks: int) -> tuple[list[Stage], list[FlatState], torch.nn.Sequential]:
    torch.manual_seed(0)
    model = getattr(pipeline, name)()
    found = [Block(str(number), module) for number, module in enumerate(model)]
    edges = list(pairwise((0, *pipeline.CUTS[name][ranks * chunks], len(model))))
    stages = [Stage(model, found, *edges[number], CPU) for number in range(rank, ranks * chunks, ranks)]
    optimizer = getattr(pipeline, f"job_{name}").optimizer
    return stages, [FlatState(stage, optimizer, CPU) for stage in stages], model


def run(name: str, schedule: str, microbatches: int, group: Group) -> float:
    stages, states, _ = build(name, group.rank, group.size, 2 if schedule == "interleaved" else 1)
    runtime = Pipeline(getattr(pipeline, f"job_{name}"), stages, group, schedule=schedule, microbatches=microbatches)
    inputs, target = pipeline.data(name)
    size = pipeline.BATCH[name]
    for step in range(pipeline.STEPS):
        if step == pipeline.STEPS // 2:
            group.barrier()
            began = time.perf_counter()
        batch = slice(step * size % len(inputs), step * size % len(inputs) + size)
        total, count = runtime.train(Batch(inputs[batch], target[batch], size, size), size)
        status = torch.tensor([total, count], dtype=torch.float64)
        group.all_reduce_now(status)  # as the workers of a run agree on each step
        for state in states:
            state.grads_N.div_(status[1].item())
            state.update(lr=1e-4)
    group.barrier()
    return 1e3 * (time.perf_counter() - began) / (pipeline.STEPS - pipeline.STEPS // 2)


def alone(name: str, schedule: str, microbatches: int, group: Group) -> list[list[float]]:
    stages, states, model = build(name, group.rank, group.size, 2 if schedule == "interleaved" else 1)
    inputs, target = pipeline.data(name)
    size = pipeline.BATCH[name] // microbatches
    deferral, found = Deferral(), []
    for stage in stages:
        deferral.install(stage)
    clock = time.perf_counter
    group.barrier()
    until = clock() + 4
    rows: list[list[list[float]]] = [[] for _ in stages]
    updates = []
    with torch.no_grad():
        values = [inputs[:size]]
        for module in model:
            values.append(module(values[-1]))
    starts = (0, *pipeline.CUTS[name][group.size * len(stages)])[group.rank :: group.size]
    stops = (*pipeline.CUTS[name][group.size * len(stages)], len(model))[group.rank :: group.size]
    while clock() < until:
        for stage, start, stop, row in zip(stages, starts, stops, rows, strict=True):
            given = values[start].clone().requires_grad_(start > 0)

            def forward(value, stage=stage):
                made = stage(value)
                return cross_entropy(made, target[:size]) if stage.last else made

            passage = Passage(forward, stage, deferral, again=False)
            times = [clock()]
            passage.forward(given)
            times.append(clock())
            passage.backward([torch.ones_like(values[stop])], hurried=True)
            times.append(clock())
            passage.finish()
            times.append(clock())
            row.append([after - before for before, after in pairwise(times)])
        began = clock()
        for state in states:
            state.update(lr=1e-4)
        updates.append(clock() - began)
    for row in rows:
        found.append([median(column) for column in zip(*row, strict=True)])
    return [*found, [median(updates)]]


def main() -> None:
    kind, name, schedule = sys.argv[1:4]
    microbatches, rank, _ = map(int, sys.argv[4:7])
    torch.set_num_threads(1)
    secret = SECRET
    listener = PeerListener(secret)
    listener.announce(1)
    print(json.dumps(listener.address), flush=True)
    addresses = [tuple(address) for address in json.loads(sys.stdin.readline())]
    group = Group(rank=rank, addresses=addresses, listener=listener, secret=secret, epoch=1, channel="line")
    print(json.dumps((run if kind == "run" else alone)(name, schedule, microbatches, group)), flush=True)
    group.barrier()
    group.close()
    listener.close()


if __name__ == "__main__":
    main()
