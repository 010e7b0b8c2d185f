"""The engine of one machine: roles are forks of a warm process (forkserver.py)."""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec

from tricorn.control import messages as m
from tricorn.engine.base import Gone, JobFacts, RoleSpec
from tricorn.engine.forkserver import End, FromServer, Load, Loaded, Spawn, Spawned, receive
from tricorn.errors import ClusterError, PeerLost, PlanError, UsageError
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.state import cores
from tricorn.state.memory import reusing

CLOSE_SECONDS = 2.0
_USAGE = {kind.__name__: kind for kind in (UsageError, PlanError)}


class LocalEngine:
    """Runs the roles of one job: ``job`` is a Job, or (file, name) of one.

    ``host`` is the address that they listen at; ``prefix`` is put before the command that starts the warm process.
    ``hosts`` is how many machines roles are spread over, this one among them.
    """

    def __init__(
        self, job: Job | tuple[str, str], *, host: str = "127.0.0.1", prefix: Sequence[str | Path] = (), hosts: int = 1
    ) -> None:
        self._hosts = hosts
        self._job = job
        self.host = host
        self._pickled = pickled(job) if isinstance(job, Job) else None
        self._sock, theirs = socket.socketpair()
        self._pickle_fd = self._pickled.fileno() if self._pickled else None
        handed = [theirs.fileno(), *([self._pickle_fd] if self._pickle_fd is not None else [])]
        # A session of its own: Ctrl-C in the terminal reaches the launcher alone, which ends the run in order.
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tricorn.engine.forkserver", str(theirs.fileno()), host],
            pass_fds=handed, env=environment(), start_new_session=True, stdin=subprocess.DEVNULL, stdout=2,
        )  # fmt: skip
        theirs.close()
        self._decode = m.Decoder(FromServer)
        self._gone: list[Gone] = []
        self._lives: dict[str, int] = {}  # incarnation, by role
        self._cores = math.inf  # that it may use, once it says so
        self.pids: dict[str, int] = {}

    def load(self, plan: Plan) -> tuple[JobFacts, m.Address]:
        self.begin_load(plan)
        return self.loaded()

    def begin_load(self, plan: Plan) -> None:
        """Begin to make the job ready; ``loaded`` waits for it."""
        if plan.hosts and max(plan.hosts) >= self._hosts:
            there = "is one host" if self._hosts == 1 else f"are {self._hosts} hosts"
            raise PlanError(
                f"the plan's hosts are {plan.hosts}, and there {there}", remedy="Count them from 0, or leave hosts out."
            )
        file, name = self._job if isinstance(self._job, tuple) else (None, "")
        sharing = -(-(plan.workers + plan.servers) // self._spread(plan))
        self._say(Load(file=file, name=name, pickle_fd=self._pickle_fd, plan=plan, sharing=sharing))

    def loaded(self) -> tuple[JobFacts, m.Address]:
        """What ``load`` returns and raises."""
        answer = self._next()
        if self._pickled:
            self._pickled.close()
        if isinstance(answer, m.Failed):
            raise _USAGE.get(answer.kind, UsageError)(answer.message, remedy=answer.remedy, where=answer.where)
        assert isinstance(answer, Loaded)
        self._cores = answer.cores
        return answer.job, answer.coordinator

    def start(self, spec: RoleSpec) -> None:
        self._lives[spec.role] = spec.incarnation
        threads = spec.threads or self._threads(spec.plan)
        self._say(Spawn(spec=msgspec.structs.replace(spec, host=self.host, threads=threads)))

    def kill(self, role: str, incarnation: int) -> None:
        self._say(End(role=role, incarnation=incarnation))

    def gone(self) -> list[Gone]:
        news = select.poll()  # select() ends at descriptor 1023
        news.register(self._sock, select.POLLIN)
        while news.poll(0):
            message = self._next()
            if isinstance(message, Spawned):
                self.pids[message.role] = message.pid
            elif isinstance(message, m.Exited):
                self.pids.pop(message.role, None)
                if self._lives.get(message.role) == message.incarnation:
                    del self._lives[message.role]
                self._gone.append(Gone(message.role, message.incarnation, message.reason))
        gone, self._gone = self._gone, []
        return gone

    def fileno(self) -> int:
        return self._sock.fileno()

    def rest(self, patience: float = 0.0) -> None:
        """Between two runs: wait so many seconds for all roles to end, then end them; the process stays warm.

        Raises ClusterError if they do not end.
        """
        for until in (time.monotonic() + patience, time.monotonic() + patience + CLOSE_SECONDS):
            while self._lives and (left := until - time.monotonic()) > 0:
                news = select.poll()
                news.register(self._sock, select.POLLIN)
                news.poll(1000 * left)
                self.gone()
            for role, incarnation in self._lives.items():
                self.kill(role, incarnation)
        if self._lives:
            raise ClusterError(
                f"{', '.join(self._lives)} cannot be ended on {self.host}",
                remedy="See whether that host still answers.",
            )

    def close(self, patience: float = CLOSE_SECONDS) -> None:
        """End all; a process that is still there after so many seconds is killed."""
        self._sock.close()  # at the end of the stream the fork server ends every role, then itself
        if self._pickled:
            self._pickled.close()
        end(self._process, patience)

    def _threads(self, plan: Plan) -> int:
        """How many compute threads each of its workers here can have."""
        there = -(-plan.workers // self._spread(plan))
        return cores.threads(min(self._cores, cores.usable() / self._hosts), there)

    def _spread(self, plan: Plan) -> int:
        """Over how many hosts its roles are spread."""
        return len(plan.hosts or range(self._hosts))

    def _say(self, message: m.Message) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # told by the next read
            self._sock.sendall(m.encode(message))

    def _next(self) -> object:
        try:
            return receive(self._sock, self._decode)
        except (PeerLost, ConnectionError):
            code = self._process.wait()
            reason = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            raise ClusterError(
                f"the process that starts the roles is gone ({reason})",
                remedy="Look above for what it printed; `tricorn train --resume RUN` goes on from the last checkpoint.",
            ) from None


def environment() -> dict[str, str]:
    """Of processes that fork: libraries start no threads in them, and memory that is freed is taken again."""
    return reusing(os.environ) | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def end(process: subprocess.Popen[bytes], patience: float) -> None:
    """Wait so many seconds for it to end, then kill it."""
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        process.kill()  # and the kernel ends its forks with it
        # A frozen process dies of it when it is thawed, which may be long after the run.
        reaper = threading.Thread(target=process.wait, name="tricorn-reaper", daemon=True)
        reaper.start()
        reaper.join(patience)


def pickled(job: Job) -> IO[bytes]:
    """The job in an anonymous file that only a process which is handed it inherits."""
    import cloudpickle

    stream = tempfile.TemporaryFile()  # noqa: SIM115 - closed by the engine
    cloudpickle.dump(sys.path, stream)
    cloudpickle.dump(job, stream)
    stream.seek(0)
    return stream
