"""Which server holds what: tables are cut into buckets, and each server takes one contiguous run of them.

All dense tables (parameters under one name) lie end to end in one flat layout, so a run of buckets is one slice of
the flat tensors: one message and one fused update, however many tables it crosses. The rows of a sparse table are
spread by a hash of their ids, so that each server has its share of those that are often used.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

from tricorn.ps.sparse.spec import BUCKETS

BUCKET = 65_536  # elements; a quarter of a megabyte of float32 is the most by which a server can be off balance


class Laid(Protocol):
    """A dense table: elements [start, stop) of the flat layout."""

    @property
    def name(self) -> str: ...
    @property
    def start(self) -> int: ...
    @property
    def stop(self) -> int: ...


class Bucket(NamedTuple):
    """The unit of placement: elements [start, stop) of the flat layout, all of one table."""

    table: str
    start: int
    stop: int


def buckets(entries: Sequence[Laid]) -> list[Bucket]:
    """Cut every table into buckets of at most ``BUCKET`` elements, in the order of the layout."""
    return [
        Bucket(entry.name, start, min(start + BUCKET, entry.stop))
        for entry in entries
        for start in range(entry.start, entry.stop, BUCKET)
    ]


def place(entries: Sequence[Laid], servers: int) -> tuple[tuple[int, int], ...]:
    """The slice [start, stop) of each server, balanced by bytes to within one bucket.

    All elements have one type, so elements stand for bytes. A server gets an empty slice where there are more
    servers than buckets.
    """
    edges = [0, *(bucket.stop for bucket in buckets(entries))]
    cuts = [_nearest(edges, edges[-1] * server / servers) for server in range(servers + 1)]
    return tuple(pairwise(cuts))


def bucket_stops(servers: int) -> tuple[int, ...]:
    """For each server the end of its buckets of every sparse table: contiguous runs of 4096, equal to within one."""
    return tuple(BUCKETS * (server + 1) // servers for server in range(servers))


def bucket_ranges(servers: int) -> tuple[tuple[int, int], ...]:
    """Each server's buckets [first, last + 1) of every sparse table."""
    return tuple(pairwise((0, *bucket_stops(servers))))


def _nearest(edges: Sequence[int], target: float) -> int:
    right = min(bisect_left(edges, target), len(edges) - 1)
    left = max(right - 1, 0)
    return edges[left] if target - edges[left] <= edges[right] - target else edges[right]
