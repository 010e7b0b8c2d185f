"""Tricorn: one declared PyTorch job, trained by parameter server, data parallel or model parallel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tricorn import errors
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.table import Table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tricorn import data, optim, ps
    from tricorn.engine.base import Engine
    from tricorn.planner import Cluster, Planned
    from tricorn.run import Result, train

__version__ = "0.1.0"
__all__ = ["Job", "Plan", "Result", "Table", "__version__", "data", "errors", "optim", "plan", "ps", "train"]


def plan(
    job: Job,
    *,
    cluster: Cluster | str | Path | None = None,
    engine: Callable[[Job | tuple[str, str]], Engine] | None = None,
    approximate: bool = False,
    **given: object,
) -> Planned:
    """Predict what every plan for the job would cost, and say which is best and why; see ``tricorn.planner.plan``.

    ``cluster`` is a file that describes other machines. With an ``engine`` (``tricorn.engine.local.LocalEngine``, or
    what ``tricorn.engine.hosts.on_hosts`` makes) the plan is for where that runs: hosts are measured, and the plans
    that seem best are tried there for some steps.
    """
    from tricorn import planner
    from tricorn.planner.options import checked, decided

    checked({"strategy": "dp", **decided(given)}, beside=plan.__annotations__)
    if engine is None:
        return planner.plan(job, given, cluster=cluster, approximate=approximate)
    if cluster is not None:
        raise errors.UsageError("a cluster is described, and an engine is given", remedy="Give one of the two.")
    from tricorn.trials import tried

    return tried(job, given, engine=engine, approximate=approximate)


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line must not wait for PyTorch before it starts the fork server.
    import importlib

    if name in ("data", "optim", "ps"):
        return importlib.import_module(f"tricorn.{name}")
    if name in ("train", "Result"):
        return getattr(importlib.import_module("tricorn.run"), name)
    raise AttributeError(f"module 'tricorn' has no attribute {name!r}")
