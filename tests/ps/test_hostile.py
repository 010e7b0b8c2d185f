"""Nothing that arrives is trusted: strangers, liars and broken clients harm nobody but themselves."""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tricorn.comm import auth
from tricorn.comm.sockets import connect, receive_exactly
from tricorn.errors import AuthenticationError, PeerLost, ProtocolError, TricornError
from tricorn.ps.client import Client
from tricorn.ps.server import MAX_STRANGERS, Server
from tricorn.ps.wire import HEADER, MAX_DOCUMENT, Header, Op, decode_error

from .cluster import SECRET, Cluster, batches, distance, make_job, plain, step_of

Build = Callable[..., Cluster]
INTRUDER = 1  # a rank of the run under attack that no trainer has
ROUNDS = int(os.environ.get("TRICORN_ROUNDS", 1))
many = settings(max_examples=80 * ROUNDS, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Attacked:
    """A run whose worker of rank 0 trains while the intruder does what it does."""

    def __init__(self, run: Cluster) -> None:
        self.run = run
        self.server: Server = run.servers[0]
        self.epoch = run.epoch
        self.done = 0

    def claim(self, **changes: Any) -> dict[str, Any]:
        return {"channel": "ps", "rank": INTRUDER, "incarnation": 1, "epoch": self.epoch} | changes

    def dial(self, **changes: Any) -> socket.socket:
        return connect(self.server.address, SECRET, self.claim(**changes))

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """One more step is trained meanwhile."""
        todo = batches(self.run.job)
        step = self.run.pool.submit(step_of, self.run.trainers[0], self.done, *todo[self.done % len(todo)])
        yield
        step.result(10)
        self.done += 1

    def check(self) -> None:
        """The training came to what it would have come to alone."""
        self.run.trainers[0].refresh()
        epochs = self.done // len(batches(self.run.job)) + 1
        job = make_job(epochs=self.run.job.epochs * epochs)
        assert distance(self.run.weights(), plain(job, self.done, torch.optim.SGD, momentum=0.9)) <= 1e-10


@pytest.fixture
def attacked(cluster: Build) -> Iterator[Attacked]:
    run = cluster(make_job(), workers=2, consistency="asp")
    seat = run.begin("initial")
    run.trainers[0].join(seat)
    target = Attacked(run)
    with target.training():
        pass
    yield target
    with target.training():
        pass
    target.check()


def outcome(sock: socket.socket) -> bytes:
    """All that the server still says, after it has been told that nothing more will come."""
    with sock, contextlib.suppress(ConnectionError):
        sock.settimeout(10)
        with contextlib.suppress(OSError):  # the server was faster
            sock.shutdown(socket.SHUT_WR)
        said = bytearray()
        while part := sock.recv(1 << 16):
            said += part
        return bytes(said)
    return b""


def complaint(said: bytes) -> TricornError | None:
    """The error that ends what a server said, if one does."""
    while said:
        header = Header.unpack(said[: HEADER.size])
        payload, said = said[HEADER.size : HEADER.size + header.length], said[HEADER.size + header.length :]
        if header.op == Op.ERROR:
            assert not said
            return decode_error(payload)
    return None


opening = b"TRCN" + bytes([auth.VERSION]) + b"n" * auth.NONCE


@many
@given(st.one_of(st.binary(max_size=400), st.binary(max_size=200).map(lambda tail: opening + tail)))
def test_strangers(attacked: Attacked, junk: bytes) -> None:
    with attacked.training():
        sock = socket.create_connection(attacked.server.address)
        sock.sendall(junk)
        outcome(sock)


ops = st.one_of(st.sampled_from(list(Op)).map(int), st.integers(0, 255))
wholes = st.one_of(st.integers(-2, 3), st.integers(-(2**63), 2**63 - 1))
lengths = st.one_of(st.integers(0, 300), st.sampled_from([2**20, 2**40, 2**63, 2**64 - 1]))
headers = st.builds(
    Header, ops, wholes, wholes, st.integers(0, 255), st.tuples(*[st.floats()] * 6), lengths
)  # fmt: skip


@many
@given(header=headers, payload=st.binary(max_size=400))
def test_headers_of_any_kind_from_one_who_knows_the_secret(attacked: Attacked, header: Header, payload: bytes) -> None:
    if header.op == Op.PUSH:
        header = header._replace(step=0)  # in the weights already, or refused: a true push would count
    if header.op == Op.BARRIER:
        header = header._replace(length=max(1, header.length))  # an empty one waits for all, as it should
    with attacked.training():
        sock = attacked.dial()
        with contextlib.suppress(ConnectionError):
            sock.sendall(header.pack() + payload)
        error = complaint(outcome(sock))
    waits = header.op == Op.CREATE and header.length <= MAX_DOCUMENT  # for the description
    if header.op not in (Op.PULL, Op.ROWS, Op.IDLE, Op.PUSH) and not waits:
        assert isinstance(error, ProtocolError)


@many
@given(st.integers(0, HEADER.size - 1), st.integers(0, 255), st.integers(0, 2 * HEADER.size))
def test_mutated_and_truncated_frames(attacked: Attacked, place: int, value: int, length: int) -> None:
    frame = bytearray(Header(Op.PULL).pack() + Header(Op.IDLE).pack())
    frame[place] = value
    if frame[0] in (Op.PUSH, Op.BARRIER):  # a true one would count, or wait
        return
    with attacked.training():
        sock = attacked.dial()
        with contextlib.suppress(ConnectionError):
            sock.sendall(frame[:length])
        outcome(sock)


def test_oversize_lengths_take_no_memory(attacked: Attacked) -> None:
    process = psutil.Process(os.getpid())
    before = process.memory_info().rss
    for op in (*Op, 99):
        for length in (MAX_DOCUMENT + 1, 2**32, 2**63, 2**64 - 1):
            sock = attacked.dial()
            sock.sendall(Header(op, length=length).pack())
            assert isinstance(complaint(outcome(sock)), ProtocolError), (op, length)
    assert process.memory_info().rss - before < 32 << 20


def test_a_wrong_secret(attacked: Attacked) -> None:
    with pytest.raises((AuthenticationError, PeerLost)):
        connect(attacked.server.address, b"x" * 32, attacked.claim())


def test_a_replayed_handshake(attacked: Attacked) -> None:
    """What a real worker once sent is worth nothing on another connection."""
    sent = []
    sock = socket.create_connection(attacked.server.address)
    steps = auth.dial(SECRET, attacked.claim())
    wanted: Any = next(steps)
    with contextlib.suppress(StopIteration):
        while True:
            if isinstance(wanted, int):
                wanted = steps.send(receive_exactly(sock, wanted))
            else:
                sent.append(wanted)
                sock.sendall(wanted)
                wanted = next(steps)
    sock.close()
    replay = socket.create_connection(attacked.server.address)
    replay.settimeout(10)
    replay.sendall(sent[0])
    assert len(receive_exactly(replay, auth.NONCE)) == auth.NONCE
    replay.sendall(sent[1] + Header(Op.PULL).pack())
    assert outcome(replay) == b""


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"epoch": 0}, PeerLost, "epoch 0 is over"),
        ({"rank": 2}, ProtocolError, "none of rank 2"),
        ({"rank": -1}, ProtocolError, "none of rank -1"),
        ({"rank": 0}, ProtocolError, "connected already"),
        ({"rank": "0"}, ProtocolError, "cannot be read"),
        ({"channel": "dp"}, ProtocolError, "cannot be read"),
        ({"more": 1}, ProtocolError, "cannot be read"),
        ({"protocol": 1}, ProtocolError, "the worker speaks version 1 of the protocol, this server version 2"),
        ({"protocol": 3, "more": 1}, ProtocolError, "speaks version 3"),
    ],
)
def test_claims_that_do_not_fit(
    attacked: Attacked, changes: dict[str, Any], error: type[TricornError], words: str
) -> None:
    told = complaint(outcome(attacked.dial(**changes)))
    assert type(told) is error
    assert words in str(told)


