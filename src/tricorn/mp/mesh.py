"""Who stands where among model parallel workers: replicas x stages x shards. Pure, and without PyTorch.

Shards of a layer are neighbours, for they talk most; then come stages; replicas meet once a step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tricorn.plan import Plan


class Place(NamedTuple):
    """Which copy of the model, which part of its layers, and which part of each of these a worker has."""

    replica: int
    stage: int
    shard: int


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """The places of a plan's workers; each worker has one."""

    replicas: int
    stages: int
    tensor: int
    spread: bool = False  # whether replicas share the optimizer's state out among them (zero=1)

    @classmethod
    def of(cls, plan: Plan) -> Mesh:
        return cls(replicas=plan.replicas, stages=plan.stages, tensor=plan.tensor, spread=plan.zero == 1)

    @property
    def size(self) -> int:
        return self.replicas * self.stages * self.tensor

    def place(self, rank: int) -> Place:
        replica, rest = divmod(rank, self.stages * self.tensor)
        return Place(replica, *divmod(rest, self.tensor))

    def rank(self, place: Place) -> int:
        return (place.replica * self.stages + place.stage) * self.tensor + place.shard

    def line(self, rank: int) -> tuple[int, ...]:
        """The workers that a batch of this one's goes through: its replica and shard, by stage."""
        here = self.place(rank)
        return tuple(self.rank(here._replace(stage=stage)) for stage in range(self.stages))

    def shards(self, rank: int) -> tuple[int, ...]:
        """The workers that share this one's layers: its replica and stage, by shard."""
        here = self.place(rank)
        return tuple(self.rank(here._replace(shard=shard)) for shard in range(self.tensor))

    def copies(self, rank: int) -> tuple[int, ...]:
        """The workers that have the same part of the model: its stage and shard, by replica."""
        here = self.place(rank)
        return tuple(self.rank(here._replace(replica=replica)) for replica in range(self.replicas))

    def part(self, rank: int) -> str:
        """The name of what this worker holds of the state: workers with the same can take each other's place."""
        here = self.place(rank)
        name = f"stage{here.stage}" + (f".shard{here.shard}" if self.tensor > 1 else "")
        return name + (f".copy{here.replica}" if self.spread and self.replicas > 1 else "")


def chunks_of(plan: Plan) -> int:
    """How many stages each worker has."""
    return plan.chunks or (2 if plan.schedule == "interleaved" else 1)
