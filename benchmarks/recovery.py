"""How long the training stands still when a process is killed: from `kill -9` to the next committed step."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, TRICORN, options

JOB = ROOT / "examples" / "digits.py"
PATIENCE = 30.0  # seconds; what a torchrun is counted with that does not come back, as happens
PEER = ROOT / "benchmarks" / "peers" / "ddp_digits.py"
CASES = {
    "dp, a worker": (["--strategy", "dp"], "worker-1"),
    "dp, the lead worker": (["--strategy", "dp"], "worker-0"),
    "ps, a worker": (["--strategy", "ps"], "worker-1"),
    "ps, the server": (["--strategy", "ps"], "server-0"),
    "mp, a stage": (["--strategy", "mp"], "worker-1"),
    "dp, the coordinator": (["--strategy", "dp"], "coordinator"),
}


def rows_of(run: Path) -> list[dict]:
    try:
        return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    except (FileNotFoundError, json.JSONDecodeError):
        return []


def tricorn(arguments: list[str], victim: str) -> float:
    with tempfile.TemporaryDirectory() as runs:
        run = Path(runs) / "latest"
        command = [TRICORN, "train", JOB, "--workers", "2", "--threads", "1", "--runs", runs, *arguments]
        process = subprocess.Popen(
            [*command, "--checkpoint-every", "50"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        while sum("loss" in row for row in rows_of(run)) < 110:
            assert process.poll() is None, "the run ended before it could be disturbed"
            time.sleep(0.01)
        killed = time.time()
        os.kill(json.loads((run / "roles.json").read_text())[victim], signal.SIGKILL)
        assert process.wait(60) == 0
        rows = rows_of(run)
        regrouped = max(i for i, row in enumerate(rows) if "event" in row)
        return next(row["time"] for row in rows[regrouped:] if "loss" in row) - killed


def torchrun() -> float:
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    process = subprocess.Popen(
        [*command, PEER, JOB, "4000"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline().startswith("first 0")
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        killed = time.time()
        os.kill(int(children[-1]), signal.SIGKILL)
        came_back = select.select([process.stdout], [], [], PATIENCE)[0]
        line = process.stdout.readline() if came_back else ""
        return float(line.split()[2]) - killed if line.startswith("first 1") else PATIENCE
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    report, chosen = options("kill -9 to the next committed step, two workers, digits")
    seconds: dict[str, list[float]] = {case: [] for case in CASES}
    peer: list[float] = []
    for _ in range(2 if chosen.quick else 5):
        peer.append(torchrun())
        for case, (arguments, victim) in CASES.items():
            seconds[case].append(tricorn(arguments, victim))
    report.row("torchrun + DDP", "dp, a worker (state is lost)", peer, "s")
    medians = {case: report.row("tricorn", case, figures, "s") for case, figures in seconds.items()}
    report.bar("dp, a worker", medians["dp, a worker"], at_most=1.5)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
