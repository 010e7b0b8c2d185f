"""What a run's folder tells of it: read once, checked, and handed on as plain values."""

from __future__ import annotations

import fcntl
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from tricorn.control.ledger import Ledger
from tricorn.data.order import steps_per_epoch
from tricorn.documents import UNREADABLE
from tricorn.engine.base import JobFacts
from tricorn.errors import UsageError
from tricorn.plan import Plan
from tricorn.planner.cluster import Host
from tricorn.planner.prediction import Prediction

LONGEST = 1 << 20  # bytes of a line of metrics: whatever is longer was not written by a run
_T = TypeVar("_T")
_Step = Annotated[int, msgspec.Meta(ge=0, lt=2**53)]


class Failure(msgspec.Struct, frozen=True):
    """The error that ended a run."""

    message: str
    where: str
    remedy: str


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """What the launch came to under a plan that it had before: at which step it left that one, and what a step took."""

    steps: _Step
    plan: Plan
    measured: dict[str, float]
    bytes_sent: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """``summary.json`` as far as it is shown; what an older version did not write is empty."""

    outcome: str
    steps: _Step
    total_steps: _Step
    samples: _Step
    seconds: float
    samples_per_second: float
    bytes_sent: float
    restarts: int
    exactly_once: bool
    loss: float | None
    metrics: dict[str, float | None]
    launch_steps: int = 0
    peak_bytes: dict[str, int] = {}
    changes: list[Change] = []
    measured: dict[str, float] = {}
    measured_steps: float = 0.0
    predicted: dict[str, float] = {}
    worst_term: str = ""
    spent: dict[str, dict[str, float]] = {}
    error: Failure | None = None


class Foreseen(Prediction, frozen=True, kw_only=True):
    """``predicted.json``: a prediction, and the machines it is for."""

    machines: tuple[Host, ...] = ()


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line of ``metrics.jsonl``: one of a loss, an evaluation, an event, or what a role told."""

    step: _Step
    time: Annotated[float, msgspec.Meta(ge=0, lt=1e11)]  # seconds since 1970
    loss: float | msgspec.UnsetType | None = msgspec.UNSET
    evaluation: dict[str, float | None] | None = None
    event: str | None = None
    membership: int = 0
    role: str = ""
    staleness: dict[str, float] | None = None
    shares: dict[str, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Event:
    """A membership epoch began. ``stood``: seconds around it in which no step was done, None if none followed."""

    time: float
    step: int
    membership: int
    text: str
    stood: float | None = None

    @property
    def loss(self) -> bool:
        """Whether something was lost; otherwise the run was launched."""
        return not self.text.startswith("the coordinator begins")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What the ledger proves. ``undone``: steps that were taken back, to be done again."""

    committed: int
    undone: int
    restarts: int
    exactly_once: bool


@dataclass(frozen=True, kw_only=True)
class Run:
    """All that is known of the run in a folder. ``problems``: what of it could not be read, a sentence each.

    ``losses`` and ``evaluations`` are by step, of a step done again the last; ``done`` are (seconds, step) in the order
    of time. ``live`` if it goes on just now. ``summary`` is None until the newest launch has ended.
    """

    folder: Path
    job: JobFacts
    plan: Plan
    live: bool = False
    summary: Summary | None = None
    foreseen: Foreseen | None = None
    losses: dict[int, float | None] = field(default_factory=dict)
    evaluations: dict[int, dict[str, float | None]] = field(default_factory=dict)
    done: list[tuple[float, int]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    staleness: dict[str, dict[str, float]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    samples: Samples | None = None
    problems: tuple[str, ...] = ()


def read(folder: Path) -> Run:
    """The run in this folder. Raises UsageError if its job or its plan cannot be read."""
    problems: list[str] = []
    job = _needed(folder / "job.json", JobFacts)
    plan = _needed(folder / "plan.json", Plan)
    if job.batch_size < 1 or plan.mistakes():
        raise UsageError(f"job.json or plan.json of {folder} is damaged", remedy="Restore it, or name another run.")
    live = _live(folder)
    lines = _lines(folder / "metrics.jsonl", problems)
    summary = None if live else _optional(folder / "summary.json", Summary, problems)
    samples, summary = _samples(folder / "ledger.sqlite", summary, problems)
    shares = [line.shares for line in lines if line.shares]
    return Run(
        folder=folder, job=job, plan=plan, live=live, summary=summary,
        foreseen=_optional(folder / "predicted.json", Foreseen, problems),
        losses={line.step: line.loss for line in lines if not isinstance(line.loss, msgspec.UnsetType)},
        evaluations={line.step: line.evaluation for line in lines if line.evaluation is not None},
        done=[(line.time, line.step + 1) for line in lines if line.loss is not msgspec.UNSET],
        events=_events(lines),
        staleness={line.role: line.staleness for line in lines if line.staleness},
        shares=shares[-1] if shares else {},
        samples=samples,
        problems=tuple(problems),
    )  # fmt: skip


def _needed(path: Path, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except UNREADABLE as error:
        raise UsageError(
            f"{path} cannot be read, and without it nothing can be said of the run: {error}",
            remedy="Restore the file, or name another run.",
        ) from None


def _optional(path: Path, kind: type[_T], problems: list[str]) -> _T | None:
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None  # a run that has not ended has no summary, one that was not predicted no prediction
    except UNREADABLE as error:
        problems.append(f"{path.name} cannot be read: {error}")
        return None


def _lines(path: Path, problems: list[str]) -> list[_Line]:
    decode: Callable[[bytes], _Line] = msgspec.json.Decoder(_Line).decode
    found, damaged = [], 0
    try:
        with path.open("rb") as file:
            while line := file.readline(LONGEST):
                try:
                    found.append(decode(line))
                except UNREADABLE:
                    damaged += 1
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error}")
    if damaged:
        problems.append(f"{damaged:,} of {damaged + len(found):,} lines of {path.name} are damaged, and are left out")
    return found


def _events(lines: list[_Line]) -> list[Event]:
    found: list[Event] = []
    open_, last = 0, None  # the first event after which no step was done yet; when the last step was done
    for line in lines:
        if line.event is not None:
            found.append(Event(time=line.time, step=line.step, membership=line.membership, text=line.event))
        elif line.loss is not msgspec.UNSET:
            for place in range(open_, len(found)):
                found[place] = replace(found[place], stood=max(0.0, line.time - (last or found[place].time)))
            open_, last = len(found), line.time
    return found


def _samples(path: Path, summary: Summary | None, problems: list[str]) -> tuple[Samples | None, Summary | None]:
    """What the ledger proves, and the summary unless it is that of an earlier launch."""
    try:
        with Ledger(path) as ledger:
            order, restarts = ledger.order, ledger.restarts()
            total = order.epochs * steps_per_epoch(order.samples, order.batch_size)
            if summary and (summary.restarts, summary.total_steps) != (restarts, total):
                summary = None
            done = summary is not None and summary.outcome == "done"
            samples = Samples(
                committed=len(ledger.committed()), undone=ledger.undone(), restarts=restarts,
                exactly_once=ledger.exactly_once(complete=done),
            )  # fmt: skip
            return samples, summary
    except UsageError as error:
        problems.append(str(error))
    except (sqlite3.Error, ValueError, TypeError) as error:  # a page or a value of it is damaged
        problems.append(f"the ledger {path.name} cannot be read: {error}")
    return None, summary


def _live(folder: Path) -> bool:
    """Whether a launcher holds the run."""
    try:
        with (folder / "lock").open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
