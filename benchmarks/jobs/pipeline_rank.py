"""One of two workers that run a pipeline of Tricorn's, one of ``torch.distributed.pipelining``, and none, in turn.

The same processes run all three on a model of pipeline.py, so that each finds the machine as the others do. None: the
same order of work with what came from the neighbour in an earlier step, so that nobody waits; each action is timed.

Arguments: model and schedules with commas between, microbatches, rank, rounds, steps in each round, port for Gloo.
Writes its address to standard output, reads those of all ranks from standard input, as JSON, and prints for each round
and schedule the milliseconds of a step of Tricorn's and of the peer's, and the seconds of each action, and of what
follows them.
"""

import json
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "peers"))
import pipeline
import pipeline_torch
import torch

from tricorn.comm.group import Group
from tricorn.comm.listener import PeerListener
from tricorn.mp.partition import Block, Stage
from tricorn.mp.pipeline import Pipeline
from tricorn.state.flat import FlatState
from tricorn.state.memory import keep_freed
from tricorn.strategy import Batch

SECRET = b"benchmark, on the loopback only."
CPU = torch.device("cpu")
RANKS = 2


def built(name: str) -> torch.nn.Sequential:
    torch.manual_seed(0)
    return getattr(pipeline, f"job_{name}").model()


class Tricorn:
    """A step as the workers of a run make it."""

    def __init__(self, name: str, cuts: tuple[int, ...], schedule: str, microbatches: int, group: Group) -> None:
        job, model = getattr(pipeline, f"job_{name}"), built(name)
        found = [Block(str(number), module) for number, module in enumerate(model)]
        edges = list(pairwise((0, *cuts, len(model))))
        stages = [Stage(model, found, *edges[number], CPU) for number in range(group.rank, len(edges), group.size)]
        self._states = [FlatState(stage, job.optimizer, CPU) for stage in stages]
        self._group = group
        self.pipeline = Timed(job, stages, group, schedule=schedule, microbatches=microbatches)

    def step(self, inputs: torch.Tensor, target: torch.Tensor, *, together: bool = True) -> None:
        total, count = self.pipeline.train(Batch(inputs, target, len(target), len(target)), len(target))
        if together:  # as the workers of a run agree on each step
            status = torch.tensor([total, count], dtype=torch.float64)
            self._group.all_reduce_now(status)
        for state in self._states:
            state.grads_N.div_(len(target))
            state.update(lr=1e-4)
        self.pipeline.note()


class Timed(Pipeline):
    """Notes the seconds of each action."""

    def __init__(self, *args, **options) -> None:
        super().__init__(*args, **options)
        self.seconds: list[float] = []
        self._last = 0.0

    def note(self) -> None:
        now = time.perf_counter()
        self.seconds.append(now - self._last)
        self._last = now

    def train(self, *args) -> tuple[float, int]:
        self.seconds, self._last = [], time.perf_counter()
        return super().train(*args)

    def _carry_out(self, *args) -> None:
        super()._carry_out(*args)
        self.note()


class Memory:
    """In the place of a wire: keeps what it gives, and gives it again when it is cut off."""

    def __init__(self, wire) -> None:
        self._wire, self._kept = wire, {}
        self.cut_off = False

    def receive(self, parcel):
        if not self.cut_off:
            self._kept[parcel] = self._wire.receive(parcel)
        return copied(self._kept[parcel])

    def __getattr__(self, name: str):
        return (lambda *_: None) if self.cut_off else getattr(self._wire, name)


def copied(value):
    """Values may be worked on in place."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    return type(value)(copied(item) for item in value)


class Case:
    """The three systems under one schedule."""

    def __init__(self, name: str, schedule: str, microbatches: int, group: Group) -> None:
        cuts = pipeline.CUTS[name][group.size * (2 if schedule == "interleaved" else 1)]
        self._group = group
        self._ours, self._alone = (Tricorn(name, cuts, schedule, microbatches, group) for _ in range(2))
        self._memory = self._alone.pipeline._wire = Memory(self._alone.pipeline._wire)
        self._theirs = pipeline_torch.Torch(built(name), cuts, schedule, microbatches)
        inputs, target = pipeline.data(name)
        size = pipeline.BATCH[name]
        self._batches = [(inputs[at : at + size], target[at : at + size]) for at in range(0, len(inputs), size)]
        self._alone.step(*self._batches[0])

    def round(self, turn: int, steps: int) -> list:
        measures = [self._of(self._ours), self._of(self._theirs), self._each_action]
        found = {}
        for number in (0, 1, 2) if turn % 2 else (2, 1, 0):
            found[number] = measures[number](steps)
        return [found[number] for number in range(3)]

    def _of(self, system):
        def timed(steps: int) -> float:
            system.step(*self._batches[0])  # what was in the cache was another's
            self._group.barrier()
            began = time.perf_counter()
            for number in range(steps):
                system.step(*self._batches[number % len(self._batches)])
            self._group.barrier()
            return 1e3 * (time.perf_counter() - began) / steps

        return timed

    def _each_action(self, steps: int) -> list[float]:
        self._memory.cut_off = True
        self._group.barrier()
        rows = []
        for number in range(1 + steps):
            self._alone.step(*self._batches[number % len(self._batches)], together=False)
            rows.append(self._alone.pipeline.seconds)
        self._memory.cut_off = False
        self._group.barrier()
        return [median(column) for column in zip(*rows[1:], strict=True)]


def main() -> None:
    name, *schedules = sys.argv[1].split(",")
    microbatches, rank, rounds, steps = map(int, sys.argv[2:6])
    torch.set_num_threads(1)
    keep_freed()  # as the workers of a run do; here for the peer too
    listener = PeerListener(SECRET)
    listener.announce(1)
    print(json.dumps(listener.address), flush=True)
    addresses = [tuple(address) for address in json.loads(sys.stdin.readline())]
    group = Group(rank=rank, addresses=addresses, listener=listener, secret=SECRET, epoch=1, channel="line")
    pipeline_torch.meet(rank, RANKS, sys.argv[6])
    cases = [Case(name, schedule, microbatches, group) for schedule in schedules]
    found = []
    for turn in range(rounds):
        found.append([case.round(turn, steps) for case in cases])
        if rank == 0:
            print(f"{name}: round {turn + 1} of {rounds}", file=sys.stderr, flush=True)
    print(json.dumps(found), flush=True)
    group.barrier()
    pipeline_torch.leave()
    group.close()
    listener.close()


if __name__ == "__main__":
    main()
