"""What roles send each other in a step, and what of it passes the links of their hosts.

A strategy lists what it sends, as the transports send it: ranks of one host through its memory, hosts among each other
by one leader each (comm/within.py, comm/mesh.py, comm/tiers.py).

Legend: p ranks of a group on h hosts, of which host i has k; n bytes of a tensor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tricorn.planner.ground import Ground

SMALL = 32 * 1024  # bytes up to which a sum takes one round, in which everyone tells everyone (comm/mesh.py, shared.py)


class Traffic:
    """``sent``: bytes that roles send each other in a step, as runs count them."""

    def __init__(self) -> None:
        self.sent = 0.0
        self._out: dict[int, float] = {}
        self._in: dict[int, float] = {}

    @property
    def fullest(self) -> tuple[int, float]:
        """The host whose link has most to carry, and the bytes of its busier direction; 0 where nothing leaves one."""
        over = {host: max(size, self._in[host]) for host, size in self._out.items()}
        return max(over.items(), key=lambda item: item[1], default=(0, 0.0))

    def links(self, ground: Ground) -> dict[str, float]:
        """The same as a prediction has it."""
        host, size = self.fullest
        return {ground.host(host).name: size} if size else {}

    def add(self, other: Traffic) -> None:
        """What others send in the same step."""
        self.sent += other.sent
        for host, size in other._out.items():
            self._pass(host, size, other._in[host])

    def part(self, times: float) -> Traffic:
        """As of a step, where all this is sent so often in one."""
        found = Traffic()
        found.sent = self.sent * times
        found._out = {host: size * times for host, size in self._out.items()}
        found._in = {host: size * times for host, size in self._in.items()}
        return found

    def send(self, source: int, target: int, n: float) -> None:
        """From a role on one host to another, on the same or another host."""
        self.sent += n
        if source != target:
            self._pass(source, n, 0.0)
            self._pass(target, 0.0, n)

    def all_reduce(self, hosts: Sequence[int], n: float) -> None:
        """``hosts``: those of the group's ranks."""
        p, there = len(hosts), Counter(hosts)
        h = len(there)
        if h == 1:
            self.sent += _summed(p, n)
            return
        if h < p:  # within each host before, and to all of it after
            self.sent += sum(_summed(k, n) + (k - 1) * n for k in there.values())
        self.sent += _summed(h, n)
        for host in there:
            self._pass(host, _summed(h, n) / h, _summed(h, n) / h)

    def reduce_scatter(self, hosts: Sequence[int], n: float) -> None:
        for host, own, others in self._shards(hosts, n, lambda k, p: _summed(k, n) + (k - 1) * n / p):
            self._pass(host, others, own)

    def all_gather(self, hosts: Sequence[int], n: float) -> None:
        for host, own, others in self._shards(hosts, n, lambda k, p: (k - 1) * (1 / p + 1) * n):
            self._pass(host, own, others)

    def _shards(
        self, hosts: Sequence[int], n: float, within: Callable[[int, int], float]
    ) -> Iterator[tuple[int, float, float]]:
        """By host, the bytes of its ranks' shards, once for each other host, and those of the shards of all others.

        ``within``: what k of p ranks that share a host send each other.
        """
        p, there = len(hosts), Counter(hosts)
        h = len(there)
        self.sent += ((p if h == 1 else h) - 1) * n
        if 1 < h < p:
            self.sent += sum(within(k, p) for k in there.values())
        for host, k in there.items() if h > 1 else ():
            yield host, (h - 1) * k / p * n, (1 - k / p) * n

    def all_to_all(self, hosts: Sequence[int], n: float) -> None:
        """Of n bytes each rank has an even part for each."""
        p = len(hosts)
        self.sent += (p - 1) * n
        for host, k in Counter(hosts).items():
            if k < p:
                self._pass(host, k * (p - k) / p * n, k * (p - k) / p * n)

    def ask(
        self, askers: Sequence[int], holders: Mapping[int, float], *, up: float, down: float, here: float
    ) -> None:  # fmt: skip
        """Each asker tells all holders ``up`` bytes and gets ``down``; ``here`` instead of both on the same host.

        ``askers``: their hosts. ``holders``: by host, the part of all this that is of roles there.
        """
        working, m, whole = Counter(askers), len(askers), sum(holders.values())
        for host in {*working, *holders}:
            a, f = working[host], holders.get(host, 0.0)
            asked, answered = a * (whole - f), f * (m - a)
            self.sent += asked * (up + down) + a * f * here
            if m > a or whole > f:
                self._pass(host, asked * up + answered * down, asked * down + answered * up)

    def _pass(self, host: int, out: float, into: float) -> None:
        self._out[host] = self._out.get(host, 0.0) + out
        self._in[host] = self._in.get(host, 0.0) + into


def _summed(p: int, n: float) -> float:
    """Bytes that p ranks send of each other's, one leader a host or all on one, to have a sum everywhere."""
    return (p if n <= SMALL else 2) * (p - 1) * n
