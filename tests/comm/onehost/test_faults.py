"""Ranks that die, freeze, abort or disagree in the midst of an operation: the others learn it, at once and by name."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from tricorn.comm.segment import Ticket
from tricorn.comm.shared import Shared, new_segment
from tricorn.errors import PeerLost, UsageError

SIZE = 3
ROUNDS = int(os.environ.get("TRICORN_ROUNDS", "8"))
AT_ONCE = 2.0  # seconds on a loaded machine, against a timeout of 60


def meet(rank: int, size: int, folder: Path, timeout: float = 60.0) -> Shared:
    segment = new_segment(size, "faults")
    (folder / f"{rank}.new").write_bytes(msgspec.json.encode(segment.ticket))
    (folder / f"{rank}.new").rename(folder / f"{rank}")
    while not all((folder / f"{peer}").exists() for peer in range(size)):
        os.sched_yield()
    tickets = [msgspec.json.decode((folder / f"{peer}").read_bytes(), type=Ticket) for peer in range(size)]
    return Shared(rank=rank, segment=segment, tickets=tickets, label="faults", timeout=timeout)


def endlessly(group: Shared, operation: str) -> None:
    """Call an operation until it fails."""
    x = torch.ones(1_000_003)
    parts = [torch.ones(300_001) for _ in range(SIZE)]
    others = [torch.ones(300_001) for _ in range(SIZE)]
    following, preceding = (group.rank + 1) % SIZE, (group.rank - 1) % SIZE
    while True:
        if operation == "small":
            group.all_reduce(x[:8])
        elif operation == "all_reduce":
            group.all_reduce(x)
        elif operation == "all_gather":
            group.all_gather(parts, others[0])
        elif operation == "reduce_scatter":
            group.reduce_scatter(others[0], parts)
        elif operation == "all_to_all":
            group.all_to_all(parts, others)
        elif operation == "broadcast":
            group.broadcast(x, 1)
            group.barrier()
        elif operation == "reduce":
            group.reduce(x, 1)
            group.barrier()
        elif operation == "gather":
            group.gather(parts if group.rank == 1 else [], others[0], 1)
            group.barrier()
        elif operation == "scatter":
            group.scatter(others[0], parts if group.rank == 1 else [], 1)
            group.barrier()
        else:
            sending = group.send(x, following, later=True)
            group.receive(parts[0].new_empty(1_000_003), preceding)
            sending.wait()


OPERATIONS = (
    "small",
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "messages",
    "reduce",
    "gather",
    "scatter",
)


class Trio:
    """Three ranks, forked; each writes why it ended and when."""

    def __init__(self, folder: Path, function: Any, *arguments: Any) -> None:
        self.folder = folder
        self.pids = []
        for rank in range(SIZE):
            if not (pid := os.fork()):
                try:
                    torch.set_num_threads(1)
                    function(rank, folder, *arguments)
                except BaseException as error:
                    (folder / f"end{rank}").write_text(f"{time.monotonic()} {type(error).__name__} {error}")
                os._exit(0)
            self.pids.append(pid)

    def ends(self, ranks: list[int]) -> list[tuple[float, str]]:
        for rank in ranks:
            os.waitpid(self.pids[rank], 0)
        texts = [(self.folder / f"end{rank}").read_text().split(" ", 1) for rank in ranks]
        return [(float(when), text) for when, text in texts]


def worker(rank: int, folder: Path, operation: str, timeout: float = 60.0) -> None:
    group = meet(rank, SIZE, folder, timeout)
    group.barrier()
    (folder / f"begun{rank}").touch()
    endlessly(group, operation)


def pass_time(seconds: float) -> None:
    """Let the ranks get somewhere, never the same place."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        os.sched_yield()


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_killed_rank_is_named_at_once(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    victim, operation = chance.randrange(SIZE), OPERATIONS[seed % len(OPERATIONS)]
    trio = Trio(tmp_path, worker, operation)
    while not all((tmp_path / f"begun{rank}").exists() for rank in range(SIZE)):
        os.sched_yield()
    pass_time(chance.random() * 0.05)
    killed = time.monotonic()
    os.kill(trio.pids[victim], signal.SIGKILL)
    os.waitpid(trio.pids[victim], 0)
    ends = trio.ends([rank for rank in range(SIZE) if rank != victim])
    assert all(f"rank {victim} died" in text for _, text in ends), ends
    assert max(when for when, _ in ends) - killed < AT_ONCE


def finite(rank: int, folder: Path, timeout: float) -> None:
    group = meet(rank, SIZE, folder, timeout)
    group.barrier()
    (folder / f"begun{rank}").touch()
    x = torch.ones(1_000_003)
    for _ in range(20):
        group.all_reduce(x, "max")
    (folder / f"end{rank}").write_text(f"{time.monotonic()} whole {x.sum().item():.0f}")
    group.barrier()


@pytest.mark.parametrize("seed", range(max(1, ROUNDS // 8)))
def test_a_frozen_rank_is_waited_for(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    victim = chance.randrange(SIZE)
    trio = Trio(tmp_path, finite, 60.0)
    while not all((tmp_path / f"begun{rank}").exists() for rank in range(SIZE)):
        os.sched_yield()
    os.kill(trio.pids[victim], signal.SIGSTOP)
    pass_time(0.1 + chance.random() * 0.1)  # many times as long as a wait until one looks after the peers
    thawed = time.monotonic()
    os.kill(trio.pids[victim], signal.SIGCONT)
    ends = trio.ends([0, 1, 2])
    assert all(text == "whole 1000003" for _, text in ends)
    assert any(when > thawed for when, _ in ends)


@pytest.mark.parametrize("seed", range(max(4, ROUNDS // 2)))
def test_a_frozen_rank_is_named_after_the_timeout(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    victim, operation = chance.randrange(SIZE), OPERATIONS[seed % len(OPERATIONS)]
    trio = Trio(tmp_path, worker, operation, 0.4)
    while not all((tmp_path / f"begun{rank}").exists() for rank in range(SIZE)):
        os.sched_yield()
    pass_time(chance.random() * 0.05)
    os.kill(trio.pids[victim], signal.SIGSTOP)
    ends = trio.ends([rank for rank in range(SIZE) if rank != victim])
    os.kill(trio.pids[victim], signal.SIGKILL)
    os.waitpid(trio.pids[victim], 0)
    assert all("PeerLost" in text for _, text in ends)
    pattern = rf"rank {victim} has not come to (.*); waited (.*) s for"
    named = [match for _, text in ends if (match := re.search(pattern, text))]
    assert named, ends
    # Who waits for one that waits for the victim blames the victim, in words of what it waits in itself.
    what = {"small": "all_reduce (32 bytes)", "messages": " rank "}.get(operation, operation)
    assert all(what in match[1] or "barrier" in match[1] for match in named), ends
    assert all(0.4 <= float(match[2]) < AT_ONCE for match in named), ends


@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_abort_in_the_midst_ends_the_waits_of_all(operation: str) -> None:
    for seed in range(max(1, ROUNDS // len(OPERATIONS))):
        chance = random.Random(seed)
        segments = [new_segment(SIZE, "aborts") for _ in range(SIZE)]
        tickets = [segment.ticket for segment in segments]
        groups = [Shared(rank=rank, segment=segments[rank], tickets=tickets, label="aborts") for rank in range(SIZE)]
        with contextlib.ExitStack() as stack:
            for group in groups:
                stack.callback(group.close)
            pool = stack.enter_context(ThreadPoolExecutor(SIZE))
            ends = [pool.submit(endlessly, group, operation) for group in groups]
            pass_time(chance.random() * 0.05)
            aborted = time.monotonic()
            groups[chance.randrange(SIZE)].interrupt("the user said so")
            for end in ends:
                with pytest.raises(PeerLost, match="the user said so"):
                    end.result(AT_ONCE)
            assert time.monotonic() - aborted < AT_ONCE


def disagreeing(rank: int, folder: Path) -> None:
    group = meet(rank, SIZE, folder)
    if rank == 1:
        group.broadcast(torch.ones(4), 1)
    group.all_reduce(torch.ones(8))


def test_ranks_that_disagree_are_told_who_called_what(tmp_path: Path) -> None:
    ends = Trio(tmp_path, disagreeing).ends([0, 1, 2])
    assert any("UsageError" in text and "rank 1 called broadcast (16 bytes)" in text for _, text in ends)
    assert all(text.split()[0] in ("UsageError", "PeerLost") for _, text in ends)


def test_what_cannot_be_shared_is_refused() -> None:
    segment = new_segment(1, "alone")
    group = Shared(rank=0, segment=segment, tickets=[segment.ticket], label="alone")
    with pytest.raises(UsageError, match="contiguous"):
        group.all_reduce(torch.ones(4, 4).t()[:2])
    with pytest.raises(UsageError, match="cannot be reduced"):
        group.all_reduce(torch.ones(4, dtype=torch.int16))
    with pytest.raises(UsageError, match="needs integers"):
        group.all_reduce(torch.ones(4), "band")
    with pytest.raises(UsageError, match="cannot exchange messages"):
        group.send(torch.ones(1), 0)
    group.close()
    with pytest.raises(PeerLost, match="closed"):
        group.barrier()
