"""Tensor parallel: the layers of a plain model split among workers, found by looking at what it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tricorn.data.sources import as_source
from tricorn.mp.tensor.apply import apply
from tricorn.mp.tensor.find import LARGE, find
from tricorn.mp.tensor.split import Split, whole
from tricorn.mp.tensor.splits import Part, Splits
from tricorn.state.gradient import placed

if TYPE_CHECKING:
    from torch import nn

    from tricorn.job import Job

__all__ = ["LARGE", "Part", "Split", "Splits", "apply", "find", "find_for", "whole"]


def find_for(job: Job, model: nn.Module, shards: int) -> Splits:
    """How to split a model of the job's, by a look at it with the first two samples of the job's data.

    Raises what the user's code raises.
    """
    source = as_source(job.train)
    inputs, _ = source.fetch(np.arange(min(2, len(source)), dtype=np.int64))
    return find(model, placed(job, inputs, torch.device("cpu")), shards)
