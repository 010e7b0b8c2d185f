"""Collectives of ranks on one host: the ``tricorn`` backend and Gloo, interleaved, with the same calls of c10d."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from common import options

import tricorn.comm

SIZES = (4, 1 << 12, 1 << 16, 1 << 20, 1 << 24, 1 << 26)
SECONDS, MOST_CALLS = 0.05, 2000  # of each sample: some of the scheduler's turns, which is what small messages wait for
BARS = {4: 10.0, 1 << 12: 10.0, 1 << 16: 10.0, 1 << 20: 6.0, 1 << 24: 3.5, 1 << 26: 2.0}
assert tricorn.comm


def operations(rank: int, ranks: int, size: int, group: dist.ProcessGroup) -> dict[str, Callable[[], object]]:
    """Each with ``size`` bytes on every rank, or received in all by every rank."""
    count = max(1, size // 4)
    whole, share = torch.zeros(count), max(1, count // ranks)
    wide, part, other = torch.zeros(share * ranks), torch.zeros(share), torch.zeros(share * ranks)
    target, source = (rank + 1) % ranks, (rank - 1) % ranks

    arriving = torch.zeros(count)

    def exchange() -> None:
        sending = dist.isend(whole, group=group, group_dst=target)
        dist.recv(arriving, group=group, group_src=source)
        sending.wait()

    return {
        "all-reduce": lambda: dist.all_reduce(whole, group=group),
        "all-gather": lambda: dist.all_gather_single(wide, part, group=group),
        "reduce-scatter": lambda: dist.reduce_scatter_single(part, wide, group=group),
        "all-to-all": lambda: dist.all_to_all_single(other, wide, group=group),
        "broadcast": lambda: dist.broadcast(whole, group_src=0, group=group),
        "send/receive": exchange,
    }


def copying(size: int) -> Callable[[], object]:
    source, target = torch.zeros(max(1, size // 4)), torch.zeros(max(1, size // 4))
    return lambda: target.copy_(source)


def timed(call: Callable[[], object], seconds: float) -> float:
    """Seconds a call, on the rank that took longest.

    Every rank makes as many calls as fit into that time on rank 0, at least one.
    """
    call()  # what is new to a system it learns here
    dist.barrier()
    began = time.perf_counter()
    call()
    fit = torch.tensor([min(MOST_CALLS, int(seconds / (time.perf_counter() - began)))])
    dist.broadcast(fit, 0)
    repeat = max(1, int(fit))
    dist.barrier()
    began = time.perf_counter()
    for _ in range(repeat):
        call()
    slowest = torch.tensor([(time.perf_counter() - began) / repeat], dtype=torch.float64)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)  # the root of a broadcast has done before the others
    return float(slowest)


def measure(rank: int, ranks: int, folder: Path, rounds: int, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "s"), ranks), rank=rank, world_size=ranks)
    groups = {"gloo": dist.group.WORLD, "tricorn": dist.new_group(backend="tricorn")}
    figures: dict[tuple[str, int, str], list[float]] = {}
    for size in SIZES:
        calls = {system: operations(rank, ranks, size, group) for system, group in groups.items()}
        copy = copying(size)
        for number in range(rounds):
            for name in calls["gloo"]:
                for system in list(calls)[:: -1 if number % 2 else 1]:  # neither always follows the other
                    figures.setdefault((name, size, system), []).append(timed(calls[system][name], SECONDS))
                figures.setdefault((name, size, "copy"), []).append(timed(copy, SECONDS / 2))
    if rank == 0:
        pipe.send(figures)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    report, chosen = options("collectives on one host: tricorn and Gloo")
    for ranks in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            ours, theirs = multiprocessing.Pipe()
            context = multiprocessing.get_context("fork")
            arguments = (ranks, Path(folder), 3 if chosen.quick else 9, theirs)
            processes = [context.Process(target=measure, args=(rank, *arguments)) for rank in range(ranks)]
            for process in processes:
                process.start()
            figures = ours.recv()
            for process in processes:
                process.join()
        worst = float("inf")
        for name, size, system in figures:
            case = f"{name}, {ranks} ranks, {size} B"
            values = [value * 1e6 for value in figures[name, size, system]]
            report.row(system if system != "copy" else "one copy of as many bytes", case, values, "us")
            if system == "tricorn":
                gloo = statistics.median(figures[name, size, "gloo"])
                own = statistics.median(figures[name, size, "tricorn"])
                bound = statistics.median(figures[name, size, "copy"])
                report.row("tricorn", f"{case}: copy / it", [bound / own], "of bound")
                worst = min(worst, gloo / own)
                if name == "all-reduce" and ranks == 2:
                    report.bar(f"Gloo / tricorn, all-reduce of {size} B", gloo / own, at_least=BARS[size])
        report.bar(f"Gloo / tricorn, slowest of all, {ranks} ranks", worst, at_least=1.0)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
