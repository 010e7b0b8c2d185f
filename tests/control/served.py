"""A coordinator in a process of its own, a launcher and roles that speak to it, and ways to be cut off."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psutil

from tricorn.comm.sockets import connect, listen, receive_exactly
from tricorn.control import messages as m
from tricorn.control.facts import Facts
from tricorn.control.ledger import Order

SECRET = b"s" * 32
STEPS = 6
ORDER = Order(seed=3, fingerprint="data", samples=10, batch_size=4, epochs=2)
FACTS = Facts(
    workers=2, servers=0, synchronous=True, samples=10, batch_size=4, steps_per_epoch=3, total_steps=STEPS,
    evaluation_samples=0, checkpoint_seconds=1e6, checkpoint_steps=0, heartbeat_timeout=60.0, barren_restarts=10**6,
)  # fmt: skip
PROGRAM = """
import socket, sys
from pathlib import Path
import msgspec
from tricorn.control.ledger import Order
from tricorn.control.record import Record
from tricorn.control.server import serve
from tricorn.control.facts import Facts
from tricorn.plan import Plan

descriptor, folder, secret, facts, order = sys.argv[1:]
facts, order = msgspec.json.decode(facts, type=Facts), msgspec.json.decode(order, type=Order)
record = Record(Path(folder), order, Plan(strategy="dp", workers=2), "launch")
serve(facts, record, bytes.fromhex(secret), socket.socket(fileno=int(descriptor)))
"""
GROWTH = 24 << 20  # bytes that the coordinator's memory may grow by under attack


class Speaker:
    """One end of a control connection. ``hear`` waits for a message of one kind and passes over the others."""

    def __init__(self, sock: socket.socket, kinds: Any) -> None:
        self.sock = sock
        self._decode = m.Decoder(kinds)
        self.epoch = 0
        sock.settimeout(10)

    def say(self, message: m.Message) -> None:
        self.sock.sendall(m.encode(message))

    def hear(self, kind: type[m.Message], **wanted: Any) -> Any:
        while True:
            message = self._decode(receive_exactly(self.sock, m.length(receive_exactly(self.sock, m.HEADER.size))))
            if isinstance(message, kind) and all(getattr(message, name) == value for name, value in wanted.items()):
                return message


class Served:
    """A coordinator in a process of its own, and its launcher."""

    def __init__(self, folder: Path, facts: Facts = FACTS) -> None:
        self.folder = folder
        with listen() as listener:
            self.address = listener.getsockname()[:2]
            values = [
                str(listener.fileno()),
                folder,
                SECRET.hex(),
                msgspec.json.encode(facts),
                msgspec.json.encode(ORDER),
            ]
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, *values], pass_fds=[listener.fileno()], stderr=subprocess.PIPE
            )
        self.launcher = Speaker(self.dial(role="launcher"), m.ToLauncher)
        self.launcher.say(m.Alive(roles={}, dead={}))
        self.lives = {self.launcher.hear(m.Start, role=role).role: 1 for role in ("worker-0", "worker-1")}
        self.memory = self.resident()

    def resident(self) -> int:
        return psutil.Process(self.process.pid).memory_info().rss

    def dial(self, **claim: Any) -> socket.socket:
        return connect(self.address, SECRET, {"channel": "control"} | claim)

    def role(self, role: str) -> Speaker:
        return Speaker(self.dial(role=role, incarnation=self.lives[role]), m.Order)

    def replace(self, role: str) -> None:
        """The launcher sees the role's process end, and starts the one that the coordinator then asks for."""
        self.launcher.say(m.Exited(role=role, incarnation=self.lives[role], reason="killed"))
        self.lives[role] = self.launcher.hear(m.Start, role=role).incarnation

    def begin(self) -> list[Speaker]:
        """Both workers join, and hold nothing; the newest membership epoch begins."""
        workers = [self.role(role) for role in self.lives]
        # The second may have been spoken for in this epoch, so that the first completes it.
        for worker in reversed(workers):
            worker.epoch = worker.hear(m.Regroup).epoch
            worker.say(m.Ready(epoch=worker.epoch, part="model", held=[], address=("127.0.0.1", 1)))
        for worker in workers:
            assert worker.hear(m.Begin, epoch=workers[0].epoch).step == 0
        return workers

    def run(self) -> dict[str, Any]:
        """A whole run: both workers train all steps, save and finish. Returns its summary."""
        workers = self.begin()
        epoch = workers[0].epoch
        workers[0].say(m.Committed(epoch=epoch, upto=STEPS, losses=[0.5] * STEPS))
        os.makedirs(self.folder / "checkpoints" / f"{STEPS:09d}")
        for worker in workers:
            worker.say(m.Saved(epoch=epoch, step=STEPS, files=[]))
            worker.say(m.Finished(epoch=epoch, stopped=False, bytes_sent=5))
        ended = self.launcher.hear(m.Ended)
        assert (ended.outcome, ended.error) == ("done", None)
        for worker in workers:
            worker.hear(m.Shutdown)
            worker.sock.close()
        return ended.summary

    def close(self) -> str:
        """Hang up; the coordinator ends by itself. Returns what it printed."""
        self.launcher.sock.close()
        try:
            return self.process.communicate(timeout=10)[1].decode()
        finally:
            self.process.kill()
            self.process.communicate()


def outcome(sock: socket.socket) -> bytes:
    """All that the coordinator still says, after it has been told that nothing more will come, until it hangs up."""
    said = bytearray()
    with sock, contextlib.suppress(ConnectionError):
        sock.settimeout(10)
        with contextlib.suppress(OSError):  # the coordinator was faster
            sock.shutdown(socket.SHUT_WR)
        while part := sock.recv(1 << 16):
            said += part
    return bytes(said)


def refused(sock: socket.socket) -> None:
    """It was cut off: not a word but the orders that a role hears on connecting."""
    sock.settimeout(10)
    with sock, contextlib.suppress(ConnectionError):
        while sock.recv(1 << 16):
            pass
