"""How far the memory that a plan is said to need is from the most that each kind of role has had resident.

Under ``dp`` and ``ps`` it is the planner that says it; under ``mp`` the run itself, once it has measured the stages.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path

import msgspec
from common import ROOT, TRICORN, options

from tricorn import planner
from tricorn.plan import Plan
from tricorn.planner.search import predicted

JOBS = ROOT / "benchmarks" / "jobs" / "fit.py"
CASES = ["mlp", "transformer", "towers"]
BOUND = 0.1
PLANS = {
    "dp x 1": Plan(strategy="dp", workers=1, threads=1), "dp x 2": Plan(strategy="dp", threads=1),
    "zero 1": Plan(strategy="dp", zero=1, threads=1), "zero 3": Plan(strategy="dp", zero=3, threads=1),
    "ps": Plan(strategy="ps", servers=1, threads=1), "ps x 2": Plan(strategy="ps", servers=2, threads=1),
    "pp2": Plan(strategy="mp", threads=1), "tp2": Plan(strategy="mp", tensor=2, threads=1),
}  # fmt: skip


def run(case: str, plan: Plan) -> tuple[dict[str, float], dict[str, float]]:
    """The most bytes of each kind of role, and what the run itself has said that they need."""
    with tempfile.TemporaryDirectory() as folder:
        kept = Path(folder, "plan.json")
        kept.write_bytes(msgspec.json.encode(plan))
        command = [TRICORN, "train", f"{JOBS}:{case}", "--runs", folder, "--json", "--plan", kept]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        summary = json.loads(done.stdout.splitlines()[-1])
        lines = [json.loads(line) for line in Path(folder, "latest", "metrics.jsonl").read_text().splitlines()]
    needs = next((line["needs"] for line in lines if "needs" in line), {})
    return _fullest(summary["peak_bytes"]), _fullest(needs)


def _fullest(sizes: dict[str, float]) -> dict[str, float]:
    """By kind of role, the most."""
    found: dict[str, float] = {}
    for role, size in sizes.items():
        kind = role.split("-")[0].split(" ")[0].replace("stage", "worker")
        found[kind] = max(found.get(kind, 0.0), size)
    return found


def main() -> None:
    report, chosen = options("memory that plans are said to need, beside the peak of resident bytes", CASES)
    for case in chosen.case or CASES:
        ground = planner.plan((str(JOBS), case), {"workers": 2, "strategy": "dp"}).ground
        worst = 0.0
        for name, plan in PLANS.items():
            peaks, needs = run(case, plan)
            said = needs or _fullest(predicted(plan, ground).memory)
            for kind in sorted(said):
                report.row(f"{name}, {kind}", f"{case}: said", [said[kind] / 1e6], "MB")
                report.row(f"{name}, {kind}", f"{case}: measured", [peaks[kind] / 1e6], "MB")
                worst = max(worst, abs(said[kind] / peaks[kind] - 1))
        report.bar(f"{case}, worst difference", worst, at_most=BOUND)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
