"""Forks of one process that do something at the same time, each at the end of a line to the one that forked them.

Nothing but small JSON values crosses a line, so that what measures is not measured.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import msgspec

from tricorn.comm.sockets import receive_exactly
from tricorn.control import messages as m
from tricorn.documents import UNREADABLE
from tricorn.engine.forkserver import die_with_parent
from tricorn.errors import PeerLost, ProtocolError, TricornError, UserCodeError, in_words, users_line


class Line:
    """One end of the line between a fork and who forked it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    def say(self, value: Any) -> None:
        payload = msgspec.json.encode(value)
        self._sock.sendall(m.HEADER.pack(len(payload)) + payload)

    def hear(self) -> Any:
        """The next value. Raises UserCodeError for what the other end raised, PeerLost if it is gone, ProtocolError if
        what it says cannot be read.
        """
        payload = receive_exactly(self._sock, m.length(receive_exactly(self._sock, m.HEADER.size)))
        try:
            value = msgspec.json.decode(payload)
        except UNREADABLE as error:
            raise ProtocolError(f"what a process that measures says cannot be read: {error}") from None
        if isinstance(value, dict) and "raised" in value:
            raise UserCodeError(value["raised"], where=value["where"])
        return value

    def close(self) -> None:
        self._sock.close()


@contextmanager
def crew(bodies: Sequence[Callable[[Line], None]]) -> Iterator[list[Line]]:
    """A fork for each body; yields the lines to them. If this ends by an error, they are killed.

    The process must have no threads but this one. Raises UserCodeError for a fork that is gone too soon.
    """
    lines: list[Line] = []
    pids: list[int] = []
    try:
        for body in bodies:
            ours, theirs = socket.socketpair()
            if (pid := os.fork()) == 0:
                _become(body, theirs, [ours, *(line._sock for line in lines)])
            theirs.close()
            pids.append(pid)
            lines.append(Line(ours))
        yield lines
    except BaseException as error:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        if isinstance(error, PeerLost):
            raise UserCodeError("a process that ran the job is gone, perhaps for want of memory") from None
        raise
    finally:
        for line in lines:
            line.close()
        for pid in pids:
            os.waitpid(pid, 0)


def gather(lines: Sequence[Line]) -> list[Any]:
    """What each says next."""
    return [line.hear() for line in lines]


def tell(lines: Sequence[Line], value: Any) -> None:
    """Say the same to each."""
    for line in lines:
        line.say(value)


def _become(body: Callable[[Line], None], sock: socket.socket, others: Sequence[socket.socket]) -> None:
    """Be a fork. Whatever is raised is told, and the end of the line is the end of it."""
    code = 1
    try:
        die_with_parent()
        gc.freeze()  # or each collection would look through all that the parent had loaded: 0.2 s
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for other in others:
            other.close()
        line = Line(sock)
        try:
            body(line)
            code = 0
        except (PeerLost, ConnectionError):
            pass
        except (Exception, SystemExit) as error:
            said = str(error) if isinstance(error, TricornError) else in_words(error)
            line.say({"raised": said[:4000], "where": users_line(error)})
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
