"""What a step brings over the link of a server, frames and all: with gradients encoded, and how much quality that
costs; and of tables ten times as large, whose bytes follow the different ids of a batch.

Workers and the server are each on a host of their own. Only gradients are encoded, which go to the server: what is read
travels as it is.
"""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from common import ROOT, Report, options
from ps_quality import JOB, auc

from tricorn.data.order import Permutation
from tricorn.engine.hosts import on_hosts
from tricorn.job import Job
from tricorn.plan import Options, Plan
from tricorn.run import execute, timing_of
from tricorn.testing.hosts import Host, RunningHost, hosts, hosts_unavailable
from tricorn.testing.network import Traffic

WIDE = ROOT / "benchmarks" / "jobs" / "wide.py"
CASES = ("encodings", "tables")
PLAIN = "none"
ENCODINGS: dict[str, tuple[Options, float]] = {  # and the most of the bytes to the server, ids and all, that is left
    PLAIN: ({}, 1.0),
    "bf16": ({"compress": "bf16"}, 0.65),
    "fp16": ({"compress": "fp16"}, 0.65),
    "int8": ({"compress": "int8"}, 0.45),
    "top-k, rows int8": ({"compress": "topk", "compress_tables": {"rows": "int8"}}, 0.45),
}
LOST = 0.003  # of the area under the ROC curve
ROW_ID = 8


def train(places: Sequence[RunningHost], job: tuple[str, str], runs: Path, **how: object) -> tuple[Traffic, Path]:
    """Bytes of a step that left the server and that came to it, and the folder of a run: the last host is the server's.

    All but it have a worker each.
    """
    before = places[-1].traffic()
    plan = Plan(strategy="ps", workers=len(places) - 1, servers=1, threads=1, **how)
    with contextlib.redirect_stderr(io.StringIO()):
        summary, folder = execute(on_hosts(*places), job, plan, timing_of("1000s", 30.0), runs=runs, folder=None)
    assert summary["exactly_once"], summary
    after, steps = places[-1].traffic(), summary["steps"]
    return Traffic((after.sent - before.sent) / steps, (after.received - before.received) / steps), folder


def encodings(report: Report, runs: Path) -> None:
    """The click-through model of ps_quality.py, two asynchronous workers."""
    os.environ["CLICKS_SAMPLES"] = "100000" if report.quick else "400000"
    steps: dict[str, list[Traffic]] = {name: [] for name in ENCODINGS}
    areas: dict[str, list[float]] = {name: [] for name in ENCODINGS}
    with hosts(Host(), Host(), Host()) as places:
        for _ in range(1 if report.quick else 3):
            for name, (how, _) in ENCODINGS.items():
                traffic, folder = train(places, (str(JOB), "job"), runs, consistency="asp", **how)
                steps[name].append(traffic)
                areas[name].append(auc(folder))
                print(name, areas[name][-1], traffic, file=sys.stderr, flush=True)
    up = {}
    for name, found in steps.items():
        up[name] = report.row(f"asp, {name}", "to the server, a step", [each.received / 1e3 for each in found], "kB")
        report.row(f"asp, {name}", "from the server, a step", [each.sent / 1e3 for each in found], "kB")
        report.row(f"asp, {name}", "AUC", areas[name], "")
    for name, (_, most) in ENCODINGS.items():
        if name != PLAIN:
            report.bar(f"to the server, {name} / {PLAIN}", up[name] / up[PLAIN], at_most=most)
            lost = statistics.median(areas[PLAIN]) - statistics.median(areas[name])
            report.bar(f"AUC lost by {name}", lost, at_most=LOST)


def tables(report: Report, runs: Path) -> None:
    """Of two sizes, and two batch sizes."""
    sys.path.insert(0, str(WIDE.parent))
    import wide

    width, each = 4 * wide.DIM, {}
    with hosts(Host(), Host()) as places:
        for batch_size in (512, 2048):
            for name, rows in (("100k", 100_000), ("1m", 1_000_000)):
                entry = f"rows_{name}_batch_{batch_size}"
                traffic, _ = train(places, (str(WIDE), entry), runs)
                found, ids = sum(traffic), different(getattr(wide, entry))
                case = f"{rows:,} x {wide.DIM}, batches of {batch_size}"
                report.row("tricorn", f"{case}: a step", [found / 1e3], "kB")
                report.row("tricorn", f"{case}: different ids of a batch", [ids], "")
                each[case] = report.row("tricorn", f"{case}: for each of these", [found / ids], "bytes")
    due = ROW_ID + 2 * width
    report.bar("bytes for each different id / id, row and gradient, most", max(each.values()) / due, at_most=1.05)
    report.bar("bytes for each different id, most / least", max(each.values()) / min(each.values()), at_most=1.05)
    report.bar(f"bytes of a step / of the table of {case}", found / (rows * width), at_most=0.05)


def different(job: Job) -> float:
    """How many different ids a batch has, on average."""
    source, size = job.train, job.batch_size
    order = Permutation(job.seed, 0, source.fingerprint, len(source)).ids(0, len(source))
    return float(np.mean([len(source.fetch(part)[0].unique()) for part in order.reshape(-1, size)]))


def main() -> None:
    report, chosen = options("bytes of a step over the link of a parameter server", CASES)
    if reason := hosts_unavailable():
        raise SystemExit(f"hosts are not available: {reason}")
    for case in chosen.case or CASES:
        with tempfile.TemporaryDirectory() as runs:
            {"encodings": encodings, "tables": tables}[case](report, Path(runs))
    report.print(chosen.json)


if __name__ == "__main__":
    main()
