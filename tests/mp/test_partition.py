"""Finding the blocks of a model, the cuts that are legal, and the best of them."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch import nn

from tricorn.errors import PlanError
from tricorn.mp.cut import NUMBERED, fineness
from tricorn.mp.partition import Stage, blocks, legal_cuts, refusal
from tricorn.plan import Plan
from tricorn.state.flat import call_model

from . import models
from .models import Setting

CPU = torch.device("cpu")
INPUTS = {
    "sequential": torch.randn(5, 8),
    "nested": torch.randn(5, 8),
    "Chain": torch.randn(5, 1, 8, 8),
    "Residual": torch.randn(5, 8),
    "Listed": torch.randn(5, 8),
    "Wide": torch.randn(5, 8),
    "Language": {"tokens": torch.randint(0, 11, (5, 7)), "offset": torch.randn(5, 7)},
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("training", [True, False])
def test_stages_one_after_another_are_the_model(name, training):
    torch.manual_seed(0)
    model = getattr(models, name)().train(training)
    with torch.no_grad():
        expected = call_model(model, INPUTS[name])
    found = blocks(model, 3)
    for cut in itertools.combinations(legal_cuts(found), 2):
        value = INPUTS[name]
        for start, stop in itertools.pairwise((0, *cut, len(found))):
            with torch.no_grad():
                value = Stage(model, found, start, stop, CPU).train(training)(value)
        assert torch.equal(value, expected)


@pytest.mark.parametrize("name", INPUTS)
def test_stages_share_out_the_tensors_under_the_names_of_the_model(name):
    model = getattr(models, name)()
    found = blocks(model, 2)
    cut = legal_cuts(found)[len(legal_cuts(found)) // 2]
    stages = [Stage(model, found, 0, cut, CPU), Stage(model, found, cut, len(found), CPU)]
    for kind in ("named_parameters", "named_buffers"):
        named = [pair for stage in stages for pair in getattr(stage, kind)()]
        assert {name: id(tensor) for name, tensor in named} == {n: id(t) for n, t in getattr(model, kind)()}
        assert len(named) == len({name for name, _ in named})


def test_nested_sequentials_are_cut_inside():
    assert [block.name for block in blocks(models.nested(), 2)] == ["0.0", "0.1.0", "0.1.1", "1", "2"]


def test_one_value_is_preferred_to_several():
    # Looked into, each block is a layer, a tanh and a sum, and only the sum is alone in use.
    names = [block.name for block in blocks(models.Wide(), 1)]
    assert names == ["add", "add_1", "add_2", "add_3", "body.head", "mul", "add_4"]
    finer = [block.name for block in blocks(models.Wide(), 2)]
    assert finer[:3] == ["body.blocks.0.inner", "tanh", "add"]


def test_submodules_are_looked_into_only_when_too_few():
    assert blocks(models.Residual(), 1)[0].name == "blocks.0"
    assert len(blocks(models.Wide(), 1)) == 7


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_cuts_of_a_plan_number_the_same_blocks_for_any_stages(stages):
    cut = fineness(Plan(strategy="mp", workers=2, cuts=(1,)))
    names = [block.name for block in blocks(models.Wide(), stages, fineness=cut)]
    assert names == [block.name for block in blocks(models.Wide(), NUMBERED)]
    assert len(names) > len(blocks(models.Wide(), 1, fineness=fineness(Plan(strategy="mp", workers=2))))


def test_looking_at_a_model_changes_nothing():
    model = models.Chain()
    chance, python_chance = torch.get_rng_state(), random.getstate()
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    blocks(model, 2)
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == attributes
    assert torch.equal(torch.get_rng_state(), chance)
    assert random.getstate() == python_chance


def test_functional_dropout_is_off_in_evaluation():
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x):
            return self.b(nn.functional.dropout(self.a(x), 0.5, self.training))

    model = Dropping()
    found = blocks(model, 2)
    stage, x = Stage(model, found, 0, len(found), CPU), torch.randn(3, 64)
    assert not torch.equal(stage.train()(x), stage.train()(x))
    assert torch.equal(stage.eval()(x), model.eval()(x))


def test_an_error_in_a_block_names_the_users_line():
    from tricorn.errors import users_line

    model = models.Chain()
    found = blocks(model, 2)
    stage = Stage(model, found, 0, len(found), CPU)
    with pytest.raises(RuntimeError) as raised:
        stage(torch.randn(2, 1, 6, 6))
    assert "models.py" in users_line(raised.value)
    assert users_line(raised.value).endswith("in forward: return self.head(self.dropout(x))")


class Drawing(Setting):
    def forward(self, x):
        return self.b(self.a(x)) if random.random() < 0.5 else self.a(x)


class Making(Setting):
    def forward(self, x):
        return self.b(self.a(x) * torch.from_numpy(np.ones(6, dtype=np.float32)))


class Chancing(Setting):
    def forward(self, x):
        return self.b(self.a(x)) if torch.rand(1).item() < 0.5 else self.a(x)


class Freezing(Setting):
    def forward(self, x):
        with torch.no_grad():
            x = self.a(x)
        return self.b(x)


class Switching(Setting):
    def forward(self, x):
        return self.b(self.a(x)) if self.training else self.a(x)


class Functions(Setting):
    def pipeline_blocks(self):
        return [self.a, lambda x: self.b(x)]


def _hooked():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Setting, "forward of Setting sets self.calls; make it a plain chain"),
        (Drawing, "forward of Drawing uses Python's random numbers; make it a plain chain"),
        (Making, r"forward of Making makes a tensor by itself, of NumPy or of a list; make it a plain chain"),
        (Chancing, r"Chancing cannot be followed .*control flow.*; make it a plain chain"),
        (
            Freezing,
            r"Freezing cannot be followed .*\(it turns gradients or autocast on or off\); make it a plain chain",
        ),
        (Switching, r"forward of Switching takes other steps in eval\(\) than in train\(\); make it a plain chain"),
        (Functions, r"no module of Functions.pipeline_blocks\(\) holds b.weight, b.bias; list the modules that do"),
        (_hooked, "Sequential has hooks, which no stage would run; register them on its submodules"),
        ("Deciding", r"Deciding cannot be followed .*control flow.*; make it a plain chain .* or give it a method"),
    ],
)
def test_a_model_that_cannot_be_listed_says_what_to_change(model, message):
    made = getattr(models, model)() if isinstance(model, str) else model()
    before = [(n, getattr(made, n, None)) for n in ("calls", "training")]
    with pytest.raises(PlanError, match=message):
        blocks(made, 2)
    assert [(n, getattr(made, n, None)) for n in ("calls", "training")] == before


@pytest.mark.parametrize(
    ("name", "stages", "message"),
    [
        ("Branching", 5, "Branching has 4 blocks for 5 stages, .* make it a longer chain .* or use at most 4 workers"),
        ("nested", 6, "Sequential has 5 blocks for 6 stages, .* use at most 5 workers"),
        ("Again", 6, "Again uses norm, which keeps statistics .* into 5 stages at most, not 6; use GroupNorm or"),
    ],
)
def test_a_model_that_cannot_be_cut_often_enough_says_what_to_change(name, stages, message):
    import re

    model = Again() if name == "Again" else getattr(models, name)()
    found = blocks(model, stages)
    assert re.match(message, refusal(model, found, stages))
    assert refusal(model, found, 1) is None


def test_a_step_whose_result_nobody_needs_and_inputs_given_by_name():
    class Checked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, mask, x, *rest, scale=2.0):
            torch.relu(x)
            y = self.a(x)
            y.mul_(scale)
            return {"y": self.b(y), "double": y * 2}

    model, x = Checked(), torch.randn(3, 6)
    found = blocks(model, 2)
    cut = legal_cuts(found)[-1]
    first, last = Stage(model, found, 0, cut, CPU), Stage(model, found, cut, len(found), CPU)
    made = last(first({"mask": None, "x": x}))
    assert {name: torch.equal(made[name], value) for name, value in model(None, x).items()} == {
        "y": True,
        "double": True,
    }


class Again(nn.Module):
    """One normalisation for two layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))
        self.norm = nn.BatchNorm1d(6)

    def forward(self, x):
        a, b, c, d, e = self.layers
        return e(d(self.norm(c(self.norm(b(a(x)))))))
