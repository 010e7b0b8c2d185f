"""The cut that is chosen from measurements of single blocks, beside the best of all cuts when each is measured.

Random uneven MLPs of seven layers, 1F1B with four microbatches, one thread a worker, two and three stages on one host;
of three stages on two cores two share one, which the choice knows of. Every cut is tried for a few steps, all in turn.
Then the chosen one and those that looked best are timed for longer, in turn again: every second step says which is the
best, and the others what it takes. And the chosen cut is timed a second time, in a pipeline built anew: how far the two
are apart is what the measurement itself is worth, and no single model can be judged more closely than that.
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median

from common import ROOT, options

RANK = ROOT / "benchmarks" / "jobs" / "cut_rank.py"
CASES = {
    f"{stages} stages, models {at} to {at + 4}": (stages, at, at + 5) for stages in (2, 3) for at in range(0, 20, 5)
}


def measured(stages: int, start: int, stop: int) -> list[list]:
    ranks = [
        subprocess.Popen(
            [sys.executable, RANK, *map(str, (rank, stages, start, stop))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(stages)
    ]
    addresses = json.dumps([json.loads(rank.stdout.readline()) for rank in ranks]) + "\n"
    for rank in ranks:
        rank.stdin.write(addresses)
        rank.stdin.flush()
    output, *_ = [rank.communicate()[0] for rank in ranks]
    return [json.loads(line) for line in output.splitlines()]


def main() -> None:
    report, chosen = options("Is the chosen cut the best?", CASES)
    for case in chosen.case or CASES:
        stages, start, stop = CASES[case]
        rows = measured(stages, start, start + 3 if report.quick else stop)
        ratios = [ours / best for _, _, ours, best, _, _ in rows]
        report.row("chosen", case, [row[2] for row in rows], "ms")
        report.row("best of all", case, [row[3] for row in rows], "ms")
        report.row("worst of all", case, [row[5] for row in rows], "ms")
        report.row("chosen / best", case, ratios, "times")
        again = [row[2] / row[4] for row in rows]
        report.row("chosen / the same again", case, again, "times")
        report.row("apart from the same again", case, [abs(ratio - 1) for ratio in again], "share")
        report.row("the same cut", case, [float(row[0] == row[1]) for row in rows], "share")
        report.bar(f"chosen / best, {case}, median", median(ratios), at_most=1.05)
        report.bar(f"chosen / best, {case}, worst", max(ratios), at_most=1.05)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
