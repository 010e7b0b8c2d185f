"""What the coordinator decides to do: plain values, carried out in order by control/server.py."""

from __future__ import annotations

from typing import NamedTuple

from tricorn.control import messages as m
from tricorn.control.intervals import Intervals


class Checkpoint(NamedTuple):
    """A published checkpoint: its step, and the steps its state holds."""

    step: int
    folder: str
    applied: list[tuple[int, int]]


class Send(NamedTuple):
    role: str
    message: m.Order


class Tell(NamedTuple):
    """To the launcher."""

    message: m.ToLauncher


class BeginEpoch(NamedTuple):
    """Make durable that this membership epoch begins with exactly these steps in the model."""

    epoch: int
    committed: Intervals
    event: str


class Commit(NamedTuple):
    steps: list[int]
    epoch: int


class Publish(NamedTuple):
    """Write the manifest that makes a checkpoint of these files."""

    step: int
    files: list[m.File]
    applied: list[tuple[int, int]]


class Measured(NamedTuple):
    step: int
    values: dict[str, float]


class Trace(NamedTuple):
    """A line for metrics.jsonl."""

    step: int
    loss: float


class Note(NamedTuple):
    """A line for metrics.jsonl of what a role measured."""

    role: str
    step: int
    what: str
    values: dict[str, float]


class End(NamedTuple):
    outcome: str
    error: m.Failed | None


Instruction = Send | Tell | BeginEpoch | Commit | Publish | Measured | Trace | Note | End
