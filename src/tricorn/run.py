"""One run: a job, a plan and a folder, from the first process to the summary."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Unpack

import msgspec

from tricorn import folder as folders
from tricorn import planner
from tricorn.comm.auth import new_secret
from tricorn.control import messages as m
from tricorn.data.order import steps_per_epoch
from tricorn.engine.base import Engine, JobFacts, Timing
from tricorn.engine.hosts import OnHosts
from tricorn.engine.local import LocalEngine
from tricorn.errors import ClusterError, Interrupted, PlanError, TricornError, UsageError
from tricorn.fields import shown
from tricorn.job import Job
from tricorn.launcher import Launcher, launcher_of
from tricorn.plan import Options, Plan
from tricorn.planner import learn, load
from tricorn.planner.auto import choose, outlook
from tricorn.planner.explain import named, seconds
from tricorn.planner.options import checked, decided, settled
from tricorn.planner.replan import Outlook, Watch
from tricorn.ps import caution
from tricorn.report.failure import located
from tricorn.report.progress import Progress, progress
from tricorn.state import cores
from tricorn.trials import tried

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Result:
    """What a run came to. ``summary`` is what ``summary.json`` says; ``folder`` is the run's."""

    job: Job
    folder: Path
    summary: dict[str, Any]

    @cached_property
    def model(self) -> nn.Module:
        """The trained model, on the CPU, ready to evaluate. Raises CheckpointDamaged if it cannot be read."""
        from tricorn.state.trained import trained_model

        return trained_model(self.job, self.folder)

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """One entry a step with its loss, one an evaluation with its values, in the order of steps."""
        return folders.history(self.folder)


def train(
    job: Job,
    *,
    plan: Plan | None = None,
    resume: str | Path | None = None,
    runs: str | Path = "runs",
    checkpoint_every: str | int = "30s",
    heartbeat_timeout: float = 10.0,
    engine: Callable[[Job | tuple[str, str]], Engine] = LocalEngine,
    replan: bool = False,
    **options: Unpack[Options],
) -> Result:
    """Train the job on this machine's processes and return the trained model and its history.

    ``options`` are the fields of ``Plan``, as of ``tricorn train``; a whole ``plan`` may be given instead. Without a
    ``strategy``, or with ``"auto"``, the planner takes the best plan that has these options. ``resume`` names a run to
    go on with, under any plan. ``checkpoint_every`` is a number of steps, or ``"30s"``. ``engine`` says where roles
    run, instead of on this machine (see ``tricorn.engine.hosts.on_hosts``); there the planner measures the hosts, and
    tries for some steps what seems best.

    Raises JobFailed for an error of the job's own code or data, PlanError, ClusterError, and Interrupted after
    Ctrl-C, when the run can be resumed.
    """
    expected: Outlook | None = None
    if not isinstance(job, Job):
        raise UsageError(f"the job is {shown(job)}", remedy="Give a tricorn.Job; `tricorn train FILE` takes a file.")
    if not isinstance(plan, Plan | None):
        raise UsageError(f"the plan is {shown(plan)}", remedy="Give a tricorn.Plan, or a strategy by its name.")
    given = decided(options)
    checked({"strategy": "dp", **given}, beside=inspect.signature(train).parameters)
    if plan is None:
        own = engine is not LocalEngine and not isinstance(engine, OnHosts)
        if "strategy" in given or resume is not None or own:
            plan = settled(given.pop("strategy", "dp"), given)
        else:
            planning = planner.plan if engine is LocalEngine else partial(tried, engine=engine)
            try:
                plan, expected = choose(job, given, planning=planning)
            except KeyboardInterrupt:
                raise Interrupted("interrupted by the user before the run began", remedy="Start it again.") from None
    elif options:
        raise UsageError(f"a plan is given, and {', '.join(options)} beside it", remedy="Give one of the two.")
    else:
        plan = checked(msgspec.structs.asdict(plan))
    if expected is None and engine is LocalEngine:
        expected = outlook(job, plan, thorough=replan)
    folder = folders.find(resume, Path(runs)) if resume is not None else None
    timing = timing_of(checkpoint_every, heartbeat_timeout)
    summary, folder = execute(
        engine, job, plan, timing, runs=Path(runs), folder=folder, expected=expected, replan=replan
    )
    return Result(job, folder, summary)


