"""Several hosts on one machine: each with its own network, link speed, CPU quota and memory limit, and its own faults.

    with hosts(Host(mbit=100), Host(mbit=100, cores=0.25)) as (a, b):
        b.run(["python", "-m", "http.server", "--bind", b.address])
        b.cut()

A host is a network namespace and a control group; it shares the machine's files, memory and clock. This needs Linux,
root and iproute2: ``hosts_unavailable`` says what is missing.
"""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tricorn.errors import ClusterError, UsageError
from tricorn.testing.cgroup import Cgroup, hierarchies
from tricorn.testing.network import NAMESPACES, Network, Traffic

SLOTS = 250  # networks at once on one machine
MOST_HOSTS = 200
# The shell moves itself into the control group, then becomes the command inside the network namespace.
_ENTER = 'for group in {groups}; do echo $$ > "$group/cgroup.procs" || exit 125; done; exec nsenter --net={space} "$@"'


@dataclass(frozen=True, kw_only=True)
class Host:
    """What a host has; None is as much as the machine.

    ``mbit`` is its link's speed, each way, in Mbit/s; ``cores`` may be a fraction; ``memory_mb`` is in MiB, and the
    kernel kills a process that asks for more. Raises UsageError for what is not positive.
    """

    mbit: float | None = None
    cores: float | None = None
    memory_mb: int | None = None

    def __post_init__(self) -> None:
        for field, value in vars(self).items():
            if value is not None and not value > 0:
                raise UsageError(f"a host with {field}={value}", remedy="Give more than 0, or None for no limit.")


class RunningHost:
    """A host that is up. ``address`` is where it is reached, from the others and from the machine itself.

    ``prefix`` before a command makes it run there.
    """

    def __init__(self, network: Network, number: int, cgroup: Cgroup) -> None:
        self._network = network
        self._number = number
        self._cgroup = cgroup
        self.address = network.address(number)
        groups = " ".join(str(folder) for folder in cgroup.folders)
        enter = _ENTER.format(groups=groups, space=network.namespace(number))
        self.prefix: tuple[str, ...] = ("sh", "-c", enter, "sh")

    def run(self, command: Sequence[str | Path], **options: Any) -> subprocess.CompletedProcess[Any]:
        """``subprocess.run`` on this host."""
        return subprocess.run([*self.prefix, *command], **options)

    def start(self, command: Sequence[str | Path], **options: Any) -> subprocess.Popen[Any]:
        """``subprocess.Popen`` on this host; the process is ended with the host."""
        return subprocess.Popen([*self.prefix, *command], **options)

    def pids(self) -> list[int]:
        """The processes that run here."""
        return self._cgroup.pids()

    def freeze(self) -> None:
        """Stop every process where it is, as on a machine that hangs: connections stay, answers do not come."""
        self._cgroup.freeze()

    def thaw(self) -> None:
        """Let them go on."""
        self._cgroup.thaw()

    def cut(self) -> None:
        """Pull the plug of the link: nothing arrives and nobody is told."""
        self._network.cut(self._number)

    def join(self) -> None:
        """Put it back."""
        self._network.join(self._number)

    def traffic(self) -> Traffic:
        """Bytes that crossed its link so far, all headers and retransmissions included."""
        return self._network.traffic(self._number)


@contextlib.contextmanager
def hosts(*declared: Host) -> Iterator[tuple[RunningHost, ...]]:
    """Bring the hosts up, joined by a switch; afterwards nothing is left of them nor of the processes on them.

    What a process that was killed has left behind is removed by the next that asks for hosts. Raises UsageError for
    too many hosts, ClusterError where hosts cannot be made.
    """
    if not 0 < len(declared) <= MOST_HOSTS:
        raise UsageError(f"{len(declared)} hosts", remedy=f"Give between 1 and {MOST_HOSTS}.")
    with contextlib.ExitStack() as stack:
        slot, lock = _slot()
        stack.enter_context(lock)
        network = Network(slot, [host.mbit for host in declared])
        stack.callback(network.close)
        network.open()
        running = []
        for number, host in enumerate(declared):
            cgroup = Cgroup(f"tricorn{slot}-{number}")
            stack.callback(cgroup.close)
            memory = host.memory_mb * 2**20 if host.memory_mb else None
            cgroup.open(cores=host.cores, memory=memory)
            running.append(RunningHost(network, number, cgroup))
        yield tuple(running)


@cache
def hosts_unavailable() -> str | None:
    """Why there can be no hosts here, None if there can: made certain by making one."""
    try:
        with hosts(Host(mbit=100, cores=1, memory_mb=64)) as (host,):
            host.run(["true"], check=True)
    except (ClusterError, subprocess.CalledProcessError) as error:
        return str(error)
    return None


def _slot() -> tuple[int, socket.socket]:
    """A number that no living process has, and what keeps it taken; what dead ones left of theirs is removed."""
    for number, names in _remains().items():
        if lock := _lock(number):
            with lock:
                for name in names:
                    Cgroup(name).close()
                Network(number, []).close()
    for number in range(SLOTS):
        if lock := _lock(number):
            return number, lock
    raise ClusterError(f"{SLOTS} networks of hosts are up already", remedy="End one of them.")


def _lock(number: int) -> socket.socket | None:
    """Take the number if nobody has it: as an abstract address, which ends with the process however that ends."""
    lock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        lock.bind(f"\0tricorn-hosts-{number}")
    except OSError:
        lock.close()
        return None
    return lock


def _remains() -> dict[int, set[str]]:
    """The names of all namespaces and control groups of hosts, by the number of their network."""
    found: dict[int, set[str]] = {}
    for folder in (NAMESPACES, *hierarchies()):
        for path in folder.glob("tricorn*-*"):
            if match := re.match(r"tricorn(\d+)-", path.name):
                found.setdefault(int(match[1]), set()).add(path.name)
    return found
