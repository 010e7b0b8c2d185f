"""The language model of examples/text.py under every kind of plan: its held-out loss, beside a bigram model's.

An epoch of half of the text, in float64. All plans follow one trajectory, so that the loss is the same to many digits.
With its embedding a table, trained by rows with an optimizer of its own, the model follows another one, the same under
all plans with tables on servers.
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

WHOLE = {
    "single": Plan(strategy="dp", workers=1, threads=1), "dp2": Plan(strategy="dp", threads=1),
    "zero3 x 2": Plan(strategy="dp", zero=3, threads=1), "ps": Plan(strategy="ps", servers=1, threads=1),
    "pp2": Plan(strategy="mp", threads=1), "tp2": Plan(strategy="mp", tensor=2, threads=1),
    "dp2 x pp2": Plan(strategy="mp", workers=4, replicas=2, threads=1),
    "dp2 rows": Plan(strategy="dp", embeddings="rows", threads=1),
}  # fmt: skip
TABLED = {
    "table, ps": Plan(strategy="ps", workers=1, servers=1, threads=1),
    "table, ps+dp": Plan(strategy="ps+dp", servers=1, threads=1),
    "table, ps+pp": Plan(strategy="ps+mp", servers=1, threads=1),
}
QUICK = ["single", "ps", "pp2"]
APART = 1e-9  # relative, of losses in float64


def piece(**changes: object) -> tricorn.Job:
    """The example's job, an epoch on half of its samples."""
    samples = len(text.job.train) // 2
    train = tricorn.data.arrays(text.job.train.inputs[:samples], text.job.train.target[:samples])
    return replace(text.job, train=train, batch_size=16, epochs=1, precision="float64", **changes)


def main() -> None:
    report, chosen = options("held-out loss of the language model under every plan, float64", [*WHOLE, *TABLED])
    bigram = text.bigram_loss()
    report.row("bigram model", "held-out loss", [bigram], "nats")
    table = tricorn.Table(std=1.0, optimizer=tricorn.optim.Adagrad(lr=0.1))
    wanted = chosen.case or (QUICK if report.quick else [*WHOLE, *TABLED])
    for plans, job in ((WHOLE, piece()), (TABLED, piece(tables={"bytes": table}))):
        losses = []
        for name in [name for name in wanted if name in plans]:
            with tempfile.TemporaryDirectory() as runs:
                summary = tricorn.train(job, plan=plans[name], runs=runs).summary
            losses.append(summary["metrics"]["loss"])
            report.row(name, "held-out loss", losses[-1:], "nats")
            report.row(name, "samples a second", [summary["samples_per_second"]], "")
            print(name, losses[-1], file=sys.stderr, flush=True)
        if losses:
            kind = "with a table" if job.tables else "without tables"
            report.bar(f"largest relative difference of losses {kind}", max(losses) / min(losses) - 1, at_most=APART)
            report.bar(f"bigram's loss over the largest {kind}", bigram / max(losses), at_least=1.0)
    report.print(chosen.json)


if __name__ == "__main__":
    main()
