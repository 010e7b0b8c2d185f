"""A role's link, over real sockets to a coordinator that the test plays."""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from tricorn.comm import auth
from tricorn.comm.sockets import listen, receive_exactly
from tricorn.control import messages as m
from tricorn.errors import AuthenticationError, PeerLost
from tricorn.worker.link import Link

SECRET = b"s" * 32
FAILURE = m.Failed(kind="UserCodeError", message="a mistake", remedy="", where="job.py:3", trace="")


class Line:
    """The coordinator's end of one connection. Heartbeats are passed over unless they are asked for."""

    def __init__(self, sock: socket.socket, secret: bytes = SECRET) -> None:
        self.sock = sock
        self._decode = m.Decoder(m.Report)
        sock.settimeout(10)
        steps = auth.answer(secret)
        wanted = next(steps)
        try:
            while True:
                if isinstance(wanted, int):
                    wanted = steps.send(receive_exactly(sock, wanted))
                else:
                    sock.sendall(wanted)
                    wanted = next(steps)
        except StopIteration as proved:
            self.claim = proved.value

    def order(self, message: m.Order) -> None:
        self.sock.sendall(m.encode(message))

    def next(self) -> m.Report:
        return self._decode(receive_exactly(self.sock, m.length(receive_exactly(self.sock, m.HEADER.size))))

    def report(self) -> m.Report:
        while isinstance(message := self.next(), m.Heartbeat):
            pass
        return message

    def rest(self) -> list[m.Report]:
        """All that is still said until the link hangs up."""
        found = []
        with contextlib.suppress(PeerLost):
            while True:
                found.append(self.report())
        return found


class Desk:
    """Where the coordinator listens, and a link that calls there."""

    def __init__(self, beat_seconds: float = 60.0) -> None:
        self.listener = listen()
        self.listener.settimeout(10)
        self.address = self.listener.getsockname()[:2]
        self.orders: queue.SimpleQueue[m.Order] = queue.SimpleQueue()
        self.sent = 0
        self._lines: list[socket.socket] = []
        self.link = Link(
            self.address, SECRET, role="worker-1", incarnation=3, beat_seconds=beat_seconds,
            handle=self.orders.put, bytes_sent=lambda: self.sent,
        )  # fmt: skip
        self.link.open()

    def call(self) -> socket.socket:
        """The link calls: a connection that has yet to prove itself."""
        sock, _ = self.listener.accept()
        self._lines.append(sock)
        return sock

    def line(self) -> Line:
        """A line on which the link already listens: what was queued before is dropped by now."""
        line = Line(self.call())
        line.order(m.Regroup(epoch=0))
        assert self.orders.get(timeout=10) == m.Regroup(epoch=0)
        return line

    def close(self) -> None:
        for sock in (*self._lines, self.listener):
            sock.close()
        self.link.close(timeout=0.1)


@pytest.fixture
def desk() -> Iterator[Desk]:
    desk = Desk()
    yield desk
    desk.close()


def trained(step: int) -> m.Trained:
    return m.Trained(epoch=1, steps=[step], losses=[0.5])


def test_it_says_who_it_is_and_reports_in_order(desk):
    line = desk.line()
    assert line.claim == {"channel": "control", "role": "worker-1", "incarnation": 3}
    for step in range(100):
        desk.link.send(trained(step))
    assert [line.report().steps for _ in range(100)] == [[step] for step in range(100)]


def test_orders_arrive_however_they_are_cut(desk):
    line = desk.line()
    orders = [m.Regroup(epoch=1), m.Lease(epoch=1, steps=list(range(50_000))), m.Shutdown()]
    stream = b"".join(map(m.encode, orders))
    for start in range(60):
        line.sock.sendall(stream[start : start + 1])
    line.sock.sendall(stream[60:])
    assert [desk.orders.get(timeout=10) for _ in orders] == orders


def test_heartbeats_say_what_was_sent_so_far():
    desk = Desk(beat_seconds=0.02)
    with contextlib.closing(desk):
        line = desk.line()
        began = time.monotonic()
        beats = []
        for sent in (5, 6, 7, 8, 9, 10):
            desk.sent = sent
            beats.append(line.next())
        assert time.monotonic() - began >= 4 * 0.02
        assert all(isinstance(beat, m.Heartbeat) for beat in beats)
        counted = [beat.bytes_sent for beat in beats]
        assert counted == sorted(counted)
        assert counted[-1] >= 9


