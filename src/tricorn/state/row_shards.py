"""Rows of sparse tables in checkpoints: written by each server for its own, read by any number of them, or by others.

The rows of a table NAME lie under the keys ``rows/NAME/ids``, ``rows/NAME/weights``, ``rows/NAME/slots/SLOT``,
``rows/NAME/counts`` and ``rows/NAME/used``, in chunks. The shape of a key is that of one row. A chunk starts, in rows,
at 2^40 times the first bucket of its server plus the rows before it there, so that no two chunks start at one place.
An embedding that was trained as a whole lies under ``param/NAME.weight``, and its slots beside it, as all others do.

Legend: R rows of a chunk, D elements of a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tricorn.errors import UsageError
from tricorn.state.shards import CheckpointReader, Piece

CHUNK = 1 << 16  # rows
_BUCKET = 1 << 40


class Chunk(NamedTuple):
    """Rows as a checkpoint has them; arrays of NumPy. ``counts`` and ``used``: how often updated, and when last."""

    ids: NDArray[np.int64]  # [R]
    weights: NDArray[Any]  # [R, D]
    slots: dict[str, NDArray[Any]]  # [R, D], or [R, 1] where a row has one number
    counts: NDArray[np.int32]  # [R]
    used: NDArray[np.int32]  # [R], a step


class _Rows(Protocol):
    @property
    def ids(self) -> NDArray[np.int64]: ...
    @property
    def weights(self) -> NDArray[Any]: ...
    @property
    def slots(self) -> dict[str, NDArray[Any]]: ...
    @property
    def counts(self) -> NDArray[np.int32]: ...
    @property
    def used(self) -> NDArray[np.int32]: ...


def row_pieces(name: str, bucket: int, chunks: Iterable[_Rows]) -> list[Piece]:
    """The pieces of all rows of a server whose first bucket is that; they keep the arrays that they are given."""
    start = bucket * _BUCKET
    # An empty list of ids says that the table is there, however few rows it has.
    pieces = [Piece(f"rows/{name}/ids", (), start, start, torch.empty(0, dtype=torch.int64))]
    for chunk in chunks:
        columns = {"ids": chunk.ids, "weights": chunk.weights, "counts": chunk.counts, "used": chunk.used}
        for column, array in {**columns, **{f"slots/{slot}": array for slot, array in chunk.slots.items()}}.items():
            width = array.shape[1] if array.ndim == 2 else 1
            flat = torch.from_numpy(np.ascontiguousarray(array)).flatten()
            shape = array.shape[1:]
            pieces.append(Piece(f"rows/{name}/{column}", shape, start * width, start * width + len(flat), flat))
        start += len(chunk.ids)
    return pieces if len(pieces) == 1 else pieces[1:]


def read_rows(
    reader: CheckpointReader, name: str, dim: int, slots: Mapping[str, int], dtype: torch.dtype
) -> Iterator[Chunk]:
    """All rows of a table, whatever wrote them, a chunk at a time; ``slots`` are the widths of the slots to read.

    Raises UsageError if the checkpoint does not have the table, or in another shape, or without a slot, and
    CheckpointDamaged if a part is missing.
    """
    stored = f"rows/{name}"
    parameter = f"{name}.weight" if name else "weight"
    if f"{stored}/ids" in reader:
        yield from _by_rows(reader, stored, dim, slots, dtype)
    elif f"param/{parameter}" in reader:
        yield from _whole(reader, parameter, dim, slots, dtype)
    else:
        raise _another(f"the checkpoint {reader.folder} has no table {name!r}")


def _by_rows(
    reader: CheckpointReader, stored: str, dim: int, slots: Mapping[str, int], dtype: torch.dtype
) -> Iterator[Chunk]:
    widths = {"weights": dim} | {f"slots/{slot}": width for slot, width in slots.items()}
    for start, stop in reader.parts(f"{stored}/ids"):
        if start == stop:
            continue
        for column, width in widths.items():
            if reader.shape(f"{stored}/{column}") != (width,):
                raise _another(
                    f"{stored}/{column} has the shape {reader.shape(f'{stored}/{column}')} in the checkpoint "
                    f"{reader.folder}, but {(width,)} in the model"
                )
        ids, counts, used = (reader.read(f"{stored}/{column}", start, stop) for column in ("ids", "counts", "used"))
        wide = {
            column: _array(reader.read(f"{stored}/{column}", start * width, stop * width), width, dtype)
            for column, width in widths.items()
        }
        yield Chunk(
            ids.numpy(), wide["weights"], {slot: wide[f"slots/{slot}"] for slot in slots}, counts.numpy(), used.numpy()
        )


def _whole(
    reader: CheckpointReader, parameter: str, dim: int, slots: Mapping[str, int], dtype: torch.dtype
) -> Iterator[Chunk]:
    shape = reader.shape(f"param/{parameter}")
    if shape is None or len(shape) != 2 or shape[1] != dim or any(width != dim for width in slots.values()):
        raise _another(f"{parameter} has the shape {shape} in the checkpoint {reader.folder}, not rows of {dim}")
    keys = {"": f"param/{parameter}"} | {slot: f"optim/{slot}/{parameter}" for slot in slots}
    for start in range(0, shape[0], CHUNK):
        stop = min(start + CHUNK, shape[0])
        parts = {
            slot: _array(reader.read_slice(key, shape, start * dim, stop * dim), dim, dtype)
            for slot, key in keys.items()
        }
        weights = parts.pop("")
        used = np.full(stop - start, reader.step, np.int32)
        yield Chunk(np.arange(start, stop), weights, parts, np.ones(stop - start, np.int32), used)


def _array(flat: Tensor, width: int, dtype: torch.dtype) -> NDArray[Any]:
    array: NDArray[Any] = flat.to(dtype).view(-1, width).numpy()
    return array


def _another(what: str) -> UsageError:
    return UsageError(what, remedy="Resume with the model and the tables that the run was started with.")
