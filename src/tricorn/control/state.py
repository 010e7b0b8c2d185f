"""The coordinator as a state machine: what happened goes in, what to do comes out. No socket, no clock, no file.

    waiting --launcher--> forming --all ready--> running --all finished--> ended
                             ^                      |
                             +------ a loss --------+

Each time a role is lost or returns, a new membership epoch forms: everybody stops, says what it holds, and all go
on together from the newest step that is wholly held (resume.py), or else from the newest checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable

from tricorn.control import messages as m
from tricorn.control.evaluations import Evaluations
from tricorn.control.facts import Facts
from tricorn.control.instructions import (
    BeginEpoch,
    Checkpoint,
    Commit,
    End,
    Instruction,
    Measured,
    Note,
    Publish,
    Send,
    Tell,
    Trace,
)  # fmt: skip
from tricorn.control.intervals import Intervals
from tricorn.control.leases import Leases
from tricorn.control.members import Member, Members
from tricorn.control.resume import LOST, Source, resume_point
from tricorn.errors import CheckpointDamaged, RoleFailed


class Coordinator:
    """Each method is an event; it returns the instructions that follow, in order.

    ``newest_checkpoint`` is asked when the state is lost; it returns the newest one that can be read, None if none
    was ever published, and raises CheckpointDamaged if none that was can be read. ``saved`` is the step of the newest.
    """

    def __init__(
        self,
        facts: Facts,
        *,
        epoch: int,
        committed: Intervals,
        evaluated: set[int],
        saved: int,
        newest_checkpoint: Callable[[], Checkpoint | None],
    ) -> None:
        self.facts = facts
        self.phase = "waiting"
        self.epoch = epoch  # the newest membership epoch ever begun
        self.members = Members.of(facts.workers, facts.servers)
        self.committed = committed
        self._evaluations = Evaluations(facts, evaluated)
        self._newest_checkpoint = newest_checkpoint
        self._saved = saved
        self._saving: dict[int, dict[str, list[m.File]]] = {}
        self._leases: Leases | None = None
        self._task = ""  # of an asynchronous run that stands still: evaluate or save
        self._generation = 0
        self._barren = 0
        self._stopping = False
        self._regroup_at: float | None = None
        self._saved_at = 0.0
        self._save_wished = False
        self._formed = 0.0
        self._broken = ""
        self._why = _BEGINS
        self._out: list[Instruction] = []

    # Events.

    def launcher(self, alive: m.Alive, now: float) -> list[Instruction]:
        """The launcher connects and says what it runs."""
        for role, incarnation in alive.roles.items():
            if role in self.members.roles:
                self.members.begin_life(role, incarnation, now)
        for role, incarnation in alive.dead.items():
            if role in self.members.roles:
                self.members.roles[role].incarnation = incarnation
        if self.phase != "ended":
            self._regroup(now, _BEGINS)
        return self._take()

    def admits(self, role: str, incarnation: int) -> bool:
        """Whether a role that calls may speak: not if it is a stranger, or a life that is over."""
        member = self.members.current(role, incarnation)
        return member is not None and not member.killed

    def connected(self, role: str, incarnation: int, now: float) -> list[Instruction]:
        """A role that is admitted has connected."""
        member = self.members.roles[role]
        member.connected, member.heard = True, now
        if self.phase == "running":
            self._regroup(now, f"{role} came back")
        elif self.phase == "forming":
            self._out.append(Send(role, m.Regroup(epoch=self.epoch)))
        elif self.phase == "ended":
            self._out.append(Send(role, m.Shutdown()))
        return self._take()

    def disconnected(self, role: str, incarnation: int) -> None:
        member = self.members.current(role, incarnation)
        if member:
            member.connected = False

    def exited(self, event: m.Exited, now: float) -> list[Instruction]:
        """The launcher saw a process end."""
        member = self.members.current(event.role, event.incarnation)
        if member is None:
            return []
        member.alive = member.connected = False
        if self.phase == "ended" or member.finished:
            return self._take()
        member.stillborn += member.ready is None
        if member.stillborn > self.facts.barren_restarts:
            message = f"{event.role} ended {member.stillborn} times before it was ready; last: {event.reason}"
            self._end("failed", m.failed(RoleFailed(message)))
            return self._take()
        self._out.append(Tell(m.Notice(text=f"{event.role} is gone ({event.reason}); it is replaced")))
        self._lose(now, f"{event.role} is gone ({event.reason})")
        return self._take()

    def storage_failed(self, error: m.Failed) -> list[Instruction]:
        """The run's folder cannot be written."""
        if self.phase != "ended":
            self._end("failed", error)
        return self._take()

    def stop(self, now: float) -> list[Instruction]:
        """Somebody interrupts the run: save at the next step, or as soon as one can begin, then end."""
        self._stopping = True
        if self.phase == "running":
            if self._leases is None:
                self._out.append(Send("worker-0", m.Wish(checkpoint=False, stop=True)))
            else:
                self._advance(now)
        elif self.phase == "waiting":
            self._end("stopped", None)
        return self._take()

    def report(self, role: str, incarnation: int, message: m.Report, now: float) -> list[Instruction]:
        """A role says something. What an old life or an old membership epoch says is dropped."""
        member = self.members.current(role, incarnation)
        if member is None or self.phase == "ended":
            return []
        member.heard = now
        if isinstance(message, m.Heartbeat):
            member.bytes_sent = message.bytes_sent
            member.peak_bytes = max(member.peak_bytes, message.peak_bytes)
        elif isinstance(message, m.Failed):
            self._end("failed", message)
        elif message.epoch == self.epoch:
            if isinstance(message, m.Ready):
                if self.phase == "forming":
                    member.ready, member.stillborn = message, 0
                    self._begin_if_ready(now)
            elif self.phase == "running":
                self._running(member, message, now)
        return self._take()

    def tick(self, now: float) -> list[Instruction]:
        """Time passes: suspect the silent, wish for a checkpoint when one is due."""
        if self.phase not in ("forming", "running"):
            return []
        for member in self.members.roles.values():
            if member.alive and not member.killed and not member.finished and (reason := self._suspicion(member, now)):
                member.killed = True
                self._out.append(Tell(m.Notice(text=f"{member.role} {reason}; it is ended and replaced")))
                self._out.append(Tell(m.Kill(role=member.role, incarnation=member.incarnation)))
        if self._regroup_at is not None and now >= self._regroup_at:
            self._lose(now, self._broken)
        elif self.phase == "running" and not self._save_wished and now - self._saved_at > self.facts.checkpoint_seconds:
            self._save_wished = True
            if self._leases is None:
                self._out.append(Send("worker-0", m.Wish(checkpoint=True, stop=False)))
            else:
                self._advance(now)
        return self._take()

    def _suspicion(self, member: Member, now: float) -> str:
        """Why a role is taken for lost though its process is there; empty if it is not."""
        if now - member.heard > (self.facts.heartbeat_timeout if member.connected else self.facts.start_timeout):
            return "is not heard from"
        # Who has not been ready once is building its model, and may take its time as long as its heart beats.
        stuck = self.phase == "forming" and member.ready is not None and member.ready.epoch != self.epoch
        if stuck and now - self._formed > self.facts.regroup_timeout:
            return f"has not left its step for {self.facts.regroup_timeout:g} s"
        return ""

    # Membership.

    def _lose(self, now: float, why: str) -> None:
        # Several that die together are one loss; who dies while a membership epoch forms counts for itself.
        self._barren += self.phase == "running"
        if self._barren > self.facts.barren_restarts:
            message = f"{self._barren} losses in a row without a step in between; the last: {why}"
            self._end("failed", m.failed(RoleFailed(message)))
        else:
            self._regroup(now, why)

    def _regroup(self, now: float, why: str) -> None:
        self.epoch += 1
        self.phase = "forming"
        self._formed = now
        self._regroup_at = None
        self._why = why
        for member in self.members.roles.values():
            if not member.alive:
                self.members.begin_life(member.role, member.incarnation + 1, now)
                self._out.append(Tell(m.Start(role=member.role, incarnation=member.incarnation + 1)))
            else:
                member.finished = False
                if member.connected:
                    self._out.append(Send(member.role, m.Regroup(epoch=self.epoch)))

    def _begin_if_ready(self, now: float) -> None:
        ready = self.members.all_ready(self.epoch)
        if ready is None:
            return
        source = resume_point(ready)
        checkpoint = None
        if source is LOST:
            try:
                checkpoint = self._go_back()
            except CheckpointDamaged as error:
                self._end("failed", m.failed(error))
                return
        elif self.facts.synchronous:
            self.committed = Intervals([(0, source.step)])
        if not self.facts.synchronous:
            servers = [server.role for server in self.members.servers()]
            held = {s: self.committed if source is LOST else Intervals(ready[s].applied) for s in servers}
            self._leases = Leases(held)
            self.committed = self._leases.committed
        step = len(self.committed)
        self._evaluations.go_back(step)
        self._saving.clear()
        self._task = ""
        self._saved_at, self._save_wished = now, False
        self.phase = "running"
        where = f"{_SOURCES[self._kind(source, checkpoint)]} at step {step}"
        event = f"{self._why}; {where}"
        if step or self._why != _BEGINS:
            self._out.append(Tell(m.Notice(text=f"going on {where}")))
        self._out.append(BeginEpoch(self.epoch, Intervals(self.committed.pairs), event))
        begin = m.Begin(
            epoch=self.epoch,
            workers=[ready[w.role].address for w in self.members.workers()],
            servers=[ready[s.role].address for s in self.members.servers()],
            step=step, source=self._kind(source, checkpoint), peers=source.peers,
            checkpoint=checkpoint.folder if checkpoint else None,
            generation=self._generation, applied=self.committed.pairs,
            evaluate=self._evaluations.due(step), saved=self._saved,
        )  # fmt: skip
        self._out += [Send(role, begin) for role in self.members.roles]
        for role, report in ready.items():
            for share in report.evaluated:
                if share.step <= step:
                    self._judge(role, share)
        if self.facts.synchronous and self._stopping:
            self._out.append(Send("worker-0", m.Wish(checkpoint=False, stop=True)))
        self._advance(now)

    def _kind(self, source: Source, checkpoint: Checkpoint | None) -> str:
        if source is LOST:
            return "checkpoint" if checkpoint else "initial"
        return source.kind

    def _go_back(self) -> Checkpoint | None:
        checkpoint = self._newest_checkpoint()
        self._saved = checkpoint.step if checkpoint else -1
        self.committed = Intervals(checkpoint.applied if checkpoint else [])
        self._generation = self.epoch
        return checkpoint

    # While it runs.

    def _running(self, member: Member, message: m.Report, now: float) -> None:
        match message:
            case m.Committed():
                self._commit_through(message)
            case m.Applied() if self._leases:
                if done := self._leases.applied(member.role, message.steps):
                    self._barren = 0
                    self._out.append(Commit(done, self.epoch))
                    every = self.facts.checkpoint_steps
                    self._save_wished |= bool(every) and len(self.committed) - self._saved >= every
            case m.Want() if self._leases:
                self._leases.want(member.role, message.steps)
            case m.Trained():
                self._out += [Trace(*each) for each in zip(message.steps, message.losses, strict=True)]
            case m.Evaluated():
                self._judge(member.role, message)
            case m.Measured():
                self._out.append(Note(member.role, message.step, message.what, message.values))
            case m.Saved():
                self._save(member.role, message, now)
            case m.Finished():
                member.finished, member.bytes_sent = True, message.bytes_sent
                self._stopping = self._stopping or message.stopped
            case m.Broken():
                # Most often the launcher tells of a death within milliseconds: one regroup then serves both.
                self._regroup_at = self._regroup_at or now + 0.25
                self._broken = f"{member.role} lost a peer: {message.reason}"
        self._advance(now)

    def _commit_through(self, message: m.Committed) -> None:
        first = self.committed.first_gap()
        if message.upto <= first:
            return
        self._barren = 0
        self.committed.add_range(first, message.upto)
        for step, loss in enumerate(message.losses, message.upto - len(message.losses)):
            self._out.append(Trace(step, loss))
        self._out.append(Commit(list(range(first, message.upto)), self.epoch))

    def _judge(self, role: str, share: m.Evaluated) -> None:
        values = self._evaluations.add(role, share)
        if values is not None:
            self._out.append(Measured(share.step, values))
            self._out.append(Tell(m.Evaluation(step=share.step, values=values)))
            if self._task == "evaluate":
                self._task = ""

    def _save(self, role: str, message: m.Saved, now: float) -> None:
        parts = self._saving.setdefault(message.step, {})
        parts[role] = message.files
        savers = self.members.roles if self._leases is None else {s.role for s in self.members.servers()}
        if set(parts) >= set(savers):
            del self._saving[message.step]
            files = [file for role_files in parts.values() for file in role_files]
            applied = [(0, message.step)] if self._leases is None else self.committed.pairs
            self._out.append(Publish(message.step, files, applied))
            self._saved, self._saved_at, self._save_wished = message.step, now, False
            if self._task == "save":
                self._task = ""

    def _advance(self, now: float) -> None:
        """Do what the run's progress allows next."""
        if self.phase != "running":
            return
        if self._leases is not None:
            self._advance_leased(self._leases)
        elif all(w.finished for w in self.members.workers()):
            step = self.committed.first_gap()
            if self._saved == step and (self._stopping or not self._evaluations.due(step)):
                self._end("done" if step == self.facts.total_steps else "stopped", None)

    def _advance_leased(self, leases: Leases) -> None:
        step = len(leases.committed)
        finished = step == self.facts.total_steps
        if self._task:
            return
        boundary = (step // self.facts.steps_per_epoch + 1) * self.facts.steps_per_epoch
        leases.limit = step if self._evaluations.due(step) else min(boundary, self.facts.total_steps)
        for worker, steps in leases.grants(torn_only=self._stopping or self._save_wished).items():
            self._out.append(Send(worker, m.Lease(epoch=self.epoch, steps=steps)))
        if leases.outstanding or leases.torn:
            return
        if self._evaluations.due(step) and not self._stopping:
            self._task, judges = "evaluate", self.members.workers()
            for judge, (start, stop) in zip(judges, self._evaluations.shares(len(judges)), strict=True):
                self._out.append(Send(judge.role, m.Evaluate(epoch=self.epoch, step=step, start=start, stop=stop)))
        elif (self._stopping or self._save_wished or finished) and self._saved != step:
            self._task = "save"
            self._out += [Send(s.role, m.Save(epoch=self.epoch, step=step)) for s in self.members.servers()]
        elif self._stopping or finished:
            self._end("done" if finished else "stopped", None)
        elif self._save_wished:
            self._save_wished = False
            self._advance_leased(leases)

    # The end.

    def _end(self, outcome: str, error: m.Failed | None) -> None:
        self.phase = "ended"
        self._out += [Send(member.role, m.Shutdown()) for member in self.members.roles.values() if member.connected]
        self._out.append(End(outcome, error))

    def _take(self) -> list[Instruction]:
        out, self._out = self._out, []
        return out


_BEGINS = "the coordinator begins"
_SOURCES = {
    "initial": "from the initial weights",
    "keep": "from what all hold",
    "peer": "copied from a peer",
    "checkpoint": "from a checkpoint",
}
