"""How to train a job: a plain value that can be printed, saved, compared and edited."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Literal, TypedDict

import msgspec

from tricorn.fields import NamedPlan

StrategyName = Literal["ps", "dp", "mp", "ps+dp", "ps+mp"]
Consistency = Literal["bsp", "ssp", "asp"]
Stale = Literal["keep", "scale", "compensate", "drop"]
Compression = Literal["none", "bf16", "fp16", "int8", "topk", "powersgd"]
RowCompression = Literal["none", "bf16", "fp16", "int8"]
Schedule = Literal["gpipe", "1f1b", "interleaved", "zero-bubble"]
Embeddings = Literal["whole", "rows", "columns", "tables"]


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=NamedPlan):
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

    Model parallel workers make a mesh: ``replicas`` of the model, each spread over ``tensor`` workers within a
    layer and over the others, ``stages``, from layer to layer. ``cuts`` are the blocks before which stages begin,
    counted from 0 in a model that is looked into as if it were to have eight stages, or as many as it has if these
    are more; ``schedule`` the order of their work, of which each worker has ``chunks`` stages when it is interleaved;
    ``recompute`` keeps only what stages hand on, and computes the rest of their activations again. Replicas may be
    ``zero=1``. What is ``None`` Tricorn chooses. ``embeddings`` are whole in every replica or spread over the
    workers by ``rows``, ``columns`` or ``tables``. ``ps+dp`` and ``ps+mp`` have the tables on servers and the rest
    of the model as ``dp`` or ``mp``. ``memory`` is how many bytes each worker may use; ``None`` leaves that to the
    machine.

    ``compress`` is how gradients travel; what rounding loses is added to the next one. ``compress_tables`` is how those
    of rows do, by the name of their table, where it differs. ``local_steps`` above 1 lets each worker, data parallel or
    of a parameter server, make that many updates by itself before they meet, by plain ``average`` or by an ``outer``
    step with Nesterov's momentum (DiLoCo); rows of tables are updated in every step.
    ``threads`` is the number of compute threads of each worker; ``None`` divides the machine's cores among them.
    ``hosts`` are those, counted from 0, on which workers are placed one after another, and then servers, round and
    round; ``None`` is all of them as they are given.

    Raises PlanError for fields that there are not. Whether values go together is for ``mistakes`` to say.
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
    replicas: int = 1
    tensor: int = 1
    cuts: tuple[int, ...] | None = None
    schedule: Schedule | None = None
    chunks: int | None = None
    recompute: bool | None = None
    embeddings: Embeddings = "whole"
    memory: int | None = None
    compress: Compression = "none"
    compress_tables: dict[str, RowCompression] = {}
    local_steps: int = 1
    outer: Literal["average", "nesterov"] = "nesterov"
    threads: int | None = None
    hosts: tuple[int, ...] | None = None

    def __hash__(self) -> int:
        return hash(msgspec.json.encode(self, order="sorted"))  # that of a struct cannot have a dictionary

    @property
    def served(self) -> bool:
        """Whether parameter servers hold the model or a part of it."""
        return self.strategy.startswith("ps")

    @property
    def dense(self) -> Literal["ps", "dp", "mp"]:
        """The strategy of all that is no table."""
        families: tuple[Literal["ps", "dp", "mp"], ...] = ("dp", "mp", "ps")
        return next(family for family in families if self.strategy.endswith(family))

    @property
    def stages(self) -> int:
        """How many workers stand one after another in a pipeline; 1 unless model parallel."""
        return self.workers // (self.replicas * self.tensor) if self.dense == "mp" else 1

    @property
    def synchronous(self) -> bool:
        """Whether every step's update of the dense part is agreed by all workers before the next step begins."""
        return self.strategy != "ps" or self.consistency == "bsp"

    def mistakes(self) -> list[str]:
        """What is wrong with the plan by itself, one sentence each; empty when nothing is."""
        found = [
            f"{field} is {value}; give at least {least}"
            for field, least in _AT_LEAST.items()
            if (value := getattr(self, field)) is not None and value < least
        ]
        if self.served and self.servers < 1:
            found.append(f"servers is {self.servers}; the parameter server needs at least 1 (--servers 1)")
        if not self.served and self.servers:
            found.append(f"servers is {self.servers}, but only --strategy ps has servers; leave it out")
        if self.strategy != "ps" and self.consistency != "bsp":
            found.append(f"consistency is {self.consistency}, but only --strategy ps can be asynchronous; add that")
        if self.stale != "keep" and self.strategy == "ps" and self.consistency == "bsp":
            found.append(f"stale is {self.stale}, but with consistency bsp no gradient is; take ssp or asp")
        bounded = self.stale == "drop" or "ssp" in (self.consistency, self.sparse_consistency)
        if not bounded and self.staleness >= 0 and self.staleness != _default("staleness"):
            found.append(f"staleness is {self.staleness}, which only ssp and --stale drop look at; leave it out")
        if self.outer != _default("outer") and self.local_steps == 1:
            found.append(f"outer is {self.outer}, but with one local step nobody goes astray; add --local-steps")
        found += [
            f"{field} is {getattr(self, field)}, which only --strategy {_either(having)} has; leave it out"
            for field, having in _ONLY.items()
            if self.dense not in having and self.strategy not in having and getattr(self, field) != _default(field)
        ]
        if self.hosts is not None and (not self.hosts or min(self.hosts) < 0 or len({*self.hosts}) < len(self.hosts)):
            found.append(f"hosts are {self.hosts}; give different numbers, from 0")
        return found + self._mesh_mistakes()

    def _mesh_mistakes(self) -> list[str]:
        found: list[str] = []
        if self.dense != "mp" or min(self.workers, self.replicas, self.tensor) < 1:
            return found
        if self.workers % (self.replicas * self.tensor):
            found.append(
                f"workers is {self.workers}, which replicas {self.replicas} x tensor {self.tensor} does not divide; "
                f"give a multiple of {self.replicas * self.tensor}"
            )
        if self.zero > 1:
            found.append(f"zero is {self.zero}, but replicas of a pipeline can have 1 at most; use zero 1")
        if self.chunks not in (None, 1) and self.schedule != "interleaved":
            found.append(f"chunks is {self.chunks}, but only --schedule interleaved has several; add that")
        stages = self.stages * (self.chunks or 1)
        if self.cuts is not None and (self.cuts != tuple(sorted(set(self.cuts))) or 0 in self.cuts):
            found.append(f"cuts are {self.cuts}; give ascending block numbers from 1")
        elif self.cuts is not None and self.chunks is not None and len(self.cuts) != stages - 1:
            found.append(f"cuts are {len(self.cuts)}, but {stages} stages have {stages - 1}; give that many")
        return found


