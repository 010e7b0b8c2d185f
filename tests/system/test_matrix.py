"""Every kind of model under every plan follows one plain loop.

With TRICORN_ROUNDS each model under each plan, in both precisions; else each plan with one model in float64, and
single precision under some.
"""

from __future__ import annotations

import os
from itertools import product

import pytest

from . import matrix

DOUBLE = ("Adam", "float64")
WITH_TABLES = ["transformer", "two towers"]
CELLS = [(plan, model, *number) for plan, model, number in product(matrix.PLANS, matrix.MODELS, matrix.BOUNDS)]
if "TRICORN_ROUNDS" not in os.environ:
    dense = [plan for plan, options in matrix.PLANS.items() if not matrix.has_tables(options)]
    tables = [plan for plan in matrix.PLANS if plan not in dense]
    models = list(matrix.MODELS)
    CELLS = [(plan, models[number % len(models)], *DOUBLE) for number, plan in enumerate(dense)]
    CELLS += [(plan, WITH_TABLES[number % 2], *DOUBLE) for number, plan in enumerate(tables)]
    CELLS += [("pp3", "ResNet", "SGD", "float32"), ("tp3", "tied transformer", "Adam", "float32")]


@pytest.mark.parametrize(("plan", "model", "optimizer", "precision"), CELLS)
def test_follows_one_plain_loop(tmp_path, plan, model, optimizer, precision):
    if reason := matrix.refusal(model, plan):
        assert matrix.has_tables(matrix.PLANS[plan]), reason
        pytest.skip(reason)
    assert matrix.apart(model, plan, optimizer, precision, tmp_path) <= matrix.BOUNDS[optimizer, precision]
