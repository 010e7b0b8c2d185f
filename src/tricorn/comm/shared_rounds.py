"""How bytes go round between the ranks of one host: compiled, without the GIL, and resumable.

Every rank owns a segment that all have mapped. In it are two rings of slots, each with two words: how many slots it
has *filled*, and up to where it is *done* with those of everybody. A collective is a number of rounds. In each, a
rank fills a slot with what the others need, at once visible to them, and takes what it needs out of theirs. A slot
is filled again only when all ranks are done with it. Filling runs a round ahead of taking, so that a wait is rarely
a long one, and the bytes are still in the cache when they are taken.

A call does its stages one after another. When a wait lasts longer than a slice, it notes its stage and returns, for
the caller to see whether the other side is alive; called again, it goes on. Each stage waits for all that it needs
before it changes anything, so it may be begun again.
"""

from __future__ import annotations

from typing import Any

from tricorn.comm import shared_sums as sums
from tricorn.comm import words
from tricorn.comm.kernel import kernel

# The layout of a segment, in bytes. Words that different ranks write are in cache lines of their own.
LINE = 64
STATE, BELL, RINGS = 0, LINE, 2 * LINE  # RINGS: filled and done of ring 0, then of ring 1
WAITS = 6 * LINE  # when it last waited, and for whom; not read by what is compiled
TEXT, TEXT_BYTES = 8 * LINE, 8 * LINE
SLOTS, HEADER = 4, LINE
CONTROL = 4096
SLOT_BYTES = 1 << 20
STREAMS = CONTROL + 2 * SLOTS * (HEADER + SLOT_BYTES)  # to each rank: words of bytes sent and consumed, then a ring
STREAM_BYTES = 1 << 20
STREAM_PIECE = 1 << 17

# What a call is given about its group: 64-bit numbers.
SIZE, RANK, SPINS, YIELDS, SLICE, ROOM, STAGE, BLAMED, SOURCES, OTHER = range(10)
BASES = 16  # where each rank's segment is; after them as many numbers for SOURCES

DONE, BLOCKED, DIFFERS = range(3)


@kernel
def _filled(group: Any, rank: int, ring: int) -> Any:
    return group[BASES + rank] + RINGS + 2 * LINE * ring


@kernel
def slot(group: Any, rank: int, ring: int, turn: int) -> Any:
    """Where a slot is; its first word tells the call it belongs to."""
    return group[BASES + rank] + CONTROL + (ring * SLOTS + turn % SLOTS) * (HEADER + SLOT_BYTES)


@kernel
def announce(group: Any, word: int, value: int) -> None:
    """Set a word of one's own and wake who waits for it."""
    words.store(word, value)
    for rank in range(group[SIZE]):
        if rank != group[RANK]:
            words.wake(group[BASES + rank] + BELL)


@kernel
def reached(group: Any, word: int, target: int) -> Any:
    """Wait a slice for a word of another rank."""
    if words.load(word) >= target:
        return True
    bell = group[BASES + group[RANK]] + BELL
    return words.wait_at_least(word, target, bell, group[SPINS], group[YIELDS], group[SLICE])


@kernel
def _all_done(group: Any, ring: int, turn: int) -> Any:
    for rank in range(group[SIZE]):
        if rank != group[RANK] and not reached(group, _filled(group, rank, ring) + LINE, turn):
            group[BLAMED] = rank
            return False
    return True


@kernel
def _taken(group: Any, rank: int, ring: int, turn: int, call: int) -> Any:
    """Wait for the slot of that rank; whether it belongs to the same call."""
    group[BLAMED] = rank
    if not reached(group, _filled(group, rank, ring), turn + 1):
        return BLOCKED
    group[OTHER] = words.load(slot(group, rank, ring, turn))
    return DONE if group[OTHER] == call else DIFFERS


@kernel
def _part(length: int, start: int, piece: int) -> Any:
    return max(0, min(piece, length - start))


@kernel
def pass_round(
    group: Any, call: int, first: int, rounds: int, piece: int, pieces: int, everyone: bool, plan: Any,
    function: int, operation: int, size: int,
) -> Any:  # fmt: skip
    """Rounds in which every rank fills a slot with a piece for each other rank (``pieces`` is the number of ranks) or
    with one for all of them (1), and takes its piece out of those of the ranks that have one for it.

    ``plan`` has four rows, of an entry for each rank: where what goes to it is (with one piece: the first entry) and
    how long, where what comes from it goes and how long. With a ``function``, what comes from all is reduced into
    the first place instead. ``everyone``: wait for all ranks, whether anything comes from them or not.
    """
    ranks, me = group[SIZE], group[RANK]
    filled = _filled(group, me, 0)
    for stage in range(group[STAGE], 2 * rounds + 2):
        group[STAGE] = stage
        fill, take = stage // 2 if stage % 2 == 0 else rounds, stage // 2 - 1 if stage % 2 else -1
        if fill < rounds:
            turn, start = first + fill, fill * piece
            if not _all_done(group, 0, turn - SLOTS + 1):
                return BLOCKED
            place = slot(group, me, 0, turn)
            words.store(place, call)
            for peer in range(pieces):
                if pieces == 1 or peer != me:
                    length = _part(plan[1, peer], start, piece)
                    if length > 0:
                        sums.copy(place + HEADER + peer * piece, plan[0, peer] + start, length)
            announce(group, filled, turn + 1)
        if take >= 0:
            turn, start = first + take, take * piece
            mine = HEADER + (me * piece if pieces > 1 else 0)
            for peer in range(ranks):
                if peer != me and (everyone or _part(plan[3, peer], start, piece) > 0):
                    state = _taken(group, peer, 0, turn, call)
                    if state != DONE:
                        return state
            if function:
                length = _part(plan[3, me], start, piece)
                for peer in range(ranks):
                    group[BASES + ranks + peer] = slot(group, peer, 0, turn) + mine
                group[BASES + ranks + me] = plan[0, me if pieces > 1 else 0] + start
                if length > 0:
                    sums.call(
                        function, plan[2, me] + start, 0, group[SOURCES], ranks, length // size, operation, group[ROOM]
                    )
            else:
                for peer in range(ranks):
                    length = _part(plan[3, peer], start, piece)
                    if length > 0 and peer != me:
                        sums.copy(plan[2, peer] + start, slot(group, peer, 0, turn) + mine, length)
                    elif length > 0 and plan[2, peer] != plan[0, peer if pieces > 1 else 0]:
                        sums.copy(plan[2, peer] + start, plan[0, peer if pieces > 1 else 0] + start, length)
            announce(group, filled + LINE, turn + 1)
    return DONE


