"""What the PyTorch peers of the click-through benchmark share: the tower, its step, and how time is taken."""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

import torch
from ctr_data import BATCH, DIM, FIELDS, HIDDEN, NUMBERS, RATE, ROWS, samples
from torch import nn

__all__ = ["BATCH", "DIM", "FIELDS", "RATE", "ROWS", "batches", "report", "step", "table", "tower"]

WORKERS, WARM = 2, 30


def tower():
    torch.manual_seed(0)
    first, second = HIDDEN
    return nn.Sequential(
        nn.Linear(FIELDS * DIM + NUMBERS, first), nn.ReLU(), nn.Linear(first, second), nn.ReLU(), nn.Linear(second, 1)
    )


def table():
    return torch.empty(ROWS, DIM).normal_(std=0.01, generator=torch.Generator().manual_seed(1))


def batches(rank, count):
    """``count`` batches of (ids, numbers, clicks) for each worker, and ``WARM`` before that are not counted."""
    arrays = [torch.from_numpy(array) for array in samples(BATCH * (count + WARM), seed=rank)]
    return list(zip(*(array.split(BATCH) for array in arrays), strict=True))


def step(model, fields, numbers, clicks):
    """Forward and backward from the rows of a batch, [512, 416]; the gradients are left where autograd leaves them."""
    loss = nn.functional.binary_cross_entropy_with_logits(model(torch.cat([fields, numbers], 1)).squeeze(1), clicks)
    model.zero_grad(set_to_none=True)
    loss.backward()


def report(count, began, ended):
    """From when the last worker began to when the last one ended."""
    seconds = max(ended) - max(began)
    print(json.dumps({"samples_per_second": WORKERS * count * BATCH / seconds}))


def now():
    return time.time()
