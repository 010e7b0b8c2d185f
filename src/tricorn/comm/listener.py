"""Where a worker's peers connect: callers prove the run's secret, then wait here until a group takes them.

One thread speaks to all callers at once, so a slow or hostile one holds up nobody. A caller that has proved the
secret is filed under what its claim says: membership epoch, channel, rank.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import threading
import time

import msgspec

from tricorn.comm import auth, sockets
from tricorn.errors import PeerLost, TricornError

# Handshakes under way at once. One more, and the oldest is dropped: a real one lasts a millisecond, so the oldest
# is a stranger that holds a place.
MAX_CALLERS = 64


class Claim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a peer says of itself; part of what it proves."""

    epoch: int
    channel: str
    rank: int


class PeerListener:
    """Listens, authenticates and keeps each caller until ``take`` asks for it. All methods are thread-safe.

    ``address`` is what the others have to dial.
    """

    def __init__(self, secret: bytes, host: str = "127.0.0.1") -> None:
        self._secret = secret
        self._socket = sockets.listen(host)
        self._socket.setblocking(False)
        self.address: sockets.Address = self._socket.getsockname()[:2]
        self._changed = threading.Condition()
        self._filed: dict[Claim, socket.socket] = {}
        self._newest = -1  # epochs before this one are over
        self._abandoned = -1  # epochs up to this one were interrupted
        self._closed = False
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="tricorn-listener", daemon=True)
        self._thread.start()

    def announce(self, epoch: int) -> None:
        """Membership epochs before this one are over: drop their callers, and fail whoever waits for one."""
        with self._changed:
            self._newest = max(self._newest, epoch)
            for claim in [claim for claim in self._filed if claim.epoch < self._newest]:
                self._filed.pop(claim).close()
            self._changed.notify_all()

    def take(self, epoch: int, channel: str, rank: int, timeout: float) -> socket.socket:
        """The connection of that peer, now the caller's to close; it blocks on reading and writing.

        Raises PeerLost when it has not come after ``timeout`` seconds, when a newer epoch has been announced, or
        when the epoch was interrupted.
        """
        self.announce(epoch)
        wanted = Claim(epoch=epoch, channel=channel, rank=rank)
        with self._changed:
            self._changed.wait_for(lambda: wanted in self._filed or self.over(epoch), timeout)
            if self.over(epoch):
                raise PeerLost(f"membership epoch {epoch} is over")
            if wanted not in self._filed:
                raise PeerLost(f"rank {rank} did not connect to {channel!r} within {timeout:g} s")
            return self._filed.pop(wanted)

    def interrupt(self) -> None:
        """Abandon the newest epoch announced: every ``take`` of it, blocked or yet to come, raises PeerLost."""
        with self._changed:
            self._abandoned = self._newest
            self._changed.notify_all()

    def over(self, epoch: int) -> bool:
        """Whether no more peers of that epoch will come: interrupted, replaced by a newer one, or closed."""
        return self._closed or epoch < self._newest or epoch <= self._abandoned

    def close(self) -> None:
        """End the thread and close every connection that was not taken."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        self._wake.send(b"\0")
        self._thread.join()
        for sock in (self._wake, self._woken, self._socket, *self._filed.values()):
            sock.close()
        self._filed.clear()

    def _serve(self) -> None:
        callers: dict[_Caller, None] = {}  # in order of arrival
        with selectors.DefaultSelector() as selector:
            selector.register(self._socket, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while not self._closed:
                patience = max(0.0, next(iter(callers)).deadline - time.monotonic()) if callers else None
                for key, _ in selector.select(patience):
                    if key.fileobj is self._socket and (caller := self._answer()):
                        callers[caller] = None
                        selector.register(caller.sock, selectors.EVENT_READ, caller)
                    elif key.data is not None:
                        key.data.advance()
                now, excess = time.monotonic(), len(callers) - MAX_CALLERS
                for place, caller in enumerate([*callers]):
                    if caller.done or place < excess or caller.deadline <= now:
                        selector.unregister(caller.sock)
                        del callers[caller]
                        self._file(caller)
        for caller in callers:
            caller.sock.close()

    def _answer(self) -> _Caller | None:
        try:
            sock, _ = self._socket.accept()
        except BlockingIOError:
            return None
        except OSError:  # out of descriptors: the caller stays in the backlog, and the loop must not spin on it
            time.sleep(0.05)
            return None
        return _Caller(sock, self._secret)

    def _file(self, caller: _Caller) -> None:
        with self._changed:
            if caller.claim is None or caller.claim.epoch < self._newest:
                caller.sock.close()
                return
            if caller.claim in self._filed:  # it dialled again: only the last connection is alive
                self._filed[caller.claim].close()
            caller.sock.setblocking(True)
            self._filed[caller.claim] = caller.sock
            self._changed.notify_all()


class _Caller:
    """One handshake under way, on a socket that never blocks. When it is ``done``, a good caller has a claim."""

    def __init__(self, sock: socket.socket, secret: bytes) -> None:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.deadline = time.monotonic() + sockets.HANDSHAKE_SECONDS
        self.done = False
        self.claim: Claim | None = None
        self._steps = auth.answer(secret)
        self._next = next(self._steps)
        self._received = b""

    def advance(self) -> None:
        """Go on with what has arrived."""
        try:
            while True:
                if isinstance(self._next, bytes):
                    if self.sock.send(self._next) < len(self._next):
                        raise PeerLost("the caller does not read")
                elif missing := self._next - len(self._received):
                    chunk = self.sock.recv(missing)
                    if not chunk:
                        raise PeerLost("the caller hung up")
                    self._received += chunk
                    continue
                received, self._received = self._received, b""
                self._next = self._steps.send(received)
        except BlockingIOError:
            return
        except StopIteration as proved:
            with contextlib.suppress(msgspec.ValidationError):
                self.claim = msgspec.convert(proved.value, Claim)
        except (OSError, TricornError):
            pass
        self.done = True
