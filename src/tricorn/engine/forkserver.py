"""A warm process that becomes the roles: PyTorch and the job are loaded once, then each role is a fork of it.

It has one thread, ends when its launcher ends, and takes all roles along. It also holds the coordinator's
listening socket, so that a replaced coordinator is found where the old one was.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import selectors
import signal
import socket
import sys
import traceback
from pathlib import Path

from tricorn.comm.sockets import listen, receive_exactly
from tricorn.control import messages as m
from tricorn.engine.base import JobFacts, RoleSpec
from tricorn.errors import PeerLost, UsageError, users_line
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.state import cores, memory

_PR_SET_PDEATHSIG = 1


class Load(m.Message, frozen=True, kw_only=True):
    """Load the job: from a file and a name in it, or from the descriptor of a pickle that the launcher inherited us."""

    file: str | None
    name: str
    pickle_fd: int | None
    plan: Plan
    sharing: int  # of how many workers and servers of the plan this machine has to hold at most


class Loaded(m.Message, frozen=True, kw_only=True):
    job: JobFacts
    coordinator: m.Address
    cores: float  # that processes there may use together


class Spawn(m.Message, frozen=True, kw_only=True):
    spec: RoleSpec


class End(m.Message, frozen=True, kw_only=True):
    role: str
    incarnation: int


class Spawned(m.Message, frozen=True, kw_only=True):
    role: str
    incarnation: int
    pid: int


ToServer = Load | Spawn | End
FromServer = Loaded | m.Failed | Spawned | m.Exited


def receive(sock: socket.socket, decode: m.Decoder) -> object:
    """One message from the other end; raises PeerLost at the end of the stream."""
    return decode(receive_exactly(sock, m.length(receive_exactly(sock, m.HEADER.size))))


def die_with_parent() -> None:
    """Have the kernel end this process when the thread that started it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class ForkServer:
    def __init__(self, sock: socket.socket, host: str) -> None:
        self._sock = sock
        self._decode = m.Decoder(ToServer)
        self._listener = listen(host)
        self._job: Job
        self._loaded: tuple[str | None, str] | None = None  # the file and the name of that job
        self._children: dict[int, tuple[str, int]] = {}
        self._killed_before: int | None = None
        self._woken, wake = socket.socketpair()
        for end in (self._woken, wake):
            end.setblocking(False)
        self._wake = wake
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.set_wakeup_fd(wake.fileno(), warn_on_full_buffer=False)

    def serve(self) -> None:
        """Until the launcher hangs up."""
        with contextlib.suppress(PeerLost, ConnectionError), selectors.DefaultSelector() as selector:
            selector.register(self._sock, selectors.EVENT_READ)
            selector.register(self._woken, selectors.EVENT_READ)
            while True:
                for key, _ in selector.select():
                    if key.fileobj is self._sock:
                        self._obey(receive(self._sock, self._decode))
                    else:
                        self._woken.recv(4096)
                        self._reap()
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in self._children:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)

    def _obey(self, order: object) -> None:
        match order:
            case Load():
                self._load(order)
            case Spawn():
                self._spawn(order.spec)
            case End():
                for pid, life in self._children.items():
                    if life == (order.role, order.incarnation):
                        os.kill(pid, signal.SIGKILL)

    def _load(self, order: Load) -> None:
        from tricorn.engine.loading import describe, load, warm

        memory.allow(order.plan.memory, order.sharing)
        self._killed_before = memory.killed_for_memory()
        try:
            if self._loaded != (order.file, order.name):
                self._job = load(order.file, order.name, order.pickle_fd)
                self._loaded = order.file, order.name
            facts = describe(self._job, order.file, order.name)
            warm(self._job, order.plan)
        except UsageError as error:
            self._say(m.failed(error))
        except (Exception, SystemExit) as error:
            problem = UsageError(
                f"the job cannot be loaded: {type(error).__name__}: {error}",
                remedy="Mend that line; `python FILE` shows the whole trace.",
                where=users_line(error),
            )
            self._say(m.failed(problem, traceback.format_exc()[-8000:]))
        else:
            memory.give_back()
            gc.freeze()  # what is loaded stays shared with the roles
            self._say(Loaded(job=facts, coordinator=self._listener.getsockname()[:2], cores=cores.share()))

    def _spawn(self, spec: RoleSpec) -> None:
        parent = os.getpid()
        pid = os.fork()
        if pid == 0:
            code = 3
            try:
                die_with_parent()
                if os.getppid() == parent:
                    code = self._become(spec)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        self._children[pid] = (spec.role, spec.incarnation)
        self._say(Spawned(role=spec.role, incarnation=spec.incarnation, pid=pid))

    def _become(self, spec: RoleSpec) -> int:
        from tricorn.engine.roles import run_role

        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for sock in (self._sock, self._woken, self._wake):
            sock.close()
        log = os.open(Path(spec.folder) / "logs" / f"{spec.role}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        return run_role(spec, self._job, self._listener)

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if life := self._children.pop(pid, None):  # else it is a process of the user's own
                    self._say(m.Exited(role=life[0], incarnation=life[1], reason=self._reason(status)))

    def _say(self, message: m.Message) -> None:
        self._sock.sendall(m.encode(message))

    def _reason(self, status: int) -> str:
        code = os.waitstatus_to_exitcode(status)
        if code >= 0:
            return f"exit code {code}"
        hint = self._hint() if -code == signal.SIGKILL else ""
        return f"killed by {signal.Signals(-code).name}{hint}"

    def _hint(self) -> str:
        """Whether the kernel has killed for want of memory since we last knew."""
        before, self._killed_before = self._killed_before, memory.killed_for_memory()
        return want_of_memory(before, self._killed_before, memory.limit_bytes())


def want_of_memory(before: int | None, now: int | None, limit: int | None) -> str:
    """What to add to "killed by SIGKILL": how many the kernel had killed for want of memory ``before``, and has now."""
    if before is None or now is None:
        return ", perhaps for want of memory"
    if now == before:
        return ""
    room = f": it may have {limit / 1e6:,.0f} MB" if limit else ""
    return f" for want of memory{room}; `tricorn plan` lists what each plan needs"


def main() -> None:
    """``python -m tricorn.engine.forkserver FD HOST``: serve the launcher at the other end of the descriptor.

    HOST is the address at which a coordinator would listen.
    """
    die_with_parent()
    sock = socket.socket(fileno=int(sys.argv[1]))
    import torch  # while the launcher still reads its options

    torch.set_num_threads(1)  # no pool of threads may exist before a fork
    importlib.import_module("tricorn.engine.loading")
    memory.keep_freed()
    ForkServer(sock, sys.argv[2]).serve()


if __name__ == "__main__":
    main()
