"""How to train a job: a plain value that can be printed, saved, compared and edited."""

from __future__ import annotations

from typing import Literal, TypedDict

import msgspec

StrategyName = Literal["ps", "dp", "mp"]
Consistency = Literal["bsp", "ssp", "asp"]
Stale = Literal["keep", "scale", "compensate", "drop"]
Compression = Literal["none", "bf16", "fp16", "int8", "topk", "powersgd"]


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to run a job.

    ``servers``, ``consistency`` and ``staleness`` speak of the parameter server: how many servers hold the
    parameters, and how old (in clocks) a value may be that a worker reads: ``bsp`` not at all, ``ssp`` at most
    ``staleness``, ``asp`` without bound. ``sparse_consistency`` is that of the job's tables where it differs.
    ``stale`` says what a server does with a gradient from old weights: ``keep`` it, ``scale`` its rate by
    1/(1 + age), ``compensate`` it for the drift since (DC-ASGD), or ``drop`` it when older than ``staleness``.

    ``zero`` says what data parallel spreads over the workers instead of copying: nothing (0), the optimizer's
    state (1), also gradients (2), also weights (3). ``balance`` lets each worker's share of a batch follow its
    measured speed. ``microbatches``: the parts of a batch that a pipeline works on in turn, or whose gradients a
    data parallel worker adds up one after another; ``None`` lets Tricorn choose.

    ``compress`` is how gradients travel; what rounding loses is added to the next one. ``local_steps`` above 1
    lets each data parallel worker make that many updates by itself before they meet, by plain ``average`` or by an
    ``outer`` step with Nesterov's momentum (DiLoCo). ``threads`` is the number of compute threads of each worker;
    ``None`` divides the machine's cores among them.
    """

    strategy: StrategyName
    workers: int = 2
    servers: int = 0
    consistency: Consistency = "bsp"
    staleness: int = 3
    sparse_consistency: Consistency | None = None
    stale: Stale = "keep"
    zero: Literal[0, 1, 2, 3] = 0
    balance: bool = False
    microbatches: int | None = None
    compress: Compression = "none"
    local_steps: int = 1
    outer: Literal["average", "nesterov"] = "nesterov"
    threads: int | None = None

    @property
    def synchronous(self) -> bool:
        """Whether every step's update is agreed by all workers before the next step begins."""
        return self.strategy != "ps" or self.consistency == "bsp"

    def mistakes(self) -> list[str]:
        """What is wrong with the plan by itself, one sentence each; empty when nothing is."""
        found = []
        if self.workers < 1:
            found.append(f"workers is {self.workers}; give at least 1")
        if self.strategy == "ps" and self.servers < 1:
            found.append(f"servers is {self.servers}; the parameter server needs at least 1 (--servers 1)")
        if self.strategy != "ps" and self.servers:
            found.append(f"servers is {self.servers}, but only --strategy ps has servers; leave it out")
        if self.strategy != "ps" and self.consistency != "bsp":
            found.append(f"consistency is {self.consistency}, but only --strategy ps can be asynchronous; add that")
        if self.stale != "keep" and self.strategy == "ps" and self.consistency == "bsp":
            found.append(f"stale is {self.stale}, but with consistency bsp no gradient is; take ssp or asp")
        if self.staleness < 0:
            found.append(f"staleness is {self.staleness}; give 0 or more")
        if self.microbatches is not None and self.microbatches < 1:
            found.append(f"microbatches is {self.microbatches}; give at least 1")
        if self.microbatches is not None and self.strategy == "ps":
            found.append("microbatches is set, but only --strategy dp and mp have microbatches; leave it out")
        if self.local_steps < 1:
            found.append(f"local_steps is {self.local_steps}; give at least 1")
        found += [
            f"{field} is {getattr(self, field)}, but only --strategy {' and '.join(having)} has that; leave it out"
            for field, having in _ONLY.items()
            if self.strategy not in having and getattr(self, field) != _default(field)
        ]
        if self.threads is not None and self.threads < 1:
            found.append(f"threads is {self.threads}; give at least 1")
        return found


class Options(TypedDict, total=False):
    """The fields of a plan, as keyword arguments."""

    strategy: StrategyName
    workers: int
    servers: int
    consistency: Consistency
    staleness: int
    sparse_consistency: Consistency | None
    stale: Stale
    zero: Literal[0, 1, 2, 3]
    balance: bool
    microbatches: int | None
    compress: Compression
    local_steps: int
    outer: Literal["average", "nesterov"]
    threads: int | None


_ONLY: dict[str, tuple[StrategyName, ...]] = {
    "sparse_consistency": ("ps",), "stale": ("ps",), "zero": ("dp",), "balance": ("dp",),
    "compress": ("ps", "dp"), "local_steps": ("dp",), "outer": ("dp",),
}  # fmt: skip


def _default(field: str) -> object:
    return {info.name: info.default for info in msgspec.structs.fields(Plan)}[field]
