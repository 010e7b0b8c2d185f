"""How much memory this process has, may have, and has had at most."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

KEPT = 32 << 20  # bytes: smaller tensors' memory is kept when they are freed (``keep_freed``)
# Of malloc.h, and their values in bytes; 32 MiB is the largest that glibc takes as the first.
_MALLOC = {"M_MMAP_THRESHOLD": (-3, KEPT), "M_TRIM_THRESHOLD": (-1, 1 << 30), "M_TOP_PAD": (-2, 16 << 20)}
_ENDLESS = 1 << 60  # what version 1 of control groups says where there is no limit is near 2**63


class _Allowance(NamedTuple):
    """What is said of this process and those that it forks: its bytes, and how many like it share the machine."""

    memory: int | None = None
    sharing: int = 1


_allowance = _Allowance()


def allow(memory: int | None, sharing: int) -> None:
    """Have ``limit_bytes`` say at most ``memory``, here and in all forks, of which ``sharing`` share the machine."""
    global _allowance
    _allowance = _Allowance(memory, sharing)


def sharing() -> int:
    """How many processes like this one share the machine."""
    return _allowance.sharing


def limit_bytes(root: Path = Path("/"), *, among: int | None = None) -> int | None:
    """How many bytes this process may have; None where nothing sets a limit.

    It is the tightest of what was allowed, of RLIMIT_AS and RLIMIT_DATA, and of its part of what all processes share:
    the limits of the control groups that it is in (v1 and v2), and the machine's memory. ``root`` is where the
    machine's files are looked for. ``among``: of how many it gets a part, where not of all that share the machine.
    """
    own = [value for value in (_allowance.memory, *_rlimits()) if value is not None]
    shared = [value // (among or _allowance.sharing) for value in (*_group_limits(root), *_machine(root))]
    return min([*own, *shared], default=None)


def killed_for_memory(root: Path = Path("/")) -> int | None:
    """How many processes of this process's control groups the kernel has killed for want of memory; None: unknown."""
    counts = []
    for folder in groups(root):
        for file in (folder / "memory.oom_control", folder / "memory.events"):
            with contextlib.suppress(OSError, ValueError):
                fields = dict(line.split() for line in file.read_text().splitlines())
                if "oom_kill" in fields:
                    counts.append(int(fields["oom_kill"]))
    return max(counts, default=None)


def peak_bytes() -> int:
    """The most resident memory that this process has had; 0 where the system does not tell."""
    return _status("VmHWM")


def resident_bytes() -> int:
    """The resident memory that this process has now; 0 where the system does not tell."""
    return _status("VmRSS")


def own_bytes() -> int:
    """This process's part of what it has now, of which forks of it have the same and libraries can be read again."""
    return _status("RssAnon") // _allowance.sharing


def keep_freed() -> None:
    """Have malloc keep what is freed, in this process and its forks; does nothing where it is not glibc's.

    By itself it returns the activations and gradients of each step to the system, and the next step takes a page fault
    for each 4 KiB of them.
    """
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in _MALLOC.values():
            mallopt(option, value)


def reusing(environment: Mapping[str, str]) -> dict[str, str]:
    """That environment, for a program whose malloc takes the place of a freed tensor again for one of its size.

    The place of an aligned tensor is cut out of a larger one. By itself glibc hands the rest to the next small thing
    that the thread wants (its tcache), next to which the place is too small for the same tensor from then on: with
    tensors of a few megabytes a process comes to hold several times as much as it uses. What the environment says of
    malloc itself counts more.
    """
    tunables = ["glibc.malloc.tcache_count=0", environment.get("GLIBC_TUNABLES", "")]
    return {**environment, "GLIBC_TUNABLES": ":".join(filter(None, tunables))}


def give_back() -> None:
    """Free what is no longer used, and return it to the system.

    By itself a model that was followed (trace.py) lives on in circles, and malloc keeps what is freed.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # where the C library is another one
        ctypes.CDLL(None).malloc_trim(0)


def _status(field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == field:
                return int(value.split()[0]) * 1024
    return 0


def _rlimits() -> Iterator[int]:
    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA):
        soft, _ = resource.getrlimit(kind)
        if soft != resource.RLIM_INFINITY:
            yield soft


def _machine(root: Path) -> Iterator[int]:
    with contextlib.suppress(OSError, ValueError):
        for line in (root / "proc/meminfo").read_text().splitlines():
            if line.startswith("MemTotal:"):
                yield int(line.split()[1]) * 1024


def _group_limits(root: Path) -> Iterator[int]:
    for folder in groups(root):
        for file in (folder / "memory.limit_in_bytes", folder / "memory.max"):
            with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
                if (value := int(file.read_text())) < _ENDLESS:
                    yield value


def groups(root: Path, controller: str = "memory") -> Iterator[Path]:
    """The folders of the control groups of that resource that this process is in, and of all around them."""
    base = root / "sys/fs/cgroup"
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                top = base / controller
            elif not controllers and (base / "cgroup.controllers").exists():
                top = base
            else:
                continue
            folder = top / path.lstrip("/")
            while True:
                yield folder
                if folder == top or top not in folder.parents:
                    break
                folder = folder.parent


def free_file_systems() -> Iterator[Path]:
    """Folders for temporary files whose pages the kernel can take from memory, $TMPDIR first: those on a disk."""
    for name in (os.environ.get("TMPDIR"), "/var/tmp", "/tmp", os.getcwd()):
        if name and os.access(name, os.W_OK) and not _in_memory(Path(name).resolve()):
            yield Path(name)


def _in_memory(folder: Path) -> bool:
    """Whether the folder is on a file system that is itself memory."""
    kinds: dict[Path, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, at, kind, *_ = line.split()
            kinds[Path(at)] = kind
    around = max((at for at in kinds if at == folder or at in folder.parents), key=lambda at: len(at.parts))
    return kinds[around] in ("tmpfs", "ramfs")
