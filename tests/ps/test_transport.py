"""Both transports under one server: the same frames, the same ends."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest
import torch

from tricorn import optim
from tricorn.comm.segment import Segment
from tricorn.comm.sockets import connect
from tricorn.errors import ClusterError, PeerLost, ProtocolError
from tricorn.ps import memory
from tricorn.ps.client import Client
from tricorn.ps.dial import REFUSED, dial
from tricorn.ps.server import Server
from tricorn.ps.shared import SharedTransport, new_segment
from tricorn.ps.table import Description
from tricorn.ps.transport import TcpTransport

from .cluster import SECRET

Connect = Callable[..., Client]
SHARES = pytest.mark.parametrize("share", [True, False], ids=["shared", "tcp"])
N = 300_000


@pytest.fixture
def client(server: Server) -> Iterator[Connect]:
    with contextlib.ExitStack() as stack:

        def build(rank: int = 0, *, share: bool, consistency: str = "asp") -> Client:
            made = Client([server.address], [(0, N)], SECRET, rank=rank, incarnation=1, epoch=0, share=share)
            stack.callback(made.close)
            made.connect()
            if rank == 0:
                made.create([description(consistency)], lambda: torch.zeros(N))
            return made

        yield build


def description(consistency: str) -> Description:
    return Description(
        tables=(("w", (N,)),), dtype="float32", start=0, stop=N, optimizer=optim.SGD(lr=1.0),
        consistency=consistency, staleness=0,
    )  # fmt: skip


@SHARES
@pytest.mark.parametrize("lent", [True, False])
def test_what_is_pushed_is_applied_and_pulled(client: Connect, share: bool, lent: bool) -> None:
    worker = client(share=share)
    weights = torch.empty(N)
    gradient = memory.zeros(N, torch.float32) if lent else torch.zeros(N)
    bases = worker.pull(weights)
    for step in range(5):
        gradient.fill_(step)
        _, bases = worker.push_pull(step, bases, gradient, (), weights, factor=1.0)
        assert torch.equal(weights, torch.full((N,), -float(sum(range(step + 1)))))
    assert bases == [5]
    assert worker.bytes_sent >= 5 * N * 4


@SHARES
def test_a_sum_outlives_the_memory_it_was_read_from(client: Connect, share: bool) -> None:
    """A worker may write its next gradient while others are still to contribute to the step."""
    workers = [client(rank, share=share, consistency="bsp") for rank in range(3)]
    gradients = [memory.zeros(N, torch.float32) for _ in workers]
    acks = []

    def push(rank: int) -> None:
        acks.append(workers[rank].push_sum(0, (0.0, 1.0, 1.0, 0.0, 0.0), gradients[rank].fill_(rank + 1)))
        gradients[rank].fill_(torch.nan)

    threads = [threading.Thread(target=push, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    weights = torch.empty(N)
    for worker in workers:
        worker.pull_version(1, weights, scale=1.0, factor=1.0)
        assert torch.equal(weights, torch.full((N,), -2.0))


def test_one_server_serves_both_kinds_at_once(client: Connect) -> None:
    workers = [client(0, share=True), client(1, share=False), client(2, share=True)]
    counts = 60

    def work(rank: int) -> None:
        weights, gradient = torch.empty(N), torch.ones(N)
        bases = workers[rank].pull(weights)
        for step in range(rank * counts, (rank + 1) * counts):
            _, bases = workers[rank].push_pull(step, bases, gradient, (), weights, factor=1.0)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    weights = torch.empty(N)
    assert workers[1].pull(weights) == [3 * counts]
    assert torch.equal(weights, torch.full((N,), -3.0 * counts))


def test_shared_memory_is_chosen_on_one_host_and_nowhere_else(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    claim = {"channel": "ps", "rank": 1, "incarnation": 1, "epoch": 0}
    for refuse, kind in ((False, SharedTransport), (True, TcpTransport)):
        if refuse:

            def attach(ticket: object) -> Segment:
                raise ClusterError("the segment is on another host")

            monkeypatch.setattr(Segment, "attach", attach)
        transport = dial(server.address, SECRET, claim | {"incarnation": 2 + refuse})
        assert type(transport) is kind
        transport.close()


@pytest.mark.parametrize("changes", [{"size": 4096}, {"size": 1 << 43}, {"inode": 1}, {"fd": 1 << 20}, {"host": "?"}])
def test_memory_that_is_not_as_told_is_refused(server: Server, changes: dict[str, Any]) -> None:
    segment = new_segment()
    ticket = msgspec.to_builtins(segment.ticket) | changes
    claim = {"channel": "ps", "rank": 1, "incarnation": 1, "epoch": 0, "segment": ticket}
    with connect(server.address, SECRET, claim) as sock:
        assert sock.recv(1) == REFUSED
        assert server._call(lambda: server._workers[1].side) is None
    segment.close()


@SHARES
def test_an_error_reaches_who_caused_it(client: Connect, share: bool) -> None:
    worker = client(share=share)
    with pytest.raises(ProtocolError, match="from version 9 of 0"):
        worker.push(0, [9], torch.zeros(N), factor=1.0)


@SHARES
def test_interrupt_frees_who_is_blocked(client: Connect, share: bool) -> None:
    workers = [client(rank, share=share, consistency="bsp") for rank in range(2)]
    caught: list[Exception] = []

    def push() -> None:
        try:
            workers[1].push_sum(0, (0.0, 1.0, 1.0, 0.0, 0.0), torch.zeros(N))
        except PeerLost as error:
            caught.append(error)

    thread = threading.Thread(target=push)
    thread.start()
    workers[0].pull_version(0, torch.empty(N), scale=1.0, factor=1.0)
    workers[1].interrupt()
    thread.join(10)
    assert len(caught) == 1
    with pytest.raises(PeerLost):
        workers[1].pull(torch.empty(N))


@SHARES
def test_a_barrier_is_passed_together_or_without_those_who_left(client: Connect, share: bool) -> None:
    workers = [client(rank, share=share) for rank in range(3)]
    passed: list[int] = []

    def come(rank: int) -> None:
        workers[rank].barrier()
        passed.append(rank)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    workers[2].pull(torch.empty(N))
    assert passed == []
    workers[2].close()
    for thread in threads:
        thread.join(10)
    assert sorted(passed) == [0, 1]


WORKER = """
import sys, torch
from tricorn.ps.client import Client
clients = [
    Client([("127.0.0.1", int(sys.argv[1]))], [(0, int(sys.argv[2]))], b"s" * 32, rank=rank, incarnation=1, epoch=0,
           share=rank == 1)
    for rank in (1, 2)
]
for client in clients:
    client.connect()
