"""Which embeddings are spread over the workers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from tricorn.errors import PlanError
from tricorn.hybrid.own import by_rows
from tricorn.optim import RowwiseAdagrad
from tricorn.state.rows import RowTable, described, row_tables, unfit, weight_owners

if TYPE_CHECKING:
    from tricorn.job import Job


def spread_tables(job: Job, model: nn.Module) -> tuple[RowTable, ...]:
    """All embeddings of a model as tables, in its order. Raises PlanError if one has to stay in every worker."""
    row_tables(job, model)  # judges what the job declares
    owners = weight_owners(model)
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            table = described(job, name, module)
            if reason := unfit(module, owners) or _unspread(table, module):
                raise PlanError(f"embedding {name!r} cannot be spread: {reason}", remedy="Or use --embeddings whole.")
            found.append(table)
    return tuple(found)


def _unspread(table: RowTable, module: nn.Embedding | nn.EmbeddingBag) -> str | None:
    if table.declared.forgetful:
        return "its rows come and go (admit, max_rows, ttl), which only servers keep; use --strategy ps+dp"
    if isinstance(table.optimizer, RowwiseAdagrad):
        return "RowwiseAdagrad keeps one number for a whole row, which only servers save; use --strategy ps+dp"
    if table.padding is not None and table.prefilled and not by_rows(table, declared=False):
        padding_D = module.weight.detach()[table.padding]
        if not module.weight.is_meta and padding_D.any():
            return "the row of its padding_idx is not zero, and the optimizer changes rows without a gradient"
    return None
