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
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tricorn.errors import PeerLost
from tricorn.testing.hosts import Host, RunningHost, hosts, hosts_unavailable

SIZE = 4
ROUNDS = int(os.environ.get("TRICORN_ROUNDS", "1"))
DETECTED = 5.0  # seconds on a loaded machine, against a timeout of 30
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
def started(pair: tuple[RunningHost, RunningHost], start_ranks: Any, tmp_path: Path) -> Any:
    """A context with the ranks of a group of that timeout, who have met."""

    @contextlib.contextmanager
    def start(timeout: float) -> Iterator[Any]:
        with contextlib.contextmanager(start_ranks)(SIZE, partial(enter, spaces_of(pair), timeout), tmp_path) as ranks:
            ranks.each(meet)
            yield ranks

    return start


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
    for dtype in (torch.int16, torch.uint64, torch.float8_e4m3fn):  # which Gloo does not know
        for shape in ((5,), (2, 3), (), (0,)):
            x = torch.full(shape, float(rank)).to(dtype)
            parts = [torch.empty_like(x) for _ in range(SIZE)]
            dist.all_gather(parts, x)
            dist.broadcast(x, 2)
            assert all((part.float() == peer).all() for peer, part in enumerate(parts))
            assert (x.float() == 2).all()
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


def meet(_: None) -> None:
    dist.barrier()


def endlessly_one(_: None, operation: str) -> str:
    """Call one operation until it fails; how it failed."""
    rank, x, parts = dist.get_rank(), torch.ones(200_000), [torch.ones(50_000) for _ in range(SIZE)]

    def message() -> None:
        sending = dist.isend(x, (rank + 1) % SIZE)
        dist.recv(torch.empty(200_000), (rank - 1) % SIZE)
        sending.wait()

    calls = {
        "small": lambda: dist.all_reduce(x[:8]),
        "all_reduce": lambda: dist.all_reduce(x),
        "broadcast": lambda: (dist.broadcast(x, 0), dist.broadcast(x, 3)),
        "all_gather": lambda: dist.all_gather(parts, x[:50_000]),
        "reduce_scatter": lambda: dist.reduce_scatter(x[:50_000], parts),
        "all_to_all": lambda: dist.all_to_all_single(x, torch.ones(200_000)),
        "reduce": lambda: (dist.reduce(x, 0), dist.reduce(x, 3)),
        "gather": lambda: [dist.gather(x[:50_000], parts if rank == root else None, root) for root in (0, 3)],
        "scatter": lambda: [dist.scatter(x[:50_000], parts if rank == root else None, root) for root in (0, 3)],
        "barrier": dist.barrier,
        "message": message,
    }
    try:
        while True:
            calls[operation]()
    except PeerLost as error:
        return str(error)


OPERATIONS = (
    "all_reduce", "all_to_all", "broadcast", "message", "small", "all_gather", "reduce_scatter", "reduce", "gather",
    "scatter", "barrier",
)  # fmt: skip
AT_ONCE = {"small", "all_reduce", "barrier"}  # in the others Gloo may leave a write to a dead rank until the timeout


def pass_time(seconds: float) -> None:
    """Let the ranks get somewhere, never the same place."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        os.sched_yield()


def said_by_the_others(ranks: Any, victim: int, patience: float) -> list[tuple[int, str, set[int]]]:
    """Which rank said what, in turn, and who had ended by then: who has failed ends, as its program would."""
    said: list[tuple[int, str, set[int]]] = []
    ended, left = {victim}, {ranks.pipes[rank]: rank for rank in range(SIZE) if rank != victim}
    until = time.monotonic() + patience
    while left:
        ready = wait([*left], until - time.monotonic())
        assert ready, f"ranks {[*left.values()]} have noticed nothing; {said}"
        together = {left.pop(pipe) for pipe in ready}
        said += [(rank, ranks.answer(rank), ended | together - {rank}) for rank in together]
        ended |= together
        for rank in together:
            os.kill(ranks.processes[rank].pid, signal.SIGKILL)
    return said


def names(text: str) -> set[int]:
    return {int(rank) for rank in re.findall(r"rank (\d)", text)}


def test_operations_between_hosts(started: Any) -> None:
    with started(30.0) as ranks:
        ranks.each(operations)


@pytest.mark.parametrize("seed", range(max(2, ROUNDS)))
def test_a_killed_rank_ends_the_waits_of_all(started: Any, seed: int) -> None:
    chance, operation = random.Random(seed), OPERATIONS[seed % len(OPERATIONS)]
    victim = (seed + 1) % SIZE if seed < SIZE else chance.randrange(SIZE)  # a follower first, then a leader
    timeout, patience = (30.0, DETECTED) if operation in AT_ONCE else (SHORT, SHORT + DETECTED)
    with started(timeout) as ranks:
        ranks.start(endlessly_one, operation)
        pass_time(chance.random() * 0.05)
        os.kill(ranks.processes[victim].pid, signal.SIGKILL)
        said = said_by_the_others(ranks, victim, patience)
    assert victim in names(said[0][1]), said
    assert all(names(text) & ended for _, text, ended in said), said


@pytest.mark.parametrize("seed", range(max(1, ROUNDS // 4)))
def test_a_frozen_rank_is_named_after_the_timeout(started: Any, seed: int) -> None:
    chance, operation = random.Random(seed), OPERATIONS[seed % len(OPERATIONS)]
    victim = chance.randrange(SIZE)
    with started(SHORT) as ranks:
        ranks.start(endlessly_one, operation)
        pass_time(chance.random() * 0.05)
        os.kill(ranks.processes[victim].pid, signal.SIGSTOP)
        try:
            said = said_by_the_others(ranks, victim, 2 * SHORT + DETECTED)
        finally:
            os.kill(ranks.processes[victim].pid, signal.SIGKILL)
    assert all(names(text) & ended for _, text, ended in said), said


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_a_link_that_is_cut_in_the_midst_is_noticed_by_all(pair: Any, started: Any, seed: int) -> None:
    chance, operation = random.Random(seed), OPERATIONS[seed % len(OPERATIONS)]
    away = pair[chance.randrange(2)]
    with started(SHORT) as ranks:
        ranks.start(endlessly_one, operation)
        pass_time(chance.random() * 0.05)
        away.cut()
        cut = time.monotonic()
        try:
            said = [ranks.answer(rank) for rank in range(SIZE)]
            assert time.monotonic() - cut < SHORT + DETECTED
        finally:
            away.join()
    far = {rank: "[23]" if rank < 2 else "[01]" for rank in range(SIZE)}
    assert all(re.search(rf"rank {far[rank]}.* was lost", text) for rank, text in enumerate(said)), said
    called = {"small": "all_reduce", "barrier": "all_reduce", "message": "ing"}.get(operation, operation)
    assert all(called in text for text in said), said
