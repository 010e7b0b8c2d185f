"""Shards: safetensors files of named parts of tensors. Any reader can put any part together from any writer's.

A tensor is stored under ``KEY@START``: elements [START, START + length) of the flattened tensor KEY; what was split
along a dim is stored under ``KEY@START+STRIDExCOUNT``: so many runs of equal length (state/runs.py). Keys are
``param/NAME``, ``optim/SLOT/NAME`` and ``buffer/NAME``, and those of rows (state/row_shards.py). So a checkpoint
written by two servers, three pipeline stages, four shards of each layer or one replica reads the same. The file's
metadata has, as ``shapes``, the whole shape of each KEY in JSON, by which a model that was changed since is told from
the one that was saved.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import torch
from safetensors import safe_open
from torch import Tensor

from tricorn.documents import UNREADABLE
from tricorn.errors import CheckpointDamaged, UsageError
from tricorn.state.runs import Runs

_KINDS = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_STORED = re.compile(r"(.+)@([0-9]{1,18})(?:\+([0-9]{1,18})x([0-9]{1,18}))?", re.DOTALL)


class Piece(NamedTuple):
    """Elements [start, stop) of the flattened tensor ``key``, whose whole shape is ``shape``, and where ``times`` is
    more than 1, as many after each ``stride`` elements.

    ``data`` is flat and on the CPU.
    """

    key: str
    shape: tuple[int, ...]
    start: int
    stop: int
    data: Tensor
    stride: int = 0
    times: int = 1

    @classmethod
    def of(cls, key: str, shape: tuple[int, ...], runs: Runs, data: Tensor) -> Piece:
        return cls(key, shape, runs.start, runs.start + runs.length, data, runs.stride, runs.times)

    @property
    def stored(self) -> str:
        """The name under which it is written."""
        return f"{self.key}@{self.start}" + (f"+{self.stride}x{self.times}" if self.times > 1 else "")


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
        header[piece.stored] = {
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
        self._stored: dict[str, list[_Stored]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for index, file in enumerate(self._files):
            shapes = (file.metadata() or {}).get("shapes", "{}")
            try:
                self._shapes |= msgspec.json.decode(shapes, type=dict[str, tuple[int, ...]])
            except UNREADABLE as error:
                raise CheckpointDamaged(
                    f"what the checkpoint {folder} says of its tensors' shapes cannot be read: {error}"
                ) from None
            for name in file.keys():  # noqa: SIM118 - not a dict
                key, runs = _runs_of(name, file.get_slice(name).get_shape(), folder)
                self._stored.setdefault(key, []).append(_Stored(runs, name, index))
        if shapeless := self._stored.keys() - self._shapes.keys():
            raise CheckpointDamaged(f"the checkpoint {folder} does not say what shape {min(shapeless)} has")
        for stored in self._stored.values():
            stored.sort()
        self.folder = folder

    def __contains__(self, key: str) -> bool:
        return key in self._stored

    def shape(self, key: str) -> tuple[int, ...] | None:
        """The whole shape of that tensor, None if it is not there."""
        return self._shapes.get(key)

    def parts(self, key: str) -> list[tuple[int, int]]:
        """The elements [start, stop) that were stored together, in order; of a tensor that was not split."""
        return [(runs.start, runs.stop) for runs, *_ in self._stored.get(key, [])]

    def read_whole(self, key: str, shape: Sequence[int]) -> Tensor:
        """The flattened tensor, which the model has in that shape; raises as ``read_part``."""
        return self.read_slice(key, shape, 0, prod(shape))

    def read_slice(self, key: str, shape: Sequence[int], start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flattened tensor; raises as ``read_part``."""
        return self.read_part(key, shape, Runs(start, stop - start))

    def read_part(self, key: str, shape: Sequence[int], runs: Runs) -> Tensor:
        """These elements, end to end, of the flattened tensor, which the model has in that shape.

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
        stored_alike = (stored for stored in self._stored.get(key, []) if stored.runs == runs)
        if (alike := next(stored_alike, None)) is not None:
            whole: Tensor = self._slice(alike)[:]
            return whole
        if runs.times == 1 and all(stored.runs.times == 1 for stored in self._stored.get(key, [])):
            return self.read(key, runs.start, runs.stop)
        parts = [self._gathered(key, window) for window in runs.windows()]
        return torch.cat(parts) if parts else torch.empty(0)

    def read(self, key: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a flattened tensor that was stored in slices; raises CheckpointDamaged if any is
        not there.
        """
        parts, at = [], start
        for stored in self._stored.get(key, []):
            low, high = stored.runs.start, stored.runs.stop
            if low <= at < high and at < stop:
                end = min(high, stop)
                parts.append(self._slice(stored)[at - low : end - low])
                at = end
        if at < stop:
            raise CheckpointDamaged(f"the checkpoint {self.folder} has no elements {at} to {stop} of {key}")
        return torch.cat(parts) if parts else torch.empty(0)

    def _gathered(self, key: str, wanted: Runs) -> Tensor:
        """A window of elements, from parts of any form."""
        positions = wanted.positions()
        missing = torch.ones(wanted.size, dtype=torch.bool)
        gathered: Tensor | None = None
        for stored in self._stored.get(key, []):
            if stored.runs.start >= wanted.stop or stored.runs.stop <= wanted.start:
                continue
            asked, numbers = stored.runs.find(positions)
            if len(numbers):
                first = int(numbers[0])
                data = self._slice(stored)[first : int(numbers[-1]) + 1]
                gathered = data.new_empty(wanted.size) if gathered is None else gathered
                gathered[asked] = data[numbers - first]
                missing[asked] = False
        if gathered is None or missing.any():
            low, high = (int(positions[missing][end]) for end in (0, -1))
            raise CheckpointDamaged(f"the checkpoint {self.folder} has no elements {low} to {high + 1} of {key}")
        return gathered

    def _slice(self, stored: _Stored) -> Any:
        return self._files[stored.file].get_slice(stored.name)


class _Stored(NamedTuple):
    """A tensor in a file."""

    runs: Runs
    name: str
    file: int


def _runs_of(name: str, shape: Sequence[int], folder: Path) -> tuple[str, Runs]:
    """What tensor is meant by a name in a file, and which elements of it."""
    named = _STORED.fullmatch(name)
    if named is not None and len(shape) == 1:
        key, start, stride, times = named.groups()
        times = int(times or 1)
        runs = Runs(int(start), shape[0] // times if times else 0, int(stride or 0), times)
        if runs.legal and runs.size == shape[0]:
            return key, runs
    raise CheckpointDamaged(f"the checkpoint {folder} has a tensor that is no part of one: {name}")
