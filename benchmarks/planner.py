"""Does the planner predict, and choose, rightly? Predictions are written down first; then every plan is measured.

For four jobs that its equations were not made for, on clusters of this machine: itself, and, with full rounds, hosts
joined by links of 1 Gbit/s and 100 Mbit/s, of which one may be slow.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common import ROOT, Report, options

from tricorn import planner
from tricorn.engine.hosts import on_hosts
from tricorn.engine.local import LocalEngine
from tricorn.errors import TricornError
from tricorn.planner.cluster import Cluster
from tricorn.planner.cluster import Host as Described
from tricorn.planner.explain import named
from tricorn.planner.prediction import Prediction
from tricorn.planner.search import exact
from tricorn.run import execute, timing_of
from tricorn.testing.hosts import Host, hosts, hosts_unavailable

JOBS = ROOT / "benchmarks" / "jobs" / "planned.py"
CASES = ("mlp", "cnn", "transformer", "recommender")
NOISE = 0.05  # plans that differ by less than this are ties


@dataclass(frozen=True)
class Place:
    """A cluster: as it is described to the planner, and the engine that runs on it."""

    name: str
    cluster: Cluster | None
    engine: Callable


@contextlib.contextmanager
def places(quick: bool) -> Iterator[list[Callable[[], contextlib.AbstractContextManager[Place]]]]:
    yield [here] if quick or hosts_unavailable() else [
        here, *(lambda mbit=mbit, slow=slow: apart(mbit, slow) for mbit in (1000, 100) for slow in (False, True))
    ]  # fmt: skip


@contextlib.contextmanager
def here() -> Iterator[Place]:
    yield Place("this machine", None, LocalEngine)


@contextlib.contextmanager
def apart(mbit: float, slow: bool) -> Iterator[Place]:
    cores = [1.0, 0.25 if slow else 1.0]
    with hosts(*(Host(mbit=mbit, cores=each) for each in cores)) as running:
        described = tuple(
            Described(name=f"host{number}", cores=1, speed=each, memory=8 * 10**9, mbit=mbit, latency=1e-4)
            for number, each in enumerate(cores)
        )
        name = f"2 hosts, {mbit:g} Mbit/s" + (", one at a quarter speed" if slow else "")
        yield Place(name, Cluster(hosts=described, described=True), on_hosts(*running))


@dataclass(frozen=True)
class Run:
    """Of one plan: seconds of a step, infinite if it failed, bytes sent in one, the most memory of a role."""

    seconds: float
    sent: float = 0.0
    memory: int = 0


def measure(place: Place, name: str, prediction: Prediction) -> Run:
    """Train with the plan."""
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stderr(io.StringIO()):
        try:
            summary, _ = execute(
                place.engine, (str(JOBS), name), prediction.plan, timing_of("1000s", 30.0), runs=Path(runs), folder=None
            )
        except TricornError as error:
            print(f"{named(prediction.plan)}: {error}", file=sys.__stderr__)
            return Run(float("inf"))
        roles = {role: size for role, size in summary["peak_bytes"].items() if role != "coordinator"}
        return Run(summary["measured"]["step"], summary["bytes_sent"] / summary["steps"], max(roles.values()))


def tau(pairs: list[tuple[float, float]]) -> float:
    """Kendall's rank correlation of predicted and measured, where what differs by less than the noise is left out."""
    signs = [
        1 if (a[0] - b[0]) * (a[1] - b[1]) > 0 else -1
        for a, b in itertools.combinations(pairs, 2)
        if abs(a[1] - b[1]) > NOISE * min(a[1], b[1])
    ]
    return sum(signs) / len(signs) if signs else 1.0


def rules(found: dict[str, tuple[Prediction, float]], sparse: bool) -> dict[str, str | None]:
    """What others would choose: always one strategy, rules of thumb, arithmetic alone."""
    plans = {name: prediction.plan for name, (prediction, _) in found.items()}
    most = max(plan.workers for plan in plans.values())

    def first(fits: Callable) -> str | None:
        return next((name for name, plan in plans.items() if plan.workers == most and fits(plan)), None)

    always = {
        "always DDP": first(lambda p: p.strategy == "dp" and not p.zero and p.embeddings == "whole"),
        "always FSDP": first(lambda p: p.strategy == "dp" and p.zero == 3),
        "always PS": first(lambda p: p.strategy == "ps" and p.synchronous),
    }
    flops = min(found, key=lambda name: (found[name][0].terms["compute"], name))
    return {
        **always, "rules of thumb": always["always PS" if sparse else "always DDP"], "arithmetic only": flops,
    }  # fmt: skip


