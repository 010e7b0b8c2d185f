"""Which embeddings of a model are tables, trained by rows, and what their rows begin as.

One answer for every strategy: all start from the same numbers, and one that cannot train a table says why.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import numpy as np
import torch
from torch import nn

from tricorn import table as tables
from tricorn.errors import PlanError, UsageError
from tricorn.state.build import sparing

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.optim import RowOptimizer
    from tricorn.table import Table

Embedding: TypeAlias = nn.Embedding | nn.EmbeddingBag

_CHUNK = 1 << 16  # rows made at a time, so that the initial rows of a large table are not in memory twice


@dataclass(frozen=True, kw_only=True)
class RowTable:
    """An embedding of the model that is trained by rows, ``rows`` x ``dim``."""

    name: str  # of the module
    rows: int
    dim: int
    padding: int | None  # the id whose row never changes
    declared: Table
    optimizer: RowOptimizer
    prefilled: bool  # its rows begin as the model's own weights, and it has no others

    @property
    def parameter(self) -> str:
        return f"{self.name}.weight" if self.name else "weight"


def row_tables(job: Job, model: nn.Module) -> tuple[RowTable, ...]:
    """The tables of a job, in the order of the model. Only the form of ``model`` is looked at, not its weights.

    Raises UsageError if the job names what is no embedding, PlanError if one cannot be a table.
    """
    embeddings = {name: m for name, m in model.named_modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)}
    owners = weight_owners(model)
    if job.tables is None:
        chosen = {name: module for name, module in embeddings.items() if _pays(job, module, owners)}
    else:
        if unknown := [name for name in job.tables if name not in embeddings]:
            there = ", ".join(map(repr, embeddings)) or "none"
            raise UsageError(
                f"job.tables names {unknown[0]!r}, which is no nn.Embedding or nn.EmbeddingBag of the model",
                remedy=f"The model's embeddings are: {there}.",
            )
        chosen = {name: module for name, module in embeddings.items() if name in job.tables}
        for name, module in chosen.items():
            if reason := unfit(module, owners):
                raise PlanError(f"embedding {name!r} cannot be a table: {reason}", remedy="Or leave it out of tables.")
    for name, module in embeddings.items():
        if name not in (job.tables or {}) and module.weight.is_meta:
            raise PlanError(
                f"embedding {name!r} is on the meta device and has no weights",
                remedy=f"Declare it, tables={{{name!r}: tricorn.Table()}}, or build it with weights.",
            )
    return tuple(described(job, name, module) for name, module in chosen.items())


def begin_rows(job: Job, model: nn.Module) -> None:
    """Give declared tables the rows that they begin with; one that was built on the meta device gets its memory."""
    for table in row_tables(job, model):
        if not table.prefilled:
            weight = model.get_parameter(table.parameter)
            if weight.is_meta:
                with sparing():
                    weight = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype))
                model.get_submodule(table.name).register_parameter("weight", weight)
            begin_table(job, table, weight.detach())


def begin_table(job: Job, table: RowTable, weight_RD: torch.Tensor) -> None:
    """Fill the whole weight of a declared table with the rows that it begins with."""
    from tricorn.ps.sparse.initial import initial_rows

    dtype: Literal["float32", "float64"] = "float64" if job.precision == "float64" else "float32"
    for start in range(0, table.rows, _CHUNK):
        ids = np.arange(start, min(start + _CHUNK, table.rows))
        rows = initial_rows(job.seed, table.name, ids, table.declared.std, table.dim, dtype)
        weight_RD[start : start + len(ids)] = torch.from_numpy(rows)
    if table.padding is not None:
        weight_RD[table.padding] = 0


def needs_server(job: Job, model: nn.Module) -> str | None:
    """Why only a parameter server can train the job's tables, in one sentence; None if whole weights do as well."""
    for table in row_tables(job, model):
        what = f"table {table.name!r}"
        if table.declared.forgetful:
            return (
                f"{what} has rows that come and go (admit, max_rows, ttl), which only servers keep; use --strategy ps"
            )
        if table.optimizer != job.optimizer:
            return f"{what} has an optimizer of its own, which only servers run; use --strategy ps"
        if not table.optimizer.by_rows:
            return (
                f"{what} is updated by {type(table.optimizer).__name__} in the steps that have a row's id and not in "
                "the others, which only servers do; use --strategy ps, or SGD without momentum and weight decay, or "
                "Adagrad"
            )
    return None


def _pays(job: Job, module: Embedding, owners: Counter[int]) -> bool:
    """Whether an embedding that the job does not speak of is a table: it is large, and comes to the same as one."""
    return (
        job.optimizer.by_rows
        and "weight" in module._parameters
        and module.weight.numel() >= tables.LARGE
        and not module.weight.is_meta
        and unfit(module, owners) is None
    )


def weight_owners(model: nn.Module) -> Counter[int]:
    """How many modules refer to each parameter, by its id()."""
    return Counter(id(p) for m in model.modules() for p in m._parameters.values())


def unfit(module: Embedding, owners: Counter[int]) -> str | None:
    """Why the rows of an embedding cannot be apart from the model, None if they can."""
    if type(module).forward not in (nn.Embedding.forward, nn.EmbeddingBag.forward):
        return "its class has a forward of its own"
    if "weight" not in module._parameters:
        return "its weight is computed from others (a parametrization)"
    if owners[id(module.weight)] > 1:
        return "another part of the model has the same weight"
    if not module.weight.requires_grad:
        return "it is frozen (requires_grad=False), so it has no updates to send"
    if module.max_norm is not None:
        return "max_norm changes rows when they are read; bound the gradient by clip_norm instead"
    if module.scale_grad_by_freq:
        return "scale_grad_by_freq divides by how often an id is in one worker's share, not in the batch"
    return None


def described(job: Job, name: str, module: Embedding) -> RowTable:
    """An embedding of that name as a table, whether the job declares it or not."""
    declared = (job.tables or {}).get(name)
    return RowTable(
        name=name,
        rows=module.num_embeddings,
        dim=module.embedding_dim,
        padding=module.padding_idx,
        declared=declared or tables.Table(),
        optimizer=(declared.optimizer if declared else None) or job.optimizer,
        prefilled=declared is None,
    )