print("connected", flush=True)
clients[0].push_sum(0, (0.0, 1.0, 1.0, 0.0, 0.0), torch.zeros(int(sys.argv[2])))
"""


def test_a_worker_that_is_killed_is_seen_at_once(server: Server, client: Connect) -> None:
    """Through shared memory, where it waits, and by a socket."""
    client(share=True, consistency="bsp")
    command = [sys.executable, "-c", WORKER, str(server.address[1]), str(N)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"connected\n"
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    began = time.monotonic()
    while server._call(lambda: [*server._workers]) != [0]:
        assert time.monotonic() - began < 1


SERVER = """
import json, threading
from tricorn.ps.standing import serve
serve(b"s" * 32, "127.0.0.1", 0, 3, None, None, lambda address: print(json.dumps(address), flush=True))
"""


def test_a_server_that_is_killed_is_seen_at_once() -> None:
    """By two that wait for a third, through shared memory and by a socket."""
    with subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE) as process:
        assert process.stdout
        address = tuple(json.loads(process.stdout.readline()))
        clients = [
            Client([address], [(0, N)], SECRET, rank=rank, incarnation=1, epoch=0, share=rank == 0) for rank in (0, 1)
        ]
        for each in clients:
            each.connect()
        clients[0].create([description("bsp")], lambda: torch.zeros(N))
        killing = threading.Timer(0.1, os.kill, (process.pid, signal.SIGKILL))
        killing.start()
        with ThreadPoolExecutor(2) as pool:
            pushes = [pool.submit(each.push_sum, 0, (0.0, 1.0, 1.0, 0.0, 0.0), torch.zeros(N)) for each in clients]
            for push in pushes:
                with pytest.raises(PeerLost):
                    push.result(10)
        for each in clients:
            each.close()
        killing.join()


@SHARES
def test_who_waits_does_not_burn_a_core(client: Connect, share: bool) -> None:
    workers = [client(rank, share=share, consistency="bsp") for rank in range(2)]

    def wait() -> None:
        with contextlib.suppress(PeerLost):
            workers[1].push_sum(0, (0.0,) * 5, torch.zeros(N))

    thread = threading.Thread(target=wait)
    thread.start()
    workers[0].pull_version(0, torch.empty(N), scale=1.0, factor=1.0)
    time.sleep(0.05)
    before = time.process_time()
    time.sleep(0.3)
    used = time.process_time() - before
    workers[1].interrupt()
    thread.join(10)
    assert used < 0.1
