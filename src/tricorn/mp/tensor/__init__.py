"""Tensor parallel: the layers of a plain model split among workers, found by looking at what it does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from tricorn.data.sources import as_source
from tricorn.mp.tensor.apply import apply
from tricorn.mp.tensor.find import LARGE, find
from tricorn.mp.tensor.split import Split, whole
from tricorn.mp.tensor.splits import Part, Splits
from tricorn.state.gradient import placed

if TYPE_CHECKING:
    from tricorn.job import Job

__all__ = ["LARGE", "Part", "Split", "Splits", "apply", "find", "find_for", "whole"]


def find_for(job: Job, model: nn.Module, shards: int) -> Splits:
    """How to split a model of the job's, by a look at it with the first two samples of the job's data.

    Tables on the meta device are looked at as if they were zero.

    Raises what the user's code raises.
    """
    source = as_source(job.train)
    inputs, _ = source.fetch(np.arange(min(2, len(source)), dtype=np.int64))
    with _with_values(model):
        return find(model, placed(job, inputs, torch.device("cpu")), shards)


@contextmanager
def _with_values(model: nn.Module) -> Iterator[None]:
    """Meanwhile what is on the meta device is one zero, seen in the whole shape: no memory, and PyTorch can compute."""
    zeros: dict[nn.Parameter, nn.Parameter] = {}
    held = [(module, name, p) for module in model.modules() for name, p in module._parameters.items() if p is not None]
    absent = [(module, name, weight) for module, name, weight in held if weight.is_meta]
    for module, name, weight in absent:
        zero = torch.zeros((), dtype=weight.dtype).expand(weight.shape)
        module._parameters[name] = zeros.setdefault(weight, nn.Parameter(zero, requires_grad=weight.requires_grad))
    try:
        yield
    finally:
        for module, name, weight in absent:
            module._parameters[name] = weight