@kernel
def all_reduce(
    group: Any, call: int, first: int, second: int, rounds: int, piece: int, data: int, length: int,
    function: int, operation: int, size: int,
) -> Any:  # fmt: skip
    """In each round a chunk of ``ranks * piece`` bytes is reduced in place: every rank fills a slot of ring 0 with
    the shares of the others, reduces its own share into the data and a slot of ring 1, and takes the other shares
    from there. The three overlap, each a round behind the one before. ``first`` and ``second`` are the turns of the
    rings.
    """
    ranks, me = group[SIZE], group[RANK]
    inputs, results = _filled(group, me, 0), _filled(group, me, 1)
    for stage in range(group[STAGE], 3 * (rounds + 2)):
        group[STAGE] = stage
        action = stage % 3
        number = stage // 3 - action
        if number < 0 or number >= rounds:
            continue
        turn, result, start = first + number, second + number, number * ranks * piece
        own = start + me * piece
        if action == 0:
            if not _all_done(group, 0, turn - SLOTS + 1):
                return BLOCKED
            place = slot(group, me, 0, turn)
            words.store(place, call)
            for peer in range(ranks):
                share = start + peer * piece
                if peer != me and _part(length, share, piece) > 0:
                    sums.copy(place + HEADER + peer * piece, data + share, _part(length, share, piece))
            announce(group, inputs, turn + 1)
        elif action == 1:
            if not _all_done(group, 1, result - SLOTS + 1):
                return BLOCKED
            for peer in range(ranks):
                if peer != me:
                    state = _taken(group, peer, 0, turn, call)
                    if state != DONE:
                        return state
                group[BASES + ranks + peer] = slot(group, peer, 0, turn) + HEADER + me * piece
            group[BASES + ranks + me] = data + own
            if _part(length, own, piece) > 0:
                sums.call(
                    function, data + own, slot(group, me, 1, result) + HEADER, group[SOURCES], ranks,
                    _part(length, own, piece) // size, operation, group[ROOM],
                )  # fmt: skip
            words.store(inputs + LINE, turn + 1)
            announce(group, results, result + 1)
        else:
            for peer in range(ranks):
                if peer != me and not reached(group, _filled(group, peer, 1), result + 1):
                    group[BLAMED] = peer
                    return BLOCKED
            for peer in range(ranks):
                share = start + peer * piece
                if peer != me and _part(length, share, piece) > 0:
                    sums.copy(data + share, slot(group, peer, 1, result) + HEADER, _part(length, share, piece))
            announce(group, results + LINE, result + 1)
    return DONE


@kernel
def segment_bytes(ranks: int) -> Any:
    """What each rank's segment has to hold."""
    return STREAMS + ranks * (2 * LINE + STREAM_BYTES)


@kernel
def _stream(group: Any, source: int, target: int) -> Any:
    return group[BASES + source] + STREAMS + target * (2 * LINE + STREAM_BYTES)


@kernel
def room(group: Any, peer: int, counts: Any) -> Any:
    """How many bytes the stream to a rank takes now."""
    return STREAM_BYTES - (counts[0] - words.load(_stream(group, group[RANK], peer) + LINE))


@kernel
def push(group: Any, peer: int, counts: Any, data: int, length: int) -> Any:
    """Send bytes into the stream to a rank. ``counts``: of bytes ever sent, and of those of this call, 0 at first."""
    sent = _stream(group, group[RANK], peer)
    while counts[1] < length:
        count = counts[0]
        piece = min(length - counts[1], STREAM_PIECE, STREAM_BYTES - count % STREAM_BYTES)
        if not reached(group, sent + LINE, count + piece - STREAM_BYTES):
            return BLOCKED
        sums.copy(sent + 2 * LINE + count % STREAM_BYTES, data + counts[1], piece)
        counts[0] = count + piece
        counts[1] += piece
        words.store(sent, count + piece)
        words.wake(group[BASES + peer] + BELL)
    return DONE


@kernel
def pull(group: Any, peer: int, counts: Any, data: int, length: int) -> Any:
    """Take bytes out of the stream from a rank, as they come; ``counts`` as of ``push``."""
    sent = _stream(group, peer, group[RANK])
    while counts[1] < length:
        count = counts[0]
        if not reached(group, sent, count + 1):
            return BLOCKED
        ready = min(words.load(sent) - count, STREAM_BYTES - count % STREAM_BYTES)
        piece = min(length - counts[1], ready)
        sums.copy(data + counts[1], sent + 2 * LINE + count % STREAM_BYTES, piece)
        counts[0] = count + piece
        counts[1] += piece
        words.store(sent + LINE, count + piece)
        words.wake(group[BASES + peer] + BELL)
    return DONE
