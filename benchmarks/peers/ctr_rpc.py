"""torch.distributed.rpc (TensorPipe): a server and two workers that call it."""

import os
import sys
import tempfile

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
os.environ.setdefault("TP_SOCKET_IFNAME", "lo")

import torch
from ctr_server import Server, work
from ctr_torch import WARM, WORKERS, batches, now, report
from torch import multiprocessing
from torch.distributed import rpc

HELD = None


def push_pull(*arguments):
    return HELD.push_pull(*arguments)


def serve(rank, folder, count, barrier, times):
    global HELD
    torch.set_num_threads(1)
    options = rpc.TensorPipeRpcBackendOptions(init_method=f"file://{folder}/rendezvous")
    if rank == WORKERS:
        HELD = Server()
    name = "server" if rank == WORKERS else f"worker-{rank}"
    rpc.init_rpc(name, rank=rank, world_size=WORKERS + 1, rpc_backend_options=options)
    if rank < WORKERS:

        def call(*arguments):
            return rpc.rpc_sync("server", push_pull, args=arguments)

        times.put(work(call, batches(rank, count), WARM, barrier.wait, now))
    rpc.shutdown()


if __name__ == "__main__":
    count = int(sys.argv[1])
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(WORKERS), context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        roles = [
            context.Process(target=serve, args=(rank, folder, count, barrier, times)) for rank in range(WORKERS + 1)
        ]
        for role in roles:
            role.start()
        found = [times.get() for _ in range(WORKERS)]
        for role in roles:
            role.join()
    report(count, *zip(*found, strict=True))
