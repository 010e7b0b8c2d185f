"""A whole run in miniature, without sockets or processes: the real coordinator, imitated roles, a random schedule.

Everything that can happen in any order does: messages are delivered late, roles and coordinator die at any point,
lines break, steps are applied by some workers and not yet by others. What a role holds is the history of the steps
in its weights, so that a step lost or counted twice is seen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from dataclasses import dataclass, field
from random import Random

from tricorn.control import instructions as s
from tricorn.control import messages as m
from tricorn.control.facts import Facts
from tricorn.control.intervals import Intervals
from tricorn.control.state import Coordinator
from tricorn.testing.clock import VirtualClock

SAMPLES_PER_STEP = 10


def facts(workers: int, servers: int, *, synchronous: bool) -> Facts:
    return Facts(
        workers=workers, servers=servers, synchronous=synchronous, samples=50, batch_size=SAMPLES_PER_STEP,
        steps_per_epoch=5, total_steps=15, evaluation_samples=12, checkpoint_seconds=4.0, checkpoint_steps=0,
        heartbeat_timeout=10.0, barren_restarts=1000,
    )  # fmt: skip


@dataclass
class Role:
    """One life of a role, as far as the coordinator can tell."""

    name: str
    incarnation: int
    history: list[int] | None = None  # the steps in the weights; None while there are none
    connected: bool = False
    inbox: deque = field(default_factory=deque)
    outbox: deque = field(default_factory=deque)
    epoch: int = -1  # that it was told to regroup for
    begin: m.Begin | None = None
    step: int = 0
    contributed: bool = False
    lent: deque = field(default_factory=deque)
    finished: bool = False
    evaluated: list[m.Evaluated] = field(default_factory=list)


class World(ABC):
    """``run`` lets the schedule decide everything until the coordinator has ended the run."""

    def __init__(self, random: Random, *, workers: int, servers: int, synchronous: bool, faults: int) -> None:
        self.random = random
        self.facts = facts(workers, servers, synchronous=synchronous)
        self.faults = faults
        self.clock = VirtualClock()
        self.roles: dict[str, Role] = {}
        self.dead: dict[str, int] = {}
        self.to_launcher: deque = deque()
        self.from_launcher: deque = deque()
        # What is durable.
        self.committed = Intervals()
        self.evaluated: dict[int, dict[str, float]] = {}
        self.checkpoints: dict[int, tuple[list[int], list[tuple[int, int]]]] = {}
        self.saved: dict[int, list[int]] = {}
        self.membership = 0
        self.outcome = ""
        self.deaths = 0  # of roles
        self._boot()

    # The coordinator and its launcher.

    def _boot(self) -> None:
        self.coordinator = Coordinator(
            self.facts, epoch=self.membership, committed=Intervals(self.committed.pairs),
            evaluated=set(self.evaluated), saved=max(self.checkpoints, default=-1), newest_checkpoint=self._newest,
        )  # fmt: skip
        self.to_launcher.clear()
        self.from_launcher.clear()
        for role in self.roles.values():
            role.connected = False
            role.inbox.clear()
            role.outbox.clear()
        alive = {role.name: role.incarnation for role in self.roles.values()}
        self._do(self.coordinator.launcher(m.Alive(roles=alive, dead=dict(self.dead)), self.clock.now()))

    def _newest(self) -> s.Checkpoint | None:
        if not self.checkpoints:
            return None
        step = max(self.checkpoints)
        return s.Checkpoint(step, str(step), self.checkpoints[step][1])

    def _do(self, instructions) -> None:
        for instruction in instructions:
            match instruction:
                case s.Send(role, message):
                    if role in self.roles and self.roles[role].connected:
                        self.roles[role].inbox.append(message)
                case s.Tell(message):
                    self.to_launcher.append(message)
                case s.BeginEpoch(epoch, committed, _):
                    assert epoch > self.membership
                    self.membership, self.committed = epoch, committed
                    self.evaluated = {k: v for k, v in self.evaluated.items() if k <= len(committed)}
                case s.Commit(steps, _):
                    for step in steps:
                        assert self.committed.add(step), f"step {step} is committed twice"
                case s.Publish(step, _, applied):
                    self.checkpoints[step] = (self.saved[step], applied)
                case s.Measured(step, values):
                    self.evaluated[step] = values
                case s.End(outcome, error):
                    assert error is None, error
                    self.outcome = outcome

    # What can happen next.

    def actions(self):
        if self.to_launcher:
            yield self._launcher_hears
        if self.from_launcher:
            yield self._coordinator_hears_launcher
        for role in list(self.roles.values()):
            if not role.connected:
                yield lambda r=role: self._connect(r)
            elif role.inbox:
                yield lambda r=role: self._role_hears(r)
            if role.outbox:
                yield lambda r=role: self._coordinator_hears(r)
            if role.begin is not None:
                yield lambda r=role: self._work(r)
        if self.faults:
            yield self._fault

    def run(self) -> None:
        for _ in range(60_000):
            if self.outcome:
                return
            choices = list(self.actions())
            if not choices or self.random.random() < 0.02:
                self.clock.advance(0.3)
                for role in self.roles.values():
                    if role.connected:
                        beat = m.Heartbeat(bytes_sent=0)
                        self._do(self.coordinator.report(role.name, role.incarnation, beat, self.clock.now()))
                self._do(self.coordinator.tick(self.clock.now()))
            else:
                self.random.choice(choices)()
        raise AssertionError(f"the run does not end: {self.coordinator.phase}, {self.committed.pairs}")

    def _fault(self) -> None:
        if self.random.random() > 0.1:
            return
        self.faults -= 1
        kind = self.random.choice(["coordinator", "role", "role", "line"])
        if kind == "coordinator":
            self._boot()
        elif self.roles:
            role = self.random.choice(list(self.roles.values()))
            if kind == "line" and role.connected:
                role.connected = False
                role.inbox.clear()
                role.outbox.clear()
                self.coordinator.disconnected(role.name, role.incarnation)
            elif kind == "role":
                self._die(role)

    def _die(self, role: Role) -> None:
        self.deaths += 1
        del self.roles[role.name]
        self.dead[role.name] = role.incarnation
        self.from_launcher.append(m.Exited(role=role.name, incarnation=role.incarnation, reason="killed"))

    def _launcher_hears(self) -> None:
        match self.to_launcher.popleft():
            case m.Start(role=name, incarnation=incarnation):
                self.roles[name] = Role(name, incarnation)
                self.dead.pop(name, None)
            case m.Kill(role=name, incarnation=incarnation):
                role = self.roles.get(name)
                if role and role.incarnation == incarnation:
                    self._die(role)

    def _coordinator_hears_launcher(self) -> None:
        self._do(self.coordinator.exited(self.from_launcher.popleft(), self.clock.now()))

    def _connect(self, role: Role) -> None:
        if self.coordinator.admits(role.name, role.incarnation):
            role.connected = True
            self._do(self.coordinator.connected(role.name, role.incarnation, self.clock.now()))

    def _coordinator_hears(self, role: Role) -> None:
        message = role.outbox.popleft()
        if role.connected:
            self._do(self.coordinator.report(role.name, role.incarnation, message, self.clock.now()))

    # What a role does.

    def _role_hears(self, role: Role) -> None:
        match order := role.inbox.popleft():
            case m.Regroup():
                role.epoch, role.begin, role.contributed, role.finished = order.epoch, None, False, False
                role.lent.clear()
                self._ready(role)
            case m.Begin() if order.epoch == role.epoch:
                role.begin, role.step = order, order.step
                self._restore(role, order)
                self._began(role, order)
            case m.Lease() if role.begin:
                role.lent.extend(order.steps)
            case m.Evaluate() if role.begin:
                self._evaluated(role, order.step, order.stop - order.start)
            case m.Save() if role.begin:
                self._save(role, order.step)

    @abstractmethod
    def _ready(self, role: Role) -> None: ...

    @abstractmethod
    def _restore(self, role: Role, begin: m.Begin) -> None: ...

    @abstractmethod
    def _began(self, role: Role, begin: m.Begin) -> None: ...

    @abstractmethod
    def _work(self, role: Role) -> None: ...

    def _evaluated(self, role: Role, step: int, samples: int) -> None:
        sums = {"loss": (samples * 1.0, float(samples))}
        share = m.Evaluated(epoch=role.epoch, step=step, samples=samples, sums=sums)
        role.evaluated.append(share)
        role.outbox.append(share)

    def _save(self, role: Role, step: int) -> None:
        self.saved[step] = list(role.history or [])
        role.outbox.append(m.Saved(epoch=role.epoch, step=step, files=[]))


class Replicas(World):
    """Data parallel: every worker has the whole history; a step happens when all have contributed to it."""

    def __init__(self, random: Random, *, workers: int, faults: int) -> None:
        super().__init__(random, workers=workers, servers=0, synchronous=True, faults=faults)

    def _ready(self, role: Role) -> None:
        held = [] if role.history is None else [len(role.history)]
        ready = m.Ready(epoch=role.epoch, part="model", held=held, address=("h", 1), evaluated=role.evaluated)
        role.outbox.append(ready)

    def _restore(self, role: Role, begin: m.Begin) -> None:
        match begin.source:
            case "initial":
                role.history = []
            case "checkpoint":
                role.history = list(self.checkpoints[int(begin.checkpoint or 0)][0])
            case "peer":
                if len(role.history or []) != begin.step or role.history is None:
                    role.history = list(range(begin.step))  # what the peer has, see below
        assert role.history == list(range(begin.step)), "the weights are not those of the step"

    def _began(self, role: Role, begin: m.Begin) -> None:
        role.finished = False
        if begin.evaluate:
            self._evaluated(role, begin.step, self.facts.evaluation_samples // self.facts.workers)

    def _work(self, role: Role) -> None:
        step, epoch = role.step, role.epoch
        if step == self.facts.total_steps:
            if not role.finished:
                role.finished = True
                if role.begin and role.begin.saved != step:
                    self._save(role, step)
                role.outbox.append(m.Finished(epoch=epoch, stopped=False, bytes_sent=0))
            return
        role.contributed = True
        peers = [r for r in self.roles.values() if r.begin and r.epoch == epoch and (r.contributed or r.step > step)]
        peers = [r for r in peers if r.step >= step]
        if len(peers) < self.facts.workers:
            return
        role.history.append(step)
        role.step, role.contributed = step + 1, False
        if role.name == "worker-0":
            role.outbox.append(m.Committed(epoch=epoch, upto=role.step, losses=[0.0]))
        if role.step % 4 == 0:
            self._save(role, role.step)
        if role.step % self.facts.steps_per_epoch == 0:
            self._evaluated(role, role.step, self.facts.evaluation_samples // self.facts.workers)


class Servers(World):
    """Asynchronous parameter server: each server has its own history; a push may reach some servers and not others."""

    def __init__(self, random: Random, *, workers: int, servers: int, faults: int) -> None:
        super().__init__(random, workers=workers, servers=servers, synchronous=False, faults=faults)

    def _ready(self, role: Role) -> None:
        if role.name.startswith("worker"):
            ready = m.Ready(epoch=role.epoch, part=None, held=[], address=("h", 1))
        else:
            held = [] if role.history is None else [role.step]
            applied = Intervals((step, step + 1) for step in role.history or []).pairs
            ready = m.Ready(epoch=role.epoch, part=role.name, held=held, address=("h", 1), applied=applied)
        role.outbox.append(ready)

    def _restore(self, role: Role, begin: m.Begin) -> None:
        if role.name.startswith("worker"):
            return
        if begin.source != "keep":
            role.history = [] if begin.checkpoint is None else list(self.checkpoints[int(begin.checkpoint)][0])
            assert sorted(role.history) == [n for low, high in begin.applied for n in range(low, high)]
        role.step = begin.generation

    def _began(self, role: Role, begin: m.Begin) -> None:
        if role.name.startswith("worker"):
            role.outbox.append(m.Want(epoch=begin.epoch, steps=2))

    def _work(self, role: Role) -> None:
        if not role.lent:
            return
        step = role.lent.popleft()
        servers = [self.roles.get(f"server-{i}") for i in range(self.facts.servers)]
        for server in self.random.sample(servers, len(servers)):
            if server is None or server.begin is None or server.epoch != role.epoch:
                role.lent.appendleft(step)  # the worker waits for it, or it died: then some have this step, others not
                return
            if self.faults and self.random.random() < 0.03:
                self.faults -= 1
                self._die(role)
                return
            if step not in server.history:
                server.history.append(step)
                server.outbox.append(m.Applied(epoch=server.epoch, steps=[step]))
        role.outbox.append(m.Trained(epoch=role.epoch, steps=[step], losses=[0.0]))
        role.outbox.append(m.Want(epoch=role.epoch, steps=1))
