"""The encodings of data parallel training as communication hooks of PyTorch's own ``DistributedDataParallel``.

    from tricorn.dp import hooks
    ddp_model.register_comm_hook(hooks.State(), hooks.int8)

On every backend of ``torch.distributed`` that has ``all_to_all_single``, ``all_gather_into_tensor`` and
``all_reduce``, as Gloo, NCCL and Tricorn's have. Gradients on a GPU are encoded by way of CPU memory, and travel as
bytes on the GPU.
"""

# Without ``from __future__ import annotations``: DDP looks at a hook's annotations and wants types, not their names.

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from tricorn.dp.compress import Compressor, compressor
from tricorn.plan import Compression
from tricorn.state.flat import layout

Hooked = torch.futures.Future[Tensor]


class State:
    """What a hook remembers between steps: for each bucket of DDP what was kept back. Not to be shared by two models.

    ``process_group`` is that of the DDP model; None is the default group. After a checkpoint is loaded, begin with a
    new one: nothing is kept back then, on all ranks alike.
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        self.wire = ProcessGroupWire(process_group)
        self._step = 0
        self._buckets: dict[int, tuple[list[int], Compressor]] = {}

    def compressor(self, name: Compression, bucket: GradBucket) -> tuple[Compressor, int]:
        """The memory of this bucket, and the number of the step."""
        here = [id(parameter) for parameter in bucket.parameters()]
        known, found = self._buckets.get(bucket.index(), ([], None))
        if found is None or known != here:  # DDP cuts its buckets anew after the first step
            entries = layout((str(number), p.shape) for number, p in enumerate(bucket.parameters()))
            found = compressor(name, entries, bucket.buffer().dtype)
            self._buckets[bucket.index()] = here, found
        self._step += bucket.is_last()
        return found, self._step


class ProcessGroupWire:
    """A process group as a ``tricorn.dp.wire.Wire``: tensors on the CPU go by way of the group's device."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device = torch.device("cpu")

    def all_reduce(self, flat: Tensor) -> None:
        there = flat.to(self.device)
        dist.all_reduce(there, group=self._group)
        flat.copy_(there)

    def all_to_all(self, sends: Sequence[Tensor], receives: Sequence[Tensor]) -> None:
        arrived = torch.empty(sum(map(len, receives)), dtype=torch.uint8, device=self.device)
        sizes = [len(data) for data in receives], [len(data) for data in sends]
        dist.all_to_all_single(arrived, torch.cat([*sends]).to(self.device), *sizes, group=self._group)
        for data, received in zip(receives, torch.split(arrived.cpu(), sizes[0]), strict=True):
            data.copy_(received)

    def all_gather(self, flat: Tensor, bounds: Sequence[int]) -> None:
        # Parts of one size, as every backend takes them: the longest, and its padding.
        sizes = [high - low for low, high in pairwise(bounds)]
        part = torch.zeros(max(sizes), dtype=torch.uint8, device=self.device)
        part[: sizes[self.rank]] = flat[bounds[self.rank] : bounds[self.rank + 1]].to(self.device)
        together = torch.empty(self.size * len(part), dtype=torch.uint8, device=self.device)
        dist.all_gather_into_tensor(together, part, group=self._group)
        for rank, received in enumerate(together.cpu().view(self.size, -1)):
            flat[bounds[rank] : bounds[rank + 1]] = received[: sizes[rank]]


def bf16(state: State, bucket: GradBucket) -> Hooked:
    """Gradients in bfloat16: half of the bytes."""
    return _mean(state, "bf16", bucket)


def fp16(state: State, bucket: GradBucket) -> Hooked:
    """Gradients in float16: half of the bytes."""
    return _mean(state, "fp16", bucket)


def int8(state: State, bucket: GradBucket) -> Hooked:
    """Gradients in a byte each, rounded at random: a quarter of the bytes."""
    return _mean(state, "int8", bucket)


def topk(state: State, bucket: GradBucket) -> Hooked:
    """One in a hundred elements, the largest: a fiftieth of the bytes."""
    return _mean(state, "topk", bucket)


def powersgd(state: State, bucket: GradBucket) -> Hooked:
    """Matrices as two factors of rank 4, the rest as it is."""
    return _mean(state, "powersgd", bucket)


def _mean(state: State, name: Compression, bucket: GradBucket) -> Hooked:
    # Not beside backward: collectives started from several threads could reach the group in another order on
    # another rank.
    flat = bucket.buffer()
    state.wire.device = flat.device
    memory, step = state.compressor(name, bucket)
    local = flat.div(state.wire.size).cpu()
    if state.wire.size > 1:
        memory.sum(state.wire, local, 0, step)
    future: Hooked = torch.futures.Future()
    future.set_result(flat.copy_(local))
    return future
