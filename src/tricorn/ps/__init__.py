"""Parameter server: servers hold the weights and apply the updates, workers compute gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tricorn.job import Job
    from tricorn.plan import Plan
    from tricorn.ps.session import Session, connect
    from tricorn.ps.standing import serving
    from tricorn.strategy import Context, Strategy, Trainer


__all__ = ["ParameterServer", "Session", "caution", "connect", "serving", "strategy", "unfit_encoding"]


def __getattr__(name: str) -> Any:
    # Imported on first use: whoever only plans must not wait for PyTorch.
    import importlib

    if name in ("Session", "connect"):
        return getattr(importlib.import_module("tricorn.ps.session"), name)
    if name == "serving":
        return importlib.import_module("tricorn.ps.standing").serving
    raise AttributeError(f"module 'tricorn.ps' has no attribute {name!r}")


class ParameterServer:
    """Fulfils ``tricorn.strategy.Strategy``."""

    def why_not(self, job: Job, plan: Plan) -> str | None:
        """One sentence that names what would have to change, None if the job can run. Builds the model."""
        from tricorn.state.flat import model_without_rows, trained_parameters
        from tricorn.state.inspect import batch_statistics
        from tricorn.state.rows import row_tables

        model = model_without_rows(job)
        trained = {name for name, _ in trained_parameters(model)}
        if not trained:
            return "the model has no trainable parameter; set requires_grad on those that shall be trained"
        layers = batch_statistics(model)
        if layers and plan.workers > 1:
            return (
                f"layer {layers[0]!r} keeps statistics of the batch, and each of the {plan.workers} workers sees only "
                "its share of it; use GroupNorm or LayerNorm, or one worker"
            )
        if layers and not plan.synchronous:
            return (
                f"layer {layers[0]!r} keeps statistics of the batch, which an asynchronous run does not save; use "
                "GroupNorm or LayerNorm, or consistency bsp"
            )
        rows = row_tables(job, model)
        tables = {table.parameter for table in rows}
        if wrong := unfit_encoding(plan.compress, plan.compress_tables, [table.name for table in rows]):
            return f"{wrong[0]}; {wrong[1]}"
        if plan.local_steps > 1 and trained <= tables:
            return (
                f"local_steps is {plan.local_steps}, and all that the model trains are tables, which are updated in "
                "every step; leave it out"
            )
        return _contradiction(plan)

    def trainer(self, context: Context) -> Trainer:
        """A worker's half, with the model built from the job's seed; a LeasedTrainer where the plan is asynchronous."""
        from tricorn.ps.trainer import AsyncTrainer, BspTrainer

        if context.plan.local_steps > 1:
            from tricorn.ps.local import LocalTrainer

            return LocalTrainer(context)
        return BspTrainer(context) if context.plan.synchronous else AsyncTrainer(context)


def unfit_encoding(compress: str, by_table: Mapping[str, str], tables: Sequence[str]) -> tuple[str, str] | None:
    """What keeps gradients from travelling so, and what to do about it; None if nothing does."""
    if unknown := [name for name in by_table if name not in tables]:
        there = ", ".join(map(repr, tables)) or "none"
        return f"compress names the table {unknown[0]!r}, which there is not", f"the tables are: {there}"
    if compress == "topk" and (left := [name for name in tables if name not in by_table]):
        reason = f"compress topk leaves most of a row's gradient behind and nothing adds it up, for table {left[0]!r}"
        return reason, f"give it another encoding ({left[0]}=bf16, fp16, int8 or none)"
    return None


def caution(optimizer: Mapping[str, Any], plan: Plan) -> str | None:
    """What a person should know of an asynchronous plan before it runs; ``optimizer`` as ``job.json`` has it.

    Momentum and running averages go on in the direction of gradients that were old when they arrived: Dai et al.
    (arXiv 1810.03264) find Adam, momentum and RMSProp more sensitive to staleness than SGD.
    """
    suffers = optimizer["kind"] in ("adam", "adamw") or optimizer.get("momentum")
    if plan.strategy != "ps" or plan.synchronous or not suffers or plan.workers == 1:
        return None
    name = {"adam": "Adam", "adamw": "AdamW"}.get(optimizer["kind"], "momentum")
    return (
        f"{plan.consistency} applies gradients of older weights, from which {name} suffers more than plain SGD or "
        "Adagrad do; if the loss does not fall as it should, use one of those, --stale scale, or --consistency bsp"
    )


def _contradiction(plan: Plan) -> str | None:
    if plan.compress == "powersgd":
        return "powersgd needs all workers to agree on its factors; use compress bf16, int8 or topk"
    if plan.local_steps > 1 and not plan.synchronous:
        return (
            f"local_steps is {plan.local_steps}, and {plan.consistency} lends steps to workers one by one; use "
            "consistency bsp (the tables may be asynchronous: sparse_consistency), or leave local_steps out"
        )
    if plan.compress != "none" and plan.stale == "drop":
        return (
            "compress adds what rounding loses to later gradients, and stale drop throws gradients away; use stale "
            "keep or scale, or compress none"
        )
    if plan.sparse_consistency == "bsp" and not plan.synchronous:
        return (
            f"sparse_consistency bsp needs agreed steps, which {plan.consistency} has not; leave it out, or use "
            "consistency bsp"
        )
    return None


strategy: Strategy = ParameterServer()
