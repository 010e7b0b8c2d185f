"""The hash index over records: from an id to the place of its record, in memory that others read while it changes.

A record is ``width`` words of 64 bits: the id, then its count (32 bits) and the step of its last use (32 bits), then
its numbers. Records lie one behind the other, from 0 to before ``header[ROWS]``.

An index of 2^bits entries of 32 bits lies at entry 2^bits of the region of indices, so that one size never overlaps
another: a larger one is built aside, and readers go on with the old one until the new one is announced. An entry is
0 where free, else the place of the record plus one in its lower ``bits`` bits and bits of the id's hash above them,
which tell all but a few of the other ids apart without a look at their records. Collisions go to the next entry.

Readers take no lock. ``header[GENERATION]`` is odd while records move, and changes when the index does: what was read
between two equal even values was read from one state of the index.

Legend: U different ids.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tricorn.comm.kernel import kernel
from tricorn.ps.sparse.ids import Ids, bucket_of_hash, mix
from tricorn.ps.sparse.kernel import fence, prefetch

GENERATION, BITS, ROWS = 0, 1, 2  # words of the header
COUNT, USED = 2, 3  # halves of a record's words
MIN_BITS, MAX_BITS = 10, 31
AHEAD = 24  # ids by which an entry is fetched before its record, and that before it is needed: the waits overlap

Words = NDArray[np.int64]
Entries = NDArray[np.uint32]
Places = NDArray[np.int64]

_LOW = np.uint64(0xFFFFFFFF)


def holds(bits: int) -> int:
    """The most records that an index of 2^bits entries is used for: beyond four fifths, searches grow long."""
    return (1 << bits) * 4 // 5


def bits_for(rows: int) -> int:
    bits = MIN_BITS
    while holds(bits) < rows:
        bits += 1
    return bits


@kernel
def place(entries: Entries, words: Words, width: int, bits: int, id: int, hash: Any) -> Any:
    """Where the id's record is; -1 if it has none."""
    low = np.int64(hash & _LOW)
    mask = (1 << bits) - 1
    tag = low & ~mask
    slot = low & mask
    for _ in range(mask + 1):
        entry = np.int64(entries[mask + 1 + slot])
        if entry == 0:
            return -1
        if entry & ~mask == tag:
            at = (entry & mask) - 1
            if words[at * width] == id:
                return at
        slot = (slot + 1) & mask
    return -1


@kernel
def hashed(ids_U: Ids) -> Any:
    hashes_U = np.empty(len(ids_U), np.uint64)
    for u in range(len(ids_U)):
        hashes_U[u] = mix(np.uint64(ids_U[u]))
    return hashes_U


@kernel
def fetch_entry(entries: Entries, mask: int, hash: Any) -> None:
    """Have the entry fetched at which the search for an id of that hash begins."""
    prefetch(entries, mask + 1 + (np.int64(hash & _LOW) & mask))


@kernel
def fetch_record(entries: Entries, words: Words, width: int, mask: int, hash: Any) -> None:
    """Have the record fetched that this entry leads to."""
    entry = np.int64(entries[mask + 1 + (np.int64(hash & _LOW) & mask)])
    if entry != 0:
        record = ((entry & mask) - 1) * width
        prefetch(words, record)
        for word in range(record + 8, record + width - 1, 8):
            prefetch(words, word)
        prefetch(words, record + width - 1)


@kernel
def find(
    header: Words, entries: Entries, words: Words, width: int, ids_U: Ids, low: int, high: int, places_U: Places
) -> int:
    """Fill ``places_U`` and return how many ids have no record, or -1 - u if id u is of no bucket in [low, high)."""
    absent = 0
    bits = header[BITS]
    mask = (1 << bits) - 1
    hashes_U = hashed(ids_U)
    for ahead in range(len(ids_U) + 2 * AHEAD):
        if ahead < len(ids_U):
            fetch_entry(entries, mask, hashes_U[ahead])
        if AHEAD <= ahead < len(ids_U) + AHEAD:
            fetch_record(entries, words, width, mask, hashes_U[ahead - AHEAD])
        u = ahead - 2 * AHEAD
        if u >= 0:
            if not low <= bucket_of_hash(hashes_U[u]) < high:
                return -1 - u
            at = place(entries, words, width, bits, ids_U[u], hashes_U[u])
            places_U[u] = at
            absent += at < 0
    return absent


@kernel
def link(entries: Entries, words: Words, width: int, bits: int, start: int, stop: int) -> None:
    """Enter the records [start, stop), whose ids are new, into the index of that size."""
    mask = (1 << bits) - 1
    fence()  # whoever finds an entry finds its record complete
    for at in range(start, stop):
        low = np.int64(mix(np.uint64(words[at * width])) & _LOW)
        slot = low & mask
        while entries[mask + 1 + slot] != 0:
            slot = (slot + 1) & mask
        entries[mask + 1 + slot] = (low & ~mask) | (at + 1)


@kernel
def _slot_of(entries: Entries, words: Words, width: int, bits: int, at: int) -> Any:
    mask = (1 << bits) - 1
    low = np.int64(mix(np.uint64(words[at * width])) & _LOW)
    entry = (low & ~mask) | (at + 1)
    slot = low & mask
    while np.int64(entries[mask + 1 + slot]) != entry:
        slot = (slot + 1) & mask
    return slot


@kernel
def remove(header: Words, entries: Entries, words: Words, width: int, places_U: Places) -> None:
    """Take these records out, given in descending order; the last ones move to where they were."""
    header[GENERATION] += 1
    fence()
    bits = header[BITS]
    mask = (1 << bits) - 1
    rows = header[ROWS]
    for at in places_U:
        free = _slot_of(entries, words, width, bits, at)
        # Entries behind a freed one move up if their search would stop at it (Knuth, volume 3, algorithm 6.4R).
        slot = free
        while True:
            slot = (slot + 1) & mask
            entry = np.int64(entries[mask + 1 + slot])
            if entry == 0:
                break
            home = np.int64(mix(np.uint64(words[((entry & mask) - 1) * width])) & _LOW) & mask
            if (slot - home) & mask >= (slot - free) & mask:
                entries[mask + 1 + free] = entry
                free = slot
        entries[mask + 1 + free] = 0
        rows -= 1
        if at != rows:
            slot = _slot_of(entries, words, width, bits, rows)
            entries[mask + 1 + slot] = (np.int64(entries[mask + 1 + slot]) & ~mask) | (at + 1)
            words[at * width : (at + 1) * width] = words[rows * width : (rows + 1) * width]
    header[ROWS] = rows
    fence()
    header[GENERATION] += 1


@kernel
def announce(header: Words, bits: int) -> None:
    """From now on the index is that of 2^bits entries."""
    header[GENERATION] += 1
    fence()
    header[BITS] = bits
    fence()
    header[GENERATION] += 1
