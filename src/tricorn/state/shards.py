"""Shards: safetensors files of named flat slices. Any reader can put any slice together from any writer's.

A tensor is stored under ``KEY@START``: elements [START, START + length) of the flattened tensor KEY. Keys are
``param/NAME``, ``optim/SLOT/NAME`` and ``buffer/NAME``. So a checkpoint written by two servers, three pipeline
stages or one replica reads the same.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tricorn.errors import CheckpointDamaged, UsageError


class Piece(NamedTuple):
    """Elements [start, stop) of the flattened tensor ``key``, whose whole shape is ``shape``.

    ``data`` is flat and on the CPU.
    """

    key: str
    shape: tuple[int, ...]
    start: int
    stop: int
    data: Tensor


class ShardFile(NamedTuple):
    """A written shard, as the manifest records it."""

    name: str
    bytes: int
    sha256: str


def write_shard(folder: Path, name: str, pieces: Sequence[Piece]) -> ShardFile:
    """Write the pieces durably to ``folder/name``; raise OSError if the disk will not take them, leaving nothing."""
    payload = save({f"{p.key}@{p.start}": p.data.contiguous() for p in pieces})
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / name, folder / f"{name}.partial"
    try:
        with partial.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return ShardFile(name, len(payload), hashlib.sha256(payload).hexdigest())


class CheckpointReader:
    """Reads slices out of the shard files of one checkpoint. ``step`` is how many updates its weights have."""

    def __init__(self, folder: Path, step: int) -> None:
        self.step = step
        self._files: list[Any] = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._slices: dict[str, list[tuple[int, int, int]]] = {}
        for index, file in enumerate(self._files):
            for stored in file.keys():  # noqa: SIM118 - not a dict
                key, _, start = stored.rpartition("@")
                length = file.get_slice(stored).get_shape()[0]
                self._slices.setdefault(key, []).append((int(start), int(start) + length, index))
        self._folder = folder

    def __contains__(self, key: str) -> bool:
        return key in self._slices

    def read_whole(self, key: str, size: int) -> Tensor:
        """All elements of the flattened tensor; raises UsageError if it has more than ``size`` of them."""
        stored = max((high for _, high, _ in self._slices.get(key, [])), default=0)
        if stored > size:
            raise UsageError(
                f"{key} has {stored} elements in the checkpoint {self._folder}, but {size} in the model",
                remedy="Resume with the model that the run was started with, or start a new run.",
            )
        return self.read(key, 0, size)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor; raises CheckpointDamaged if any is not there."""
        parts, at = [], start
        for low, high, index in sorted(self._slices.get(key, [])):
            if low <= at < high and at < stop:
                end = min(high, stop)
                parts.append(self._files[index].get_slice(f"{key}@{low}")[at - low : end - low])
                at = end
        if at < stop:
            raise CheckpointDamaged(f"the checkpoint {self._folder} has no elements {at} to {stop} of {key}")
        return torch.cat(parts) if parts else torch.empty(0)
