"""Short runs of a job under one plan after another, where it is to be trained: what their steps really take."""

from __future__ import annotations

import io
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path

import msgspec

from tricorn import folder as folders
from tricorn import planner
from tricorn.comm.auth import new_secret
from tricorn.control import messages as m
from tricorn.engine.base import Engine, Timing
from tricorn.engine.hosts import OnHosts
from tricorn.errors import Interrupted
from tricorn.job import Job
from tricorn.launcher import launcher_of
from tricorn.plan import Plan
from tricorn.planner import Planned
from tricorn.report.progress import Progress

SETTLED, SETTLING = 20.0, 2.0  # steps, or seconds, after which sizes and shares that are tried first are settled
SECONDS = 0.7  # of steps that are measured, at least
FEWEST_STEPS = 3
LONGEST = 15.0  # seconds of a trial; what has not made its steps by then is not measured
NEVER = 1e9  # seconds


def tried(
    job: Job | tuple[str, str],
    given: Mapping[str, object],
    *,
    engine: Callable[[Job | tuple[str, str]], Engine],
    approximate: bool = False,
    fresh: bool = False,
    told: Callable[[str], None] = lambda text: None,
) -> Planned:
    """``tricorn.planner.plan`` for where the engine runs: hosts are measured, and what seems best is tried there."""
    places = engine.places if isinstance(engine, OnHosts) else ()
    with Trials(job, engine) as trial:
        return planner.plan(job, given, places=places, approximate=approximate, fresh=fresh, trial=trial, told=told)


class Trials:
    """Of one job on one engine, which stays warm between them. A context manager; call it with a plan."""

    def __init__(self, job: Job | tuple[str, str], engine: Callable[[Job | tuple[str, str]], Engine]) -> None:
        self._stack = ExitStack()
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="tricorn-")))
        self._engine = engine(job)
        self._stack.callback(self._engine.close)

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __call__(self, plan: Plan) -> Mapping[str, float]:
        """Seconds of a step by term (report/compare.py); empty if too few were made. Raises what a run raises."""
        try:
            return self._run(plan)
        finally:
            self._engine.rest()

    def _run(self, plan: Plan) -> Mapping[str, float]:
        facts, coordinator = self._engine.load(plan)
        folder = folders.create(self._folder, facts, plan)

        settled: tuple[float, Mapping[str, float]] = 0.0, {}
        until = time.monotonic() + SETTLING

        def enough(said: m.Progress) -> bool:
            nonlocal settled
            if said.measured and not settled[0] and (said.measured_steps >= SETTLED or time.monotonic() > until):
                settled = said.measured_steps, said.measured
            elif settled[0]:
                steps = said.measured_steps - settled[0]
                found = _between(*settled, said.measured_steps, said.measured)
                if steps >= FEWEST_STEPS and steps * found["step"] >= SECONDS:
                    raise _Enough(found)
            return False

        launcher = launcher_of(
            self._engine, coordinator, facts, plan, Timing(checkpoint_seconds=NEVER), folder, Progress(io.StringIO()),
            launch=new_secret().hex()[:16], leaves=enough,
        )  # fmt: skip
        timer = threading.Timer(LONGEST, launcher.interrupt)
        timer.start()
        try:
            summary = launcher.run().summary
            return msgspec.convert(summary.get("measured", {}), dict[str, float])
        except _Enough as found:
            return found.measured
        except Interrupted:
            return {}
        finally:
            timer.cancel()
            timer.join()


def _between(before: float, then: Mapping[str, float], steps: float, now: Mapping[str, float]) -> dict[str, float]:
    """Means of the steps in between, where ``then`` are those of the first ``before`` steps, ``now`` of all."""
    return {
        term: max(0.0, (seconds * steps - then.get(term, 0.0) * before) / max(1.0, steps - before))
        for term, seconds in now.items()
    }


class _Enough(Exception):
    """The steps that were to be measured are made."""

    def __init__(self, measured: Mapping[str, float]) -> None:
        super().__init__()
        self.measured = measured
