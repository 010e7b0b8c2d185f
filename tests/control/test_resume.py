"""From where a membership epoch goes on: each case a line."""

from __future__ import annotations

import pytest

from tricorn.control.messages import Ready
from tricorn.control.resume import LOST, Source, rank_of, resume_point

REPLICAS, STAGES, SERVERS = ["model"] * 3, ["stage0", "stage1", "stage2"], ["server0", "server1", None]
MESH = ["stage0", "stage1", "stage0", "stage1"]  # two replicas of two stages
SPREAD = ["stage0.copy0", "stage1.copy0", "stage0.copy1", "stage1.copy1"]  # the same with zero=1
SERVED = ["model", "model", "server0"]
CASES = {
    "nobody holds anything": (REPLICAS, [[], [], []], LOST),
    "all hold the same": (REPLICAS, [[7], [7], [7]], Source("keep", 7, {})),
    "all hold the initial weights": (REPLICAS, [[0], [0], [0]], Source("keep", 0, {})),
    "one replica is new": (REPLICAS, [[], [7], [7]], Source("peer", 7, {"model": 1})),
    "one replica is a step ahead": (REPLICAS, [[7], [7], [8]], Source("peer", 8, {"model": 2})),
    "the last replica that holds it": (REPLICAS, [[], [], [8]], Source("peer", 8, {"model": 2})),
    "several hold the newest: the first of them": (REPLICAS, [[6], [7], [7]], Source("peer", 7, {"model": 1})),
    "replicas with a step in common": (REPLICAS, [[6, 7], [7], [7, 8]], Source("peer", 8, {"model": 2})),
    "all stages": (STAGES, [[4], [4], [4]], Source("keep", 4, {})),
    "a stage is new": (STAGES, [[4], [], [4]], LOST),
    "stages apart": (STAGES, [[4], [5], [5]], LOST),
    "stages apart with a step in common": (STAGES, [[4, 5], [5], [5, 6]], Source("keep", 5, {})),
    "servers hold, workers have no part": (SERVERS, [[2], [2], []], Source("keep", 2, {})),
    "a server is new": (SERVERS, [[2], [], []], LOST),
    "servers of different histories": (SERVERS, [[2], [3], []], LOST),
    "a mesh of which all hold the same": (MESH, [[3], [3], [3], [3]], Source("keep", 3, {})),
    "a mesh with a new stage": (MESH, [[3], [], [3], [3]], Source("peer", 3, {"stage1": 3})),
    "a mesh with a new replica": (MESH, [[], [], [3], [3]], Source("peer", 3, {"stage0": 2, "stage1": 3})),
    "a mesh with stages of both replicas new": (
        MESH,
        [[], [3], [3], []],
        Source("peer", 3, {"stage0": 2, "stage1": 1}),
    ),
    "a mesh a part of which is a step ahead": (
        MESH,
        [[4], [3], [3], [4]],
        Source("peer", 4, {"stage0": 0, "stage1": 3}),
    ),
    "a mesh with both copies of a stage new": (MESH, [[3], [], [3], []], LOST),
    "a mesh whose stages are apart": (MESH, [[4], [3], [4], [3]], LOST),
    "a mesh of shares, one of which is new": (SPREAD, [[3], [3], [3], []], LOST),
    "a worker is new, and its server holds": (SERVED, [[5], [], [5]], Source("peer", 5, {"model": 0})),
    "a worker is new, and its server is ahead": (SERVED, [[5], [], [6]], LOST),
    "a worker is new, and its server can go either way": (SERVED, [[5], [], [5, 6]], Source("peer", 5, {"model": 0})),
    "no part of the state has a holder": ([None] * 3, [[], [], []], LOST),
}


@pytest.mark.parametrize("case", CASES)
def test_resume_point(case):
    parts, held, expected = CASES[case]
    ready = {
        f"worker-{rank}": Ready(epoch=1, part=part, held=steps, address=("h", 1))
        for rank, (part, steps) in enumerate(zip(parts, held, strict=True))
    }
    assert resume_point(ready) == expected
    assert resume_point(dict(reversed(ready.items()))) == expected


def test_nobody_at_all():
    assert resume_point({}) == LOST


def test_rank_of():
    assert [rank_of(role) for role in ("worker-0", "server-12")] == [0, 12]
