"""Models that are too large for a worker: refused under data parallel, trained under model parallel, in real limits.

With TRICORN_ROUNDS a recommender too.
"""

from __future__ import annotations

import json
import os
import sys

import cloudpickle
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tricorn
from tricorn import data, optim
from tricorn.dp.memory import resident_bytes
from tricorn.engine.hosts import on_hosts
from tricorn.errors import PlanError
from tricorn.plan import Plan
from tricorn.testing.hosts import Host, hosts, hosts_unavailable

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # where roles run there is no such module

LIMIT_MB = 715
TOKENS, WIDTH, HIDDEN = 500, 256, 9216
IDS, DIM = 156_000, 64


class Transformer(nn.Module):
    """80 MB of weights."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, HIDDEN, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens):
        return self.head(self.layers(self.tokens(tokens))).transpose(1, 2)


class Towers(nn.Module):
    """80 MB of weights, nearly all of them in two tables."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(IDS, DIM), nn.Embedding(IDS, DIM)
        self.user, self.item = nn.Linear(DIM, DIM), nn.Linear(DIM, DIM)

    def forward(self, user, item):
        return (torch.relu(self.user(self.users(user))) * self.item(self.items(item))).sum(-1)


def job(model):
    generator = torch.Generator().manual_seed(0)
    if model is Transformer:
        inputs = target = torch.randint(0, TOKENS, (32, 16), generator=generator)
    else:
        inputs = tuple(torch.randint(0, IDS, (32,), generator=generator) for _ in range(2))
        target = torch.randn(32, generator=generator)
    return tricorn.Job(
        model=model,
        loss=F.cross_entropy if model is Transformer else F.mse_loss,
        optimizer=optim.Adam(lr=1e-3),
        train=data.arrays(inputs, target),
        batch_size=8,
        epochs=1,
        device="cpu",
    )


# Of models of 80.7 MB: the largest block, and the peak of the fullest worker beside the 237 MB of one without a model,
# as benchmarks/fit.py measures them.
PEAKS = [
    (Plan(strategy="dp", workers=1), 20, 649), (Plan(strategy="dp", workers=2), 20, 691),
    (Plan(strategy="dp", workers=3), 20, 705), (Plan(strategy="dp", zero=1), 20, 346),
    (Plan(strategy="dp", zero=3), 20, 421), (Plan(strategy="dp", workers=1), 40, 640),
    (Plan(strategy="dp", workers=2), 40, 682), (Plan(strategy="dp", workers=3), 40, 698),
    (Plan(strategy="dp", zero=3), 40, 292),
]  # fmt: skip


@pytest.mark.parametrize(("plan", "largest", "measured"), PEAKS, ids=str)
def test_what_data_parallel_needs_is_known_to_a_tenth(plan, largest, measured):
    found = resident_bytes(plan, 80.7e6, 0, len(optim.Adam(lr=0.1).slots), largest=largest * 1e6, kept=0) / 1e6
    assert abs(found - measured) <= 0.1 * (measured + 237)


@pytest.fixture(scope="module")
def limited():
    if reason := hosts_unavailable():
        pytest.skip(reason)
    with hosts(*[Host(memory_mb=LIMIT_MB)] * 2) as made:
        yield made


@pytest.mark.timeout(60)
@pytest.mark.parametrize("model", [Transformer, Towers] if "TRICORN_ROUNDS" in os.environ else [Transformer])
def test_what_dies_under_dp_trains_under_mp(limited, model, tmp_path):
    with pytest.raises(
        PlanError, match=r"dp cannot run this job .* each worker needs \d+ MB at least, and may have \d+ MB"
    ) as refused:
        tricorn.train(job(model), engine=on_hosts(*limited[:1]), strategy="dp", workers=1, runs=tmp_path)
    assert "--strategy mp" in refused.value.remedy
    result = tricorn.train(job(model), engine=on_hosts(*limited), strategy="mp", workers=2, runs=tmp_path)
    assert result.summary["outcome"] == "done"
    assert result.summary["restarts"] == 0
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    needs = next(line["needs"] for line in lines if "needs" in line)
    peaks = result.summary["peak_bytes"]
    for worker in ("worker-0", "worker-1"):
        print(worker, f"{needs[worker] / 1e6:.0f} MB needed, {peaks[worker] / 1e6:.0f} MB at most")
        assert abs(needs[worker] - peaks[worker]) <= 0.1 * peaks[worker]
