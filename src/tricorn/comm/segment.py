"""Anonymous shared memory: it has no name, so nothing is left of it once the last process that holds it has ended,
however that came about.

A segment is a memfd. Another process of this host and user opens it through ``/proc/PID/fd/FD`` of its creator and
checks the inode, since both numbers are used again. It is sealed against shrinking, so that no peer can turn a
read of it into a SIGBUS, and takes memory only where it was touched.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import DTypeLike, NDArray

from tricorn.errors import ClusterError, PeerLost

MAX_SIZE = 1 << 44


class Ticket(msgspec.Struct, frozen=True, kw_only=True):
    """What a process needs to attach to a segment: some 120 bytes as JSON."""

    host: str
    pid: int
    fd: int
    inode: int
    size: int  # bytes
    label: str


def here() -> str:
    """Which host this is. Processes with the same answer can share memory and watch each other's lives.

    Containers with process ids of their own count as hosts, and so do network namespaces: what stands for a machine
    in a test is one. Raises ClusterError where there is no /proc to tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError as error:
        raise ClusterError(f"this host cannot be told from others: {error}", remedy="Use Linux, with /proc.") from None
    return ":".join([boot, *(str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("pid", "net"))])


class Segment:
    """Shared memory, zero at first. Its creator has to live until its peers have attached, and no longer."""

    def __init__(self, descriptor: int, ticket: Ticket) -> None:
        self.ticket = ticket
        self._descriptor = descriptor
        self._map = mmap.mmap(descriptor, ticket.size)
        self.memory = memoryview(self._map)
        self.address = np.frombuffer(self._map, np.uint8).ctypes.data

    @classmethod
    def create(cls, size: int, label: str) -> Segment:
        """``size`` in bytes; the label is seen in /proc/PID/maps. Raises ClusterError when there is no room."""
        if not 0 < size <= MAX_SIZE:
            raise ValueError(f"a segment has 1 to {MAX_SIZE} bytes, not {size}")
        try:
            descriptor = os.memfd_create(label[:200], os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise ClusterError(
                f"no shared memory for {label!r}: {error}", remedy="Raise the limit of open files (ulimit -n)."
            ) from None
        try:
            os.ftruncate(descriptor, size)
            fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            inode = os.fstat(descriptor).st_ino
            ticket = Ticket(host=here(), pid=os.getpid(), fd=descriptor, inode=inode, size=size, label=label)
            return cls(descriptor, ticket)
        except OSError as error:
            os.close(descriptor)
            raise ClusterError(
                f"no shared memory of {size} bytes for {label!r}: {error}",
                remedy="Free memory on this machine, or raise the memory limit of the container.",
            ) from None

    @classmethod
    def attach(cls, ticket: Ticket) -> Segment:
        """The same memory, in another process. Raises PeerLost when its creator is gone, and ClusterError when it is
        on another host or belongs to a user whose processes may not be read.
        """
        if ticket.host != here():
            raise ClusterError(
                f"the segment {ticket.label!r} is on another host (or in another container)",
                remedy="Share memory only between processes of one host; use sockets between hosts.",
            )
        try:
            descriptor = os.open(f"/proc/{ticket.pid}/fd/{ticket.fd}", os.O_RDWR | os.O_CLOEXEC)
        except PermissionError:
            raise ClusterError(
                f"process {ticket.pid} does not let this one open its segment {ticket.label!r}",
                remedy="Run all processes of the group as the same user, without changing credentials after the start.",
            ) from None
        except OSError:
            raise PeerLost(f"process {ticket.pid} is gone, and with it the segment {ticket.label!r}") from None
        try:
            status = os.fstat(descriptor)
            if status.st_ino != ticket.inode or not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
                raise OSError("another file")
            if not 0 < ticket.size <= status.st_size:
                raise OSError("another size")
            return cls(descriptor, ticket)
        except OSError:
            os.close(descriptor)
            raise PeerLost(f"process {ticket.pid} no longer holds the segment {ticket.label!r}") from None

    def array(self, dtype: DTypeLike, offset: int, count: int) -> NDArray[Any]:
        """A view of ``count`` elements that starts ``offset`` bytes in; ValueError when that is not inside."""
        return np.frombuffer(self._map, dtype, count, offset)

    def forget(self, offset: int, size: int) -> None:
        """Give the memory of these whole pages back: they are zero again, for all who share them."""
        self._map.madvise(mmap.MADV_REMOVE, offset, size)

    def close(self) -> None:
        """Let nobody attach any more. The memory goes with this object and its views. May be called again."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
