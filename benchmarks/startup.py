"""How long from the launch to the first step: Tricorn and torchrun, two workers, the digits. And how long to plan."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, TRICORN, options

JOB = ROOT / "examples" / "digits.py"
PLANNED = ("digits", "prose", "movies")
PEER = ROOT / "benchmarks" / "peers" / "ddp_digits.py"


def tricorn(strategy: str) -> float:
    with tempfile.TemporaryDirectory() as runs:
        command = [TRICORN, "train", JOB, "--strategy", strategy, "--workers", "2", "--threads", "1", "--runs", runs]
        began = time.time()
        subprocess.run(command, check=True, capture_output=True)
        rows = (Path(runs) / "latest" / "metrics.jsonl").read_text().splitlines()
        return next(row["time"] for row in map(json.loads, rows) if row.get("step") == 0 and "loss" in row) - began


def torchrun() -> float:
    command = [Path(sys.executable).with_name("torchrun"), "--standalone", "--nproc-per-node=2", PEER, JOB, "20"]
    began = time.time()
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(next(line for line in output.splitlines() if line.startswith("first")).split()[2]) - began


def planning(name: str, cache: str) -> float:
    """Seconds of ``tricorn plan``, which finds in the cache what was measured before."""
    began = time.time()
    command = [TRICORN, "plan", ROOT / "examples" / f"{name}.py"]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | {"TRICORN_CACHE": cache})
    return time.time() - began


def main() -> None:
    report, chosen = options("launch to first step, two workers, digits")
    systems = {"torchrun + DDP": torchrun} | {f"tricorn {s}": lambda s=s: tricorn(s) for s in ("dp", "ps", "mp")}
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    for _ in range(2 if chosen.quick else 5):
        for name, launch in systems.items():
            seconds[name].append(launch())
    first = {name: report.row(name, "launch to first step", figures, "s") for name, figures in seconds.items()}
    report.bar("tricorn dp / torchrun", first["tricorn dp"] / first["torchrun + DDP"], at_most=1.0)
    cold: dict[str, list[float]] = {name: [] for name in PLANNED}
    warm: dict[str, list[float]] = {name: [] for name in PLANNED}
    for _ in range(1 if chosen.quick else 3):
        for name in PLANNED:
            with tempfile.TemporaryDirectory() as cache:
                cold[name].append(planning(name, cache))
                warm[name].append(planning(name, cache))
    for what, found, most in (("nothing measured before", cold, 20.0), ("all measured before", warm, 2.0)):
        medians = [report.row(f"tricorn plan, {what}", name, seconds, "s") for name, seconds in found.items()]
        report.bar(f"seconds to plan, {what}, the slowest", max(medians), at_most=most)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
