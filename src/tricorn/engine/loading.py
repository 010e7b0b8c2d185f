"""Getting the user's job into the fork server, and everything a role will need before it is forked."""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import cast

import msgspec
import torch

from tricorn import strategy
from tricorn.data.sources import as_source
from tricorn.engine.base import JobFacts
from tricorn.engine.fitting import too_large
from tricorn.errors import PlanError, UsageError, users_line
from tricorn.job import Job
from tricorn.plan import Plan

_FOR_ROLES = (
    "tricorn.engine.roles",
    "tricorn.worker.leased",
    "tricorn.worker.synchronous",
    "tricorn.worker.saver",
    "tricorn.control.record",
    "tricorn.comm.listener",
)
_FOR_SERVED = ("tricorn.ps.server", "tricorn.ps.shared", "tricorn.ps.trainer")


def load(file: str | None, name: str, pickle_fd: int | None) -> Job:
    """The job of that name in the file, or the one in the pickle that the launcher handed over.

    The pickle comes through an inherited anonymous file from the process that started this one, never from a
    socket or from disk.
    """
    if pickle_fd is not None:
        import cloudpickle

        with os.fdopen(pickle_fd, "rb") as stream:
            sys.path[:] = cloudpickle.load(stream)
            return cast(Job, cloudpickle.load(stream))
    assert file is not None
    path = Path(file).resolve()
    if not path.is_file():
        raise UsageError(f"there is no file {file}", remedy="Name a Python file that declares a tricorn.Job.")
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{file} is not a Python file", remedy="Name a Python file that declares a tricorn.Job.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
        found = getattr(module, name, None)
        if callable(found):
            found = found()
    except UsageError as error:
        error.where = error.where or users_line(error)
        raise
    if not isinstance(found, Job):
        jobs = [key for key, value in vars(module).items() if isinstance(value, Job)]
        what = f"{name} is a {type(found).__name__}" if found is not None else f"there is no {name}"
        remedy = (
            f"Name one of its jobs: {', '.join(f'{file}:{j}' for j in jobs)}."
            if jobs
            else "Declare job = tricorn.Job(...)."
        )
        raise UsageError(f"in {file}, {what}", remedy=remedy)
    return found


def describe(job: Job, file: str | None, entry: str) -> JobFacts:
    """What the launcher and the coordinator need to know."""
    source = as_source(job.train)
    return JobFacts(
        name=Path(file).stem if file else getattr(job.model, "__name__", "job").strip("<>"),
        file=str(Path(file).resolve()) if file else None,
        entry=entry,
        fingerprint=source.fingerprint,
        samples=len(source),
        evaluation_samples=len(job.evaluate) if job.evaluate is not None else 0,
        batch_size=job.batch_size,
        epochs=job.epochs,
        seed=job.seed,
        precision=job.precision,
        device=job.device,
        optimizer=msgspec.to_builtins(job.optimizer),
        metrics=list(job.metrics),
    )


def prepare(plan: Plan, precision: str) -> None:
    """Import, and compile, what the roles of a plan will need: forks of this process have it then."""
    for module in (*_FOR_ROLES, *(_FOR_SERVED if plan.served else ())):
        importlib.import_module(module)
    if plan.workers > 1 and (plan.strategy != "ps" or plan.local_steps > 1):
        from tricorn.comm import within

        within.warm({getattr(torch, precision), torch.float32, torch.float64})
    encodings = {plan.compress, *plan.compress_tables.values()} - {"none"}
    if encodings and (plan.served or plan.workers > 1):
        from tricorn.dp import compress

        for encoding in encodings:
            compress.warm(encoding, torch.float64 if precision == "float64" else torch.float32)
    if plan.served:
        from tricorn.ps import ring

        ring.warm()


def warm(job: Job, plan: Plan) -> None:
    """Have ready what the roles of this plan will need. Raises PlanError if the plan cannot run the job."""
    prepare(plan, job.precision)
    chosen = strategy.find(plan)
    if reason := chosen.why_not(job, plan):
        raise PlanError(
            f"{plan.strategy} cannot run this job: {reason}", remedy="Change that, or choose another --strategy."
        )
    if error := too_large(job, plan):
        raise error
    if "torch.cuda" in sys.modules and torch.cuda._initialized:
        raise UsageError(
            "the job uses CUDA while it is being loaded, and a process that uses CUDA cannot be forked",
            remedy="Build models and tensors on the CPU; Tricorn moves them to the job's device.",
        )
