"""Messages between two ranks of one host, matched by tag in the order in which they were sent."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tricorn.comm import shared_rounds as rounds
from tricorn.comm.lane import Handle, Lane
from tricorn.comm.shared_waiting import Waiting
from tricorn.errors import PeerLost, UsageError

MAX_MESSAGE = 1 << 40
HEADER = 16  # bytes: length and tag

Then = Callable[[BaseException | None, int], None]  # called with the error, if any, and the rank it came from


class Arrival(Handle):
    """A message that is expected; ``source`` is the rank that sent it."""

    def __init__(self, tensor: Tensor, tag: int, then: Then | None) -> None:
        super().__init__()
        self._then = then
        self.tensor = tensor
        self.tag = tag
        self.source = -1
        self._claim = threading.Lock()

    def run(self, function: Callable[[], None]) -> Handle:
        super().run(function)
        if self._then:
            self._then(self._error, self.source)
        return self

    @property
    def claimed(self) -> bool:
        return self._claim.locked()

    def claim(self) -> bool:
        """Whether the caller is the first to have something for it."""
        return self._claim.acquire(blocking=False)


class Messages:
    """All streams from and to one rank."""

    def __init__(self, waiting: Waiting) -> None:
        peers = waiting.others
        self._out = {peer: _Outbox(waiting, peer) for peer in peers}
        self._in = {peer: _Inbox(waiting, peer) for peer in peers}

    def send(self, tensor: Tensor, peer: int, tag: int, later: bool, then: Then | None) -> Handle:
        return self._out[peer].send(tensor, tag, later, then)

    def room(self, peer: int) -> int:
        return self._out[peer].room

    def receive(self, tensor: Tensor, peer: int | None, tag: int, later: bool, then: Then | None) -> Arrival:
        arrival = Arrival(tensor, tag, then)
        if peer is not None and not later:
            self._in[peer].drive(arrival)
            arrival.wait()
            return arrival
        for inbox in self._in.values() if peer is None else [self._in[peer]]:
            inbox.post(arrival)
        if not later:
            arrival.wait()
        return arrival

    def close(self) -> None:
        for outbox in self._out.values():
            outbox.close()
        for inbox in self._in.values():
            inbox.close()


class _Stream:
    """Bytes to or from a peer, whole."""

    def __init__(self, waiting: Waiting, peer: int, kernel: Callable[..., int], what: str) -> None:
        self._waiting, self._peer, self._kernel, self._what = waiting, peer, kernel, what
        self._counts = np.zeros(2, np.int64)

    @property
    def room(self) -> int:
        """Bytes that can be sent without waiting, unless others are being sent."""
        return int(rounds.room(self._waiting.group, self._peer, self._counts))

    def move(self, data: int, length: int, give_up: Callable[[], bool] | None = None) -> bool:
        if self._waiting.lost:
            raise PeerLost(self._waiting.lost)
        self._counts[1] = 0
        group = self._waiting.group

        def attempt() -> int:
            state = self._kernel(group, self._peer, self._counts, data, length)
            return rounds.DONE if state and give_up and not self._counts[1] and give_up() else state

        if attempt() != rounds.DONE:
            what = f"{self._what} rank {self._peer}"
            self._waiting.insist(attempt, lambda: (self._peer, int(self._counts[0])), what)
        return bool(self._counts[1] == length)


class _Outbox:
    def __init__(self, waiting: Waiting, peer: int) -> None:
        self._stream = _Stream(waiting, peer, rounds.push, "sending to")
        self._turn = threading.Lock()  # a message is sent as a whole
        self._lane = Lane(f"tricorn-to-{peer}")

    def send(self, tensor: Tensor, tag: int, later: bool, then: Then | None) -> Handle:
        header = np.array([tensor.nbytes, tag], np.int64)

        def work() -> None:
            try:
                with self._turn:
                    self._stream.move(header.ctypes.data, header.nbytes)
                    self._stream.move(tensor.data_ptr(), tensor.nbytes)
            except BaseException as error:
                if then:
                    then(error, -1)
                raise
            if then:
                then(None, -1)

        if later and (self._turn.locked() or self.room < tensor.nbytes):
            return self._lane.start(work)
        self._lane.run(work)
        return Handle().run(lambda: None)

    @property
    def room(self) -> int:
        """Bytes of a message that can be sent without waiting, unless others are being sent."""
        return self._stream.room - HEADER

    def close(self) -> None:
        self._lane.close()


class _Inbox:
    """What comes from one rank. Whoever waits drives: takes messages out of the stream, for anybody."""

    def __init__(self, waiting: Waiting, peer: int) -> None:
        self._peer = peer
        self._stream = _Stream(waiting, peer, rounds.pull, "receiving from")
        self._mutex = threading.Lock()  # of what is expected and what is kept
        self._expected: list[Arrival] = []
        self._kept: deque[tuple[int, Tensor]] = deque()
        self._driven = False
        self._lane = Lane(f"tricorn-from-{peer}")

    def post(self, arrival: Arrival) -> None:
        """Expect it, and see to it in another thread."""
        if self._expect(arrival):
            self._lane.start(self._drive_rest)

    def drive(self, arrival: Arrival) -> None:
        """Expect it, and see to it in this thread, unless another does so anyway."""
        if self._expect(arrival):
            self._drive(arrival)

    def close(self) -> None:
        self._lane.close()

    def _expect(self, arrival: Arrival) -> bool:
        """Whether the caller has to see to it that messages are taken."""
        with self._mutex:
            for kept in self._kept:
                if kept[0] == arrival.tag:
                    if arrival.claim():
                        self._kept.remove(kept)
                        _deliver(arrival, self._peer, kept[1])
                    return False
            self._expected.append(arrival)
            idle, self._driven = not self._driven, True
        return idle

    def _drive(self, arrival: Arrival) -> None:
        """Take messages until this one has been claimed, then leave the others to the lane."""
        while not arrival.claimed and self._step(lambda: arrival.claimed):
            pass
        with self._mutex:
            self._purge()
            self._driven = more = bool(self._expected)
        if more:
            self._lane.start(self._drive_rest)

    def _drive_rest(self) -> None:
        while True:
            with self._mutex:
                self._purge()
                self._driven = bool(self._expected)
                if not self._driven:
                    return
            self._step(lambda: all(arrival.claimed for arrival in self._expected))

    def _purge(self) -> None:
        self._expected = [arrival for arrival in self._expected if not arrival.claimed]

    def _step(self, give_up: Callable[[], bool]) -> bool:
        """Take the next message; false if there was no more need to."""
        header = np.zeros(2, np.int64)
        arrival = None
        try:
            if not self._stream.move(header.ctypes.data, header.nbytes, give_up):
                return False
            length, tag = map(int, header)
            if not 0 <= length <= MAX_MESSAGE:
                raise PeerLost(f"rank {self._peer} announced a message of {length} bytes")
            with self._mutex:
                arrival = next((each for each in self._expected if each.tag == tag and each.claim()), None)
            fits = arrival is not None and arrival.tensor.nbytes == length
            tensor = arrival.tensor if arrival and fits else torch.empty(length, dtype=torch.uint8)
            self._stream.move(tensor.data_ptr(), length)
        except BaseException as error:
            self._fail(error, arrival)
            return False
        if arrival is None:
            with self._mutex:
                # It may have become expected while it was being taken.
                arrival = next((each for each in self._expected if each.tag == tag and each.claim()), None)
                if arrival is None:
                    self._kept.append((tag, tensor))
                    return True
            fits = False
        if fits:
            arrival.source = self._peer
            arrival.run(lambda: None)
        else:
            _deliver(arrival, self._peer, tensor)
        return True

    def _fail(self, error: BaseException, begun: Arrival | None) -> None:
        """``begun`` is claimed already, for a message of which a part has come."""

        def fail() -> None:
            raise error

        with self._mutex:
            expected, self._expected = self._expected, []
        if begun is not None:
            begun.run(fail)
        for arrival in expected:
            if arrival.claim():
                arrival.run(fail)


def _deliver(arrival: Arrival, source: int, message: Tensor) -> None:
    """Copy a message that was taken before it was expected."""

    def copy() -> None:
        if arrival.tensor.nbytes != message.nbytes:
            raise UsageError(
                f"rank {source} sent {message.nbytes} bytes where {arrival.tensor.nbytes} were expected",
                remedy="Receive into a tensor of the size and dtype that was sent.",
            )
        arrival.tensor.view(-1).view(torch.uint8).copy_(message)

    arrival.source = source
    arrival.run(copy)
