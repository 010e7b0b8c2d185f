"""A Ray actor as the server, and two as the workers that call it."""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ["PYTHONPATH"] = str(Path(__file__).resolve().parent)

import ray
from ctr_torch import WARM, WORKERS, report


@ray.remote
class Held:
    def __init__(self):
        from ctr_server import Server

        self.server, self.waiting = Server(), 0

    def push_pull(self, *arguments):
        return self.server.push_pull(*arguments)

    def arrive(self):
        self.waiting += 1

    def arrived(self):
        return self.waiting


@ray.remote
class Worker:
    def work(self, held, rank, count):
        from ctr_server import work
        from ctr_torch import batches, now

        def ready():
            ray.get(held.arrive.remote())
            while ray.get(held.arrived.remote()) < WORKERS:
                time.sleep(0.001)

        return work(lambda *a: ray.get(held.push_pull.remote(*a)), batches(rank, count), WARM, ready, now)


if __name__ == "__main__":
    count = int(sys.argv[1])
    ray.init(num_cpus=WORKERS + 1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    held = Held.remote()
    workers = [Worker.remote() for _ in range(WORKERS)]
    found = ray.get([worker.work.remote(held, rank, count) for rank, worker in enumerate(workers)])
    ray.shutdown()
    report(count, *zip(*found, strict=True))
