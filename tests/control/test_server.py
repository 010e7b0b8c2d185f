"""The live coordinator: whatever calls it, a good launcher and good roles are served to the end of their run."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import socket
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tricorn.comm import auth
from tricorn.comm.sockets import connect, listen, receive_exactly
from tricorn.control import messages as m
from tricorn.control.record import Record
from tricorn.control.server import MAX_STRANGERS, serve
from tricorn.control.state import Coordinator
from tricorn.errors import AuthenticationError, PeerLost
from tricorn.plan import Plan

from .served import FACTS, ORDER, SECRET, STEPS, Served, Speaker, outcome, refused

many = settings(max_examples=1000, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def test_a_run_from_the_first_word_to_the_last(served):
    served.replace("worker-1")


class Bomb:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


opening = b"TRCN" + bytes([auth.VERSION]) + b"n" * auth.NONCE
junk = st.one_of(
    st.binary(max_size=300),
    st.binary(max_size=100).map(lambda tail: opening + tail),
    st.binary(min_size=32, max_size=100).map(lambda tail: opening + b"\0\2{}" + tail),
)


@many
@given(junk)
def test_strangers_learn_nothing(served, sent):
    sock = socket.create_connection(served.address)
    sock.sendall(sent)
    assert len(outcome(sock)) in (0, auth.NONCE)  # at most a nonce, never a proof or an order


def test_a_wrong_secret(served):
    for _ in range(20):
        with pytest.raises((AuthenticationError, PeerLost)):
            connect(served.address, b"t" * 32, {"channel": "control", "role": "launcher"})


class Recording:
    """A socket that remembers what was sent."""

    def __init__(self, address: Any, claim: dict[str, Any]) -> None:
        self.sent: list[bytes] = []
        steps = auth.dial(SECRET, claim)
        with socket.create_connection(address) as sock, contextlib.suppress(StopIteration):
            wanted = next(steps)
            while True:
                if isinstance(wanted, int):
                    wanted = steps.send(receive_exactly(sock, wanted))
                else:
                    sock.sendall(wanted)
                    self.sent.append(wanted)
                    wanted = next(steps)


def test_a_handshake_that_was_overheard_is_worth_nothing(served):
    overheard = Recording(served.address, {"channel": "control", "role": "worker-0", "incarnation": 1}).sent
    sock = socket.create_connection(served.address)
    sock.sendall(b"".join(overheard) + m.encode(m.Heartbeat(bytes_sent=1)))
    assert len(outcome(sock)) == auth.NONCE


def test_the_silent_and_the_half_open_keep_nobody_out(served):
    with contextlib.ExitStack() as open_meanwhile:
        for i in range(3 * MAX_STRANGERS):
            sock = open_meanwhile.enter_context(socket.create_connection(served.address))
            sock.sendall((opening + struct.pack("!H", 1024) + b"{" * 1023)[: i * 11])
        worker = open_meanwhile.enter_context(served.role("worker-0").sock)
        assert Speaker(worker, m.Order).hear(m.Regroup).epoch == 1
        served.replace("worker-1")


NOBODY = [
    {"role": "worker-0", "incarnation": 0}, {"role": "worker-0", "incarnation": 2}, {"role": "worker-0"},
    {"role": "worker-9", "incarnation": 1}, {"role": "coordinator", "incarnation": 1}, {"incarnation": 1}, {},
    {"role": 1, "incarnation": 1}, {"role": ["worker-0"], "incarnation": 1}, {"role": {}, "incarnation": 1},
    {"role": None, "incarnation": 1}, {"role": ["launcher"]}, {"role": "worker-0", "incarnation": "1"},
    {"role": "worker-0", "incarnation": True}, {"role": "worker-0", "incarnation": 1.0},
    {"role": "worker-0", "incarnation": [1]}, {"role": "worker-0", "incarnation": 10**300},
    {"role": "worker-0", "incarnation": 1, "more": 1}, {"role": "worker-0", "incarnation": 1, "channel": "ps"},
    {"role": "\ud800", "incarnation": 1}, {"role": "launcher", "channel": None},
]  # fmt: skip


def test_proved_callers_that_are_nobody(served):
    for claim in NOBODY:
        # Encoded here, because connect() would not encode some of them.
        assert outcome(proved(served.address, json.dumps({"channel": "control"} | claim).encode())) == b"", claim


def proved(address: Any, claim: bytes) -> socket.socket:
    """A connection whose proof is right, with a claim as it stands."""
    sock = socket.create_connection(address)
    sock.settimeout(10)
    nonce = os.urandom(auth.NONCE)
    sock.sendall(b"TRCN" + bytes([auth.VERSION]) + nonce + struct.pack("!H", len(claim)) + claim)
    theirs = receive_exactly(sock, auth.NONCE)
    sock.sendall(auth._proof(SECRET, b"dialer", nonce, theirs, claim))
    receive_exactly(sock, auth.PROOF)
    return sock


def test_proved_claims_that_cannot_be_read(served):
    for claim in (b"", b"[]", b"{", b'{"role":"\xff"}', b'{"role":' + b"[" * 1000, b"null", b'"launcher"'):
        assert outcome(proved(served.address, claim)) == b"", claim


def test_there_is_one_launcher(served):
    for _ in range(3):
        assert outcome(served.dial(role="launcher")) == b""
    impostor = served.dial(role="launcher")
    with contextlib.suppress(OSError):
        impostor.sendall(m.encode(m.Stop()))
    refused(impostor)


def test_a_life_that_is_over_is_not_heard(served):
    old = served.role("worker-1")
    served.replace("worker-1")
    old.say(m.Ready(epoch=1, part="model", held=[3], address=("h", 1)))
    for incarnation in (1, 3):
        assert outcome(served.dial(role="worker-1", incarnation=incarnation)) == b""
    old.sock.close()


def test_who_calls_again_is_heard_on_the_new_line(served):
    first = served.role("worker-0")
    first.hear(m.Regroup)
    second = served.role("worker-0")
    second.hear(m.Regroup)
    refused(first.sock)
    second.sock.close()


numbers = st.one_of(st.integers(-3, 10), st.sampled_from([2**31, 2**53 - 1, 2**53, 2**63, 2**64 - 1, -(2**63)]))
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.floats(), st.text(max_size=9), st.binary(max_size=9), numbers),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
anything = st.one_of(numbers, st.lists(numbers, max_size=3), values)


def reports(epoch: int) -> list[m.Message]:
    """One of each that a role says but Failed, with which any role ends a run."""
    return [
        m.Ready(epoch=epoch, part="model", held=[3], address=("h", 1), applied=[(0, 2)]),
        m.Heartbeat(bytes_sent=1),
        m.Committed(epoch=epoch, upto=3, losses=[1.0]),
        m.Want(epoch=epoch, steps=1),
        m.Applied(epoch=epoch, steps=[1]),
        m.Trained(epoch=epoch, steps=[1], losses=[0.5]),
        m.Evaluated(epoch=epoch, step=3, samples=1, sums={"loss": (1.0, 1.0)}),
        m.Saved(epoch=epoch, step=1, files=[m.File(name="worker-1.safetensors", bytes=1, sha256="")]),
        m.Broken(epoch=epoch, reason="gone"),
        m.Finished(epoch=epoch, stopped=False, bytes_sent=1),
    ]


def lying(epoch: int, which: int, count: int) -> bytes:
    return m.HEADER.pack(count) + m.encode(reports(epoch)[which])


def changed(epoch: int, which: int, changes: list[tuple[int, int]]) -> bytes:
    frame = bytearray(m.encode(reports(epoch)[which]))
    for place, byte in changes:
        frame[place % len(frame)] = byte
    return bytes(frame)


def impossible(epoch: int, which: int, replaced: list[tuple[int, Any]], added: dict[str, Any]) -> bytes:
    document = msgspec.msgpack.decode(m.encode(reports(epoch)[which])[m.HEADER.size :])
    for place, value in replaced:
        document[[*document][place % len(document)]] = value
    payload = msgspec.msgpack.encode(document | added)
    return m.HEADER.pack(len(payload)) + payload


which = st.integers(0, len(reports(1)) - 1)
counts = st.sampled_from([0, 1, 10, m.MAX_FRAME, m.MAX_FRAME + 1, 2**32 - 1])
changes = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 255)), min_size=1, max_size=4)
replaced = st.lists(st.tuples(st.integers(0, 9), anything), min_size=1, max_size=2)
added = st.dictionaries(st.text(max_size=9), anything, max_size=1)
# Functions of the membership epoch that make what a proved role might send.
nonsense = st.lists(
    st.one_of(
        st.binary(max_size=64).map(lambda noise: lambda epoch: noise),
        st.builds(lambda w, count: lambda epoch: lying(epoch, w, count), which, counts),
        st.builds(lambda w, changes: lambda epoch: changed(epoch, w, changes), which, changes),
        st.builds(lambda w, new: lambda epoch: impossible(epoch, w, new, {}), which, replaced),
        st.builds(lambda w, new, more: lambda epoch: impossible(epoch, w, new, more), which, replaced, added),
    ),
    min_size=1,
    max_size=3,
)


@settings(many, max_examples=700)
@given(nonsense)
def test_a_proved_role_that_talks_nonsense(served, sent):
    sock = served.dial(role="worker-1", incarnation=1)
    with contextlib.suppress(ConnectionError):
        sock.sendall(b"".join(frame(1) for frame in sent))
    outcome(sock)


@settings(many, max_examples=300)
@given(nonsense)
def test_a_member_that_talks_nonsense_while_steps_run(served, sent):
    workers = served.begin()
    with contextlib.suppress(ConnectionError):
        workers[1].sock.sendall(b"".join(frame(workers[1].epoch) for frame in sent))
    for worker in workers:
        outcome(worker.sock)


def test_a_frame_that_is_too_long_is_cut_off_before_it_is_read(served):
    sock = served.dial(role="worker-1", incarnation=1)
    sock.sendall(m.HEADER.pack(m.MAX_FRAME + 1))
    refused(sock)  # although nothing of it was sent


def test_a_frame_that_never_ends_costs_at_most_itself(served):
    sock = served.dial(role="worker-1", incarnation=1)
    sock.sendall(m.HEADER.pack(m.MAX_FRAME) + b"\0" * (m.MAX_FRAME - 1))
    served.replace("worker-0")
    sock.close()


def test_nothing_is_unpickled(served, tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "exploded"))
    stranger = socket.create_connection(served.address)
    stranger.sendall(bomb)
    outcome(stranger)
    for payload in (bomb, msgspec.msgpack.encode({"type": "Heartbeat", "bytes_sent": bomb})):
        sock = served.dial(role="worker-1", incarnation=1)
        sock.sendall(m.HEADER.pack(len(payload)) + payload)
        refused(sock)
    assert not (tmp_path / "exploded").exists()


SENSELESS = [
    m.Ready(epoch=1, part="model", held=[STEPS + 1], address=("h", 1)),
    m.Ready(epoch=1, part="model", held=[2**53 - 1], address=("h", 1)),
    m.Ready(epoch=1, part="model", held=[], address=("h", 1), applied=[(0, 2**53 - 1)]),
    m.Committed(epoch=1, upto=2**53 - 1, losses=[]),
    m.Committed(epoch=1, upto=1, losses=[]),  # only the lead may
    m.Saved(epoch=1, step=2**53 - 1, files=[]),
    m.Evaluated(epoch=1, step=STEPS + 1, samples=1, sums={}),
    m.Applied(epoch=1, steps=[2**53 - 1]),
    m.Trained(epoch=1, steps=[1], losses=[0.0]),
    m.Want(epoch=1, steps=1),
]


def test_steps_that_the_run_does_not_have_are_refused(served):
    for message in SENSELESS:
        sock = served.dial(role="worker-1", incarnation=1)
        sock.sendall(m.encode(message))
        refused(sock)


def test_a_launcher_that_talks_nonsense_ends_its_own_run(tmp_path):
    served = Served(tmp_path)
    served.launcher.sock.sendall(m.HEADER.pack(3) + b"abc")
    refused(served.launcher.sock)
    assert (served.close(), served.process.returncode) == ("", 0)


def test_a_full_disk_ends_the_run_with_a_remedy(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    served = Served(tmp_path)
    for worker in served.begin():
        worker.sock.close()
    ended = served.launcher.hear(m.Ended)
    assert (ended.outcome, ended.error.kind) == ("failed", "StorageError")
    assert "No space left" in ended.error.message
    assert "Free space" in ended.error.remedy
    assert (served.close(), served.process.returncode) == ("", 0)


def test_a_mistake_of_its_own_ends_the_coordinator(tmp_path, monkeypatch):
    """Which is then replaced: one that has lost its clock would wait for ever."""
    monkeypatch.setattr(Coordinator, "tick", lambda self, now: 1 // 0)
    with listen() as listener, pytest.raises(ZeroDivisionError):
        serve(FACTS, Record(tmp_path, ORDER, Plan(strategy="dp"), "launch"), SECRET, listener)
