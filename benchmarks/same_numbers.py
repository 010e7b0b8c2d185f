"""How far from those of one plain PyTorch loop the weights of every plan are, relative in L2.

The matrix: models of four kinds under every plan, workers and servers as threads, 20 steps. And runs of the command
line with a perceptron, 56 steps.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import ROOT, Report, options

sys.path.insert(0, str(ROOT / "tests"))  # not as a package: one of what we use brings a package "tests" too

import torch
from system import harness, matrix
from system.test_numbers import PLANS

JOBS = {"sgd32": 1e-5, "adam32": 1e-4, "sgd64": 1e-10, "adam64": 1e-10}
PROCESSES = "processes"
QUICK = ("pp3", "tp3", "dp2 x pp2", "ps+dp")


def fill(report: Report, models: list[str]) -> None:
    """The matrix, which is printed; its rows have the worst, the best and the number of models."""
    found: dict[tuple[str, str, str], list[float]] = {}
    print(f"{'':16}", *(f"{model:36}" for model in models), file=sys.stderr)
    print(f"{'':16}", f"{' '.join(f'{o[:4]} {p[5:]}' for o, p in matrix.BOUNDS):36} " * len(models), file=sys.stderr)
    for plan in QUICK if report.quick else matrix.PLANS:
        cells = []
        for model in models:
            if reason := matrix.refusal(model, plan):
                cells.append(f"{reason[:34]:36}")
                continue
            numbers = []
            for number in matrix.BOUNDS:
                with tempfile.TemporaryDirectory() as folder:
                    numbers.append(matrix.apart(model, plan, *number, Path(folder)))
                found.setdefault((plan, *number), []).append(numbers[-1])
            cells.append(f"{' '.join(f'{number:.1e}' for number in numbers):36}")
        print(f"{plan:16}", *cells, file=sys.stderr)
    for number, bound in matrix.BOUNDS.items():
        case, worst = " ".join(number), 0.0
        for (plan, *of), numbers in found.items():
            if tuple(of) == number:
                record(report, plan, f"{case}, worst model", numbers)
                worst = max(worst, *numbers)
        bar(report, f"matrix, {case}", worst, bound)


def run(report: Report) -> None:
    """Real processes."""
    for name, bound in JOBS.items():
        worst = 0.0
        for plan, arguments in PLANS.items():
            if report.quick and "x 3" not in plan:
                continue
            with tempfile.TemporaryDirectory() as runs:
                started = harness.start(Path(runs), name, *arguments)
                started.summary()
                found = harness.distance(started.weights(name), harness.plain(name))
            record(report, plan, name, [found])
            worst = max(worst, found)
        bar(report, f"{name}, worst plan", worst, bound)


def record(report: Report, system: str, case: str, found: list[float]) -> None:
    row = {"figure": max(found), "unit": "", "low": min(found), "high": max(found), "runs": len(found)}
    report.rows.append({"system": system, "case": case, **row})


def bar(report: Report, name: str, worst: float, bound: float) -> None:
    report.bars.append({"name": name, "value": worst, "at_most": bound, "holds": worst <= bound})


def main() -> None:
    cases = [*matrix.MODELS, PROCESSES]
    report, chosen = options("distance of the weights from one plain PyTorch loop", cases)
    torch.set_num_threads(1)
    wanted = chosen.case or cases
    if models := [model for model in matrix.MODELS if model in wanted]:
        fill(report, models)
    if PROCESSES in wanted:
        run(report)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