def test_a_new_life_of_a_worker_takes_the_place_of_the_old(attacked: Attacked) -> None:
    with attacked.dial() as old, attacked.dial(incarnation=2) as new:
        old.settimeout(10)
        assert old.recv(1) == b""
        new.sendall(Header(Op.IDLE).pack())
        assert Header.unpack(receive_exactly(new, HEADER.size)).op == Op.DONE


@pytest.mark.parametrize("share", [True, False], ids=["shared", "tcp"])
def test_who_dies_while_it_waits_is_gone_at_once(attacked: Attacked, share: bool) -> None:
    """Its next life is welcome, and nobody passes the barrier because the former one had come to it."""

    def client() -> Client:
        options: dict[str, Any] = {"rank": INTRUDER, "incarnation": 1, "epoch": attacked.epoch, "share": share}
        found = Client([attacked.server.address], [(0, 0)], SECRET, **options)
        found.connect()
        return found

    first = client()
    first._wire.servers[0].send(Header(Op.BARRIER))
    first.close()
    second = client()
    second.idle()
    assert not attacked.server._service._at_barrier
    second.close()
    attacked.run.trainers[0]._client.barrier()


def test_who_is_turned_away_while_still_sending_hears_why(attacked: Attacked) -> None:
    """A close in the middle of what it sends would reset the connection, and the reason would be lost."""
    with attacked.dial() as sock:
        sock.settimeout(10)
        sock.sendall(Header(99).pack() + bytes(20 << 20))
        said = bytearray()
        while part := sock.recv(1 << 16):  # to the end, which the server makes
            said += part
    assert "no request of kind 99" in str(complaint(bytes(said)))


