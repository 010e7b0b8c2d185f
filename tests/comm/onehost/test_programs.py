"""PyTorch's own programs run on the backend, unchanged, and give what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleDualPipeV,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
    ScheduleLoopedBFS,
    ScheduleZBVZeroBubble,
)
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

SIZE = 4
WIDTH = 12


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, WIDTH))


def batch() -> Tensor:
    return torch.randn(16, WIDTH, generator=torch.Generator().manual_seed(1))


def of_one_process() -> list[Tensor]:
    model = net()
    model(batch()).square().mean().backward()
    return [parameter.grad for parameter in model.parameters()]


class Branching(nn.Module):
    """Uses one of its two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = net(), net()

    def forward(self, x: Tensor, left: bool) -> Tensor:
        return self.left(x) if left else self.right(x)


def ddp(_: None) -> None:
    rank = dist.get_rank()
    model = DistributedDataParallel(net())
    model(batch().chunk(SIZE)[rank]).square().mean().backward()
    for parameter, wanted in zip(model.parameters(), of_one_process(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted)
    branching = DistributedDataParallel(Branching(), find_unused_parameters=True)
    branching(batch().chunk(SIZE)[rank], rank % 2 == 0).square().mean().backward()
    halves = [
        (half, [p.grad.clone() for p in half.parameters()]) for half in (branching.module.left, branching.module.right)
    ]
    for _, gradients in halves:
        for gradient in gradients:
            everybody = [torch.empty_like(gradient) for _ in range(SIZE)]
            dist.all_gather(everybody, gradient)
            assert all(torch.equal(each, gradient) for each in everybody)


def fsdp(_: None, reshard: bool, low: bool) -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (SIZE,))
    model = net()
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if low else MixedPrecisionPolicy()
    )
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard, mp_policy=policy)
    model(batch().chunk(SIZE)[rank]).float().square().mean().backward()
    tolerance = {"rtol": 0.05, "atol": 0.005} if low else {"rtol": 1.3e-6, "atol": 1e-5}
    for parameter, wanted in zip(model.parameters(), of_one_process(), strict=True):
        torch.testing.assert_close(parameter.grad.full_tensor(), wanted, **tolerance)


def redistribution(_: None) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    whole = torch.arange(7 * 10, dtype=torch.float32).view(7, 10)
    placements: list[Placement] = [Replicate(), Shard(0), Shard(1)]
    for first in placements:
        for second in placements:
            source = distribute_tensor(whole, mesh, [first, second])
            for third in placements:
                for fourth in placements:
                    there = source.redistribute(mesh, [third, fourth])
                    assert torch.equal(there.full_tensor(), whole), (first, second, third, fourth)
    for target in placements:
        partial = DTensor.from_local(whole / 4, mesh, [Partial(), Partial()], run_check=False)
        assert torch.equal(partial.redistribute(mesh, [target, Replicate()]).full_tensor(), whole)


STAGED = {
    "GPipe": (ScheduleGPipe, 1), "1F1B": (Schedule1F1B, 1), "Interleaved1F1B": (ScheduleInterleaved1F1B, 2),
    "LoopedBFS": (ScheduleLoopedBFS, 2), "InterleavedZeroBubble": (ScheduleInterleavedZeroBubble, 2),
    "ZBVZeroBubble": (ScheduleZBVZeroBubble, 2), "DualPipeV": (ScheduleDualPipeV, 2),
}  # fmt: skip


def pipeline(_: None, name: str) -> None:
    schedule_type, each = STAGED[name]
    rank, count = dist.get_rank(), each * SIZE
    torch.manual_seed(0)
    blocks = [nn.Linear(WIDTH, WIDTH) for _ in range(count)]
    own = [rank, count - 1 - rank] if "V" in name else [rank + SIZE * turn for turn in range(each)]
    stages = [PipelineStage(blocks[number], number, count, torch.device("cpu")) for number in own]
    schedule = schedule_type(stages[0] if each == 1 else stages, 8, loss_fn=lambda y, t: (y - t).square().mean())
    inputs, targets = (batch(),) if 0 in own else (), {"target": batch()} if count - 1 in own else {}
    schedule.step(*inputs, **targets)
    alone = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(count)])
    for mine, block in zip(alone, blocks, strict=True):
        mine.load_state_dict(block.state_dict())
    (alone(batch()) - batch()).square().mean().backward()
    for number in own:
        torch.testing.assert_close(blocks[number].weight.grad, alone[number].weight.grad)


def checkpoint(_: None, folder: str) -> None:
    mesh = init_device_mesh("cpu", (SIZE,))
    whole = torch.arange(64.0).view(16, 4)
    dcp.save({"w": distribute_tensor(whole, mesh, [Shard(0)]), "n": 3}, checkpoint_id=folder)
    loaded: dict[str, Any] = {"w": distribute_tensor(torch.zeros(16, 4), mesh, [Shard(1)]), "n": 0}
    dcp.load(loaded, checkpoint_id=folder)
    assert torch.equal(loaded["w"].full_tensor(), whole)
    assert loaded["n"] == 3


def test_ddp(four: Any) -> None:
    four.each(ddp)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2(four: Any, reshard: bool, low: bool) -> None:
    four.each(fsdp, reshard, low)


def test_dtensors_go_from_any_placement_to_any_other(four: Any) -> None:
    four.each(redistribution)


@pytest.mark.parametrize("name", STAGED)
def test_pipelines(four: Any, name: str) -> None:
    four.each(pipeline, name)


def test_distributed_checkpoint(four: Any, tmp_path: Path) -> None:
    four.each(checkpoint, str(tmp_path))
