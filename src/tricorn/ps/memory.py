"""Tensors that other processes of this host can read where they lie."""

from __future__ import annotations

import itertools
import weakref
from bisect import bisect_right
from threading import RLock

import numpy as np
import torch
from torch import Tensor

from tricorn.comm.segment import Segment, Ticket

SMALLEST = 1 << 15  # bytes; less is copied sooner than it is looked up

_serials = itertools.count()
_changing = RLock()  # a tensor may end, and say so, while another one begins in the same thread
_segments: dict[int, tuple[int, Segment]] = {}  # by address: a serial number and the segment
_addresses: tuple[int, ...] = ()  # sorted; replaced and never changed, so that ``find`` needs no lock


def zeros(count: int, dtype: torch.dtype) -> Tensor:
    """A flat CPU tensor of ``count`` elements in shared memory, for as long as it or a view of it is alive."""
    size = count * dtype.itemsize
    segment = Segment.create(max(size, 1), "tricorn-ps")
    array = segment.array(np.uint8, 0, max(size, 1))
    with _changing:
        _segments[segment.address] = (next(_serials), segment)
        _sort()
    weakref.finalize(array, _forget, segment.address).atexit = False
    return torch.from_numpy(array)[:size].view(dtype)


def ticket(tensor: Tensor) -> Ticket:
    """What another process needs to attach to the memory of a tensor that ``zeros`` made."""
    # Of the storage: a tensor without elements has no address of its own.
    return _segments[tensor.untyped_storage().data_ptr()][1].ticket


def find(view: memoryview) -> tuple[int, Segment, int] | None:
    """The serial number of the segment made here that the view lies in, the segment, and the offset."""
    addresses = _addresses
    if not addresses:
        return None
    address = np.frombuffer(view, np.uint8).ctypes.data
    index = bisect_right(addresses, address) - 1
    if index < 0 or (known := _segments.get(addresses[index])) is None:
        return None
    serial, segment = known
    offset = address - segment.address
    return (serial, segment, offset) if offset + len(view) <= segment.ticket.size else None


def _forget(address: int) -> None:
    with _changing:
        _, segment = _segments.pop(address)
        _sort()
    segment.close()


def _sort() -> None:
    global _addresses
    _addresses = tuple(sorted(_segments))
