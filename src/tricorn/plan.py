"""How to train a job: a plain value that can be printed, saved, compared and edited."""

from __future__ import annotations

from typing import Literal

import msgspec

StrategyName = Literal["ps", "dp", "mp"]
Consistency = Literal["bsp", "ssp", "asp"]


class Plan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One way to run a job.

    ``servers``, ``consistency`` and ``staleness`` speak of the parameter server: how many servers hold the
    parameters, and how old (in clocks) a value may be that a worker reads: ``bsp`` not at all, ``ssp`` at most
    ``staleness``, ``asp`` without bound. ``microbatches`` speaks of the pipeline; ``None`` lets Tricorn choose.
    ``threads`` is the number of compute threads of each worker; ``None`` divides the machine's cores among them.
    """

    strategy: StrategyName
    workers: int = 2
    servers: int = 0
    consistency: Consistency = "bsp"
    staleness: int = 3
    microbatches: int | None = None
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
            found.append(f"consistency is {self.consistency}, but only --strategy ps can be asynchronous; leave it out")
        if self.staleness < 0:
            found.append(f"staleness is {self.staleness}; give 0 or more")
        if self.microbatches is not None and self.microbatches < 1:
            found.append(f"microbatches is {self.microbatches}; give at least 1")
        if self.microbatches is not None and self.strategy != "mp":
            found.append("microbatches is set, but only --strategy mp has microbatches; leave it out")
        if self.threads is not None and self.threads < 1:
            found.append(f"threads is {self.threads}; give at least 1")
        return found
