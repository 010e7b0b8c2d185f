"""A worker's peers from one membership epoch to the next."""

from __future__ import annotations

from collections.abc import Sequence

from tricorn.comm.group import Group
from tricorn.strategy import Context, Seat


class Peers:
    """The group of the present membership epoch; ``channel`` keeps groups of different kinds apart.

    ``interrupt`` and ``bytes_sent`` are for any thread, the rest for the one that trains.
    """

    def __init__(self, context: Context, channel: str) -> None:
        self._context = context
        self._channel = channel
        self._group: Group | None = None
        self._sent_before = 0  # by the groups of earlier epochs

    @property
    def group(self) -> Group:
        assert self._group is not None, "join before anything else"
        return self._group

    @property
    def bytes_sent(self) -> int:
        group = self._group  # read once: another thread may leave meanwhile
        return self._sent_before + (group.bytes_sent if group else 0)

    def join(self, seat: Seat, ranks: Sequence[int] | None = None) -> Group:
        """Leave the old group and connect to the new, of all workers or of some, this one among them. Raises PeerLost.

        In the group, ``ranks`` are numbered in their order. All of them must have the same channel for it.
        """
        self.leave()
        context = self._context
        members = list(range(len(seat.workers)) if ranks is None else ranks)
        context.listener.announce(seat.epoch)
        self._group = Group(
            rank=members.index(context.rank), addresses=[seat.workers[rank] for rank in members],
            listener=context.listener, secret=context.secret, epoch=seat.epoch, channel=self._channel,
        )  # fmt: skip
        if context.listener.over(seat.epoch):  # an interrupt that came before there was a group
            self._group.interrupt()
        return self._group

    def interrupt(self) -> None:
        # In this order: a group that is being built sees one of the two.
        self._context.listener.interrupt()
        if group := self._group:
            group.interrupt()

    def give_up(self) -> None:
        """Fail the present group alone: the thread that trains may be told of the next epoch already."""
        if self._group:
            self._group.interrupt()

    def leave(self) -> None:
        if group := self._group:
            group.close()
            self._sent_before += group.bytes_sent
            self._group = None
