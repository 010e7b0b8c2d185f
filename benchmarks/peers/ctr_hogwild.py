"""The bound: two processes that update one table and one tower in shared memory, without any server (Hogwild)."""

import sys

import torch
from ctr_torch import RATE, WARM, WORKERS, batches, now, report, step, table, tower
from torch import multiprocessing


def work(rank, rows, model, count, barrier, times):
    torch.set_num_threads(1)
    parts = batches(rank, count)
    for n, (ids, numbers, clicks) in enumerate(parts):
        if n == WARM:
            barrier.wait()
            began = now()
        flat = ids.flatten()
        # Each id its own row: there is no search for unique ones.
        fields = rows.index_select(0, flat).view(len(ids), -1).requires_grad_()
        step(model, fields, numbers, clicks)
        rows.index_add_(0, flat, fields.grad.view(len(flat), -1), alpha=-RATE)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(parameter.grad, alpha=-RATE)
    times.put((began, now()))


if __name__ == "__main__":
    count = int(sys.argv[1])
    rows, model = table().share_memory_(), tower().share_memory()
    context = multiprocessing.get_context("spawn")
    barrier, times = context.Barrier(WORKERS), context.Queue()
    workers = [context.Process(target=work, args=(r, rows, model, count, barrier, times)) for r in range(WORKERS)]
    for worker in workers:
        worker.start()
    found = [times.get() for _ in workers]
    for worker in workers:
        worker.join()
    report(count, *zip(*found, strict=True))
