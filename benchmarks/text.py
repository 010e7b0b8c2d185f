"""The language model of examples/text.py under every kind of plan: its held-out loss, beside a bigram model's.

All plans follow one trajectory, so that the loss is the same; in float64 to many digits.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import replace

from common import ROOT, options

sys.path.insert(0, str(ROOT / "examples"))

import text

import tricorn
from tricorn.plan import Plan

PLANS = {
    "single": Plan(strategy="dp", workers=1, threads=2), "dp2": Plan(strategy="dp", threads=1),
    "pp2": Plan(strategy="mp", threads=1), "tp2": Plan(strategy="mp", tensor=2, threads=1),
    "dp2 x pp2": Plan(strategy="mp", workers=4, replicas=2, threads=1),
}  # fmt: skip
APART = 1e-9  # relative, of losses in float64


def main() -> None:
    report, chosen = options("held-out loss of the language model under every plan, float64", list(PLANS))
    bigram = text.bigram_loss()
    report.row("bigram model", "held-out loss", [bigram], "nats")
    job = replace(text.job, precision="float64", epochs=1 if report.quick else 3)
    losses = []
    for name in chosen.case or PLANS:
        with tempfile.TemporaryDirectory() as runs:
            summary = tricorn.train(job, plan=PLANS[name], runs=runs).summary
        losses.append(summary["metrics"]["loss"])
        report.row(name, "held-out loss", losses[-1:], "nats")
        report.row(name, "samples a second", [summary["samples_per_second"]], "")
        print(name, losses[-1], file=sys.stderr, flush=True)
    report.bar("largest relative difference of losses", max(losses) / min(losses) - 1, at_most=APART)
    report.bar("bigram's loss over the largest", bigram / max(losses), at_least=1.0)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
