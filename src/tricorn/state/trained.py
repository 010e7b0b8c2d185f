"""The model that a run has trained, read back from its newest checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from tricorn.control import checkpoints
from tricorn.errors import CheckpointDamaged
from tricorn.job import Job
from tricorn.state.flat import build_model
from tricorn.state.whole_rows import open_checkpoint


def trained_model(job: Job, run: Path) -> nn.Module:
    """The job's model with the weights of the run's newest whole checkpoint.

    Raises CheckpointDamaged if there is none, UsageError if its shapes are not those of the job's model.
    """
    folder, damages = checkpoints.newest_whole(run / "checkpoints")
    if folder is None:
        raise CheckpointDamaged("; ".join(damages) or f"the run {run} has no checkpoint")
    model = build_model(job)
    reader = open_checkpoint(job, folder, checkpoints.load_manifest(folder).step)
    with torch.no_grad():
        for prefix, tensors in (("param", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in tensors:
                if f"{prefix}/{name}" in reader:
                    tensor.copy_(reader.read_whole(f"{prefix}/{name}", tensor.shape).view(tensor.shape))
    return model.eval()
