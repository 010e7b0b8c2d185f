"""Does the planner predict, and choose, rightly? Predictions are written down first; then every plan is measured.

For four jobs that its equations were not made for, on clusters of one to four hosts. A piece is one job on one cluster
(``--case mlp --cluster 2-100``). The planner looks at the hosts and tries some plans, as it does for whoever has them;
its predictions are written into a file of their own, and beside them those for hosts that are only described. Then
plan after plan is measured until ``--minutes`` are over, and those that turn out to be the fastest nine times more, by
turns; called again, it goes on where it was. ``--summary`` says what all pieces came to. Without any of these all jobs
are measured on the usual clusters, which takes hours.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from common import ROOT, Report
from pace import Pace
from planner_judged import SLOW, SPARSE, Case, Run, baselines
from planner_places import EVERY, SOME, SPEEDS, Place, described, place

from tricorn import planner
from tricorn.errors import TricornError
from tricorn.plan import Plan
from tricorn.planner.explain import named
from tricorn.planner.prediction import Prediction
from tricorn.planner.search import exact
from tricorn.run import execute, timing_of
from tricorn.testing.hosts import hosts_unavailable
from tricorn.trials import Trials

JOBS = ROOT / "benchmarks" / "jobs" / "planned.py"
CASES = ("mlp", "cnn", "transformer", "recommender")
TRIED_STEPS = 4000  # of a trial, of which it makes as many as it wants
SECONDS = 1.2  # that the steps of a run should take together
STEPS = range(10, 401, 5)  # of a run: whole epochs, of which workers do not count the first five steps
SLOW_MBIT = 200.0
FIRST = 5  # of the planner's plans, and what others would choose: measured before the rest
GROUP = 8  # plans whose runs are interleaved
CLOSE, CLOSING = 1.2, 9  # plans that take so many times as long as the fastest at most are run so often at the end


def key_of(plan: Plan) -> str:
    return msgspec.json.encode(plan).decode()


def predict(case: str, cluster: str, where: Place, file: Path) -> dict:
    """What the planner says of the case, from the file if it has said it before; with measurements of its own."""
    if not file.exists():
        job = str(JOBS), f"{case}@{TRIED_STEPS}"
        with _cache(file.parent / "cache"), Pace() as pace:
            stated = planner.plan((str(JOBS), case), where.given, cluster=described(cluster), told=_tell)
            with Trials(job, where.engine) as trial:
                found = planner.plan((str(JOBS), case), where.given, places=where.hosts, trial=trial, told=_tell)
        mbit = SPEEDS.get(cluster.split("-")[1]) if "-" in cluster else None
        traits = [SPARSE] * bool(found.ground.profile.tables) + [SLOW] * (mbit is not None and mbit < SLOW_MBIT)
        said = {
            "case": case, "cluster": cluster, "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "chosen": key_of(found.best), "traits": traits, "tried": [key_of(plan) for plan in found.planning.tried],
            "predictions": [each.as_dict() for each in found.ranked],
            "stated": {key_of(each.plan): each.seconds for each in stated.ranked} if where.hosts else {},
            "rejected": Counter(each.reason for each in found.rejected), "pace": pace.seconds,
        }  # fmt: skip
        file.write_text(json.dumps(said))
    return json.loads(file.read_text())


def _tell(text: str) -> None:
    print(f"{text} ...", file=sys.stderr)


def predictions_of(said: dict) -> dict[str, Prediction]:
    """By plan, the best first."""
    found = [msgspec.convert(each, Prediction) for each in said["predictions"]]
    return {key_of(each.plan): each for each in found}


def order(predictions: dict[str, Prediction], said: dict) -> tuple[list[str], list[str]]:
    """The plans that decide, and all others: by chance, those that train as one process would first."""
    able = [key for key, each in predictions.items() if exact(each.plan)]
    others = [key for key in baselines(predictions, said["traits"]).values() if key]
    first = list(dict.fromkeys([said["chosen"], *able[:FIRST], *others]))
    rest = [key for key in predictions if key not in first]
    random.Random(0).shuffle(rest)
    return first, sorted(rest, key=lambda key: not exact(predictions[key].plan))


def todo(
    groups: Sequence[Sequence[str]], chosen: str, steps: dict[str, int], rounds: int, runs: list[Run]
) -> Iterator[tuple[str, int, bool]]:
    """(plan, steps, whether it closes) of each run that is left: rounds interleaved, the second of them twice as long.

    What choices come to is decided at the end, between the chosen plan and those that were the fastest, all at the same
    time: cores are now faster and now slower, by what other machines do on the same hardware.
    """
    for group in groups:
        for key, number in _rounds(group, rounds, runs):
            yield key, steps[key] * (2 if number == 1 else 1), False
    if rounds > 2:
        closing = list(dict.fromkeys([chosen, *closest(runs)]))
        for key, _ in _rounds(closing, CLOSING, runs, closing=True):
            yield key, steps[key], True


def _rounds(group: Sequence[str], rounds: int, runs: list[Run], *, closing: bool = False) -> Iterator[tuple[str, int]]:
    for number in range(rounds):
        for key in group:
            if sum(run.plan == key and run.closing == closing for run in runs) <= number:
                yield key, number


def closest(runs: Sequence[Run]) -> list[str]:
    """The plans, of those that train as one process would, that came close to the fastest."""
    taken: dict[str, list[float]] = {}
    for run in runs:
        if not run.closing:
            taken.setdefault(run.plan, []).append(run.seconds)
    medians = {
        key: statistics.median(found)
        for key, found in taken.items() if exact(msgspec.json.decode(key, type=Plan))
    }  # fmt: skip
    return [key for key, seconds in medians.items() if seconds <= CLOSE * min(medians.values())]


def measure(where: Place, case: str, plan: Plan, steps: int, *, closing: bool) -> Run:
    """Train with the plan; a failure is a run that takes for ever."""
    before = where.traffic()
    with (
        Pace() as pace,
        tempfile.TemporaryDirectory() as runs,
        contextlib.redirect_stderr(io.StringIO()),
        _cache(Path(runs, "cache")),
    ):
        try:
            timing = timing_of("1000s", 30.0)
            job = (str(JOBS), f"{case}@{steps}")
            summary, _ = execute(where.engine, job, plan, timing, runs=Path(runs), folder=None)
        except TricornError as error:
            return Run(plan=key_of(plan), steps=steps, closing=closing, error=str(error))
    over = [max(now - old for now, old in zip(after, before[host], strict=True))
            for host, after in where.traffic().items()]  # fmt: skip
    return Run(
        plan=key_of(plan), steps=steps, closing=closing, seconds=summary["measured"]["step"], pace=pace.seconds,
        link=max(over, default=0),
        memory=max(size for role, size in summary["peak_bytes"].items() if role != "coordinator"),
    )  # fmt: skip


@contextlib.contextmanager
def _cache(folder: Path) -> Iterator[None]:
    """What is measured is kept there: predictions must not learn from the runs that they are held against."""
    old = os.environ.get("TRICORN_CACHE")
    os.environ["TRICORN_CACHE"] = str(folder)
    try:
        yield
    finally:
        os.environ.pop("TRICORN_CACHE")
        if old is not None:
            os.environ["TRICORN_CACHE"] = old


def piece(case: str, cluster: str, out: Path, *, rounds: int, minutes: float, quick: bool) -> None:
    """Predict, then measure until time is up or everything is measured."""
    until = time.monotonic() + 60 * minutes
    results = out / "results.jsonl"
    with place(cluster, (str(JOBS), case)) as where:
        said = predict(case, cluster, where, out / f"{case}@{cluster}.json")
        predictions = predictions_of(said)
        first, rest = order(predictions, said)
        rest = [] if quick else rest
        groups = [first, *(rest[start : start + GROUP] for start in range(0, len(rest), GROUP))]
        steps = {key: _steps(predictions[key].seconds) for key in predictions}
        runs = [run for run in runs_of(results, case, cluster) if run.plan in predictions]
        for key, count, closing in todo(groups, said["chosen"], steps, rounds, runs):
            if time.monotonic() + predictions[key].seconds * count > until:
                print(f"{case} on {cluster}: to be gone on with", file=sys.stderr)
                return
            run = measure(where, case, predictions[key].plan, count, closing=closing)
            runs.append(run)
            with results.open("a") as file:
                file.write(json.dumps({"case": case, "cluster": cluster, **vars(run)}) + "\n")
            print(
                f"{case} on {cluster}: {named(predictions[key].plan)}: predicted {1e3 * predictions[key].seconds:.2f} "
                f"ms, {run.error or f'measured {1e3 * run.seconds:.2f}'}",
                file=sys.stderr,
            )


def _steps(seconds: float) -> int:
    wanted = STEPS.step * math.ceil(SECONDS / seconds / STEPS.step)
    return min(max(wanted, STEPS[0]), STEPS[-1])


def runs_of(results: Path, case: str, cluster: str) -> list[Run]:
    """All that were measured of the case."""
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    return [
        Run(**{key: value for key, value in row.items() if key not in ("case", "cluster")})
        for row in rows
        if (row["case"], row["cluster"]) == (case, cluster)
    ]


def cases_in(out: Path) -> Iterator[tuple[str, Case]]:
    """Every piece of which something was measured."""
    for file in sorted(out.glob("*@*.json")):
        said = json.loads(file.read_text())
        if runs := runs_of(out / "results.jsonl", said["case"], said["cluster"]):
            predictions = predictions_of(said)
            case = Case(
                predictions, said["chosen"], said["traits"], [run for run in runs if run.plan in predictions],
                tried=said["tried"], stated=said["stated"], pace=said["pace"],
            )  # fmt: skip
            if case.exact:
                yield f"{said['case']} on {said['cluster']}", case


def judge(report: Report, cases: dict[str, Case]) -> None:
    """A row for each figure of each case, the same of all of them, and the bars."""
    regrets: dict[str, list[float]] = {}
    best = min(run.pace for case in cases.values() for run in case.runs if run.pace)
    for name, case in cases.items():
        plans = [*case.measured.values()]
        report.row(name, "plans measured, of those that can run", [len(plans)], f"of {len(case.predictions)}")
        report.row(name, "noise: range of three runs of a plan", [100 * case.noise], "%")
        slow = [run.pace / best for run in case.runs if run.pace]
        report.row(name, "noise: how slow cores were, of their best", slow, "times")
        _spread(report, name, "error of a step", [100 * abs(each.time_error) for each in plans])
        report.row(name, "error of memory, signed", [100 * each.memory_error for each in plans], "%")
        if errors := [100 * each.link_error for each in plans if each.link_error is not None and each.runs[0].link]:
            _spread(report, name, "error of bytes on the busiest link", errors)
        report.row(name, "Kendall's tau", [case.tau()], "")
        report.row(name, "false fits", [case.false_fits()[0]], f"of {case.false_fits()[1]}")
        report.row(name, "plans that failed", [len(case.failed)], "")
        for way, regret in case.regrets().items():
            regrets.setdefault(way, []).append(regret)
            if regret < float("inf"):
                report.row(name, f"regret of {way}", [100 * regret], "%")
    everything = [each for case in cases.values() for each in case.measured.values()]
    _spread(report, "all", "error of a step", [100 * abs(each.time_error) for each in everything])
    for what, chosen in (("tried", True), ("not tried", False)):
        if errors := [
            100 * abs(each.time_error)
            for case in cases.values() for key, each in case.measured.items() if (key in case.tried) == chosen
        ]:  # fmt: skip
            _spread(report, "all", f"error of a step, plans that the planner had {what}", errors)
    paced = [abs(error) for case in cases.values() for error in case.paced_errors()]
    _spread(report, "all", "error of a step, had cores been as fast as while it was planned", [100 * e for e in paced])
    if stated := [100 * abs(error) for case in cases.values() for error in case.stated_errors()]:
        _spread(report, "all", "error of a step, hosts only described", stated)
    report.row("all", "error of memory, signed", [100 * each.memory_error for each in everything], "%")
    for way, found in regrets.items():
        able = [100 * regret for regret in found if regret < float("inf")]
        if len(able) < len(found):
            report.row("all", f"cases in which {way} has a plan that runs", [len(able)], f"of {len(found)}")
        if able:
            report.row("all", f"mean regret of {way}", [statistics.mean(able)], "%")
    _bars(report, cases, regrets)


def _bars(report: Report, cases: dict[str, Case], regrets: dict[str, list[float]]) -> None:
    everything = [each for case in cases.values() for each in case.measured.values()]
    own = statistics.mean(regrets["planner"])
    report.bar("mean regret, %", 100 * own, at_most=5)
    report.bar("worst regret, %", 100 * max(regrets["planner"]), at_most=15)
    report.bar("Kendall's tau, mean", statistics.mean(case.tau() for case in cases.values()), at_least=0.85)
    report.bar(
        "error of a step, median, %", 100 * statistics.median(abs(each.time_error) for each in everything), at_most=10
    )
    links = [each.link_error for each in everything if each.link_error is not None and each.runs[0].link]
    if links:
        report.bar("error of bytes, nine of ten plans, %", 100 * _percentile(links, 0.9), at_most=2)
    report.bar("false fits", sum(case.false_fits()[0] for case in cases.values()), at_most=0)
    report.bar("plans that failed", sum(len(case.failed) for case in cases.values()), at_most=0)
    for way, found in regrets.items():
        able = [regret for regret in found if regret < float("inf")]
        if way != "planner" and able:  # to have no plan at all counts nothing here, which is kind
            others = statistics.mean(able)
            report.bar(f"mean regret of {way}, beyond the planner's, %", 100 * (others - own), at_least=0.01)


def _spread(report: Report, name: str, what: str, errors: list[float]) -> None:
    report.row(name, f"{what}, median", errors, "%")
    report.row(name, f"{what}, nine of ten", [_percentile(errors, 0.9)], "%")


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[math.ceil(share * len(values)) - 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="only this job")
    parser.add_argument("--cluster", action="append", choices=EVERY, help=f"only on this; usual are {', '.join(SOME)}")
    parser.add_argument("--minutes", type=float, default=9.0, help="that a piece may take [9]")
    parser.add_argument("--summary", action="store_true", help="measure nothing, say what there is")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "planner", help="where predictions and runs are")
    parser.add_argument("--quick", action="store_true", help="only the planner's first plans and the baselines', twice")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    clusters = chosen.cluster or (("1",) if hosts_unavailable() else SOME)
    if not chosen.summary:
        for cluster in clusters:
            for case in chosen.case or CASES:
                piece(case, cluster, chosen.out, rounds=2 if chosen.quick else 3, minutes=chosen.minutes,
                      quick=chosen.quick)  # fmt: skip
    report = Report("the planner's predictions and choices", chosen.quick)
    cases = dict(cases_in(chosen.out))
    if not cases:
        raise SystemExit("nothing was measured yet: give no --summary")
    judge(report, cases)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
