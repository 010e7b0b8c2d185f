"""A job and a machine as if they had been measured: round figures from simple laws."""

from __future__ import annotations

from typing import Any

from tricorn.planner.cluster import Cluster, Host
from tricorn.planner.figures import Curve, Point
from tricorn.planner.ground import Ground
from tricorn.planner.links import Links
from tricorn.planner.profile import Layer, Profile, TableUse

SIZES = (1e3, 1e6, 1e8)
CORES = 4
GB = 10**9


def line(fixed: float, each: float, sizes: tuple[float, ...] = SIZES, scatter: float = 0.02) -> Curve:
    """``fixed`` seconds, and ``each`` for every unit of size."""
    return Curve(tuple(Point(size, fixed + each * size, scatter) for size in sizes))


def links() -> Links:
    """Of 4 cores: memory at 5 GB/s, 0.2 ms a step, and 0.1 ms for each worker."""
    curves = {"copy/1": line(1e-6, 2e-10), "update/1": line(1e-6, 1e-10)}
    curves |= {f"coding/{how}/1": line(1e-4, 2e-9) for how in ("bf16", "fp16", "int8", "topk", "powersgd")}
    for workers in (1, 2, 4):
        fixed = 2e-4 + 1e-4 * workers
        curves[f"exchange/dp/{workers}"] = line(fixed, 2e-10 * workers)
        for zero in (1, 2, 3):
            curves[f"exchange/zero{zero}/{workers}"] = line(fixed * (1 + zero), 3e-10 * (1 + zero))
        curves[f"exchange/ps/{workers}"] = line(2 * fixed, 6e-10 * workers)
        curves[f"exchange/asp/{workers}"] = line(fixed / workers, 6e-10)
        curves[f"exchange/mp/{workers}"] = line(1e-3, 4e-4, (1, 8))
        for way, each in (("shared", 3e-10), ("tcp", 1e-9)):
            for operation in ("all_reduce", "reduce_scatter", "all_gather", "all_to_all", "send"):
                curves[f"{way}/{operation}/{workers}"] = line(1e-4, each)
    del curves["exchange/mp/1"]
    return Links(cores=CORES, curves=curves)


def profile(*, elements: int = 2_000_000, batch: float = 0.08, **changes: Any) -> Profile:
    """A job whose whole batch of 64 computes in ``batch`` seconds on one core."""
    threads = {1: 1.0, 2: 0.6, 4: 0.4}  # what more threads make of it
    crowds = [(workers, CORES // workers) for workers in (1, 2, 4)] + [(1, 1), (2, 1)]
    compute = {
        f"{workers}x{count}": line(2e-3, (batch - 2e-3) / 64 * threads[count] * (1 + 0.02 * (workers - 1)), (4, 16, 64))
        for workers, count in crowds
    }
    fields: dict[str, Any] = {
        "name": "job", "samples": 6400, "batch_size": 64, "epochs": 3, "device": "cpu", "optimizer": "AdamW",
        "elements": elements, "element_bytes": 4, "slots": 2, "parameters": 12, "buffer_bytes": 0,
        "base_bytes": 200_000_000, "input_bytes": 4e3, "kept_bytes": 2e5, "compute": compute,
        "update": {key: line(1e-5, 5e-10) for key in compute}, "load": line(1e-5, 1e-6, (16, 64)),
        "layers": tuple(
            Layer(name=f"layers.{index}", forward=1e-3, backward=1e-3, weights=1e-3, elements=elements // 8,
                  output_bytes=64_000, kept_bytes=400_000, cut_after=True)
            for index in range(8)
        ),
        "layer_samples": 16,
    }  # fmt: skip
    return Profile(**{**fields, **changes})


def recommender(rows: int = 1_000_000) -> Profile:
    """Mostly one table, of which a batch reads a few hundred rows."""
    plain = profile(elements=rows * 16 + 50_000, batch=0.01)
    table = TableUse(name="rows", rows=rows, dim=16, unique=((16, 100.0), (32, 190.0), (64, 350.0)))
    small = {f"rows {key}": line(5e-4, 2e-5, (4, 16, 64)) for key in plain.compute}
    return profile(elements=rows * 16 + 50_000, batch=0.03, tables=(table,), compute=plain.compute | small, slots=1,
                   optimizer="Adagrad", rows=reading())  # fmt: skip


def reading() -> dict[str, Curve]:
    """Of rows: new ones take twice as long."""
    ways = (("ps", 2), ("asp", 1), ("served", 2), ("spread", 3))
    return {
        f"{kind}/{way}/{workers}": line(2 * times * (2e-4 + 1e-4 * workers), each)
        for way, times in ways for workers in (1, 2, 4) for kind, each in (("known", 2e-9), ("new", 4e-9))
    }  # fmt: skip


def machine(memory: int = 16 * GB) -> Cluster:
    return Cluster(hosts=(Host(name="here", cores=CORES, memory=memory),))


def apart(count: int, *, mbit: float = 1000.0, memory: int = 16 * GB, **host: Any) -> Cluster:
    """Hosts of one core each, joined by links."""
    each = {"cores": 1.0, "memory": memory, "mbit": mbit, "latency": 1e-4, **host}
    return Cluster(hosts=tuple(Host(name=f"h{number}", **each) for number in range(count)), described=True)


def ground(job: Profile | None = None, cluster: Cluster | None = None) -> Ground:
    return Ground(job or profile(), links(), cluster or machine())


def can_run(plans: Any) -> list[str | None]:
    """Every strategy accepts every plan."""
    return [None] * len(plans)
