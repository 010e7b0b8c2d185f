"""Whom a server attends to next: those whose memory has changed, and those of whom the selector says so.

While there is something to do it only looks from one to the other; then it sleeps.
"""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable
from typing import Any

from tricorn.ps.bells import Bells
from tricorn.ps.connection import Connection

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
_MILLISECONDS = 5
_SELECT_EVERY = 16  # turns of shared memory, so that those who come by sockets have theirs

Ready = list[tuple[Any, int]]  # a connection, or what to call, and the events; WRITE also where the socket says nothing


class Watch:
    def __init__(self) -> None:
        self._selector = selectors.EpollSelector()
        self._shared: list[Connection] = []  # those through shared memory
        self._bells = Bells()
        self._since_select = 0  # turns of shared memory

    def call(self, sock: socket.socket, task: Callable[[], None]) -> None:
        """Have ``ready`` name the task whenever the socket can be read."""
        self._selector.register(sock, READ, task)

    def share(self, connection: Connection) -> None:
        """The connection has gone over to shared memory."""
        self._shared.append(connection)
        self._watch_shared()

    def adjust(self, connection: Connection) -> None:
        """Watch the socket for what the connection can do now."""
        # Where memory is shared, the socket is a sign of life.
        events = READ if connection.side else READ * connection.reading | WRITE * connection.writing
        if events == connection.watched:
            return
        if not events:
            self._selector.unregister(connection.sock)
        elif connection.watched:
            self._selector.modify(connection.sock, events, connection)
        else:
            self._selector.register(connection.sock, events, connection)
        connection.watched = events

    def forget(self, connection: Connection) -> None:
        """The connection is about to be closed."""
        if connection.watched:
            self._selector.unregister(connection.sock)
            connection.watched = 0
        if connection in self._shared:
            self._shared.remove(connection)
            self._watch_shared()

    def close(self) -> None:
        self._selector.close()

    @property
    def descriptor(self) -> int:
        """Can be read while any of the sockets can."""
        return self._selector.fileno()

    @property
    def patience(self) -> tuple[int, int, int]:
        """How long one connection may be waited for alone: turns of shared memory, or milliseconds of a socket."""
        return *self._bells.turns, 0 if self._bells.count else _MILLISECONDS

    def ready(self, going_on: Ready, patience: float | None) -> Ready:
        """Who has something to be attended to, besides ``going_on``; waits for it, at most ``patience`` seconds."""
        ready = going_on + self._changed(patient=not going_on)
        self._since_select += 1
        if ready and self._since_select < _SELECT_EVERY:
            return ready
        self._since_select = 0
        if ready or not self._bells.count:
            return ready + self._select(0.0 if ready else patience)
        ready = self._select(0.0 if not self._bells.may_sleep() else patience)
        self._bells.awake()
        return ready

    def _select(self, patience: float | None) -> Ready:
        return [(key.data, events) for key, events in self._selector.select(patience)]

    def _changed(self, *, patient: bool) -> Ready:
        if not self._bells.count:
            return []
        index = self._bells.changed(patient=patient)
        return [] if index is None else [(self._shared[index], WRITE)]

    def _watch_shared(self) -> None:
        self._bells.watch(connection.side for connection in self._shared if connection.side)
