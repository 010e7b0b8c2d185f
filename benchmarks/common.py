"""What every benchmark shares: its options, the machine, rows and bars, and how they are printed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRICORN = Path(sys.executable).with_name("tricorn")


@dataclass
class Report:
    """Figures of one benchmark: ``rows`` (system, case, figure, unit) and ``bars`` that have to hold."""

    question: str
    quick: bool
    rows: list[dict] = field(default_factory=list)
    bars: list[dict] = field(default_factory=list)

    def row(self, system: str, case: str, figures: list[float], unit: str) -> float:
        """Record the median of the figures, with their range; returns the median."""
        median = statistics.median(figures)
        self.rows.append(
            {
                "system": system,
                "case": case,
                "figure": round(median, 4),
                "unit": unit,
                "low": round(min(figures), 4),
                "high": round(max(figures), 4),
                "runs": len(figures),
            }
        )
        return median

    def bar(self, name: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        holds = (at_least is None or value >= at_least) and (at_most is None or value <= at_most)
        bound = {"at_least": at_least} if at_least is not None else {"at_most": at_most}
        self.bars.append({"name": name, "value": round(value, 4), **bound, "holds": holds})

    def print(self, as_json: bool) -> None:
        machine = {
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "torch": version("torch"),
            "tricorn": version("tricorn"),
            "system": platform.system(),
        }
        if as_json:
            print(json.dumps({"question": self.question, "machine": machine, "rows": self.rows, "bars": self.bars}))
            return
        print(f"{self.question}\n{machine}")
        for row in self.rows:
            spread = f"({row['low']:g} to {row['high']:g}, {row['runs']} runs)"
            print(f"  {row['system']:<28} {row['case']:<34} {row['figure']:>10g} {row['unit']:<10} {spread}")
        for bar in self.bars:
            bound = f"at least {bar['at_least']:g}" if "at_least" in bar else f"at most {bar['at_most']:g}"
            print(f"  {'holds ' if bar['holds'] else 'FAILS '} {bar['name']}: {bar['value']:g}, {bound}")


def options(question: str, cases: Sequence[str] = ()) -> tuple[Report, argparse.Namespace]:
    """Read ``--quick``, ``--json`` and, where there are ``cases``, ``--case``: a list of some, or None."""
    parser = argparse.ArgumentParser(description=question)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    if cases:
        parser.add_argument("--case", action="append", choices=cases, help="only this one")
    chosen = parser.parse_args()
    return Report(question, chosen.quick), chosen
