"""How far the weights of every plan are from those of one plain PyTorch loop, relative in L2."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from common import ROOT, options

sys.path.insert(0, str(ROOT / "tests"))  # not as a package: one of what we use brings a package "tests" too

from system import harness
from system.test_numbers import PLANS

BOUNDS = {"sgd32": 1e-5, "adam32": 1e-4, "sgd64": 1e-10, "adam64": 1e-10}


def main() -> None:
    report, chosen = options("distance of the weights from one plain PyTorch loop, 56 steps of ragged batches")
    for name, bound in BOUNDS.items():
        worst = 0.0
        for plan, arguments in PLANS.items():
            if chosen.quick and "x 3" not in plan:
                continue
            with tempfile.TemporaryDirectory() as runs:
                run = harness.start(Path(runs), name, *arguments)
                run.summary()
                found = harness.distance(run.weights(name), harness.plain(name))
            report.rows.append(
                {"system": plan, "case": name, "figure": found, "unit": "", "low": found, "high": found, "runs": 1}
            )
            worst = max(worst, found)
        report.bars.append({"name": f"{name}, worst plan", "value": worst, "at_most": bound, "holds": worst <= bound})
    report.print(chosen.json)


if __name__ == "__main__":
    main()
