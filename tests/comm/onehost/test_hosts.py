"""Ranks in two network namespaces: the same results as on one host, and a lost rank ends the waits of all."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tricorn.errors import PeerLost
from tricorn.testing.hosts import Host, RunningHost, hosts, hosts_unavailable

SIZE = 4
ROUNDS = int(os.environ.get("TRICORN_ROUNDS", "1"))
DETECTED = 15.0  # seconds that a loaded machine may take, against a timeout of 30
SHORT = 3.0  # the timeout after which a host whose link is cut is lost


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[RunningHost, RunningHost]]:
    if reason := hosts_unavailable():
        pytest.skip(reason)
    with hosts(Host(), Host()) as made:
        yield made


def enter(spaces: list[str], timeout: float, rank: int, size: int, folder: Path) -> None:
    """Go to the host of this rank and join the group."""
    with open(spaces[rank // 2]) as space:
        assert ctypes.CDLL(None).setns(space.fileno(), 0) == 0
    os.environ["GLOO_SOCKET_IFNAME"] = "eth0"
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("tricorn", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))


@pytest.fixture
def ranks(pair: tuple[RunningHost, RunningHost], start_ranks: Any, tmp_path: Path) -> Iterator[Any]:
    yield from start_ranks(SIZE, partial(enter, spaces_of(pair), 30.0), tmp_path)


def spaces_of(pair: tuple[RunningHost, RunningHost]) -> list[str]:
    return [re.search(r"--net=(\S+)", " ".join(host.prefix))[1] for host in pair]


def operations(_: None) -> None:
    rank = dist.get_rank()
    for dtype in (torch.float32, torch.int64):
        for count in (3, 200_000):
            x = torch.arange(count).to(dtype) + rank
            dist.all_reduce(x)
            assert torch.equal(x, (torch.arange(count) * 4 + 6).to(dtype))
            for root in range(SIZE):
                x = torch.full((count,), rank, dtype=dtype)
                dist.broadcast(x, root)
                assert (x == root).all()
    mean = torch.full((3,), float(rank))
    dist.all_reduce(mean, dist.ReduceOp.AVG)
    assert mean.tolist() == [1.5] * 3
    for dtype in (torch.float32, torch.int64, torch.bfloat16):
        for count in (0, 2, 50_000):
            own, every = torch.full((count, 2), rank, dtype=dtype), torch.arange(SIZE, dtype=dtype)
            parts = [torch.empty_like(own) for _ in range(SIZE)]
            dist.all_gather(parts, own)
            assert all((part == peer).all() for peer, part in enumerate(parts))
            whole = torch.empty(SIZE * count, 2, dtype=dtype)
            dist.all_gather_single(whole, own, async_op=True).wait()
            assert torch.equal(whole, torch.cat(parts))
            for operation, expected in ((dist.ReduceOp.SUM, 4 * rank + 6), (dist.ReduceOp.MAX, rank + 3)):
                dist.reduce_scatter(own, [part + rank for part in parts], operation)
                assert (own == expected).all()
                dist.reduce_scatter_single(own, every.repeat_interleave(2 * count).view(-1, 2) + rank, operation)
                assert (own == expected).all()
    dist.reduce_scatter(mean, [torch.full((3,), float(rank + peer)) for peer in range(SIZE)], dist.ReduceOp.AVG)
    assert mean.tolist() == [rank + 1.5] * 3
    if rank == 0:
        dist.send(torch.ones(1), 3)
    elif rank == 3:
        far = torch.zeros(1)
        dist.recv(far, 0)
        assert far.item() == 1
    dist.barrier()


def endlessly(_: None) -> str:
    try:
        while True:
            dist.all_reduce(torch.ones(1000))
    except PeerLost as error:
        return str(error)


@pytest.mark.parametrize("victim", [1, 2], ids=["follower", "leader"])
def test_two_hosts_of_two_ranks(ranks: Any, victim: int) -> None:
    ranks.each(operations)
    ranks.start(endlessly)
    os.kill(ranks.processes[victim].pid, signal.SIGKILL)
    killed = time.monotonic()
    said = [ranks.answer(rank) for rank in range(SIZE) if rank != victim]
    assert time.monotonic() - killed < DETECTED
    assert any(f"rank {victim} died" in text for text in said)


def endlessly_one(_: None, operation: str) -> str:
    """Call one operation until it fails; how it failed."""
    rank, x, parts = dist.get_rank(), torch.ones(200_000), [torch.ones(50_000) for _ in range(SIZE)]
    calls = {
        "small": lambda: dist.all_reduce(x[:8]),
        "all_reduce": lambda: dist.all_reduce(x),
        "broadcast": lambda: (dist.broadcast(x, 0), dist.broadcast(x, 3)),
        "all_gather": lambda: dist.all_gather(parts, x[:50_000]),
        "reduce_scatter": lambda: dist.reduce_scatter(x[:50_000], parts),
        "all_to_all": lambda: dist.all_to_all_single(x, torch.ones(200_000)),
        "message": lambda: (dist.isend(x, (rank + 2) % SIZE), dist.recv(torch.empty(200_000), (rank + 2) % SIZE)),
    }
    try:
        while True:
            calls[operation]()
    except PeerLost as error:
        return str(error)


OPERATIONS = ("all_reduce", "broadcast", "message", "small", "all_gather", "reduce_scatter", "all_to_all")


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_link_that_is_cut_in_the_midst_is_noticed_by_all(pair, start_ranks: Any, tmp_path: Path, seed: int) -> None:
    chance, operation = random.Random(seed), OPERATIONS[seed % len(OPERATIONS)]
    away = pair[chance.randrange(2)]
    with contextlib.contextmanager(start_ranks)(SIZE, partial(enter, spaces_of(pair), SHORT), tmp_path) as ranks:
        ranks.each(operations)
        ranks.start(endlessly_one, operation)
        until = time.monotonic() + chance.random() * 0.05
        while time.monotonic() < until:
            os.sched_yield()
        away.cut()
        cut = time.monotonic()
        try:
            said = [ranks.answer(rank) for rank in range(SIZE)]
            assert time.monotonic() - cut < SHORT + DETECTED
        finally:
            away.join()
    far = {rank: "[23]" if rank < 2 else "[01]" for rank in range(SIZE)}
    assert all(re.search(rf"rank {far[rank]}.* was lost", text) for rank, text in enumerate(said)), said
    names = {"small": "all_reduce", "message": "ing"}
    assert all(names.get(operation, operation) in text for text in said), said
