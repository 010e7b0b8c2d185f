"""What one server holds: its slice of the weights and optimizer slots, described, filled, updated and copied out.

Legend: S elements of this server's slice of the flat layout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import msgspec
import psutil
import torch
from torch import Tensor

from tricorn.errors import PlanError, ProtocolError
from tricorn.optim import Optimizer
from tricorn.plan import Consistency
from tricorn.state.flat import Entry, flat_pieces, layout
from tricorn.state.shards import CheckpointReader, Piece

_Natural = Annotated[int, msgspec.Meta(ge=0, lt=2**40)]


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker asks a server to hold: elements [start, stop) of all tables, and how to update them."""

    tables: tuple[tuple[str, tuple[_Natural, ...]], ...]  # name and shape, in the order of the flat layout
    dtype: Literal["float32", "float64"]
    start: _Natural
    stop: _Natural
    optimizer: Optimizer
    consistency: Consistency
    staleness: _Natural

    @property
    def bytes(self) -> int:
        """Of the weights of this slice."""
        return (self.stop - self.start) * (8 if self.dtype == "float64" else 4)


def read_description(document: bytes | bytearray) -> Description:
    """Decode and judge the payload of a CREATE; raises ProtocolError, or PlanError if this machine is too small."""
    try:
        description = msgspec.json.decode(document, type=Description)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"a description that cannot be read: {error}") from None
    if wrong := description.optimizer.mistakes():
        raise ProtocolError(f"an optimizer that cannot run: {wrong[0][0]} is {wrong[0][1]}")
    entries = layout(description.tables)
    if not description.start <= description.stop <= (entries[-1].stop if entries else 0):
        raise ProtocolError(f"a slice [{description.start}, {description.stop}) that the tables do not have")
    needed = description.bytes * (2 + len(description.optimizer.slots))
    if needed > psutil.virtual_memory().total:
        raise PlanError(
            f"this server's slice needs {needed / 2**30:.1f} GiB, more than its machine has; give more servers"
        )
    return description


class Table:
    """The slice as it is trained: ``weights_S`` and the optimizer's ``slots``, all zero until loaded."""

    def __init__(self, description: Description) -> None:
        self.description = description
        self.entries: tuple[Entry, ...] = layout(description.tables)
        self.weights_S = self.empty().zero_()
        self.slots = {slot: torch.zeros_like(self.weights_S) for slot in description.optimizer.slots}

    def empty(self) -> Tensor:
        """Room for one gradient, S elements."""
        description = self.description
        return torch.empty(description.stop - description.start, dtype=getattr(torch, description.dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {"param": self.weights_S} | {f"optim/{slot}": tensor for slot, tensor in self.slots.items()}

    def load(self, folder: Path, step: int) -> None:
        """Take the slice from a checkpoint.

        Raises CheckpointDamaged if the checkpoint does not have it, UsageError if it has other tables.
        """
        reader = CheckpointReader(folder, step)
        start, stop = self.description.start, self.description.stop
        for prefix, flat_S in self.tensors().items():
            for entry in self.entries:
                low, high = max(entry.start, start), min(entry.stop, stop)
                if low < high:
                    key = f"{prefix}/{entry.name}"
                    stored = reader.read_slice(key, entry.shape, low - entry.start, high - entry.start)
                    flat_S[low - start : high - start] = stored

    def update(self, grad_S: Tensor, *, step: int, lr: float) -> None:
        """Apply a gradient as update number ``step``, from 1; the gradient is used up."""
        self.description.optimizer.update(self.weights_S, grad_S, self.slots, step=step, lr=lr)

    def pieces(self) -> list[Piece]:
        """Copies of the slice, as a checkpoint stores them."""
        return flat_pieces(self.tensors(), self.entries, self.description.start, self.description.stop)