class Options(TypedDict, total=False):
    """The fields of a plan, as keyword arguments."""

    strategy: StrategyName | Literal["auto"]
    workers: int
    servers: int
    consistency: Consistency
    staleness: int
    sparse_consistency: Consistency | None
    stale: Stale
    zero: Literal[0, 1, 2, 3]
    balance: bool
    microbatches: int | None
    replicas: int
    tensor: int
    cuts: tuple[int, ...] | None
    schedule: Schedule | None
    chunks: int | None
    recompute: bool | None
    embeddings: Embeddings
    memory: int | None
    compress: Compression
    compress_tables: dict[str, RowCompression]
    local_steps: int
    outer: Literal["average", "nesterov"]
    threads: int | None
    hosts: tuple[int, ...] | None


_AT_LEAST = {
    "workers": 1, "staleness": 0, "microbatches": 1, "local_steps": 1, "threads": 1, "replicas": 1, "tensor": 1,
    "chunks": 1, "memory": 1,
}  # fmt: skip
_ONLY: dict[str, tuple[StrategyName, ...]] = {
    "sparse_consistency": ("ps", "ps+dp", "ps+mp"), "stale": ("ps",), "zero": ("dp", "mp"), "balance": ("dp",),
    "compress": ("ps", "dp"), "compress_tables": ("ps", "ps+dp", "ps+mp"), "local_steps": ("dp", "ps"),
    "outer": ("dp", "ps"), "microbatches": ("dp", "mp"), "replicas": ("mp",), "tensor": ("mp",), "cuts": ("mp",),
    "schedule": ("mp",), "chunks": ("mp",), "recompute": ("mp",), "embeddings": ("dp", "mp"),
}  # fmt: skip


def _either(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


@cache
def _default(field: str) -> object:
    return getattr(Plan(strategy="dp"), field)
