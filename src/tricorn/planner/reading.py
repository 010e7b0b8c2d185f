"""What reading and updating rows of a job's tables takes, by every way that trains them by rows.

The job's tables are stood for by made ones of as many rows as far as memory's caches can tell, of which each step reads
as many as the job's, here and there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial

from tricorn import optim
from tricorn.errors import UserCodeError
from tricorn.plan import Plan
from tricorn.planner.figures import Curve, Point
from tricorn.planner.load import Quiet
from tricorn.planner.profile import TableUse
from tricorn.planner.rehearse import BATCHES, WARM_STEPS, Found, Read, rehearse, rows
from tricorn.planner.sweep import FLOAT, Way, counts

PARTS = (1 / 4, 1.0)  # of a batch
MOST_READ = 1 << 15  # rows in a worker's step
MOST_HELD = 1 << 23  # elements of all tables: several times what caches hold
STEPS = 2 * BATCHES - WARM_STEPS
KINDS = ("known", "new")
FEW_NEW = 0.2  # of a step's rows: then what new ones cost cannot be told


def ways(cores: int) -> Iterator[Way]:
    """All that are measured on so many cores."""
    for workers in counts(cores):
        yield Way("ps", Plan(strategy="ps", workers=workers, servers=1))
        yield Way("asp", Plan(strategy="ps", workers=workers, servers=1, consistency="asp"))
        yield Way("served", Plan(strategy="ps+dp", workers=workers, servers=1))
        if workers > 1:
            yield Way("spread", Plan(strategy="dp", workers=workers, embeddings="rows"))


def reading(
    tables: Sequence[TableUse], batch_size: int, slots: int, cores: int, quiet: Quiet, told: Callable[[str], None]
) -> dict[str, Curve]:
    """Seconds of a step without its computing, by bytes of rows: ``known/WAY/W``, and ``new/WAY/W`` where all are new.

    ``slots``: of the job's optimizer. The process must have no threads but this one, and be ``rehearse.warm``.
    """
    optimizer = optim.Adagrad(lr=0.0) if slots else optim.SGD(lr=0.0)
    found: dict[str, Curve] = {}
    for name, plan in ways(cores):
        told(f"rows of {name} with {plan.workers}")
        share = batch_size / (plan.workers if plan.synchronous else 1)
        reads = [_reads(tables, share * part) for part in PARTS]
        jobs = [rows(each, plan, optimizer) for each in reads]
        with suppress(UserCodeError):  # what this machine cannot is out of the question
            taken = quiet.measure(partial(rehearse, jobs, plan, [STEPS] * len(jobs)))
            curves = zip(*(_points(*each, plan) for each in zip(taken, reads, strict=True)), strict=True)
            found |= {
                f"{kind}/{name}/{plan.workers}": Curve(points) for kind, points in zip(KINDS, curves, strict=True)
            }
    return found


def _points(found: Found, reads: Sequence[Read], plan: Plan) -> tuple[Point, Point]:
    """What a step of such reads takes whose rows are known, and one whose rows are all new."""
    size = sum(read.ids * read.dim for read in reads) * FLOAT * (plan.workers if plan.synchronous else 1)
    known = Point(size, *found.exchange)
    new, more = _new(reads, plan.workers), found.first.seconds - found.step.seconds
    return known, known._replace(seconds=known.seconds + max(0.0, more) / new) if new > FEW_NEW else known


def _new(reads: Sequence[Read], workers: int) -> float:
    """The share of new rows in those steps of a rehearsal that are measured before all have been read."""
    elements = sum(read.ids * read.dim for read in reads)
    steps = range(WARM_STEPS, BATCHES)
    return sum(
        read.ids * read.dim / elements * (1 - read.ids / read.rows) ** (workers * step)
        for read in reads
        for step in steps
    ) / len(steps)


def _reads(tables: Sequence[TableUse], samples: float) -> list[Read]:
    """What a worker's step of so many samples reads of each table."""
    fullest = max(table.ids(samples) for table in tables)
    part = MOST_READ / max(MOST_READ, fullest * len(tables))
    found = []
    for table in tables:
        held = max(1, min(table.rows, MOST_HELD // (table.dim * len(tables))))
        found.append(Read(held, table.dim, max(1, min(held, round(table.ids(samples) * part)))))
    return found