def test_crowds_of_strangers_do_not_keep_workers_out(attacked: Attacked) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(3 * MAX_STRANGERS):
            stack.enter_context(socket.create_connection(attacked.server.address))
        client = Client([attacked.server.address], [(0, 0)], SECRET, rank=INTRUDER, incarnation=1, epoch=attacked.epoch)
        stack.callback(client.close)
        client.connect()
        client.idle()
        assert len(attacked.server._strangers) <= MAX_STRANGERS


def test_no_crowd_evicts_a_worker_that_waits_for_its_epoch(cluster: Build) -> None:
    run = cluster(make_job(), workers=1)
    run.begin("initial")
    address, claim = run.servers[0].address, {"channel": "ps", "rank": 0, "incarnation": 1, "epoch": run.epoch + 1}
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(connect(address, SECRET, claim)) for _ in range(MAX_STRANGERS + 2)]
        for _ in range(MAX_STRANGERS + 2):
            stack.enter_context(socket.create_connection(address))
        workers.append(stack.enter_context(connect(address, SECRET, claim)))  # all before it are accepted
        for worker in workers:
            worker.setblocking(False)
            with pytest.raises(BlockingIOError):  # neither closed nor told anything
                worker.recv(1)


def test_out_of_descriptors_the_server_pauses_and_goes_on(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    paused, pause = threading.Event(), time.sleep

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        paused.set()
        pause(seconds)

    monkeypatch.setattr("tricorn.ps.server.time.sleep", sleep)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket() as caller, contextlib.ExitStack() as stack:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        with contextlib.suppress(OSError):
            while True:
                stack.callback(os.close, os.dup(caller.fileno()))
        caller.connect(attacked.server.address)
        assert paused.wait(10)
        with attacked.training():
            pass
        stack.close()
        outcome(caller)  # it is accepted now, and its silence ends the connection
    assert pauses[0] > 0


def test_who_is_silent_is_dropped(attacked: Attacked, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tricorn.ps.server.HANDSHAKE_SECONDS", 0.05)
    with socket.create_connection(attacked.server.address) as silent:
        silent.settimeout(10)
        assert silent.recv(1) == b""


def test_who_asks_and_never_reads_costs_a_bounded_amount(attacked: Attacked) -> None:
    with attacked.dial() as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.settimeout(0.2)
        frame = Header(Op.PULL).pack() * 1000
        with contextlib.suppress(TimeoutError):
            for _ in range(200):
                greedy.sendall(frame)
        (connection,) = [c for rank, c in attacked.server._workers.items() if rank == INTRUDER]
        assert len(connection._outbox) <= 10


def test_a_description_must_make_sense(cluster: Build) -> None:
    good = (
        b'{"tables":[["a",[2,3]]],"dtype":"float32","start":0,"stop":6,"optimizer":{"kind":"sgd","lr":0.1},'
        b'"consistency":"bsp","staleness":0}'
    )
    bad = {
        b"[2,3]": b"[2,-3]",
        b"float32": b"object",
        b'"stop":6': b'"stop":7',
        b'"lr":0.1': b'"lr":-1',
        b'"sgd"': b'"magic"',
        b"bsp": b"csp",
        b'"start":0': b'"start":0,"more":1',
        b'"staleness":0': b'"staleness":9999999999999999999999',
    }
    run = cluster(make_job(), workers=1)
    run.begin("initial")
    claim = {"channel": "ps", "rank": 0, "incarnation": 1, "epoch": run.epoch}
    for document in (good, b"", b"[" * 100_000, *(good.replace(*pair) for pair in bad.items())):
        sock = connect(run.servers[0].address, SECRET, claim)
        sock.sendall(Header(Op.CREATE, length=len(document)).pack() + document)
        said = outcome(sock)
        assert (complaint(said) is None) == (document == good), (document[:200], said)


def test_a_description_over_the_limit_is_not_read(cluster: Build) -> None:
    run = cluster(make_job(), workers=1)
    run.begin("initial")
    claim = {"channel": "ps", "rank": 0, "incarnation": 1, "epoch": run.epoch}
    sock = connect(run.servers[0].address, SECRET, claim)
    sock.sendall(Header(Op.CREATE, length=MAX_DOCUMENT + 1).pack())
    assert f"{MAX_DOCUMENT + 1} bytes" in str(complaint(outcome(sock)))


def test_a_slice_larger_than_the_machine_is_refused_with_the_remedy(cluster: Build) -> None:
    shape = 2**39
    document = (
        f'{{"tables":[["a",[{shape}]]],"dtype":"float64","start":0,"stop":{shape},'
        '"optimizer":{"kind":"sgd","lr":0.1},"consistency":"bsp","staleness":0}'
    ).encode()
    run = cluster(make_job(), workers=1)
    run.begin("initial")
    sock = connect(run.servers[0].address, SECRET, {"channel": "ps", "rank": 0, "incarnation": 1, "epoch": run.epoch})
    sock.sendall(Header(Op.CREATE, length=len(document)).pack() + document)
    assert "give more servers" in str(complaint(outcome(sock)))
