"""The recommendation of examples/movies.py, real ratings, in every mode of the parameter server: its error on ratings
that were held out, beside that of one process.
"""

from __future__ import annotations

import sys
import tempfile

from common import ROOT, options

sys.path.insert(0, str(ROOT / "examples"))

import movies

import tricorn
from tricorn.plan import Options, Plan

MODES: dict[str, Options] = {
    "bsp": {}, "ssp(3)": {"consistency": "ssp"}, "asp": {"consistency": "asp"},
    "hybrid (rows asp)": {"sparse_consistency": "asp"},
}  # fmt: skip
ERROR, APART = 0.90, 0.005


def error(plan: Plan) -> float:
    """The root of the mean squared error, in stars."""
    with tempfile.TemporaryDirectory() as runs:
        summary = tricorn.train(movies.job, plan=plan, runs=runs).summary
    assert summary["exactly_once"], summary
    return summary["metrics"]["squared_error"] ** 0.5


def main() -> None:
    report, chosen = options("held-out error of movie ratings in every mode, two workers", list(MODES))
    plans = {"one process": Plan(strategy="dp", workers=1, threads=1)} | {
        name: Plan(strategy="ps", workers=2, servers=1, threads=1, **MODES[name]) for name in chosen.case or MODES
    }
    errors: dict[str, list[float]] = {name: [] for name in plans}
    for _ in range(1 if report.quick else 3):
        for name, plan in plans.items():
            errors[name].append(error(plan))
            print(name, errors[name][-1], file=sys.stderr, flush=True)
    for name, found in errors.items():
        report.row(name, "RMSE", found, "stars")
        report.bar(f"{name}, highest RMSE", max(found), at_most=ERROR)
    alone = errors.pop("one process")
    for name, found in errors.items():
        furthest = max(abs(mine - its) for mine, its in zip(found, alone, strict=True))
        report.bar(f"{name}, furthest from one process", furthest, at_most=APART)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
