"""Dense requests that are answered in machine code: nothing tells them from those that are answered in Python."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tricorn import optim
from tricorn.comm.sockets import connect, receive_exactly
from tricorn.errors import Diverged, ProtocolError
from tricorn.ps.asynchronous import Asynchronous
from tricorn.ps.client import Client
from tricorn.ps.server import Server
from tricorn.ps.table import Description
from tricorn.ps.wire import DUPLICATE, HEADER, PROTOCOL, Header, Op, as_bytes, decode_error

from .cluster import SECRET

SHARES = pytest.mark.parametrize("share", [True, False], ids=["shared", "tcp"])
WARM = 40  # requests until machine code answers
N = 37

Build = Callable[..., Client]


@pytest.fixture
def client(server: Server) -> Iterator[Build]:
    with contextlib.ExitStack() as stack:

        def build(rank: int = 0, *, share: bool, dtype: str = "float32", lr: float = 1.0, **changes: Any) -> Client:
            made = Client([server.address], [(0, N)], SECRET, rank=rank, incarnation=1, epoch=0, share=share)
            stack.callback(made.close)
            made.connect()
            if rank == 0:
                fields: dict[str, Any] = {"optimizer": optim.SGD(lr=lr), "consistency": "asp", "staleness": 0}
                made.create(
                    [Description(tables=(("w", (N,)),), dtype=dtype, start=0, stop=N, **fields | changes)],
                    lambda: torch.zeros(N, dtype=getattr(torch, dtype)),
                )
            return made

        yield build


def mode_of(server: Server) -> Asynchronous:
    mode = server._service._mode
    assert isinstance(mode, Asynchronous)
    return mode


def warmed(worker: Client, first: int = 0) -> list[int]:
    """Bring a worker to where its requests are answered in machine code; returns the versions it has."""
    weights, nothing = torch.empty(N), torch.zeros(N)
    bases = worker.pull(weights)
    for step in range(first, first + WARM):
        _, bases = worker.push_pull(step, bases, nothing, (), weights, factor=1.0)
    return bases


@SHARES
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_every_update_is_that_of_torch_bit_for_bit(client: Build, server: Server, share: bool, dtype: str) -> None:
    worker = client(share=share, dtype=dtype, lr=0.037)
    kind = getattr(torch, dtype)
    weights, expected = torch.empty(N, dtype=kind), torch.nn.Parameter(torch.zeros(N, dtype=kind))
    plain = torch.optim.SGD([expected], lr=0.037)
    generator = torch.Generator().manual_seed(3)
    bases = worker.pull(weights)
    for step in range(3 * WARM):
        gradient = torch.randn(N, dtype=kind, generator=generator)
        factor = 1 / (1 + step % 7)
        _, bases = worker.push_pull(step, bases, gradient.clone(), (), weights, factor=factor)
        plain.param_groups[0]["lr"] = 0.037 * factor
        expected.grad = gradient
        plain.step()
        assert torch.equal(weights, expected.detach())
    assert bases == [3 * WARM]
    mode = mode_of(server)
    assert mode._slice is not None
    assert server._call(server.staleness) == {0: 3 * WARM}  # bookkept when it comes to its commands
    assert server.applied() == [(0, 3 * WARM)]


@SHARES
def test_a_gradient_that_is_not_finite_changes_nothing(client: Build, server: Server, share: bool) -> None:
    worker = client(share=share)
    bases = warmed(worker)
    gradient = torch.ones(N)
    gradient[N - 1] = torch.inf
    with pytest.raises(Diverged, match="not finite"):
        worker.push_pull(WARM, bases, gradient, (), torch.empty(N), factor=1.0)
    mode = mode_of(server)
    assert mode._slice is not None
    assert server.applied() == [(0, WARM)]
    assert not mode.table.weights_S.any()


@SHARES
@pytest.mark.parametrize("factor", [np.nan, np.inf])
def test_a_rate_that_is_not_finite_is_refused(client: Build, server: Server, share: bool, factor: float) -> None:
    worker = client(share=share)
    bases = warmed(worker)
    with pytest.raises(ProtocolError, match="not all finite"):
        worker.push_pull(WARM, bases, torch.ones(N), (), torch.empty(N), factor=factor)
    assert server.applied() == [(0, WARM)]
    assert not mode_of(server).table.weights_S.any()


@SHARES
def test_a_version_that_is_not_there_yet_is_refused(client: Build, share: bool) -> None:
    worker = client(share=share)
    (base,) = warmed(worker)
    with pytest.raises(ProtocolError, match=f"from version {base + 1} of {base}"):
        worker.push_pull(WARM, [base + 1], torch.ones(N), (), torch.empty(N), factor=1.0)


def test_workers_of_both_kinds_at_once_lose_nothing(client: Build, server: Server) -> None:
    counts, shares = 400, [True, False, True]
    workers = [client(rank, share=share) for rank, share in enumerate(shares)]

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
    assert mode_of(server)._slice is not None
    assert server.applied() == [(0, 3 * counts)]
    assert sum(server._call(server.staleness).values()) == 3 * counts


KINDS = ["push_pull", "push", "again", "pull", "idle", "stats"]


@SHARES
def test_any_requests_in_any_order_come_to_the_same(client: Build, server: Server, share: bool) -> None:
    worker = client(share=share)
    bases, weights = warmed(worker), torch.empty(N)
    step, total = WARM, 0.0

    @settings(max_examples=20)
    @given(st.lists(st.sampled_from(KINDS), max_size=40))
    def run(kinds: list[str]) -> None:
        nonlocal bases, step, total
        for kind in kinds:
            if kind == "push_pull":
                total += 1.0
                pushed, bases = worker.push_pull(step, bases, torch.ones(N), (), weights, factor=1.0)
                step += 1
                assert not pushed.refused
            elif kind == "again":  # a step that is in the weights
                _, bases = worker.push_pull(step - 1, bases, torch.ones(N), (), weights, factor=1.0)
            elif kind == "push":
                total += 1.0
                worker.push(step, bases, torch.ones(N), factor=1.0)
                step += 1
                continue
            elif kind == "pull":
                bases = worker.pull(weights)
            elif kind == "idle":
                worker.idle()
                continue
            else:
                assert server._call(server._service.stats)["dense"]["elements"] == N
                continue
            assert torch.equal(weights, torch.full((N,), -total))
            assert bases == [step]

    run()
    assert server.applied() == [(0, step)]


class Raw:
    """A worker that speaks the protocol by itself."""

    def __init__(self, server: Server) -> None:
        claim = {"channel": "ps", "rank": 1, "incarnation": 1, "epoch": 0, "protocol": PROTOCOL}
        self.sock = connect(server.address, SECRET, claim)

    def request(self, step: int, version: int, *, op: Op = Op.PUSH_PULL, length: int = 4 * N) -> bytes:
        payload = np.ones(N, np.float32).tobytes()[:length]
        return Header(op, step=step, version=version, numbers=(1.0,), length=length).pack() + payload

    def reply(self) -> tuple[Header, bytes]:
        header = Header.unpack(receive_exactly(self.sock, HEADER.size))
        return header, receive_exactly(self.sock, header.length)


@pytest.fixture
def raw(client: Build, server: Server) -> Iterator[Raw]:
    client(share=False)
    made = Raw(server)
    with made.sock:
        for step in range(WARM):
            made.sock.sendall(made.request(step, step))
            made.reply()
        yield made


def weights_of(reply: tuple[Header, bytes]) -> float:
    values = np.frombuffer(reply[1], np.float32)
    assert (values == values[0]).all()
    return float(values[0])


def test_a_request_may_come_in_any_pieces(raw: Raw, server: Server) -> None:
    raw.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for number, pieces in enumerate(([1], [79], [80], [81], [40, 90], [227], [1, 2, 3, 79, 80, 150])):
        request, before = raw.request(WARM + number, WARM + number), 0
        for piece in (*pieces, len(request)):
            raw.sock.sendall(request[before:piece])
            before = piece
            server._call(lambda: None)  # has looked at the piece, or will with the next
        header, payload = raw.reply()
        assert (header.op, header.version) == (Op.WEIGHTS, WARM + number + 1)
        assert weights_of((header, payload)) == -(WARM + number + 1)


def test_requests_may_come_several_at_once(raw: Raw) -> None:
    """Two of one step among them, and one of another kind in between."""
    steps = [WARM, WARM + 1, WARM + 1, WARM + 2]
    requests = [raw.request(step, WARM) for step in steps]
    requests.insert(2, Header(Op.PULL).pack())
    raw.sock.sendall(b"".join(requests))
    replies = [raw.reply() for _ in requests]
    assert [weights_of(reply) for reply in replies] == [-(WARM + count) for count in (1, 2, 2, 2, 3)]
    assert [reply[0].flags for reply in replies] == [0, 0, 0, DUPLICATE, 0]


def test_what_is_malformed_is_told_so(raw: Raw) -> None:
    raw.sock.sendall(raw.request(WARM, WARM) + raw.request(WARM + 1, WARM, length=4))
    assert weights_of(raw.reply()) == -(WARM + 1)
    header, payload = raw.reply()
    assert header.op == Op.ERROR
    assert "4 bytes where" in str(decode_error(payload))


def test_who_does_not_read_its_answers_holds_nobody_up(raw: Raw, client: Build, server: Server) -> None:
    other = Client([server.address], [(0, N)], SECRET, rank=2, incarnation=1, epoch=0, share=False)
    other.connect()
    raw.sock.setblocking(False)
    step = WARM
    with contextlib.suppress(BlockingIOError):
        while True:
            request = raw.request(step, WARM)
            if raw.sock.send(request) < len(request):
                break
            step += 1
    weights = torch.empty(N)
    bases = other.pull(weights)
    gradient = torch.zeros(N)
    for number in range(WARM):
        _, bases = other.push_pull((1 << 40) + number, bases, gradient, (), weights, factor=1.0)
    assert as_bytes(weights)
    other.close()


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": optim.SGD(lr=1.0, momentum=0.9)}, {"optimizer": optim.Adam(lr=1.0)}, {"consistency": "ssp"},
        {"stale": "scale"},
    ],
)  # fmt: skip
def test_what_it_does_not_know_stays_in_python(client: Build, server: Server, changes: dict[str, Any]) -> None:
    warmed(client(share=False, **changes))
    assert mode_of(server)._slice is None
