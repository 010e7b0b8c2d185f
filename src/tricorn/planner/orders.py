"""What the planner and the process that measures for it say to each other."""

from __future__ import annotations

from tricorn.control import messages as m
from tricorn.plan import Plan
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


ToSurveyor = Load | MeasureJob | MeasureLinks | Judge
FromSurveyor = Loaded | Told | JobMeasured | LinksMeasured | Judged | m.Failed