def judge(report: Report, place: Place, name: str, rounds: int, out: Path) -> dict[str, float]:
    """Predict, measure, compare; the regret of each way to choose."""
    planned = planner.plan((str(JOBS), name), cluster=place.cluster)
    ranked = [p for p in planned.ranked if exact(p.plan)]
    case = f"{name}, {place.name}"
    (out / f"{case}.json").write_text(json.dumps([p.as_dict() for p in ranked]))
    found: dict[str, tuple[Prediction, float]] = {}
    errors, sizes, memory = [], [], []
    for prediction in ranked:
        taken = [measure(place, name, prediction) for _ in range(rounds)]
        seconds = statistics.median(run.seconds for run in taken)
        label = named(prediction.plan)
        print(
            f"  {case}: {label}: predicted {1e3 * prediction.seconds:.2f} ms, measured {1e3 * seconds:.2f}",
            file=sys.stderr,
        )
        if seconds == float("inf"):
            continue
        found[label] = prediction, seconds
        errors.append(abs(prediction.seconds / seconds - 1))
        sizes.append(abs(prediction.sent - taken[0].sent) / max(taken[0].sent, 1e5))
        memory.append(prediction.fullest[1] / max(run.memory for run in taken) - 1)
        report.row(label, f"{case}: predicted", [1e3 * prediction.seconds], "ms")
        report.row(label, f"{case}: measured", [1e3 * run.seconds for run in taken], "ms")
    best = min(seconds for _, seconds in found.values())
    choices = {"planner": named(planned.best), **rules(found, bool(planned.ground.profile.tables))}
    regrets = {way: found[label][1] / best - 1 for way, label in choices.items() if label in found}
    for way, regret in regrets.items():
        report.row(way, f"{case}: slower than the best", [100 * regret], "%")
    report.row("planner", f"{case}: error of a step, median", [100 * statistics.median(errors)], "%")
    report.row("planner", f"{case}: error of a step, worst", [100 * max(errors)], "%")
    report.row("planner", f"{case}: error of bytes, median", [100 * statistics.median(sizes)], "%")
    report.row("planner", f"{case}: memory beside what was measured", [100 * each for each in memory], "%")
    report.row("planner", f"{case}: Kendall's tau", [tau([(p.score, s) for p, s in found.values()])], "")
    return regrets


def main() -> None:
    report, chosen = options("the planner's predictions and choices", cases=CASES)
    os.environ["PLANNED_STEPS"] = "80" if chosen.quick else "200"
    cases = chosen.case or (CASES[:3] if chosen.quick else CASES)
    regrets: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as out, places(chosen.quick) as listed:
        for make, name in itertools.product(listed, cases):
            with make() as place:
                for way, regret in judge(report, place, name, 1 if chosen.quick else 3, Path(out)).items():
                    regrets.setdefault(way, []).append(regret)
    means = {
        way: report.row(way, "all: mean regret", [100 * statistics.mean(all_)], "%") for way, all_ in regrets.items()
    }
    report.bar("planner: mean regret, %", means["planner"], at_most=5)
    report.bar("planner: worst regret, %", 100 * max(regrets["planner"]), at_most=15)
    taus = [row["figure"] for row in report.rows if row["case"].endswith("tau")]
    report.bar("Kendall's tau, mean", statistics.mean(taus), at_least=0.85)
    medians = [row["figure"] for row in report.rows if row["case"].endswith("step, median")]
    report.bar("error of a step, median of medians, %", statistics.median(medians), at_most=10)
    for way in [way for way in means if way != "planner"]:
        report.bar(f"mean regret of {way} less the planner's, %", means[way] - means["planner"], at_least=0)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
