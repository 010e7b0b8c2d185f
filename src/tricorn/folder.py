"""A run's folder as the launcher sees it: found or made, held by one launcher at a time, with job and plan in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from tricorn.control.ledger import Ledger
from tricorn.documents import UNREADABLE
from tricorn.engine.base import JobFacts
from tricorn.errors import StorageError, UsageError
from tricorn.plan import Plan


class _Told(msgspec.Struct):
    """What of a summary is shown."""

    run: str
    outcome: str
    steps: int
    samples: int
    seconds: float
    samples_per_second: float
    loss: float | None
    metrics: dict[str, float | None]


def find(name: str | Path, runs: Path) -> Path:
    """The folder of a run, given by its path or its name."""
    for folder in (Path(name), runs / name):
        if (folder / "job.json").is_file():
            return folder.resolve()
    raise UsageError(f"there is no run {name}", remedy=f"Name a run's folder, such as {runs / 'latest'}.")


def load(folder: Path) -> tuple[JobFacts, Plan]:
    """The job and the plan with which a run was last started."""
    try:
        job = msgspec.json.decode((folder / "job.json").read_bytes(), type=JobFacts)
        plan = msgspec.json.decode((folder / "plan.json").read_bytes(), type=Plan)
    except UNREADABLE as error:
        raise UsageError(f"the run {folder} cannot be resumed: {error}", remedy="Start a new run.") from None
    return job, plan


def read_plan(file: Path) -> Plan:
    """A plan by itself, as ``tricorn plan -o`` writes it. Raises UsageError if it is none."""
    try:
        return msgspec.json.decode(file.read_bytes(), type=Plan)
    except UNREADABLE as error:
        raise UsageError(f"{file} is no plan: {error}", remedy="Have one written by tricorn plan -o FILE.") from None


def create(runs: Path, job: JobFacts, plan: Plan) -> Path:
    """A new folder in ``runs``, named after the moment, the job and the strategy."""
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{re.sub(r'[^A-Za-z0-9_-]+', '', job.name) or 'job'}-{plan.strategy}"
    try:
        runs.mkdir(parents=True, exist_ok=True)
        for attempt in range(1, 1000):
            folder = runs / (stem if attempt == 1 else f"{stem}-{attempt}")
            with contextlib.suppress(FileExistsError):
                folder.mkdir()
                return folder
    except OSError as error:
        raise UsageError(f"runs cannot be kept in {runs}: {error}", remedy="Choose a folder with --runs.") from None
    raise UsageError(f"{runs} has a thousand runs of this second", remedy="Choose another folder with --runs.")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other launchers off the run meanwhile. Raises UsageError if one has it."""
    with _writable(folder), (folder / "lock").open("wb") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"the run {folder} is in progress", remedy="Wait for its end, or stop it first.") from None
        yield


def prepare(folder: Path, job: JobFacts, plan: Plan) -> None:
    """Make the folder ready for a run, and point ``latest`` to it. What an earlier run said it is stays for now.

    Raises UsageError if the run was started with another order of samples, StorageError if the disk will not take it.
    """
    with _writable(folder):
        Ledger(folder / "ledger.sqlite", job.order).close()
        (folder / "logs").mkdir(exist_ok=True)
        if not (folder / "job.json").exists():
            say(folder, job, plan)
        fresh = folder.parent / f".latest-{os.getpid()}"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(folder.name)
        fresh.replace(folder.parent / "latest")


def say(folder: Path, job: JobFacts, plan: Plan) -> None:
    """Write what the run is. Raises OSError."""
    write_json(folder / "job.json", job)
    write_json(folder / "plan.json", plan)


def predict(folder: Path, prediction: dict[str, Any] | None) -> None:
    """Write what the run is predicted to cost, or that nothing is predicted."""
    with contextlib.suppress(OSError):  # it is for whoever looks
        (folder / "predicted.json").unlink(missing_ok=True)
        if prediction is not None:
            write_json(folder / "predicted.json", prediction)


def change(folder: Path, launch: str, changes: list[dict[str, Any]]) -> None:
    """Write what a launch of the run came to under the plans that it had so far."""
    with contextlib.suppress(OSError):  # it is for whoever looks
        write_json(folder / "changes.json", {"launch": launch, "changes": changes})


def finished(folder: Path, job: JobFacts) -> dict[str, Any] | None:
    """The summary of a run that has done all that the job asks for; None if there is something left to do."""
    with contextlib.suppress(*UNREADABLE):
        summary = msgspec.json.decode((folder / "summary.json").read_bytes(), type=dict[str, Any])
        told = msgspec.convert(summary, _Told)
        old = msgspec.json.decode((folder / "job.json").read_bytes(), type=JobFacts)
        if told.outcome == "done" and old.epochs == job.epochs and old.order == job.order:
            return summary
    return None


def history(folder: Path) -> list[dict[str, Any]]:
    """The losses and evaluations that count, in the order of steps: of a step that was run again, the last."""
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for line in (folder / "metrics.jsonl").read_bytes().splitlines():
        with contextlib.suppress(*UNREADABLE):  # torn when the coordinator was killed
            row = msgspec.json.decode(line, type=dict[str, Any])
            if "loss" in row or "evaluation" in row:
                rows[msgspec.convert(row.get("step"), int), "evaluation" in row] = row
    return [rows[key] for key in sorted(rows)]


def write_json(path: Path, value: Any) -> None:
    """Replace the file whole or not at all. Raises OSError."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n")
    partial.replace(path)


@contextlib.contextmanager
def _writable(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(f"the run's folder {folder} cannot be written: {error}") from None
