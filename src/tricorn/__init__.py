"""Tricorn: one declared PyTorch job, trained by parameter server, data parallel or model parallel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tricorn import errors
from tricorn.job import Job
from tricorn.plan import Plan
from tricorn.table import Table

if TYPE_CHECKING:
    from tricorn import data, optim, ps
    from tricorn.run import Result, train

__version__ = "0.1.0"
__all__ = ["Job", "Plan", "Result", "Table", "__version__", "data", "errors", "optim", "ps", "train"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the command line must not wait for PyTorch before it starts the fork server.
    import importlib

    if name in ("data", "optim", "ps"):
        return importlib.import_module(f"tricorn.{name}")
    if name in ("train", "Result"):
        return getattr(importlib.import_module("tricorn.run"), name)
    raise AttributeError(f"module 'tricorn' has no attribute {name!r}")
