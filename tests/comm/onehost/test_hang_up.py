"""Who gives up lets the others know. Hosts are told apart by name only."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from tricorn.errors import PeerLost

AT_ONCE = 5.0  # seconds on a loaded machine, against a timeout of 60


def enter(hosts: list[int], rank: int, size: int, folder: Path) -> list[PeerLost]:
    """Join the group; where this rank keeps the errors that it meets."""
    from tricorn.comm import segment
    from tricorn.comm.backend import group

    segment.here = group.here = lambda: f"host {hosts[rank]}"
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("tricorn", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    return []


@pytest.fixture
def ranks(request: pytest.FixtureRequest, start_ranks: Any, tmp_path: Path) -> Iterator[Any]:
    yield from start_ranks(len(request.param), partial(enter, request.param), tmp_path)


def meet(_: list[PeerLost]) -> None:
    dist.barrier()


def endlessly(kept: list[PeerLost], operation: str) -> str:
    """Call it until it fails, and keep the error as a program may that looks at it later."""
    x = torch.ones(1000)
    parts = [torch.ones(1000) for _ in range(dist.get_world_size())]
    try:
        while True:
            if operation == "all_reduce":
                dist.all_reduce(x)
            elif operation == "all_gather":
                dist.all_gather(parts, x)
            else:
                dist.reduce_scatter(x, parts)
    except PeerLost as error:
        kept.append(error)
        return str(error)


def connections(_: list[PeerLost]) -> int:
    return sum(each.status == psutil.CONN_ESTABLISHED for each in psutil.Process().net_connections("tcp"))


@pytest.mark.parametrize("operation", ["all_gather", "reduce_scatter"])
@pytest.mark.parametrize("ranks", [[0, 1, 2]], indirect=True, ids=["three hosts"])
def test_a_leader_that_fails_hangs_up_whoever_keeps_the_error(ranks: Any, operation: str) -> None:
    ranks.each(meet)
    assert ranks.each(connections) == [4, 4, 4]  # among all and among leaders, to each of two
    ranks.start(endlessly, operation)
    os.kill(ranks.processes[2].pid, signal.SIGKILL)
    assert all("rank 2" in ranks.answer(rank) for rank in (0, 1))
    until = time.monotonic() + AT_ONCE
    left = [4, 4]
    while left != [1, 1] and time.monotonic() < until:
        ranks.start(connections, only=[0, 1])
        left = [ranks.answer(rank) for rank in (0, 1)]
    assert left == [1, 1]


def abort(_: list[PeerLost]) -> str:
    for _turn in range(20):
        dist.all_reduce(torch.ones(1000))
    group: Any = dist.group.WORLD
    group.abort()
    try:
        dist.all_reduce(torch.ones(1000))
    except PeerLost as error:
        return str(error)
    return ""


@pytest.mark.parametrize("ranks", [[0, 0, 0], [0, 0, 1, 1]], indirect=True, ids=["one host", "two hosts"])
def test_an_abort_ends_the_waits_of_all(ranks: Any) -> None:
    ranks.each(meet)
    others = [rank for rank in range(len(ranks.pipes)) if rank != 1]
    began = time.monotonic()
    ranks.start(endlessly, "all_reduce", only=others)
    ranks.start(abort, only=[1])
    said = [ranks.answer(rank) for rank in range(len(ranks.pipes))]
    assert time.monotonic() - began < AT_ONCE
    near = said if len(said) == 3 else said[:2]
    assert all("rank 1 aborted the group" in text for text in near), said
    assert all("rank 0 or rank 1, on another host, was lost" in text for text in said[len(near) :]), said
