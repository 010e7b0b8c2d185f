"""The trained model, read back from a run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tricorn.control.checkpoints import Manifest, folder_of, publish
from tricorn.control.messages import File
from tricorn.errors import CheckpointDamaged, UsageError
from tricorn.job import Job
from tricorn.optim import SGD
from tricorn.state.flat import FlatState
from tricorn.state.shards import write_shard
from tricorn.state.trained import trained_model


def job_of(inputs: int, outputs: int) -> Job:
    return Job(
        model=lambda: nn.Sequential(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs)),
        loss=nn.functional.mse_loss,
        optimizer=SGD(lr=0.1),
        train=torch.utils.data.TensorDataset(torch.zeros(4, inputs), torch.zeros(4, outputs)),
        batch_size=4,
        epochs=1,
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run whose checkpoint of step 2 has the weights 0, 1, 2, ..."""
    state = FlatState(job_of(2, 3).model(), SGD(lr=0.1), torch.device("cpu"))
    state.weights_N.copy_(torch.arange(len(state.weights_N)))
    state.module(torch.ones(4, 2))
    root = tmp_path / "checkpoints"
    shard = write_shard(folder_of(root, 2), "worker-0.safetensors", state.pieces())
    publish(root, Manifest(step=2, applied=[(0, 2)], files=[File(**shard._asdict())]))
    return tmp_path


def test_it_has_the_weights_and_buffers_of_the_checkpoint(run: Path) -> None:
    model = trained_model(job_of(2, 3), run)
    assert not model.training
    assert torch.equal(model[0].weight, torch.arange(6.0).view(3, 2))
    assert torch.equal(model[1].num_batches_tracked, torch.tensor(1))


def test_another_model_is_refused(run: Path) -> None:
    with pytest.raises(UsageError, match=r"param/0.weight has the shape \(3, 2\) in .*, but \(2, 3\) in the model"):
        trained_model(job_of(3, 2), run)


def test_a_run_without_a_checkpoint_is_told_of(tmp_path: Path) -> None:
    with pytest.raises(CheckpointDamaged, match="has no checkpoint"):
        trained_model(job_of(2, 3), tmp_path)
