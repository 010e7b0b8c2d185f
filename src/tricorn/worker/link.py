"""A role's link to the coordinator: one thread that listens, beats, and calls again when the line breaks.

The coordinator is never on the path of a step: what a step says goes into a queue, and is sent by this thread.
After a broken line nothing is repeated but a failure, because the coordinator then forms a new membership epoch, in
which every role says afresh what it holds.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable

from tricorn.comm.sockets import Address, connect
from tricorn.control import messages as m
from tricorn.errors import AuthenticationError, PeerLost, ProtocolError
from tricorn.state.memory import peak_bytes

CALL_AGAIN_SECONDS = 0.05
PATIENCE_SECONDS = 60.0  # without a coordinator for so long, a role ends


class Link:
    """``handle(order)`` is called on the link's thread for every order that arrives."""

    def __init__(
        self,
        address: Address,
        secret: bytes,
        *,
        role: str,
        incarnation: int,
        beat_seconds: float,
        handle: Callable[[m.Order], None],
        bytes_sent: Callable[[], int],
    ) -> None:
        self._address = address
        self._secret = secret
        self._claim = {"channel": "control", "role": role, "incarnation": incarnation}
        self._beat_seconds = beat_seconds
        self._handle = handle
        self._bytes_sent = bytes_sent
        self._outgoing: deque[m.Report] = deque()
        self._failure: m.Failed | None = None
        self._woken, self._waker = socket.socketpair()
        self._waker.setblocking(False)
        self._closing = False
        self._flushed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)

    def open(self) -> None:
        self._thread.start()

    def send(self, *messages: m.Report) -> None:
        """Queue messages. Safe from any thread, never blocks."""
        for message in messages:
            if isinstance(message, m.Failed):
                self._failure = message
            self._outgoing.append(message)
        self._wake()

    def close(self, timeout: float = 2.0) -> None:
        """Send what is queued, then hang up."""
        with self._flushed:
            self._flushed.wait_for(lambda: not self._outgoing, timeout)
        self._closing = True
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _wake(self) -> None:
        with contextlib.suppress(OSError):  # a full socket wakes as well, and a closed link need not
            self._waker.send(b"\0")

    def _run(self) -> None:
        try:
            while not self._closing and (sock := self._call()):
                self._converse(sock)
                time.sleep(0 if self._closing else CALL_AGAIN_SECONDS)
        except BaseException:
            traceback.print_exc()
            os._exit(3)  # a role that cannot be told anything is of no use: it will be replaced
        self._woken.close()
        self._waker.close()

    def _call(self) -> socket.socket | None:
        """A line to the coordinator; None if the link is closed before there is one."""
        give_up = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                sock = connect(self._address, self._secret, self._claim)
            except (PeerLost, ProtocolError, AuthenticationError):
                if self._closing:
                    return None
                if time.monotonic() > give_up:
                    os._exit(3)
                time.sleep(CALL_AGAIN_SECONDS)
            else:
                for _ in range(len(self._outgoing)):
                    self._outgoing.popleft()
                if self._failure is not None:  # even if it was sent: perhaps nobody read it
                    self._outgoing.appendleft(self._failure)
                return sock

    def _converse(self, sock: socket.socket) -> None:
        decode = m.Decoder(m.Order)
        received = bytearray()
        beat = 0.0
        with sock, selectors.DefaultSelector() as selector, contextlib.suppress(OSError, ProtocolError):
            selector.register(sock, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            self._flush(sock)
            while not self._closing:
                now = time.monotonic()
                if now >= beat:
                    beat = now + self._beat_seconds
                    sock.sendall(m.encode(m.Heartbeat(bytes_sent=self._bytes_sent(), peak_bytes=peak_bytes())))
                for key, _ in selector.select(max(0.0, beat - now)):
                    if key.fileobj is sock:
                        chunk = sock.recv(1 << 16)
                        if not chunk:
                            return
                        received += chunk
                        for payload in _frames(received):
                            self._handle(decode(payload))
                    else:
                        self._woken.recv(4096)
                        self._flush(sock)

    def _flush(self, sock: socket.socket) -> None:
        if self._outgoing:
            sock.sendall(m.encode(m.Heartbeat(bytes_sent=self._bytes_sent(), peak_bytes=peak_bytes())))
        while self._outgoing:
            sock.sendall(m.encode(self._outgoing[0]))
            self._outgoing.popleft()
        with self._flushed:  # not while sending, which may block for longer than who closes wants to wait
            self._flushed.notify_all()


def _frames(received: bytearray) -> list[bytes]:
    """Take the whole frames out of what was received."""
    found = []
    while len(received) >= m.HEADER.size:
        end = m.HEADER.size + m.length(received[: m.HEADER.size])
        if len(received) < end:
            break
        found.append(bytes(received[m.HEADER.size : end]))
        del received[:end]
    return found
