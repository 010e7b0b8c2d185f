"""Every error that Tricorn raises on purpose, each with its remedy.

TricornError
├── UsageError              exit 2   the call, the job file or the options
│   ├── JobError                     a job's fields, all mistakes at once
│   └── PlanError                    this strategy cannot run this job
├── JobFailed               exit 1   the user's code or data, while running
│   ├── UserCodeError                an exception in the model, loss or metrics
│   ├── DataError                    an item that cannot be read or batched
│   └── Diverged                     a loss that is not a number
├── ClusterError            exit 3   machines, network, storage
│   ├── RoleFailed                   a role that cannot be kept alive
│   ├── StorageError                 a full or failing disk
│   ├── TableFull                    a sparse table that has reached its memory limit
│   ├── CheckpointDamaged            no checkpoint left that can be read
│   ├── ProtocolError                a frame that is malformed or too long
│   └── AuthenticationError          a peer that does not know the run's secret
├── PeerLost                internal a peer died; the coordinator will regroup
└── Interrupted             exit 130 stopped by a signal, resumable
"""

from __future__ import annotations

import linecache
import sysconfig
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class TricornError(Exception):
    """Base of all. ``remedy`` says what to do about it; ``where`` is a line of the user's own code."""

    exit_code = 3
    remedy = ""

    def __init__(self, message: str, *, remedy: str | None = None, where: str = "") -> None:
        super().__init__(message)
        if remedy is not None:
            self.remedy = remedy
        self.where = where


class UsageError(TricornError):
    exit_code = 2


@dataclass(frozen=True)
class Problem:
    """One mistake in a job: which field, what was given, what would do."""

    field: str
    given: str
    would_do: str

    def __str__(self) -> str:
        return f"{self.field}: given {self.given}; {self.would_do}"


class JobError(UsageError):
    """All mistakes of a job, reported together."""

    remedy = "Correct the fields named above in the job."

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        count = "1 mistake" if len(problems) == 1 else f"{len(problems)} mistakes"
        super().__init__(f"the job has {count}:\n" + "\n".join(f"  - {p}" for p in problems))


class PlanError(UsageError):
    """A strategy that cannot run the job, with what would have to change."""


class JobFailed(TricornError):
    exit_code = 1


class UserCodeError(JobFailed):
    remedy = (
        "Correct it (the traceback is in RUN/logs); "
        "`tricorn train --resume RUN` goes on from the last checkpoint, if there is one."
    )


class DataError(JobFailed):
    remedy = "Correct or drop the item named above; every item must have the shape and type of the first."


class Diverged(JobFailed):
    remedy = "Lower the learning rate, set clip_norm, or look at the data of this step for values that are not finite."


class ClusterError(TricornError):
    exit_code = 3


class RoleFailed(ClusterError):
    remedy = "Read the role's log in the run's folder; `tricorn train --resume RUN` goes on from the last checkpoint."


class StorageError(ClusterError):
    remedy = "Free space in the run's folder or choose another with --runs, then `tricorn train --resume RUN`."


class TableFull(ClusterError):
    remedy = "Give the table max_rows or ttl, add servers (--servers), or raise the memory limit."


class CheckpointDamaged(ClusterError):
    remedy = "Restore the file named above, or start a new run."


class ProtocolError(ClusterError):
    remedy = "Check that every role runs the same version of Tricorn and that nothing else uses its ports."


class AuthenticationError(ClusterError):
    remedy = "Give both sides the secret of the same run."


class PeerLost(TricornError):
    """A peer of this membership epoch is gone; the step is abandoned and the coordinator regroups."""


class Interrupted(TricornError):
    exit_code = 130
    remedy = "Go on with `tricorn train --resume RUN`."


_LIBRARIES = (str(Path(__file__).parent), *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")))


def note(error: BaseException, function: str, **given: object) -> None:
    """Add to an error which function of the job raised it, and shapes and types of what that was given."""
    error.add_note(f"in the job's {function}, given " + ", ".join(f"{name} {form(it)}" for name, it in given.items()))


def in_words(error: BaseException) -> str:
    """An error that is not of Tricorn in words: its type, what it says, and its notes, a line each."""
    return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


def form(value: Any) -> str:
    """What a value is: ``float32 (100, 10)`` of a tensor, the same of each in a tuple or dict, else its type."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {form(item)}" for name, item in value.items()) + "}"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(form, value)) + ")"
    return type(value).__name__


def users_line(error: BaseException) -> str:
    """The last line of the user's own code that led to the error, as ``FILE:LINE in FUNCTION: TEXT``.

    Frames of Tricorn, of installed packages, of Python itself and of what it generates, as a dataclass's ``__init__``,
    are passed over; empty if there are no others.
    """
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        file = frame.f_code.co_filename
        if not file.startswith((*_LIBRARIES, "<frozen", "<string>")):
            text = linecache.getline(file, line).strip()
            return f"{file}:{line} in {frame.f_code.co_name}" + (f": {text}" if text else "")
    return ""
