"""Does the simulator say what runs then take, and is it fast enough for thousands of workers?

Runs of the digits with two workers beside what was simulated of them, and the interval of the prediction; and 10,000
workers on a described cluster, with stalls and failures.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, Report, options

from tricorn import planner
from tricorn.engine.local import LocalEngine
from tricorn.plan import Plan
from tricorn.planner.cluster import Cluster, Host
from tricorn.planner.explain import named
from tricorn.planner.ground import Ground
from tricorn.planner.prediction import Prediction
from tricorn.planner.search import predicted
from tricorn.planner.simulation import simulate
from tricorn.run import execute, timing_of

JOB = (str(ROOT / "examples" / "digits.py"), "job")
HERE = (
    Plan(strategy="dp", workers=2),
    Plan(strategy="ps", workers=2, servers=1),
    Plan(strategy="ps", workers=2, servers=1, consistency="asp"),
    Plan(strategy="mp", workers=2, microbatches=4),
)
THERE = (
    Plan(strategy="dp", workers=10_000),
    Plan(strategy="ps", workers=9_900, servers=100),
    Plan(strategy="ps", workers=9_900, servers=100, consistency="ssp"),
)
STEPS = 200


def measured(plan: Plan) -> float:
    """Seconds of a step of a run."""
    with tempfile.TemporaryDirectory() as runs, contextlib.redirect_stderr(io.StringIO()):
        summary, _ = execute(LocalEngine, JOB, plan, timing_of("1000s", 30.0), runs=Path(runs), folder=None)
    return float(summary["measured"]["step"])


def beside_runs(report: Report, ground: Ground, rounds: int) -> None:
    inside = 0
    for plan in HERE:
        prediction = predicted(plan, ground)
        assert isinstance(prediction, Prediction)
        found = simulate(plan, ground, steps=STEPS)
        taken = [measured(plan) for _ in range(rounds)]
        report.row(named(plan), "predicted", [1e3 * prediction.seconds], "ms")
        report.row(named(plan), "simulated, mean", [1e3 * found.mean], "ms")
        report.row(named(plan), "simulated, 90th percentile", [1e3 * found.p90], "ms")
        seconds = report.row(named(plan), "measured", [1e3 * each for each in taken], "ms")
        inside += 1e3 * prediction.low <= seconds <= 1e3 * prediction.high
    report.bar("runs whose step is within the prediction's interval", inside, at_least=len(HERE))


def beyond(report: Report, ground: Ground, steps: int) -> None:
    host = Host(name="h", cores=2, memory=8 * 10**9, mbit=10_000, latency=1e-4, stalls=0.001, failures_per_day=0.1)
    far = Ground(ground.profile, ground.links, Cluster(hosts=(host,) * 10_000, described=True))
    longest = 0.0
    for plan in THERE:
        began = time.perf_counter()
        simulate(plan, far, steps=steps)
        seconds = report.row(named(plan), f"{steps} steps simulated in", [time.perf_counter() - began], "s")
        longest = max(longest, seconds)
    report.bar("10,000 workers simulated, seconds", longest, at_most=60)


def main() -> None:
    report, chosen = options("the simulator beside runs, and its speed", cases=("runs", "many"))
    ground = planner.plan(JOB, told=lambda text: print(text, file=sys.stderr)).ground
    cases = chosen.case or ("runs", "many")
    if "runs" in cases:
        beside_runs(report, ground, 1 if chosen.quick else 3)
    if "many" in cases:
        beyond(report, ground, 20 if chosen.quick else STEPS)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
