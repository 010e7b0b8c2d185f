"""The cut that is chosen from measurements of single blocks, beside the best of all cuts when each is measured.

Random uneven MLPs of seven layers, 1F1B with four microbatches, one thread a worker, two and three stages on one host.
Every cut is tried for a few steps; then the chosen one and the best of them are timed again in turn, because the best
of many short looks is partly luck.
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median

from common import ROOT, options

RANK = ROOT / "benchmarks" / "jobs" / "cut_rank.py"
RANKS = 3


def measured(models: int) -> list[list]:
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, str(rank), str(models)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    addresses = json.dumps([json.loads(rank.stdout.readline()) for rank in ranks]) + "\n"
    for rank in ranks:
        rank.stdin.write(addresses)
        rank.stdin.flush()
    output, *_ = [rank.communicate()[0] for rank in ranks]
    return [json.loads(line) for line in output.splitlines()]


def main() -> None:
    report, chosen = options("Is the chosen cut the best?")
    rows = measured(4 if report.quick else 20)
    for stages in (2, 3):
        of = [row for row in rows if row[1] == stages]
        ratios = [ours / best for _, _, _, _, ours, best, _, _ in of]
        case = f"{stages} stages, {len(of)} models"
        report.row("chosen", case, [row[4] for row in of], "ms")
        report.row("best of all", case, [row[5] for row in of], "ms")
        report.row("worst of all", case, [row[7] for row in of], "ms")
        report.row("chosen / best", case, ratios, "times")
        report.row("the same cut", case, [float(row[2] == row[3]) for row in of], "share")
        report.bar(f"chosen / best, {stages} stages, median", median(ratios), at_most=1.05)
        report.bar(f"chosen / best, {stages} stages, worst", max(ratios), at_most=1.05)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
