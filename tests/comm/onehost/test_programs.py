"""PyTorch's own programs run on the backend, unchanged, and give what one process gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
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
    """Uses one of its three parts, never the last."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.never = net(), net(), net()

    def forward(self, x: Tensor, left: bool) -> Tensor:
        return self.left(x) if left else self.right(x)


def ddp(_: None) -> None:
    rank = dist.get_rank()
    model = DistributedDataParallel(net())
    model(batch().chunk(SIZE)[rank]).square().mean().backward()
    for parameter, wanted in zip(model.parameters(), of_one_process(), strict=True):
        torch.testing.assert_close(parameter.grad, wanted)
    branching = DistributedDataParallel(Branching(), find_unused_parameters=True)
    alone = Branching()
    for lefts in ((0, 2), (3,), ()):  # in the last step nobody uses that part
        branching.zero_grad()
        alone.zero_grad()
        branching(batch().chunk(SIZE)[rank], rank in lefts).square().mean().backward()
        parts = [alone(part, each in lefts).square().mean() for each, part in enumerate(batch().chunk(SIZE))]
        (sum(parts) / SIZE).backward()
        for (name, ours), theirs in zip(branching.module.named_parameters(), alone.parameters(), strict=True):
            if theirs.grad is None:
                assert ours.grad is None, name
            else:
                torch.testing.assert_close(ours.grad, theirs.grad)


def fsdp(_: None, reshard: bool, low: bool) -> None:
    rank = dist.get_rank()
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if low else MixedPrecisionPolicy()
    )
    model = sharded(net(), reshard_after_forward=reshard, mp_policy=policy)
    alone = net()
    stepping = [torch.optim.SGD(each.parameters(), lr=0.5) for each in (model, alone)]
    tolerance = {"rtol": 0.05, "atol": 0.005} if low else {"rtol": 1.3e-6, "atol": 1e-5}
    for _step in range(2):
        model(batch().chunk(SIZE)[rank]).float().square().mean().backward()
        alone(batch()).square().mean().backward()
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.full_tensor(), theirs.grad, **tolerance)
        for optimizer in stepping:
            optimizer.step()
            optimizer.zero_grad()
    for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.full_tensor(), theirs, **tolerance)


def sharded(model: nn.Sequential, **how: Any) -> nn.Sequential:
    """The model under FSDP2, layer by layer."""
    mesh = init_device_mesh("cpu", (SIZE,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **how)
    fully_shard(model, mesh=mesh, **how)
    return model


PLACEMENTS: list[Placement] = [Replicate(), Shard(0), Shard(1)]
WHOLE = torch.arange(7 * 10, dtype=torch.float32).view(7, 10)
# What makes a whole of two parts, and the part of each.
PARTIAL = {
    "sum": (WHOLE / 4, WHOLE * 3 / 4),
    "avg": (WHOLE / 2, WHOLE * 3 / 2),
    "max": (WHOLE, WHOLE - 1),
    "min": (WHOLE + 1, WHOLE),
}


def redistribution(_: None) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for first in PLACEMENTS:
        for second in PLACEMENTS:
            source = distribute_tensor(WHOLE, mesh, [first, second])
            for third in PLACEMENTS:
                for fourth in PLACEMENTS:
                    there = source.redistribute(mesh, [third, fourth])
                    assert torch.equal(there.full_tensor(), WHOLE), (first, second, third, fourth)
    for target in PLACEMENTS:
        partial = DTensor.from_local(WHOLE / 4, mesh, [Partial(), Partial()], run_check=False)
        assert torch.equal(partial.redistribute(mesh, [target, Replicate()]).full_tensor(), WHOLE)


def partial_redistribution(_: None, kind: str) -> None:
    """Partial on one axis beside any placement on the other, to any."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    for axis, across in ((0, "b"), (1, "a")):
        own = PARTIAL[kind][mesh.get_coordinate()[axis]]
        for other in PLACEMENTS:
            local = distribute_tensor(own, mesh[across], [other]).to_local()
            placements = [Partial(kind), other] if axis == 0 else [other, Partial(kind)]
            shape = {"shape": WHOLE.shape, "stride": WHOLE.stride()}
            source = DTensor.from_local(local, mesh, placements, run_check=False, **shape)
            for third in PLACEMENTS:
                for fourth in PLACEMENTS:
                    there = source.redistribute(mesh, [third, fourth])
                    assert torch.equal(there.full_tensor(), WHOLE), (placements, third, fourth)


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


def resumed(_: None, folder: str) -> None:
    """A model under FSDP2 and its optimizer go on from a checkpoint as if nothing had been."""

    def made(scale: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = net()
        for parameter in model.parameters():
            parameter.data.mul_(scale)
        model = sharded(model)
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        model(batch().chunk(SIZE)[dist.get_rank()]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    first, second = made(1.0), made(0.0)
    step(*first)
    step(*first)
    dcp.save(dict(zip(("model", "optimizer"), get_state_dict(*first), strict=True)), checkpoint_id=folder)
    states = dict(zip(("model", "optimizer"), get_state_dict(*second), strict=True))
    dcp.load(states, checkpoint_id=folder)
    set_state_dict(*second, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    step(*first)
    step(*second)
    for ours, theirs in zip(second[0].parameters(), first[0].parameters(), strict=True):
        assert torch.equal(ours.full_tensor(), theirs.full_tensor())
        ours_state, theirs_state = second[1].state[ours], first[1].state[theirs]
        assert torch.equal(ours_state["exp_avg_sq"].full_tensor(), theirs_state["exp_avg_sq"].full_tensor())
        assert ours_state["step"] == theirs_state["step"] == 3


def test_ddp(four: Any) -> None:
    four.each(ddp)


@pytest.mark.parametrize("low", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("reshard", [True, False])
def test_fsdp2(four: Any, reshard: bool, low: bool) -> None:
    four.each(fsdp, reshard, low)


def test_dtensors_go_from_any_placement_to_any_other(four: Any) -> None:
    four.each(redistribution)


@pytest.mark.parametrize("kind", PARTIAL)
def test_partial_dtensors_go_to_any_placement(four: Any, kind: str) -> None:
    four.each(partial_redistribution, kind)


@pytest.mark.parametrize("name", STAGED)
def test_pipelines(four: Any, name: str) -> None:
    four.each(pipeline, name)


def test_distributed_checkpoint(four: Any, tmp_path: Path) -> None:
    four.each(checkpoint, str(tmp_path))


def test_distributed_checkpoint_of_an_optimizer(four: Any, tmp_path: Path) -> None:
    four.each(resumed, str(tmp_path))
