"""Random models, cut at random places under random plans, follow one plain loop.

TRICORN_ROUNDS says how many; each is trained for a few steps.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from hybrid.crew import Crew, distance, plain
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from tricorn import data, optim, strategy
from tricorn.job import Job
from tricorn.mp.cut import NUMBERED
from tricorn.mp.partition import blocks_of, legal_cuts
from tricorn.plan import Plan
from tricorn.state.flat import build_model

from .models import KINDS, Drawn

ROUNDS = int(os.environ.get("TRICORN_ROUNDS", "6"))
STEPS = 5
MESHES = [(1, 2, 1), (1, 3, 1), (2, 2, 1), (1, 1, 2), (1, 1, 3), (1, 2, 2), (2, 1, 2), (3, 1, 1)]  # replicas first


def job_of(parts: list[tuple[str, int]], width: int) -> Job:
    generator = torch.Generator().manual_seed(width)
    inputs = torch.randn(17, width, generator=generator, dtype=torch.float64)
    return Job(
        model=lambda: Drawn(width, parts), loss=F.cross_entropy, optimizer=optim.Adam(lr=0.01), precision="float64",
        train=data.arrays(inputs, torch.randint(0, 3, (17,), generator=generator)), device="cpu", batch_size=7,
        epochs=2, clip_norm=0.5, seed=len(parts),
    )  # fmt: skip


@settings(max_examples=ROUNDS)
@given(
    parts=st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 5)), min_size=2, max_size=7),
    width=st.integers(5, 9), mesh=st.sampled_from(MESHES), microbatches=st.sampled_from([1, 3, None]),
    schedule=st.sampled_from(["gpipe", "1f1b", "zero-bubble", "interleaved"]), recompute=st.booleans(),
    zero=st.booleans(), choice=st.data(),
)  # fmt: skip
def test_follow_one_plain_loop(parts, width, mesh, microbatches, schedule, recompute, zero, choice):
    replicas, stages, tensor = mesh
    job = job_of(parts, width)
    cut_into = stages * (2 if schedule == "interleaved" and stages > 1 else 1)
    assume(schedule != "interleaved" or stages > 1)
    legal = legal_cuts(blocks_of(job, build_model(job), cut_into, NUMBERED))
    assume(len(legal) >= cut_into - 1)
    cuts = choice.draw(st.permutations(legal), label="cuts")[: cut_into - 1]
    plan = Plan(
        strategy="mp", workers=replicas * stages * tensor, replicas=replicas, tensor=tensor, schedule=schedule,
        cuts=tuple(sorted(cuts)), microbatches=microbatches, recompute=recompute, zero=int(zero and replicas > 1),
    )  # fmt: skip
    assume(tensor == 1 or strategy.find(plan).why_not(job, plan) is None)
    with TemporaryDirectory() as folder:
        team = Crew(job, plan, Path(folder))
        try:
            team.join("initial")
            team.train(0, STEPS)
            weights = team.weights(STEPS)
        finally:
            team.close()
    expected = plain(job, STEPS, lambda model: [torch.optim.Adam(model.parameters(), lr=0.01, fused=True)])
    assert distance(weights, expected) <= 1e-10
