"""What every cost stands on: a job's profile, this machine's links, and the cluster that a plan is for.

Legend: p workers, n bytes of something, b samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from math import prod
from typing import NamedTuple

import msgspec

from tricorn.plan import Plan
from tricorn.planner.cluster import Cluster, Host
from tricorn.planner.correct import Seen
from tricorn.planner.links import Links
from tricorn.planner.load import BUSY
from tricorn.planner.profile import Profile
from tricorn.state import cores

AHEAD = 1e-3  # seconds: batches that take longer to make are made beside computing (worker/batches.py)
# Of a gradient's bytes, those that travel: what the encodings say of themselves; PowerSGD's rank 4 of square matrices.
ENCODED = {"none": 1.0, "bf16": 0.5, "fp16": 0.5, "int8": (1 + 4 / 256) / 4, "topk": 0.02, "powersgd": 0.05}
SLOW_LINK = 5e9 / 8  # bytes a second
MODEL_SCATTER = 0.05  # what measuring again an hour later moves, beside the scatter within a measurement


class Placed(NamedTuple):
    """The hosts of all workers and of all servers, and how many workers each host has."""

    workers: list[int]
    servers: list[int]
    working: Counter[int]


@dataclass(frozen=True)
class Ground:
    """``cluster`` may be elsewhere: then speeds are this machine's times what is said, or was measured, of its hosts.

    ``seen`` is what runs of the job have taught.
    """

    profile: Profile
    links: Links
    cluster: Cluster
    seen: Seen = field(default_factory=dict)
    # Thousands of workers are asked for one by one, and are of a few kinds.
    _placed: dict[object, Placed] = field(default_factory=dict, init=False, repr=False, compare=False)
    _latest: list[tuple[Plan, Placed]] = field(default_factory=list, init=False, repr=False, compare=False)
    _orders: dict[tuple[int, int], list[tuple[int, ...] | None]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _computing: dict[object, tuple[float, float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def busy(self) -> float:
        """The share of this machine that others took while job and machine were measured."""
        return max(self.profile.busy, self.links.busy)

    def jitter(self, scatter: float) -> float:
        """How far steps of a run scatter if computing was measured to scatter so.

        Beside others it says nothing of that: it is doubt of what was measured, by which all steps are as wrong.
        """
        return 0.0 if self.profile.busy > BUSY else scatter

    def places(self, plan: Plan) -> tuple[list[int], list[int]]:
        """The host of each worker and of each server."""
        placed = self._place(plan)
        return placed.workers, placed.servers

    def placements(self, plan: Plan) -> list[Plan]:
        """The plan once for each choice of hosts that is worth a thought."""
        key = plan.workers, plan.servers
        if key not in self._orders:
            self._orders[key] = self.cluster.orders(*key)
        return [msgspec.structs.replace(plan, hosts=hosts) for hosts in self._orders[key]]

    def spread(self, plan: Plan) -> int:
        """On how many hosts the workers are."""
        return len(self._place(plan).working)

    def apart(self, plan: Plan) -> bool:
        """Whether its roles are on several hosts."""
        placed = self._place(plan)
        return len({*placed.working, *placed.servers}) > 1

    def hosts(self, plan: Plan) -> list[int]:
        """One of each kind of hosts that workers of the plan are on."""
        working = self._place(plan).working
        return list({(self.kind(host), there): host for host, there in working.items()}.values())

    @property
    def unlike(self) -> bool:
        """Whether some hosts compute faster than others."""
        return len({(host.speed, host.cores) for host in self.cluster.hosts}) > 1

    @property
    def slow_links(self) -> bool:
        """Whether it can pay to send less."""
        hosts = self.cluster.hosts
        return len(hosts) > 1 and min(host.bytes_per_second for host in hosts) < SLOW_LINK

    def server_counts(self, workers: int) -> list[int]:
        """How many servers are worth a thought beside so many workers."""
        hosts = len(self.cluster.hosts)
        most = min(workers, hosts if hosts > 1 else int(self.cluster.cores) // 2)
        return sorted({1, *(1 << power for power in range(most.bit_length()) if 1 << power <= most), max(1, most)})

    def kind(self, host: int) -> tuple[float, ...]:
        """What hosts that are alike have in common."""
        its = self.cluster.hosts[host]
        return its.cores, its.speed, its.bytes_per_second, its.latency, its.stalls, its.stall_times

    def threads(self, plan: Plan, host: int) -> int:
        """Of each worker on that host, as engines have it: all as many as where there are most."""
        there = -(-plan.workers // len(plan.hosts or self.cluster.hosts))
        return plan.threads or cores.threads(self.cluster.hosts[host].cores, there)

    def _place(self, plan: Plan) -> Placed:
        for known, placed in self._latest:  # asked for each worker, and many hosts take long to be looked up by
            if known is plan:
                return placed
        key = plan.workers, plan.servers, plan.hosts
        if key not in self._placed:
            workers, servers = self.cluster.place(*key)
            self._placed[key] = Placed(workers, servers, Counter(workers))
        self._latest[:] = [(plan, self._placed[key])]
        return self._placed[key]

    def computing(self, plan: Plan, samples: float, *, served: bool = False) -> tuple[list[float], float]:
        """For each worker the seconds of forward and backward of so many samples, and their scatter.

        ``served``: rows of tables come from servers.
        """
        found: list[float] = []
        scatter = 0.0
        for host in self.places(plan)[0]:
            seconds, scatter = self.on(host, plan, samples, served=served)
            found.append(seconds)
        return found, scatter

    def on(
        self, host: int, plan: Plan, samples: float, *, served: bool = False, direct: bool = False
    ) -> tuple[float, float]:
        """The same of one worker on that host. ``direct``: as of ``Profile.computing``."""
        there, threads = self._place(plan).working[host], self.threads(plan, host)
        key = self.kind(host), there, threads, samples, served, direct
        if key not in self._computing:
            crowd = self._crowd(host, there, threads)
            seconds, scatter = self.profile.computing(*crowd, samples, served=served, direct=direct)
            self._computing[key] = seconds * self.slowness(host, there), scatter
        return self._computing[key]

    def slowness(self, host: int, working: int) -> float:
        """How many times as long one of so many processes takes on that host as on this machine."""
        its = self.cluster.hosts[host]
        crowding = max(1.0, working / its.cores) if self.cluster.described else 1.0
        return crowding / its.speed

    def slowest(self, hosts: list[int]) -> float:
        """The same of the slowest of processes on these hosts, each named as often as it has any."""
        return max(self.slowness(host, there) for host, there in Counter(hosts).items())

    def together(self, hosts: Collection[int]) -> float:
        """The share of the time in which one of these hosts computes that all others may, too.

        One that is granted less than a core stands still for the rest, and not when others do.
        """
        granted = [*map(self.granted, hosts)]
        return prod(granted) / min(granted)

    def granted(self, host: int) -> float:
        """The share of the time for which one process of that host may compute."""
        return min(1.0, self.cluster.hosts[host].cores) if self.cluster.described else 1.0

    def awake(self, servers: list[int], workers: list[int]) -> float:
        """How many times as long as here the slowest of servers on these hosts takes, once workers have computed.

        One that shares its host with no worker has saved up what the host is granted.
        """
        computing = set(workers)
        return max(
            self.slowness(host, count) * (1.0 if host in computing else self.granted(host))
            for host, count in Counter(servers).items()
        )

    def updating(self, plan: Plan, n: float, host: int) -> float:
        """Seconds to update n bytes of parameters in a worker on that host."""
        there = self._place(plan).working[host]
        crowd = self._crowd(host, there, self.threads(plan, host))
        return self.profile.updating(*crowd, n) * self.slowness(host, there)

    def _crowd(self, host: int, working: int, threads: int) -> tuple[int, int]:
        """How many workers at once here, with how many threads each, are like so many on that host.

        Those of a described host have its own cores: more than this machine has are like all that it has.
        """
        if not self.cluster.described:
            return working, threads
        threads = min(threads, self.links.cores)
        return max(1, min(working, int(self.cluster.hosts[host].cores), self.links.cores // threads)), threads

    def coding(self, how: str, n: float) -> float:
        """Seconds to encode and decode n bytes of a gradient that workers sum."""
        return self.links.seconds(f"coding/{how}", 1, n) if how != "none" and n else 0.0

    def plain_updating(self, n: float) -> float:
        """The part of every measured exchange that is the update by plain SGD."""
        return self.links.seconds("update", 1, n)

    def exchanging(self, way: str, workers: int, n: float) -> tuple[float, float]:
        """Seconds of a step of that way that are neither computing nor updating, and their scatter."""
        seconds = self.links.seconds(f"exchange/{way}", workers, n)
        curve = self.links.curve(f"exchange/{way}", workers)
        part = n if way in ("ps", "asp", "mp") else n / workers
        return max(seconds - self.plain_updating(part), seconds / 4), curve.scatter

    def reading(self, way: str, workers: int, n: float) -> tuple[float, float]:
        """Seconds of a step of that way that reads n bytes of rows and updates them, and their scatter."""
        measured = Links(cores=self.links.cores, curves=self.profile.rows)
        known, new = (measured.seconds(f"{kind}/{way}", workers, n) for kind in ("known", "new"))
        return known + self.profile.new_rows * max(0.0, new - known), measured.curve(f"known/{way}", workers).scatter

    def loading(self, samples: float, beside: float) -> float:
        """Seconds for which a worker waits for a batch, made while it computes for so long if it is slow."""
        seconds = self.profile.load.at(samples)
        return seconds if seconds <= AHEAD else max(0.0, seconds - beside) + AHEAD

    def wire(self, n: float, hosts: list[int], messages: int) -> float:
        """Seconds for n bytes over the slowest link of some hosts, after so many latencies."""
        chosen = (self.cluster.hosts[host] for host in hosts)
        return max(n / host.bytes_per_second + messages * host.latency for host in chosen)

    def base(self, way: str, role: str = "worker") -> int:
        """Bytes of a role beside its model's."""
        return self.profile.base_bytes + self.links.overhead.get(f"{way}/{role}", 0)

    def notes(self, way: str, workers: int, n: float) -> tuple[str, ...]:
        """Where an exchange goes beyond what was measured."""
        found = []
        counts = self.links.counts(f"exchange/{way}")
        if counts and workers > counts[-1]:
            found.append(f"{workers} workers, of which at most {counts[-1]} were measured")
        if counts and n > 2 * self.links.curve(f"exchange/{way}", workers).points[-1].x:
            found.append(f"{n / 1e6:,.0f} MB to exchange, of which a smaller amount was measured")
        if self.profile.device != "cpu":
            found.append(f"exchanging from {self.profile.device}")
        if self.cluster.described and (most := max(host.cores for host in self.cluster.hosts)) > self.links.cores:
            found.append(f"hosts of up to {most:g} cores, of which {self.links.cores} were measured")
        if self.cluster.described and not self.cluster.present:
            found.append("links between hosts, and speeds, that the cluster file states")
        return tuple(found)

    def host(self, index: int) -> Host:
        return self.cluster.hosts[index]


def combined(*parts: tuple[float, float]) -> float:
    """The scatter of a sum of (seconds, scatter): errors that do not know of each other, and the model's own."""
    total = sum(seconds for seconds, _ in parts) or 1.0
    square = sum((seconds * scatter) ** 2 for seconds, scatter in parts) / total**2
    return float((square + MODEL_SCATTER**2) ** 0.5)
