"""How many cores this process may use, and what workers make of them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from math import ceil
from pathlib import Path

from tricorn.state.memory import groups


def usable(root: Path = Path("/")) -> int:
    """How many cores it can keep busy: ``share``, rounded up.

    ``root`` is where the machine's files are looked for.
    """
    return max(1, ceil(share(root)))


def share(root: Path = Path("/")) -> float:
    """The cores it may run on, but no more than the quotas of its control groups (v1 and v2) come to."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([allowed, *_quotas(root)])


def threads(available: float, workers: int) -> int:
    """How many compute threads each of some workers has that share so many cores."""
    return max(1, int(available) // max(1, workers))


def _quotas(root: Path) -> Iterator[float]:
    for folder in groups(root, "cpu"):
        with contextlib.suppress(OSError, ValueError):  # ValueError: "max"
            quota, period = (int(value) for value in (folder / "cpu.max").read_text().split())
            yield quota / period
        with contextlib.suppress(OSError, ValueError):
            if (quota := int((folder / "cpu.cfs_quota_us").read_text())) > 0:
                yield quota / int((folder / "cpu.cfs_period_us").read_text())
