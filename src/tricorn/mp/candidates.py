"""Meshes that are worth a thought. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from msgspec.structs import replace

from tricorn.plan import Plan

if TYPE_CHECKING:
    from tricorn.planner.ground import Ground

SHARDS = (1, 2, 4, 8)
PER_STAGE = (1, 2, 4)  # microbatches: fewer idle too long, and more cost more than they gain
CHUNKS = 2
MUCH = 1 / 4  # of a worker's memory, above which activations may have to be computed again


def candidates(workers: int, ground: Ground, room: int) -> Iterator[Plan]:
    """With so many workers, that have ``room`` bytes each."""
    kept = ground.profile.kept_bytes * ground.profile.batch_size / workers
    for mesh in meshes(workers, ground):
        for order in _orders(mesh, ground):
            yield order
            if mesh.replicas > 1:
                yield replace(order, zero=1)
            if kept > MUCH * room:
                yield replace(order, recompute=True)


def meshes(workers: int, ground: Ground) -> Iterator[Plan]:
    """Replicas x stages x shards, of which at least two are in a model."""
    layers, batch = ground.profile.layers, ground.profile.batch_size
    most = sum(layer.cut_after for layer in layers[:-1]) + 1
    for tensor in SHARDS if ground.profile.splitting else (1,):
        for replicas in range(1, min(workers, batch) + 1):
            if workers % (tensor * replicas) == 0:
                plan = Plan(strategy="mp", workers=workers, replicas=replicas, tensor=tensor)
                if plan.tensor * plan.stages > 1 and plan.stages <= most:
                    yield plan


def _orders(mesh: Plan, ground: Ground) -> Iterator[Plan]:
    """How the stages go about a batch. ``gpipe`` idles as long as 1F1B and keeps more: only where it is asked for."""
    share, stages = ground.profile.batch_size // mesh.replicas, mesh.stages
    yield replace(mesh, microbatches=1)
    if stages == 1:
        return
    for microbatches in (stages * times for times in PER_STAGE):
        if 1 < microbatches <= share:
            yield replace(mesh, microbatches=microbatches)
            yield replace(mesh, microbatches=microbatches, schedule="zero-bubble")
            yield replace(mesh, microbatches=microbatches, schedule="interleaved", chunks=CHUNKS)
