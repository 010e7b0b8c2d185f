"""The live listener: files who is proved, sheds who is not, and goes on serving."""

from __future__ import annotations

import random
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tricorn.comm import auth, sockets
from tricorn.comm.listener import MAX_CALLERS, PeerListener
from tricorn.errors import AuthenticationError, PeerLost

SECRET = b"s" * 32


@pytest.fixture
def listener() -> Iterator[PeerListener]:
    listener = PeerListener(SECRET)
    yield listener
    listener.close()
    listener.close()


def dial(listener: PeerListener, *, epoch: int = 1, channel: str = "test", rank: int = 0) -> socket.socket:
    return sockets.connect(listener.address, SECRET, {"epoch": epoch, "channel": channel, "rank": rank})


def assert_serves(listener: PeerListener) -> None:
    with dial(listener, channel="good") as dialled, listener.take(1, "good", 0, 5) as taken:
        dialled.sendall(b"hello")
        assert sockets.receive_exactly(taken, 5) == b"hello"


def said_until_hung_up(stranger: socket.socket) -> bytes:
    """All that the listener says to a stranger until it hangs up."""
    stranger.settimeout(5)
    said = b""
    try:
        while chunk := stranger.recv(4096):
            said += chunk
    except ConnectionResetError:
        pass
    return said


def test_callers_are_filed_by_epoch_channel_and_rank(listener):
    claims = [(1, "a", 0), (1, "a", 1), (1, "b", 0)]
    dialled = {claim: dial(listener, epoch=claim[0], channel=claim[1], rank=claim[2]) for claim in claims}
    for claim in reversed(claims):
        with listener.take(*claim, timeout=5) as taken:
            assert taken.getpeername() == dialled[claim].getsockname()
    for sock in dialled.values():
        sock.close()


def test_take_waits_for_a_caller_that_is_late(listener):
    late = threading.Thread(target=lambda: dial(listener).close())
    late.start()
    listener.take(1, "test", 0, 5).close()
    late.join()


def test_a_newer_epoch_ends_the_older(listener):
    old = dial(listener, epoch=1)
    listener.announce(2)
    assert said_until_hung_up(old) == b""
    with pytest.raises(PeerLost, match="epoch 1 is over"):
        listener.take(1, "test", 0, 5)
    late = dial(listener, epoch=1)
    assert said_until_hung_up(late) == b""
    new = dial(listener, epoch=2)
    listener.take(2, "test", 0, 5).close()
    for sock in (old, late, new):
        sock.close()


def test_a_caller_ahead_of_its_epoch_is_kept(listener):
    with dial(listener, epoch=5):
        listener.announce(4)
        listener.take(5, "test", 0, 5).close()


def test_who_dials_again_replaces_its_own_connection(listener):
    first = dial(listener)
    second = dial(listener)
    assert said_until_hung_up(first) == b""
    with listener.take(1, "test", 0, 5) as taken:
        assert taken.getpeername() == second.getsockname()
    first.close()
    second.close()


def test_interrupt_and_close_wake_whoever_waits(listener):
    lost: list[str] = []

    def wait(epoch: int) -> None:
        try:
            listener.take(epoch, "test", 0, 60)
        except PeerLost as error:
            lost.append(str(error))

    for epoch, end in ((1, listener.interrupt), (2, listener.close)):
        listener.announce(epoch)
        waiting = threading.Thread(target=wait, args=(epoch,))
        waiting.start()
        end()
        waiting.join(5)
    assert lost == ["membership epoch 1 is over", "membership epoch 2 is over"]


def test_an_interrupt_that_comes_first_is_not_missed(listener):
    listener.announce(3)
    listener.interrupt()
    assert listener.over(3)
    with pytest.raises(PeerLost):
        listener.take(3, "test", 0, 60)
    with dial(listener, epoch=4):
        listener.take(4, "test", 0, 5).close()


def test_silent_and_slow_callers_hold_up_nobody(listener, monkeypatch):
    monkeypatch.setattr(sockets, "HANDSHAKE_SECONDS", 600)
    silent = [socket.create_connection(listener.address) for _ in range(3 * MAX_CALLERS)]
    for sock in silent[::2]:
        sock.sendall(auth.MAGIC)
    assert_serves(listener)
    assert said_until_hung_up(silent[0]) == b""  # the oldest had to give way
    for sock in silent:
        sock.close()
    assert_serves(listener)


def test_a_caller_that_does_not_finish_in_time_is_dropped(listener, monkeypatch):
    monkeypatch.setattr(sockets, "HANDSHAKE_SECONDS", 0.05)
    with socket.create_connection(listener.address) as slow:
        slow.sendall(auth.MAGIC)
        assert said_until_hung_up(slow) == b""


def test_another_secret_and_a_replay_are_refused(listener):
    with pytest.raises((AuthenticationError, PeerLost)):
        sockets.connect(listener.address, b"wrong", {"epoch": 1, "channel": "test", "rank": 0})
    recorded: list[bytes] = []
    with socket.create_connection(listener.address) as caller:
        steps = auth.dial(SECRET, {"epoch": 1, "channel": "test", "rank": 3})
        wanted = next(steps)
        try:
            while True:
                if isinstance(wanted, bytes):
                    recorded.append(wanted)
                    caller.sendall(wanted)
                    wanted = next(steps)
                else:
                    wanted = steps.send(sockets.receive_exactly(caller, wanted))
        except StopIteration:
            listener.take(1, "test", 3, 5).close()
    with socket.create_connection(listener.address) as thief:
        thief.sendall(b"".join(recorded))
        assert len(said_until_hung_up(thief)) <= auth.NONCE
    with pytest.raises(PeerLost, match="did not connect"):
        listener.take(1, "test", 3, 0.01)


@pytest.mark.parametrize(
    "claim", [{}, {"epoch": "1", "channel": "c", "rank": 0}, {"epoch": 1, "channel": "c", "rank": 0, "more": 1}]
)
def test_a_proved_claim_that_is_not_a_peers_is_dropped(listener, claim):
    with sockets.connect(listener.address, SECRET, claim) as caller:
        assert said_until_hung_up(caller) == b""
    assert_serves(listener)


OPENINGS = st.builds(
    lambda magic, version, nonce, length: struct.pack("!4sB32sH", magic, version, nonce, length),
    st.sampled_from([auth.MAGIC, b"GET ", b"\x80\x04\x95\x00"]),
    st.sampled_from([auth.VERSION, 0, 255]),
    st.binary(min_size=32, max_size=32),
    st.integers(0, 65535),
)


@settings(max_examples=1500, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.one_of(st.binary(max_size=3000), st.tuples(OPENINGS, st.binary(max_size=1200)).map(b"".join)))
def test_noise_is_refused_and_peers_are_served_all_the_while(listener, noise):
    with socket.create_connection(listener.address) as stranger:
        try:
            stranger.sendall(noise)
            stranger.shutdown(socket.SHUT_WR)
        except OSError:  # it has hung up already
            pass
        assert len(said_until_hung_up(stranger)) <= auth.NONCE
    if random.Random(noise).random() < 0.1:
        assert_serves(listener)
