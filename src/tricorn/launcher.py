"""The launcher: engine, coordinator and progress brought together in the user's own process.

It decides nothing: it starts and ends what the coordinator names, tells it what ended, and replaces the
coordinator itself.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tricorn import folder as folders
from tricorn.comm.auth import new_secret
from tricorn.comm.sockets import connect, receive_exactly
from tricorn.control import messages as m
from tricorn.control.facts import Facts
from tricorn.data.order import steps_per_epoch
from tricorn.engine.base import Engine, Gone, JobFacts, RoleSpec, Timing
from tricorn.errors import Interrupted, PeerLost, RoleFailed
from tricorn.plan import Plan
from tricorn.report.progress import Progress

STOP_SECONDS = 2.0  # an interrupted run has so long to save and end
COORDINATOR_SECONDS = 15.0
COORDINATOR_LIVES = 8  # deaths of the coordinator without progress in between, before the run fails


class Launcher:
    """Runs one run to its end. ``spec(role, incarnation)`` is what a role is started with."""

    def __init__(
        self,
        engine: Engine,
        spec: Callable[[str, int], RoleSpec],
        display: Progress,
        *,
        steps_per_epoch: int,
        silence: float,
        note_pids: Callable[[dict[str, int]], None],
        begun: Callable[[], None],
        leaves: Callable[[m.Progress], bool],
    ) -> None:
        """A coordinator that says nothing for ``silence`` seconds is ended and replaced.

        ``begun`` is called when the first steps are done: the job and the plan do fit the run. ``leaves`` is asked at
        each word of progress whether the run is to be saved and ended now.
        """
        self._engine = engine
        self._spec = spec
        self._display = display
        self._steps_per_epoch = steps_per_epoch
        self._silence = silence
        self._heard = 0.0
        self._note_pids = note_pids
        self._pids: dict[str, int] = {}
        self._begun: Callable[[], None] | None = begun
        self._leaves = leaves
        self._leaving = False
        self._decode = m.Decoder(m.ToLauncher)
        self._alive: dict[str, int] = {}
        self._dead: dict[str, int] = {}
        self._coordinator: socket.socket | None = None
        self._coordinator_deaths = 0
        self._stop_by: float | None = None
        self._interrupts = 0

    def run(self) -> m.Ended:
        """Until the coordinator says how it ended. Raises Interrupted if it cannot save in time after Ctrl-C."""
        self._start_coordinator()
        try:
            while (ended := self._turn()) is None:
                while self._interrupts:
                    self._interrupts -= 1
                    self._interrupted()
            return ended
        finally:
            self._hang_up()

    @property
    def interrupted(self) -> bool:
        """Whether somebody wished for the end."""
        return self._stop_by is not None

    def interrupt(self) -> None:
        """Save and end; the second time, end at once. Safe in a signal handler."""
        self._interrupts += 1

    def _turn(self) -> m.Ended | None:
        """Wait for news and deal with it."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._engine, selectors.EVENT_READ)
            if self._coordinator is not None:
                selector.register(self._coordinator, selectors.EVENT_READ)
            readable = [key.fileobj for key, _ in selector.select(0.1)]
        for gone in self._engine.gone():
            self._ended(gone)
        if (pids := self._engine.pids) != self._pids:
            self._pids = dict(pids)
            self._note_pids(self._pids)
        if self._coordinator in readable and (message := self._hear()) is not None:
            if isinstance(message, m.Ended):
                return message
            self._obey(message)
        if self._coordinator is not None and time.monotonic() - self._heard > self._silence:
            self._display.notice("the coordinator is not heard from")
            self._give_up_coordinator()
        if self._stop_by is not None and time.monotonic() > self._stop_by:
            raise Interrupted("interrupted before the run could save; it goes on from its last checkpoint")
        return None

    def _interrupted(self) -> None:
        if self._stop_by is not None:
            raise Interrupted("interrupted twice; the run goes on from its last checkpoint")
        self._stop_by = time.monotonic() + STOP_SECONDS
        self._display.notice("interrupted: saving, then ending (once more to end at once)")
        self._tell(m.Stop())

    def _obey(self, message: m.ToLauncher) -> None:
        match message:
            case m.Start(role=role, incarnation=incarnation):
                self._alive[role] = incarnation
                self._dead.pop(role, None)
                self._engine.start(self._spec(role, incarnation))
            case m.Kill(role=role, incarnation=incarnation):
                self._engine.kill(role, incarnation)
            case m.Progress():
                self._coordinator_deaths = 0
                if self._begun is not None:
                    self._begun()
                    self._begun = None
                epoch = (message.step - 1) // self._steps_per_epoch
                self._display.step(
                    message.step, epoch=epoch, loss=message.loss, samples_per_second=message.samples_per_second
                )
                if not self._leaving and self._leaves(message):
                    self._leaving = True
                    self._tell(m.Stop())
            case m.Evaluation():
                self._display.evaluated(message.step // self._steps_per_epoch - 1, message.values)
            case m.Notice():
                self._display.notice(message.text)

    def _ended(self, gone: Gone) -> None:
        if gone.role == "coordinator":
            self._replace_coordinator(gone)
        elif self._alive.get(gone.role) == gone.incarnation:
            del self._alive[gone.role]
            self._dead[gone.role] = gone.incarnation
            self._tell(m.Exited(role=gone.role, incarnation=gone.incarnation, reason=gone.reason))

    def _replace_coordinator(self, gone: Gone) -> None:
        self._coordinator_deaths += 1
        if self._coordinator_deaths > COORDINATOR_LIVES:
            raise RoleFailed(f"the coordinator ended {self._coordinator_deaths} times in a row; last: {gone.reason}")
        self._display.notice(f"the coordinator is gone ({gone.reason}); it is replaced")
        self._start_coordinator()

    def _start_coordinator(self) -> None:
        self._hang_up()
        incarnation = self._dead["coordinator"] = self._dead.get("coordinator", 0) + 1
        spec = self._spec("coordinator", incarnation)
        self._engine.start(spec)
        claim = {"channel": "control", "role": "launcher"}
        try:
            self._coordinator = connect(spec.coordinator, spec.secret, claim, timeout=COORDINATOR_SECONDS)
        except PeerLost:
            self._give_up_coordinator()
            return
        self._heard = time.monotonic()
        dead = {role: life for role, life in self._dead.items() if role != "coordinator"}
        self._tell(m.Alive(roles=self._alive, dead=dead))
        if self._leaving or self.interrupted:
            self._tell(m.Stop())

    def _give_up_coordinator(self) -> None:
        """End it, if it is not dead already: the engine will tell, and the next one is started."""
        self._hang_up()
        self._engine.kill("coordinator", self._dead["coordinator"])

    def _tell(self, message: m.FromLauncher) -> None:
        # A word lost with a dying coordinator is not missed: the next one is told afresh who is alive.
        if self._coordinator is not None:
            with contextlib.suppress(OSError):
                self._coordinator.sendall(m.encode(message))

    def _hear(self) -> Any:
        assert self._coordinator is not None
        try:
            header = receive_exactly(self._coordinator, m.HEADER.size)
            message = self._decode(receive_exactly(self._coordinator, m.length(header)))
        except (PeerLost, OSError):
            self._hang_up()
            return None
        self._heard = time.monotonic()
        return message

    def _hang_up(self) -> None:
        if self._coordinator is not None:
            self._coordinator.close()
            self._coordinator = None


def launcher_of(
    engine: Engine,
    coordinator: tuple[str, int],
    job: JobFacts,
    plan: Plan,
    timing: Timing,
    folder: Path,
    display: Progress,
    *,
    launch: str,
    leaves: Callable[[m.Progress], bool],
) -> Launcher:
    """What runs a job that the engine has loaded, in a new or an earlier run's folder."""
    steps = steps_per_epoch(job.samples, job.batch_size)
    facts = Facts(
        workers=plan.workers, servers=plan.servers, synchronous=plan.synchronous, samples=job.samples,
        batch_size=job.batch_size, steps_per_epoch=steps, total_steps=steps * job.epochs,
        evaluation_samples=job.evaluation_samples, checkpoint_seconds=timing.checkpoint_seconds,
        checkpoint_steps=timing.checkpoint_steps, heartbeat_timeout=timing.heartbeat_timeout,
    )  # fmt: skip
    secret = new_secret()

    def spec(role: str, incarnation: int) -> RoleSpec:
        return RoleSpec(
            role=role, incarnation=incarnation, coordinator=coordinator, secret=secret, folder=str(folder.resolve()),
            launch=launch, threads=plan.threads, plan=plan, job=job, facts=facts, timing=timing,
        )  # fmt: skip

    def note_pids(pids: dict[str, int]) -> None:
        with contextlib.suppress(OSError):  # it is for whoever looks; a full disk is told where something is lost
            folders.write_json(folder / "roles.json", pids)

    def begun() -> None:
        with contextlib.suppress(OSError):
            folders.say(folder, job, plan)

    folders.prepare(folder, job, plan)
    display.started(plan, total_steps=facts.total_steps, epochs=job.epochs)
    silence = 3 * timing.heartbeat_timeout  # the hashes of a large checkpoint take their time
    return Launcher(
        engine, spec, display, steps_per_epoch=steps, silence=silence, note_pids=note_pids, begun=begun, leaves=leaves
    )