def garbage(line: Line) -> None:
    line.sock.sendall(m.HEADER.pack(3) + b"abc")


def too_long(line: Line) -> None:
    line.sock.sendall(m.HEADER.pack(m.MAX_FRAME + 1))


def hangs_up(line: Line) -> None:
    line.sock.close()


@pytest.mark.parametrize("breaks", [hangs_up, garbage, too_long])
def test_it_calls_again_after_the_line_broke(desk, breaks: Callable[[Line], None]):
    for step in range(3):
        line = desk.line()
        assert line.claim["incarnation"] == 3
        desk.link.send(trained(step))
        assert line.report() == trained(step)
        breaks(line)


def test_it_calls_until_somebody_proves_to_be_the_coordinator(desk):
    for _ in range(3):
        desk.call().close()
    with desk.call() as liar, pytest.raises(AuthenticationError):
        Line(liar, b"t" * 32)
    with desk.call() as liar:
        liar.sendall(b"x" * 64)
    line = desk.line()
    desk.link.send(trained(1))
    assert line.report() == trained(1)


def test_what_was_not_sent_is_dropped_with_the_line_but_a_failure_is_kept(desk):
    desk.line().sock.close()
    again = desk.call()  # so it has noticed, and its queue is that of the old line
    for message in (trained(1), FAILURE, trained(2)):
        desk.link.send(message)
    line = Line(again)
    assert line.report() == FAILURE
    desk.link.send(trained(3))
    assert line.report() == trained(3)


def test_a_failure_is_told_to_every_new_coordinator(desk):
    """The old one may have died with the word unread."""
    desk.link.send(FAILURE)
    for _ in range(3):
        line = desk.line()
        assert line.report() == FAILURE
        line.sock.close()


def test_closing_sends_what_is_queued(desk):
    line = desk.line()
    for step in range(1000):
        desk.link.send(trained(step))
    desk.link.close(timeout=10)
    assert [report.steps[0] for report in line.rest()] == list(range(1000))


def test_closing_without_a_coordinator(desk):
    """Neither waits nor takes the process along, and what is said afterwards harms nobody."""
    desk.line().sock.close()
    desk.listener.close()
    began = time.monotonic()
    desk.link.close(timeout=1.0)
    assert time.monotonic() - began < 5.0
    desk.link.send(trained(1))
    desk.link.close(timeout=0.0)


def test_closing_while_the_coordinator_does_not_read(desk):
    line = desk.line()
    large = m.Broken(epoch=1, reason="x" * m.MAX_TEXT)
    for _ in range(2000):  # more than the sockets between the two can hold
        desk.link.send(large)
    began = time.monotonic()
    desk.link.close(timeout=0.2)
    assert time.monotonic() - began < 2.0
    line.sock.close()


PROGRAM = """
import sys, threading
from tricorn.control import messages as m
from tricorn.worker import link as module

def handle(order):
    raise RuntimeError("what the order asks cannot be done")

module.PATIENCE_SECONDS = float(sys.argv[2])
link = module.Link(
    ("127.0.0.1", int(sys.argv[1])), b"s" * 32, role="worker-1", incarnation=3, beat_seconds=60, handle=handle,
    bytes_sent=lambda: 0,
)
link.open()
threading.Event().wait()
"""


def role(port: int, patience: float) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(port), str(patience)], stderr=subprocess.PIPE)


def test_a_role_whose_coordinator_stays_away_ends():
    with listen() as listener:
        port = listener.getsockname()[1]
    process = role(port, 0.1)
    process.communicate(timeout=20)
    assert process.returncode == 3


def test_a_role_that_cannot_obey_ends_and_says_why():
    with listen() as listener:
        process = role(listener.getsockname()[1], 60)
        listener.settimeout(20)
        sock, _ = listener.accept()
        with sock:
            Line(sock).order(m.Shutdown())
            _, printed = process.communicate(timeout=20)
    assert process.returncode == 3
    assert b"what the order asks cannot be done" in printed
