"""Measure a job: computing alone and side by side, its update, its batches, its rows, and its layers one by one.

All of it happens in forks of a process that has loaded the job, so that nothing of the job or of this process changes.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import psutil
import torch
from torch import Tensor, nn

from tricorn.data.sources import as_source
from tricorn.errors import TricornError, UserCodeError
from tricorn.mp.cut import NUMBERED
from tricorn.planner import computing
from tricorn.planner.computing import rounds
from tricorn.planner.crew import Line, crew
from tricorn.planner.figures import Curve, Point
from tricorn.planner.load import Quiet
from tricorn.planner.profile import Layer, Profile, Splitting, TableUse, crowd
from tricorn.planner.reading import reading
from tricorn.planner.rehearse import warm
from tricorn.planner.splitting import splitting
from tricorn.state.flat import (
    build_model,
    call_model,
    device_of,
    model_without_rows,
    trained_parameters,
)
from tricorn.state.gradient import placed
from tricorn.state.rows import row_tables
from tricorn.worker.batches import Batches

if TYPE_CHECKING:
    from tricorn.job import Job

BATCHES = 16  # in which rows are counted
RANGES = 24  # of a table's rows, equal ones, in which they are counted: as many as most numbers of workers divide
IMPORTED = ("torch.", "numba.", "tricorn.")  # packages whose modules have no effect but to be there
CACHE = 1 << 22  # elements that push what computing would out of the processor's caches
LARGE = 1 << 18  # elements of a linear layer's weight, from which on it matters where its gradient goes
HEADROOM = 0.5  # of the memory that is free, for what measures


def profile(job: Job, name: str, cores: int, told: Callable[[str], None]) -> Profile:
    """Everything; ``told`` hears what is being measured. The process must have no threads but this one.

    What the user's code raises is in ``unmeasured`` or ``no_layers``, and the rest is measured nevertheless.
    """
    told("the model")
    facts = _said(partial(_facts, job))
    by_rows = facts["table_bytes"] > 0
    if by_rows:
        warm()
        facts["tables"] = _said(partial(_tables, job))
    for module in facts["imported"]:  # here, or each fork would have to
        with suppress(ImportError):
            import_module(module)
    compute: dict[str, Curve] = {}
    direct: dict[str, Curve] = {}
    update: dict[str, Curve] = {}
    unmeasured = too_large = ""
    kept = 0.0
    quiet = Quiet(cores)
    batch = min(job.batch_size, facts["samples"])
    try:
        for workers, threads in crowds(cores):
            told(f"{workers} computing at once, threads: {threads}")
            if not _fits(facts, workers):
                too_large = f"{workers} copies of the model are more than half of the memory that is free"
                continue
            sizes = shares(batch, workers)
            for how in ("whole", *["served"] * by_rows, *["direct"] * (facts["linear"] and facts["device"] == "cpu")):
                bodies = [partial(computing.compute, job, threads, sizes, how)] * workers
                found = quiet.measure(partial(computing.side_by_side, bodies, sizes))
                if how == "direct":
                    direct[crowd(workers, threads)] = found["compute"]
                    continue
                key = ("rows " if how == "served" else "") + crowd(workers, threads)
                compute[key], update[key] = found["compute"], found["update"]
                kept = max(kept, found["kept"].points[0].seconds)
    except UserCodeError as error:
        unmeasured = str(error)
    layers: tuple[Layer, ...] = ()
    split: Splitting | None = None
    no_layers = unmeasured
    few = max(1, batch // 4)
    if not unmeasured:
        told("layers")
        try:
            layers = quiet.measure(partial(_layered, job, few))
        except TricornError as error:
            no_layers = str(error)
        told("layers that are split")
        with suppress(UserCodeError):
            stages, room = NUMBERED if layers else 0, cores > 1 and _fits(facts, 2)
            body = partial(splitting, job, stages, compute.get("1x1") if room else None)
            split = msgspec.convert(quiet.measure(partial(_said, body)), Splitting | None)
    gathered = 0
    if compute and not unmeasured:
        with suppress(UserCodeError):
            gathered = _said(partial(_gathered, job))
    tables = tuple(msgspec.convert(table, TableUse) for table in facts["tables"])
    rows = reading(tables, batch, len(job.optimizer.slots), cores, quiet, told) if by_rows and not unmeasured else {}
    told("batches")
    data = _said(partial(_load, job))
    return Profile(
        name=name, samples=facts["samples"], batch_size=job.batch_size, epochs=job.epochs,
        device=facts["device"], optimizer=type(job.optimizer).__name__, elements=facts["elements"],
        element_bytes=facts["element_bytes"], slots=len(job.optimizer.slots), parameters=facts["parameters"],
        buffer_bytes=facts["buffer_bytes"], base_bytes=facts["base_bytes"], input_bytes=data["input_bytes"],
        kept_bytes=kept or sum(layer.kept_bytes for layer in layers) / few,
        compute=compute, direct=direct, update=update, load=Curve(tuple(Point(*point) for point in data["load"])),
        tables=tables, rows=rows, shapes=tuple(map(tuple, facts["shapes"])), gathered=gathered,
        layers=layers, layer_samples=few, splitting=split, busy=quiet.busy, no_layers=no_layers,
        unmeasured=unmeasured or ("" if compute else too_large),
    )  # fmt: skip


def _said(body: Callable[[Line], None]) -> Any:
    """What a fork says."""
    with crew([body]) as (line,):
        return line.hear()


def _layered(job: Job, samples: int) -> tuple[Layer, ...]:
    return tuple(Layer(**row) for row in _said(partial(_layers, job, samples)))


def crowds(cores: int) -> list[tuple[int, int]]:
    """How many workers compute at once, each with how many threads: (1, all), (2, half), ..., (all, 1), and (1, 1)."""
    counts = [1 << power for power in range(cores.bit_length()) if 1 << power < cores]
    return list(dict.fromkeys([*((count, cores // count) for count in counts), (cores, 1), (1, 1)]))


def shares(batch_size: int, workers: int) -> list[int]:
    """Samples of one computation: the whole batch, a worker's share of it, and a quarter of that; ascending."""
    share = -(-batch_size // max(workers, 2))
    return sorted({batch_size, share, max(1, share // 4)})


def _facts(job: Job, line: Line) -> None:
    """What is known without running anything."""
    torch.set_num_threads(1)
    base, before = psutil.Process().memory_info().rss, {*sys.modules}
    model = model_without_rows(job)
    trained = trained_parameters(model)
    tables = row_tables(job, model)
    source = as_source(job.train)
    dtype_bytes = trained[0][1].element_size() if trained else 4
    line.say(
        {
            "samples": len(source),
            "device": device_of(job).type,
            "elements": sum(p.numel() for _, p in trained),
            "element_bytes": dtype_bytes,
            "parameters": len(trained),
            "shapes": [tuple(p.shape) for _, p in trained],
            "slots": len(job.optimizer.slots),
            "buffer_bytes": sum(buffer.nbytes for buffer in model.buffers()),
            "base_bytes": base,
            "imported": [name for name in sys.modules if name not in before and name.startswith(IMPORTED)],
            "linear": max((p.weight.numel() for p in model.modules() if type(p) is nn.Linear), default=0) >= LARGE,
            "table_bytes": sum(table.rows * table.dim for table in tables) * dtype_bytes,
            "tables": [],
        }
    )


def _tables(job: Job, line: Line) -> None:
    """Each table, and how many different ids of it some shares of a batch have, and some batches together."""
    from tricorn.ps.lookup import Lookups
    from tricorn.ps.rows import Wanted

    model, source = model_without_rows(job), as_source(job.train)
    tables = row_tables(job, model)
    seen = [np.empty(0, np.int64) for _ in tables]

    def see(wanted: list[Wanted]) -> None:
        for each in wanted:
            each.out_UD.zero_()
            seen[each.table] = np.union1d(seen[each.table], each.ids_U.numpy())

    lookups, whole = Lookups(model, tables, see), min(job.batch_size, len(source))
    unique: list[list[tuple[int, int]]] = [[] for _ in tables]
    where: list[list[float]] = [[] for _ in tables]
    known = False  # whether ids are found in a batch without a forward
    ends = sorted({max(1, whole // 4), max(1, whole // 2), *(whole * times for times in range(1, BATCHES + 1))})
    for start, stop in pairwise((0, *ends)):
        if stop > len(source) or (stop > whole and not known):
            break
        inputs, _ = source.fetch(np.arange(start, stop, dtype=np.int64))
        ahead = lookups.ahead(inputs)
        see(ahead.wanted)
        known = len(ahead.wanted) == len(tables)
        if not known:
            lookups.begin(ahead)
            with torch.no_grad():
                call_model(model, placed(job, inputs, device_of(job)))
            lookups.end()
        for number, ids in enumerate(seen):
            unique[number].append((stop, len(ids)))
            if stop <= max(1, whole // 2):  # as two workers share a batch
                counts, _ = np.histogram(ids, RANGES, (0, tables[number].rows))
                where[number] = [float(share) for share in counts / max(1, counts.sum())]
    line.say(
        [
            {"name": table.name, "rows": table.rows, "dim": table.dim, "unique": points, "where": shares}
            for table, points, shares in zip(tables, unique, where, strict=True)
        ]
    )


def _gathered(job: Job, line: Line) -> None:
    """What zero=3 gathers in a step."""
    from tricorn.dp.gathered import gathered
    from tricorn.mp.measure import example

    torch.set_num_threads(1)
    line.say(gathered(job, example(job, 2)))


def _fits(facts: dict[str, Any], workers: int) -> bool:
    needed = workers * facts["elements"] * facts["element_bytes"] * (2 + facts["slots"])
    return bool(needed < HEADROOM * psutil.virtual_memory().available)


def _load(job: Job, line: Line) -> None:
    """Seconds in which a worker makes a batch after computing on another, and the bytes of a sample's inputs."""
    torch.set_num_threads(1)
    batches, points = Batches(job), []
    batch = batches.samples(0)
    steps = (step for step in itertools.count(0, 2) if batches.samples(step) == batch)  # none is made ahead
    used, unused = torch.zeros(CACHE), torch.zeros(CACHE)

    def make(samples: int) -> None:
        batches.training(next(steps), 0, samples)

    for samples in sorted({max(1, batch // 4), batch}):
        points.append(Point(samples, *rounds(partial(make, samples), partial(used.copy_, unused))))
    line.say({"load": points, "input_bytes": sum(t.nbytes for t in _tensors(batches.training(0, 0, 1).inputs))})


def _layers(job: Job, samples: int, line: Line) -> None:
    """Each block by itself, on what the one before it made."""
    from tricorn.mp.measure import example, measure
    from tricorn.mp.partition import blocks_of, legal_cuts

    torch.set_num_threads(1)
    found = blocks_of(job, build_model(job), 2, NUMBERED)
    legal = set(legal_cuts(found))
    costs = measure(job, found, example(job, samples), device_of(job))
    line.say(
        [
            {
                "name": block.name,
                "forward": cost.forward,
                "backward": cost.input_gradient,
                "weights": cost.weight_gradient,
                "elements": sum(p.numel() for p in block.module.parameters() if p.requires_grad),
                "output_bytes": cost.handed_on,
                "kept_bytes": cost.kept,
                "cut_after": index + 1 in legal and cost.obstacle is None,
                "together": cost.together,
            }
            for index, (block, cost) in enumerate(zip(found, costs, strict=True))
        ]
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple | list):
        inner: Iterable[Any] = value.values() if isinstance(value, dict) else value
        for item in inner:
            yield from _tensors(item)