def execute(
    engine_type: Callable[[Job | tuple[str, str]], Engine],
    job: Job | tuple[str, str],
    plan: Plan,
    timing: Timing,
    *,
    runs: Path,
    folder: Path | None,
    expected: Outlook | None = None,
    replan: bool = False,
) -> tuple[dict[str, Any], Path]:
    """Run a job, given as itself or as (file, name), in a new folder or going on in that of an earlier run.

    What it comes to is held against what was ``expected``, if anything was. When another plan would clearly be faster
    the run says so; with ``replan`` it is saved and ended at the next step, and goes on under that one.
    """
    if mistakes := plan.mistakes():
        raise PlanError("the plan has mistakes:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes))
    display = progress()
    launcher: Launcher | None = None

    by = ""  # who interrupted it

    def interrupted(signum: int, frame: FrameType | None) -> None:
        nonlocal by
        by = "by the user" if signum == signal.SIGINT else "by SIGTERM"
        if launcher is None:
            raise KeyboardInterrupt
        launcher.interrupt()

    launch = new_secret().hex()[:16]
    left: list[Plan] = []  # plans that the run had
    changes: list[dict[str, Any]] = []
    with _signals(interrupted):
        try:
            while True:
                launcher, began = None, load.moment()
                with contextlib.closing(engine_type(job)) as engine:
                    try:
                        facts, coordinator = engine.load(plan)
                    except PlanError as error:
                        if not left:
                            raise
                        display.notice(f"{named(plan)} is not to be had, and the run goes on as before: {error}")
                        plan, expected = left.pop(), None
                        continue
                    if not left and folder is not None and (summary := folders.finished(folder, facts)) is not None:
                        display.notice("the run is complete; there is nothing left to do")
                        display.finished(summary)
                        return summary, folder
                    if notice := caution(facts.optimizer, plan):
                        display.notice(notice)
                    folder = folder or folders.create(runs, facts, plan)
                    watch = Watch(expected, left) if expected else None
                    with folders.held(folder):
                        folders.predict(folder, expected.as_dict() if expected else None)
                        leaves = _looks(watch, facts, display, replan=replan)
                        launcher = launcher_of(
                            engine, coordinator, facts, plan, timing, folder, display, launch=launch, leaves=leaves
                        )
                        ended = launcher.run()
                measured, steps = ended.summary.get("measured", {}), ended.summary.get("measured_steps", 0.0)
                if expected and measured and load.taken(began, load.moment(), cores.usable()) <= load.BUSY:
                    learn(expected, measured, steps)
                better = watch.better if watch else None
                if ended.outcome != "stopped" or not (replan and better and expected) or launcher.interrupted:
                    break
                changes.append({key: ended.summary[key] for key in ("steps", "plan", "measured", "bytes_sent")})
                changes[-1]["bytes_sent"] -= sum(change["bytes_sent"] for change in changes[:-1])
                folders.change(folder, launch, changes)
                left.append(plan)
                plan, ground = better.plan, expected.after(measured, steps)
                expected = replace(expected, prediction=better, ground=ground)
        except KeyboardInterrupt:
            if left:
                raise _located(Interrupted(f"interrupted {by} while it changed over"), folder, job) from None
            raise Interrupted(f"interrupted {by} before the run began", remedy="Start it again.") from None
        except TricornError as error:
            raise _located(error, folder, job) from error.__cause__
        finally:
            display.close()
    if ended.error is not None:
        raise _located(m.raised(ended.error, ClusterError), folder, job)
    if ended.outcome == "stopped":
        steps, saved = ended.summary["steps"], ended.summary["saved"]
        what = "and saved" if saved == steps else f"to go on from {f'step {saved}' if saved else 'the beginning'}"
        raise _located(Interrupted(f"interrupted {by} at step {steps}, {what}"), folder, job)
    display.finished(ended.summary)
    return ended.summary, folder


def _looks(watch: Watch | None, job: JobFacts, display: Progress, *, replan: bool) -> Callable[[m.Progress], bool]:
    """What is asked at each word of progress: whether the run is to go on under another plan, of which it is told."""
    total = job.epochs * steps_per_epoch(job.samples, job.batch_size)

    def leaves(said: m.Progress) -> bool:
        if watch is None or not watch.look(said.measured, said.measured_steps, total - said.step):
            return False
        assert watch.better is not None
        better = watch.better
        display.notice(
            f"a step takes {seconds(said.measured['step'])}, and would take {seconds(better.seconds)} "
            f"({seconds(better.low)} to {seconds(better.high)}) with {named(better.plan)}"
            + ("; changing over" if replan else "; --replan changes over")
        )
        return replan

    return leaves


def timing_of(checkpoint_every: str | int, heartbeat_timeout: float) -> Timing:
    """Read ``100``, ``100 steps`` or ``30s``."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|steps?|)\s*", str(checkpoint_every))
    if not match or float(match[1]) <= 0:
        raise UsageError(
            f"checkpoint_every is {checkpoint_every!r}",
            remedy="Give a number of steps, such as 100, or a time, such as 30s.",
        )
    if not heartbeat_timeout >= 0.5:
        raise UsageError(
            f"heartbeat_timeout is {heartbeat_timeout:g} s", remedy="Give at least 0.5: a busy role needs a moment."
        )
    if match[2] == "s":
        return Timing(checkpoint_seconds=float(match[1]), heartbeat_timeout=heartbeat_timeout)
    return Timing(checkpoint_steps=max(1, int(float(match[1]))), heartbeat_timeout=heartbeat_timeout)


def _located(error: TricornError, folder: Path | None, job: Job | tuple[str, str]) -> TricornError:
    """The error, with the run's folder where its remedy speaks of RUN, and the way on of who came from Python."""
    if folder is not None:
        error.remedy = located(error.remedy, os.path.relpath(folder), python=isinstance(job, Job))
    return error


@contextlib.contextmanager
def _signals(handler: Any) -> Iterator[None]:
    """Ctrl-C and SIGTERM go to the handler meanwhile, where the interpreter allows it: in its main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
