"""A control group: processes that share a CPU quota and a memory limit, and are stopped or ended together.

Version 1 has a hierarchy for each resource, version 2 one for all; both are driven through their files
(docs.kernel.org: admin-guide/cgroup-v1, admin-guide/cgroup-v2).
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from tricorn.errors import ClusterError

ROOT = Path("/sys/fs/cgroup")
# The kernel hands out the quota anew so often: at its default of 100 ms, a slow host would run and stand still by turns
# that are longer than a training step.
PERIOD_US = 20_000
PATIENCE = 5.0  # seconds that the kernel gets to stop or to end processes


def hierarchies(root: Path = ROOT) -> list[Path]:
    """Where groups are made: version 2 has one place, version 1 one for each resource."""
    if (root / "cgroup.controllers").exists():
        return [root]
    return [root / controller for controller in ("cpu", "memory", "freezer")]


class Cgroup:
    """The group called ``name`` once it is opened; gone with all its processes once it is closed."""

    def __init__(self, name: str, root: Path = ROOT) -> None:
        self.folders = [hierarchy / name for hierarchy in hierarchies(root)]
        self._unified = len(self.folders) == 1

    def open(self, *, cores: float | None, memory: int | None) -> None:
        """Make the group, of at most so many cores and bytes. Raises ClusterError where that is not possible."""
        try:
            for folder in self.folders:
                folder.mkdir()
            if cores is not None:
                self._limit_cores(cores)
            if memory is not None:
                self._limit_memory(memory)
        except OSError as error:
            raise ClusterError(
                f"no control group can be made: {error}", remedy="Run as root where /sys/fs/cgroup can be written."
            ) from None

    def close(self) -> None:
        """End all processes in it, stopped ones too, and remove it. May be called again, and on what others left.

        Raises ClusterError if a process will not end.
        """
        until = time.monotonic() + PATIENCE
        while left := [folder for folder in self.folders if folder.exists()]:
            if time.monotonic() > until:
                raise ClusterError(f"processes {self.pids()} do not end", remedy="See what they wait for.")
            with contextlib.suppress(OSError):
                self.thaw()
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            for folder in left:
                try:
                    folder.rmdir()
                except OSError:  # busy until its last process has ended
                    time.sleep(0.002)

    def freeze(self) -> None:
        """Stop all its processes where they are, without their knowledge."""
        self._freezer("FROZEN")
        until = time.monotonic() + PATIENCE
        while not self._frozen():
            if time.monotonic() > until:
                raise ClusterError(f"processes {self.pids()} cannot be frozen", remedy="See what they wait for.")
            time.sleep(0.001)

    def thaw(self) -> None:
        self._freezer("THAWED")

    def pids(self) -> list[int]:
        found: set[int] = set()
        for folder in self.folders:
            with contextlib.suppress(OSError):
                found.update(int(line) for line in (folder / "cgroup.procs").read_text().split())
        return sorted(found)

    def _limit_cores(self, cores: float) -> None:
        quota = max(1000, round(cores * PERIOD_US))  # the kernel takes no less than a millisecond
        if self._unified:
            (self.folders[0] / "cpu.max").write_text(f"{quota} {PERIOD_US}")
        else:
            (self.folders[0] / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (self.folders[0] / "cpu.cfs_quota_us").write_text(str(quota))

    def _limit_memory(self, memory: int) -> None:
        """So much, and no more of it on swap."""
        if self._unified:
            (self.folders[0] / "memory.max").write_text(str(memory))
            (self.folders[0] / "memory.swap.max").write_text("0")
        else:
            for file in ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes"):
                if (self.folders[1] / file).exists():  # the second only where swap is counted
                    (self.folders[1] / file).write_text(str(memory))

    def _freezer(self, state: str) -> None:
        if self._unified:
            (self.folders[0] / "cgroup.freeze").write_text("1" if state == "FROZEN" else "0")
        else:
            (self.folders[2] / "freezer.state").write_text(state)

    def _frozen(self) -> bool:
        if self._unified:
            return "frozen 1" in (self.folders[0] / "cgroup.events").read_text()
        return (self.folders[2] / "freezer.state").read_text().strip() == "FROZEN"
