"""What every test runs under: one thread, reproducible examples, and a check that nothing is left behind."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import psutil
import pytest
import torch
from hypothesis import settings

PATIENCE = 5.0  # seconds that what a test has told to end may take to do so

torch.set_num_threads(1)
settings.register_profile("tricorn", deadline=None, derandomize=True, database=None)
settings.load_profile("tricorn")


@pytest.fixture(autouse=True, scope="module")
def old_objects_are_not_collected() -> None:
    """Trainers collect garbage before they begin: 0.3 s each if all of torch and of the tests is looked through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def nothing_left_over() -> Iterator[None]:
    """Fail a test that leaves a thread, a process, an open socket or a shared-memory segment behind."""
    threads, children = set(threading.enumerate()), _children()
    sockets, segments = _sockets(), _segments()
    yield
    for thread in set(threading.enumerate()) - threads:
        thread.join(PATIENCE)
    psutil.wait_procs([psutil.Process(pid) for pid in _children() - children if psutil.pid_exists(pid)], PATIENCE)
    left = {
        "threads": {thread.name for thread in set(threading.enumerate()) - threads},
        "processes": _children() - children,
        "sockets": _sockets() - sockets,
        "shared memory": {name for name in _segments() - segments if not _held_elsewhere(name)},
    }
    if any(left.values()):
        pytest.fail("left behind: " + "; ".join(f"{what} {sorted(found)}" for what, found in left.items() if found))


def _children() -> set[int]:
    # Python's tracker of shared resources lives as long as the process that first shared one.
    tracker = getattr(resource_tracker._resource_tracker, "_pid", None)
    return {child.pid for child in psutil.Process().children(recursive=True)} - {tracker}


def _sockets() -> set[str]:
    return set(_links(Path("/proc/self/fd"), lambda target: target.startswith("socket:")))


def _segments() -> set[str]:
    return set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()


def _held_elsewhere(segment: str) -> bool:
    """Whether a process that is none of ours has the segment open or mapped: it is another run's."""
    ours = {os.getpid(), *_children()}
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) not in ours and any(
            True
            for folder in ("fd", "map_files")
            for _ in _links(process / folder, lambda target: target == f"/dev/shm/{segment}")
        ):
            return True
    return False


def _links(folder: Path, wanted: Callable[[str], bool]) -> Iterator[str]:
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        try:
            target = os.readlink(entry)
        except OSError:
            continue
        if wanted(target):
            yield target
