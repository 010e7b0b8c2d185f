"""Clusters of this machine's two cores: as they are described to the planner, and as plans are run on them.

A name such as ``3-100-slow`` says: three hosts, links of 100 Mbit/s (``free``: without limit), and the last host at a
quarter of the others' speed. ``1`` is this machine itself. The hosts have equal parts of three quarters of the cores:
what joins and watches them, as switches and other people's machines would, takes from the rest, and not from them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from tricorn.engine.base import Engine
from tricorn.engine.hosts import HostsEngine
from tricorn.engine.local import LocalEngine
from tricorn.planner.cluster import Cluster
from tricorn.planner.cluster import Host as Described
from tricorn.testing.hosts import Host, RunningHost, hosts

SPEEDS = {"free": None, "1000": 1000.0, "100": 100.0}
EVERY = ("1", *(f"{n}-{speed}{slow}" for n in (2, 3, 4) for speed in SPEEDS for slow in ("", "-slow")))
# Each number of hosts, each speed and a slow host, in pairs of each with each of the others as far as six can have.
SOME = ("1", "2-free", "2-100-slow", "3-1000", "3-free-slow", "4-100", "4-1000-slow")
QUARTER = 0.25
GIVEN = 0.75  # of this machine's cores, to all hosts together
MEMORY = 4 * 10**9  # bytes of each host, which none of the jobs comes near
LATENCY = 2e-5  # seconds that veth and switch add to loopback, on which collectives are measured
HEADERS = 66  # bytes of a packet that are Ethernet's, IPv4's and TCP's
ENDED_SECONDS = 2.0


class Kept(LocalEngine):
    """An engine that is still warm for the next run, of the same job or another one of its file."""

    def next(self, job: tuple[str, str]) -> None:
        """What the next run trains."""
        self._job = job

    def close(self, patience: float = ENDED_SECONDS) -> None:
        """The run is over."""
        self.rest(patience)

    def end(self) -> None:
        super().close()


@dataclass(frozen=True)
class Place:
    """``hosts`` are what the planner looks at, none for this machine; ``given`` what it may not choose.

    ``traffic`` is the bytes of payload so far over each host's interface, received and sent.
    """

    hosts: tuple[RunningHost, ...]
    given: dict[str, int]
    engine: Callable[[tuple[str, str]], Engine]
    traffic: Callable[[], dict[str, tuple[int, int]]]


def cores_of(name: str) -> list[float]:
    """Of each host, what is given of this machine's parted among them."""
    count = int(name.partition("-")[0])
    each = min(1.0, GIVEN * len(os.sched_getaffinity(0)) / count)
    return [each] * (count - 1) + [each * (QUARTER if name.endswith("-slow") else 1.0)]


def described(name: str) -> Cluster | None:
    """What a person would write into a cluster file."""
    if name == "1":
        return None
    mbit = SPEEDS[name.split("-")[1]]
    all_cores = cores_of(name)
    return Cluster(
        described=True,
        hosts=tuple(
            Described(name=f"host{number}", cores=all_cores[0], speed=cores / all_cores[0], memory=MEMORY, mbit=mbit,
                      latency=LATENCY)
            for number, cores in enumerate(all_cores)
        ),
    )  # fmt: skip


@contextlib.contextmanager
def place(name: str, job: tuple[str, str]) -> Iterator[Place]:
    """Bring the cluster up. Raises ClusterError where hosts cannot be made."""
    with contextlib.ExitStack() as stack:
        if name == "1":
            engine = Kept(job)
            stack.callback(engine.end)
            yield Place((), {}, lambda job: _ready([engine], job), dict)
            return
        mbit = SPEEDS[name.split("-")[1]]
        running = stack.enter_context(hosts(*(Host(mbit=mbit, cores=cores) for cores in cores_of(name))))
        engines = []
        for host in running:
            engines.append(Kept(job, host=host.address, prefix=host.prefix, hosts=len(running)))
            stack.callback(engines[-1].end)
        yield Place(
            running,
            {"threads": 1},  # the kernel gives a host its part of the cores, and each of its processes sees them all
            lambda job: _ready(engines, job),
            lambda: {f"host{number}": _payload(host) for number, host in enumerate(running)},
        )


def _payload(host: RunningHost) -> tuple[int, int]:
    """What the kernel counts at the interface, less headers: how many a byte has depends on where packets are cut."""
    shown = host.run(["cat", "/proc/net/dev"], check=True, capture_output=True, text=True).stdout
    received, packets, *_, sent, sent_packets = [*map(int, shown.partition("eth0:")[2].split()[:10])]
    return received - HEADERS * packets, sent - HEADERS * sent_packets


def _ready(engines: list[Kept], job: tuple[str, str]) -> Engine:
    for engine in engines:
        engine.next(job)
    return HostsEngine(engines) if len(engines) > 1 else engines[0]
