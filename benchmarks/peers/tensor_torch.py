"""One rank of DTensor's tensor parallel on a model of jobs/tensor.py; prints the milliseconds of a step.

Arguments: model, backend (gloo or tricorn), rank, ranks, port.
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "jobs"))

import tensor
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

name, backend, rank, ranks, port = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:6])
if backend == "tricorn":
    import tricorn.comm

    assert tricorn.comm  # registers the backend
torch.set_num_threads(1)
torch.manual_seed(0)
dist.init_process_group(backend, init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
model = tensor.MODELS[name]()
styles = {each: ColwiseParallel() for each in model.COLUMN} | {each: RowwiseParallel() for each in model.ROW}
parallelize_module(model, init_device_mesh("cpu", (ranks,)), styles)


def local(value):
    return getattr(value, "_local_tensor", value)


print(tensor.timed(model, local, dist.barrier))
dist.destroy_process_group()
