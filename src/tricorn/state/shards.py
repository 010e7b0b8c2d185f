"""Shards: safetensors files of named flat slices. Any reader can put any slice together from any writer's.

A tensor is stored under ``KEY@START``: elements [START, START + length) of the flattened tensor KEY. Keys are
``param/NAME``, ``optim/SLOT/NAME`` and ``buffer/NAME``, and those of rows (state/row_shards.py). So a checkpoint
written by two servers, three pipeline stages or one replica reads the same. The file's metadata has, as ``shapes``,
the whole shape of each KEY in JSON, by which a model that was changed since is told from the one that was saved.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import safe_open
from torch import Tensor

from tricorn.errors import CheckpointDamaged, UsageError

_KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


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
    shapes = msgspec.json.encode({p.key: p.shape for p in pieces}).decode()
    # Wide elements first, so that all are aligned. Written piece by piece: a shard can be half of the memory.
    ordered = sorted(pieces, key=lambda piece: -piece.data.itemsize)
    header: dict[str, Any] = {"__metadata__": {"shapes": shapes}}
    stop = 0
    for piece in ordered:
        start, stop = stop, stop + piece.data.nbytes
        kind = _KINDS[piece.data.dtype]
        header[f"{piece.key}@{piece.start}"] = {
            "dtype": kind, "shape": [piece.data.numel()], "data_offsets": [start, stop]
        }  # fmt: skip
    document = msgspec.json.encode(header)
    document += b" " * (-len(document) % 8)
    digest, size = hashlib.sha256(), 0
    folder.mkdir(parents=True, exist_ok=True)
    path, partial = folder / name, folder / f"{name}.partial"
    try:
        with partial.open("wb") as file:
            beginning = torch.frombuffer(bytearray(len(document).to_bytes(8, "little") + document), dtype=torch.uint8)
            for flat in (beginning, *(piece.data for piece in ordered)):
                part: memoryview = flat.contiguous().view(torch.uint8).numpy().data
                file.write(part)
                digest.update(part)
                size += len(part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    return ShardFile(name, size, digest.hexdigest())


class CheckpointReader:
    """Reads slices out of the shard files of one checkpoint. ``step`` is how many updates its weights have.

    Raises CheckpointDamaged if a file does not say what shapes its tensors have.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.step = step
        self._files: list[Any] = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        self._slices: dict[str, list[tuple[int, int, int]]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for index, file in enumerate(self._files):
            shapes = (file.metadata() or {}).get("shapes", "{}")
            self._shapes |= msgspec.json.decode(shapes, type=dict[str, tuple[int, ...]])
            for stored in file.keys():  # noqa: SIM118 - not a dict
                key, _, start = stored.rpartition("@")
                length = file.get_slice(stored).get_shape()[0]
                self._slices.setdefault(key, []).append((int(start), int(start) + length, index))
        if shapeless := self._slices.keys() - self._shapes.keys():
            raise CheckpointDamaged(f"the checkpoint {folder} does not say what shape {min(shapeless)} has")
        self.folder = folder

    def __contains__(self, key: str) -> bool:
        return key in self._slices

    def shape(self, key: str) -> tuple[int, ...] | None:
        """The whole shape of that tensor, None if it is not there."""
        return self._shapes.get(key)

    def parts(self, key: str) -> list[tuple[int, int]]:
        """The elements [start, stop) that were stored together, in order."""
        return sorted((start, stop) for start, stop, _ in self._slices.get(key, []))

    def read_whole(self, key: str, shape: Sequence[int]) -> Tensor:
        """The flattened tensor, which the model has in that shape; raises as ``read_slice``."""
        return self.read_slice(key, shape, 0, prod(shape))

    def read_slice(self, key: str, shape: Sequence[int], start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor, which the model has in that shape.

        Raises UsageError if the checkpoint has it in another, CheckpointDamaged if any element is not there.
        """
        if key not in self and prod(shape) > 0:
            raise UsageError(
                f"the checkpoint {self.folder} has no {key}",
                remedy="Resume with the model and the optimizer that the run was started with, or start a new run.",
            )
        stored = self._shapes.get(key, tuple(shape))
        if stored != tuple(shape):
            raise UsageError(
                f"{key} has the shape {stored} in the checkpoint {self.folder}, but {tuple(shape)} in the model",
                remedy="Resume with the model that the run was started with, or start a new run.",
            )
        return self.read(key, start, stop)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor; raises CheckpointDamaged if any is not there."""
        parts, at = [], start
        for low, high, index in sorted(self._slices.get(key, [])):
            if low <= at < high and at < stop:
                end = min(high, stop)
                parts.append(self._files[index].get_slice(f"{key}@{low}")[at - low : end - low])
                at = end
        if at < stop:
            raise CheckpointDamaged(f"the checkpoint {self.folder} has no elements {at} to {stop} of {key}")
        return torch.cat(parts) if parts else torch.empty(0)
