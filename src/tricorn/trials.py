"""Short runs of a job under one plan after another, where it is to be trained: what their steps really take."""

from __future__ import annotations

import io
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tricorn import folder as folders
from tricorn import planner
from tricorn.comm.auth import new_secret
from tricorn.control import messages as m
from tricorn.engine.base import Engine, Timing
from tricorn.engine.hosts import OnHosts
from tricorn.engine.local import LocalEngine
from tricorn.errors import ClusterError, Interrupted, UsageError
from tricorn.fields import shown
from tricorn.job import Job
from tricorn.launcher import launcher_of
from tricorn.plan import Plan
from tricorn.planner import Planned
from tricorn.planner.trying import FEWEST_STEPS, NOTHING, Tried
from tricorn.report.progress import Progress

SETTLED, SETTLING = 20.0, 2.0  # steps, or seconds, after which sizes and shares that are tried first are settled
SECONDS = 0.7  # of steps that are measured, at least
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
    """``tricorn.planner.plan`` for where the engine runs: hosts are measured, and what seems best is tried there.

    Raises UsageError for engines that are neither of this machine nor of hosts.
    """
    if not isinstance(engine, OnHosts) and engine is not LocalEngine:
        raise UsageError(
            f"{shown(engine)} cannot be planned for",
            remedy="Give LocalEngine or on_hosts(...) as the engine, or name a strategy.",
        )
    places = engine.places if isinstance(engine, OnHosts) else ()
    with Trials(job, engine) as trial:
        return planner.plan(job, given, places=places, approximate=approximate, fresh=fresh, trial=trial, told=told)


class Trials:
    """Of one job on one engine, which stays warm between them. A context manager; call it with a plan."""

    def __init__(self, job: Job | tuple[str, str], engine: Callable[[Job | tuple[str, str]], Engine]) -> None:
        self._runs = tempfile.TemporaryDirectory(prefix="tricorn-")
        self._job, self._make = job, engine
        self._engine: Engine | None = None

    def __enter__(self) -> Trials:
        return self

    def __exit__(self, *_: object) -> None:
        if self._engine is not None:
            self._engine.close()
        self._runs.cleanup()

    def __call__(self, plan: Plan) -> Tried:
        """Run the plan for some steps. Raises what a run raises."""
        if self._engine is None:  # not before: nothing is to begin beside what the planner measures
            self._engine = self._make(self._job)
        try:
            found = self._run(plan, self._engine)
            self._engine.rest()
        except BaseException:  # it may be in any state, or lost
            self._engine.close()
            self._engine = None
            raise
        return found

    def _run(self, plan: Plan, engine: Engine) -> Tried:
        facts, coordinator = engine.load(plan)
        folder = folders.create(Path(self._runs.name), facts, plan)
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
                    raise _Enough(Tried(found, steps))
            return False

        launcher = launcher_of(
            engine, coordinator, facts, plan, Timing(checkpoint_seconds=NEVER), folder, Progress(io.StringIO()),
            launch=new_secret().hex()[:16], leaves=enough,
        )  # fmt: skip
        timer = threading.Timer(LONGEST, launcher.interrupt)
        timer.start()
        try:
            ended = launcher.run()
        except _Enough as end:
            return end.found
        except Interrupted:
            return NOTHING
        finally:
            timer.cancel()
            timer.join()
            shutil.rmtree(folder, ignore_errors=True)  # which a run that ended has saved its weights in
        if ended.error is not None:
            raise m.raised(ended.error, ClusterError)
        return Tried(ended.summary.get("measured", {}), ended.summary.get("measured_steps", 0.0))


def _between(before: float, then: Mapping[str, float], steps: float, now: Mapping[str, float]) -> dict[str, float]:
    """Means of the steps in between, where ``then`` are those of the first ``before`` steps, ``now`` of all."""
    return {
        term: max(0.0, (seconds * steps - then.get(term, 0.0) * before) / max(1.0, steps - before))
        for term, seconds in now.items()
    }


class _Enough(Exception):
    """The steps that were to be measured are made."""

    def __init__(self, found: Tried) -> None:
        super().__init__()
        self.found = found
