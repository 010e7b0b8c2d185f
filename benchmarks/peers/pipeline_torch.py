"""A rank of ``torch.distributed.pipelining`` on Gloo: a model of jobs/pipeline.py, cut as it is told, fused AdamW."""

import os
import warnings
from itertools import pairwise

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
import torch
import torch.distributed as dist
from torch.distributed import pipelining
from torch.distributed.pipelining import schedules
from torch.nn.functional import cross_entropy

warnings.filterwarnings("ignore")
KINDS = {
    "gpipe": schedules.ScheduleGPipe,
    "1f1b": schedules.Schedule1F1B,
    "interleaved": schedules.ScheduleInterleaved1F1B,
    "zero-bubble": schedules.ScheduleInterleavedZeroBubble,  # with one stage a rank it is ZB-H1
}


class Torch:
    """``cuts`` are of all stages, those of one rank are several with the schedule ``interleaved``."""

    def __init__(self, model: torch.nn.Sequential, cuts: tuple, schedule: str, microbatches: int) -> None:
        rank, ranks = dist.get_rank(), dist.get_world_size()
        edges = list(pairwise((0, *cuts, len(model))))
        stages = [
            pipelining.PipelineStage(model[slice(*edges[number])], number, len(edges), torch.device("cpu"))
            for number in range(rank, len(edges), ranks)
        ]
        single = schedule in ("gpipe", "1f1b")
        self._runner = KINDS[schedule](stages[0] if single else stages, microbatches, loss_fn=cross_entropy)
        parameters = [parameter for stage in stages for parameter in stage.submod.parameters()]
        self._optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self._first, self._last = rank == 0, rank == ranks - 1

    def step(self, inputs: torch.Tensor, target: torch.Tensor) -> None:
        losses: list[torch.Tensor] = []
        self._optimizer.zero_grad()
        self._runner.step(
            *([inputs] if self._first else []),
            **({"target": target, "losses": losses} if self._last else {}),
        )
        self._optimizer.step()
        if self._last:
            torch.stack(losses).mean().item()


def meet(rank: int, ranks: int, port: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)


def leave() -> None:
    dist.destroy_process_group()
