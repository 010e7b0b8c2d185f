"""The engine of several hosts: a warm process on each, and roles spread over them.

A host is whatever a command can be started on with a prefix, sharing this machine's files: those of tricorn.testing.
"""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tricorn.control import messages as m
from tricorn.engine.base import Engine, Gone, JobFacts, RoleSpec
from tricorn.engine.local import LocalEngine
from tricorn.errors import ClusterError, UsageError
from tricorn.job import Job
from tricorn.plan import Plan

T = TypeVar("T")
KILL_SECONDS = 2.0  # a host that has not ended a role so long after it was told to is taken for lost


class Place(Protocol):
    """A host: the address that roles there listen at, and what to put before a command to start it there."""

    address: str
    prefix: tuple[str, ...]


@dataclass(frozen=True)
class OnHosts:
    """Makes engines that spread roles over these hosts."""

    places: tuple[Place, ...]

    def __call__(self, job: Job | tuple[str, str]) -> Engine:
        count = len(self.places)
        return HostsEngine(
            [LocalEngine(job, host=place.address, prefix=place.prefix, hosts=count) for place in self.places]
        )


def on_hosts(*places: Place) -> OnHosts:
    """For ``tricorn.train(job, engine=on_hosts(a, b), ...)``, and for ``tricorn.plan``.

    Raises UsageError without any host.
    """
    if not places:
        raise UsageError("no hosts are given", remedy="Give at least one, as in on_hosts(a, b).")
    return OnHosts(places)


class Placement:
    """Which host each role lives on: by the plan's ``hosts`` the workers one after another, then the servers; the
    coordinator on the first of all.

    A role that fell silent there is better off on the next host, for the fault may be the host's or its link's.
    """

    def __init__(self, hosts: int, lost: Iterable[int] = ()) -> None:
        self._hosts = hosts
        self._moves: dict[str, int] = {}
        self.lost = {*lost}

    def host(self, role: str, plan: Plan) -> int:
        """Where the role's next life is. Of the hosts that are not lost, at least one has to be left."""
        if role == "coordinator":
            return 0
        kind, _, index = role.partition("-")
        wanted = plan.hosts or tuple(range(self._hosts))
        ring = [*wanted, *(host for host in range(self._hosts) if host not in wanted)]
        first = (int(index) + (plan.workers if kind == "server" else 0)) % len(wanted) + self._moves.get(role, 0)
        turned = (ring[place % len(ring)] for place in range(first, first + len(ring)))
        return next(host for host in turned if host not in self.lost)

    def silent(self, role: str) -> None:
        """The role had to be ended where it was."""
        self._moves[role] = self._moves.get(role, 0) + 1


class HostsEngine:
    """Fulfils ``tricorn.engine.base.Engine``.

    A host that does not answer is given up, and its roles are told as gone; without the first, on which the coordinator
    lives, the run ends.
    """

    def __init__(self, engines: Sequence[LocalEngine], clock: Callable[[], float] = time.monotonic) -> None:
        self._engines = engines
        self._clock = clock
        self._placement = Placement(len(engines))
        self._homes: dict[str, tuple[int, int]] = {}  # of a role that lives: host, incarnation
        self._overdue: dict[str, float] = {}  # when a role that was to end should be gone
        self._news = select.epoll()
        for engine in engines:
            self._news.register(engine, select.EPOLLIN)

    @property
    def pids(self) -> dict[str, int]:
        return {role: pid for host in self._living() for role, pid in self._engines[host].pids.items()}

    def load(self, plan: Plan) -> tuple[JobFacts, m.Address]:
        if lost := [self._engines[host].host for host in sorted(self._placement.lost)]:
            raise ClusterError(f"lost: {', '.join(lost)}", remedy="Leave it out, or start anew when it is back.")
        for engine in self._engines:
            engine.begin_load(plan)
        (facts, coordinator), *others = _all_of([engine.loaded for engine in self._engines])
        for engine, (other, _) in zip(self._engines[1:], others, strict=True):
            if other != facts:
                raise UsageError(
                    f"the job is not the same on {engine.host} as on {self._engines[0].host}",
                    remedy="Make the job file depend on nothing but what is in it: no clock, no unseeded numbers.",
                )
        return facts, coordinator

    def start(self, spec: RoleSpec) -> None:
        host = self._placement.host(spec.role, spec.plan)
        self._homes[spec.role] = host, spec.incarnation
        self._engines[host].start(spec)

    def kill(self, role: str, incarnation: int) -> None:
        host, life = self._homes.get(role, (0, -1))
        if life == incarnation:
            self._placement.silent(role)
            self._engines[host].kill(role, incarnation)
            self._overdue.setdefault(role, self._clock() + KILL_SECONDS)

    def gone(self) -> list[Gone]:
        found: list[Gone] = []
        for host in self._living():
            try:
                found += self._engines[host].gone()
            except ClusterError as error:
                found += self._give_up(host, str(error))
        for role in {gone.role for gone in found}:
            self._homes.pop(role, None)
            self._overdue.pop(role, None)
        for role, until in [*self._overdue.items()]:
            if self._clock() > until and role in self._homes:
                found += self._give_up(self._homes[role][0], "it does not answer")
        return found

    def fileno(self) -> int:
        return self._news.fileno()

    def rest(self, patience: float = 0.0) -> None:
        """As of ``LocalEngine``, on all hosts."""
        for host in self._living():
            self._engines[host].rest(patience)
        self._homes.clear()
        self._overdue.clear()
        self._placement = Placement(len(self._engines), self._placement.lost)

    def close(self) -> None:
        self._news.close()
        for host in self._living():
            self._engines[host].close()

    def _living(self) -> list[int]:
        return [host for host in range(len(self._engines)) if host not in self._placement.lost]

    def _give_up(self, host: int, why: str) -> list[Gone]:
        """Never use the host again; the roles that were there."""
        address = self._engines[host].host
        self._placement.lost.add(host)
        self._news.unregister(self._engines[host])
        self._engines[host].close(patience=0)
        if host == 0:
            raise ClusterError(
                f"the host of the coordinator, {address}, is lost: {why}",
                remedy="`tricorn train --resume RUN` goes on from the last checkpoint.",
            )
        there = [(role, life) for role, (home, life) in self._homes.items() if home == host]
        for role, _ in there:
            del self._homes[role]
            self._overdue.pop(role, None)
        return [Gone(role, life, f"its host {address} is lost: {why}") for role, life in there]


def _all_of(asked: Sequence[Callable[[], T]]) -> list[T]:
    """What all return, or the first error, once all have answered."""
    found: list[T] = []
    errors: list[Exception] = []
    for ask in asked:
        try:
            found.append(ask())
        except (UsageError, ClusterError) as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return found
