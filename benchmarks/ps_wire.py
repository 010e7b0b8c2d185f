"""What a push_pull costs beside a bare socket: one client, one server that applies SGD, one host.

The bare pair are two processes with blocking sockets and preallocated buffers. It sends as many bytes there and back
as gradients and weights have, and does nothing with them; the server also adds the gradient to the weights, counts
the step once, and looks for values that are not finite.

Each of the two processes has a core of its own, in all systems alike: where the kernel puts a pair that takes turns on
one core, an answer takes 16 us, and 80 on two, and it may change its mind in the midst of a round.
"""

from __future__ import annotations

import os
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import torch
from common import options

from tricorn import optim
from tricorn.ps import memory
from tricorn.ps.client import Client
from tricorn.ps.standing import EPOCH, serve
from tricorn.ps.table import Description

SECRET = b"s" * 32
CORES = os.sched_getaffinity(0)
SIZES = {"4 KB": 4 << 10, "64 KB": 64 << 10, "1 MB": 1 << 20, "16 MB": 16 << 20}


@contextmanager
def forked(body: Callable[[Connection], None]) -> Iterator[tuple[str, int]]:
    """A process that does this and first says where it listens."""
    here, there = Pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.sched_setaffinity(0, {max(CORES)})
            body(there)
        finally:
            os._exit(0)
    try:
        yield here.recv()
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


def echo(size: int) -> Callable[[Connection], None]:
    def body(pipe: Connection) -> None:
        listener = socket.create_server(("127.0.0.1", 0))
        pipe.send(listener.getsockname())
        sock, _ = listener.accept()
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        buffer = memoryview(bytearray(size))
        while True:
            fill(sock, buffer)
            sock.sendall(buffer)

    return body


def fill(sock: socket.socket, buffer: memoryview) -> None:
    got = 0
    while got < len(buffer):
        count = sock.recv_into(buffer[got:])
        if not count:
            os._exit(0)
        got += count


@contextmanager
def bare(size: int) -> Iterator[Callable[[], None]]:
    with forked(echo(size)) as address, socket.create_connection(address) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        out, back = bytes(size), memoryview(bytearray(size))

        def once() -> None:
            sock.sendall(out)
            fill(sock, back)

        yield once


@contextmanager
def tricorn(size: int, *, share: bool) -> Iterator[Callable[[], None]]:
    count = size // 4
    with forked(lambda pipe: serve(SECRET, "127.0.0.1", 0, 1, None, None, pipe.send)) as address:
        client = Client([address], [(0, count)], SECRET, rank=0, incarnation=1, epoch=EPOCH, share=share)
        client.connect()
        description = Description(
            tables=(("w", (count,)),), dtype="float32", start=0, stop=count, optimizer=optim.SGD(lr=1e-3),
            consistency="asp", staleness=0,
        )  # fmt: skip
        client.create([description], lambda: torch.zeros(count))
        gradient, weights = memory.zeros(count, torch.float32), torch.zeros(count)
        gradient.fill_(1.0)
        steps, bases = 0, client.pull(weights)

        def once() -> None:
            nonlocal steps, bases
            _, bases = client.push_pull(steps, bases, gradient, (), weights, factor=1.0)
            steps += 1

        yield once
        expected = torch.zeros(1)
        for _ in range(steps):
            expected.sub_(1e-3)
        torch.testing.assert_close(weights, expected.expand(count))
        client.close()


def main() -> None:
    report, chosen = options("push_pull beside a bare socket pair, one client, one server")
    torch.set_num_threads(1)
    os.sched_setaffinity(0, {min(CORES)})
    medians: dict[tuple[str, str], float] = {}
    for case, size in SIZES.items():
        repeats = max(10, min(1000, (64 << 20) // size)) // (4 if chosen.quick else 1)
        with ExitStack() as stack:
            systems = {
                "bare socket pair": stack.enter_context(bare(size)),
                "tricorn TCP": stack.enter_context(tricorn(size, share=False)),
                "tricorn shared memory": stack.enter_context(tricorn(size, share=True)),
            }
            rounds: dict[str, list[float]] = {name: [] for name in systems}
            for number in range(6):
                for name, once in systems.items():
                    seconds = [timed(once) for _ in range(repeats)]
                    if number:  # the first warms up
                        rounds[name].append(statistics.median(seconds) * 1e6)
        for name, figures in rounds.items():
            medians[name, case] = report.row(name, case, figures, "us p50")
    small, large = "4 KB", "16 MB"
    sockets, tcp, shared = "bare socket pair", "tricorn TCP", "tricorn shared memory"
    report.bar("4 KB: TCP / bare", medians[tcp, small] / medians[sockets, small], at_most=1.5)
    report.bar("16 MB: bandwidth of TCP / bare", medians[sockets, large] / medians[tcp, large], at_least=0.8)
    for case in (small, large):
        report.bar(f"{case}: TCP / shared memory", medians[tcp, case] / medians[shared, case], at_least=3.0)
    report.print(chosen.json)


def timed(once: Callable[[], None]) -> float:
    began = time.perf_counter()
    once()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
