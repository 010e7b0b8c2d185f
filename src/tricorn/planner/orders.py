"""What the planner and the process that measures for it say to each other."""

from __future__ import annotations

from tricorn.control import messages as m
from tricorn.plan import Plan
from tricorn.planner.figures import Curve
from tricorn.planner.links import Links
from tricorn.planner.profile import Profile


class Load(m.Message, frozen=True, kw_only=True):
    """Load a job: from a file and a name in it, or from the descriptor of a pickle that the planner inherited us."""

    file: str | None
    name: str
    pickle_fd: int | None


class MeasureJob(m.Message, frozen=True, kw_only=True):
    cores: int


class MeasureLinks(m.Message, frozen=True, kw_only=True):
    cores: int


class Judge(m.Message, frozen=True, kw_only=True):
    """Which of the plans can run the job?"""

    plans: list[Plan]


class MeasureHost(m.Message, frozen=True, kw_only=True):
    """Compute with so many samples of the job."""

    samples: int


class Exchange(m.Message, frozen=True, kw_only=True):
    """Be one of so many ranks that exchange, and listen at that address. ``sizes``: bytes; ``only``: an operation."""

    rank: int
    ranks: int
    secret: bytes
    host: str
    sizes: list[int]
    only: str | None = None


class Meet(m.Message, frozen=True, kw_only=True):
    """Where all ranks listen."""

    addresses: list[m.Address]


class Part(m.Message, frozen=True, kw_only=True):
    """All have finished."""


class Loaded(m.Message, frozen=True, kw_only=True):
    """``sources``: the user's own files that make up the job."""

    sources: list[str]


class Told(m.Message, frozen=True, kw_only=True):
    """What is being measured."""

    text: str


class JobMeasured(m.Message, frozen=True, kw_only=True):
    profile: Profile


class LinksMeasured(m.Message, frozen=True, kw_only=True):
    links: Links


class Judged(m.Message, frozen=True, kw_only=True):
    """For each plan one sentence that says why not, None if it can run the job."""

    why_not: list[str | None]


class HostMeasured(m.Message, frozen=True, kw_only=True):
    """``cores`` may be a fraction; ``memory``: bytes; ``seconds``: of forward and backward, on average."""

    cores: float
    memory: int
    seconds: float


class Listening(m.Message, frozen=True, kw_only=True):
    address: m.Address


class Exchanged(m.Message, frozen=True, kw_only=True):
    """Seconds of each operation, by bytes."""

    curves: dict[str, Curve]


class Parted(m.Message, frozen=True, kw_only=True):
    """Nothing is left of the exchange."""


ToSurveyor = Load | MeasureJob | MeasureLinks | MeasureHost | Exchange | Meet | Part | Judge
FromSurveyor = (
    Loaded | Told | JobMeasured | LinksMeasured | HostMeasured | Listening | Exchanged | Parted | Judged | m.Failed
)
