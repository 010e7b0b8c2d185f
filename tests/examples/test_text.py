"""The language model of examples/text.py, on a piece of its text."""

from dataclasses import replace
from pathlib import Path

import tricorn
from tricorn.engine.loading import load

FILE = Path(__file__).parents[2] / "examples" / "text.py"


def test_it_learns(tmp_path):
    job = load(str(FILE), "job", None)
    inputs, targets = job.train.inputs[:640], job.train.target[:640]
    short = replace(job, train=tricorn.data.arrays(inputs, targets), evaluate=None, epochs=2)
    result = tricorn.train(short, strategy="mp", threads=1, runs=tmp_path)
    losses = [row["loss"] for row in result.history if "loss" in row]
    assert len(losses) == 40
    assert losses[-1] < 3.2 < 5 < losses[0]
