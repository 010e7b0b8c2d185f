"""Finding the blocks of a model, the cuts that are legal, and the best of them."""

from __future__ import annotations

import gc
import itertools
import random
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from tricorn.errors import PlanError
from tricorn.mp import wire
from tricorn.mp.partition import Stage, blocks, legal_cuts, refusal, tied
from tricorn.state.flat import call_model

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
def test_stages_one_after_another_are_the_model(models, name, training):
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
def test_stages_share_out_the_tensors_under_the_names_of_the_model(models, name):
    model = getattr(models, name)()
    found = blocks(model, 2)
    cut = legal_cuts(found)[len(legal_cuts(found)) // 2]
    stages = [Stage(model, found, 0, cut, CPU), Stage(model, found, cut, len(found), CPU)]
    for kind in ("named_parameters", "named_buffers"):
        named = [pair for stage in stages for pair in getattr(stage, kind)()]
        assert {name: id(tensor) for name, tensor in named} == {n: id(t) for n, t in getattr(model, kind)()}
        assert len(named) == len({name for name, _ in named})


def test_nested_sequentials_are_cut_inside(models):
    assert [block.name for block in blocks(models.nested(), 2)] == ["0.0", "0.1.0", "0.1.1", "1", "2"]


def test_one_value_is_preferred_to_several(models):
    # Looked into, each block is a layer, a tanh and a sum, and only the sum is alone in use.
    names = [block.name for block in blocks(models.Wide(), 1)]
    assert names == ["add", "add_1", "add_2", "add_3", "body.head", "mul", "add_4"]
    finer = [block.name for block in blocks(models.Wide(), 2)]
    assert finer[:3] == ["body.blocks.0.inner", "tanh", "add"]


def test_submodules_are_looked_into_only_when_too_few(models):
    assert blocks(models.Residual(), 1)[0].name == "blocks.0"
    assert len(blocks(models.Wide(), 1)) == 7


def test_looking_at_a_model_changes_nothing(models):
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


def test_an_error_in_a_block_names_the_users_line(models):
    from tricorn.errors import users_line

    model = models.Chain()
    found = blocks(model, 2)
    stage = Stage(model, found, 0, len(found), CPU)
    with pytest.raises(RuntimeError) as raised:
        stage(torch.randn(2, 1, 6, 6))
    assert "conftest.py" in users_line(raised.value)
    assert users_line(raised.value).endswith("in forward: return self.head(self.dropout(x))")


class Setting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.calls = nn.Linear(6, 6), nn.Linear(6, 6), 0

    def forward(self, x):
        self.calls += 1
        return self.b(self.a(x))


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
def test_a_model_that_cannot_be_listed_says_what_to_change(models, model, message):
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
def test_a_model_that_cannot_be_cut_often_enough_says_what_to_change(models, name, stages, message):
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


class Skips(nn.Module):
    """Skip connections over the whole model, as in a U-Net."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList(nn.Conv1d(c, 2 * c, 3, padding=1) for c in (2, 4, 8))
        self.up = nn.ModuleList(nn.Conv1d(2 * c, c // 2, 3, padding=1) for c in (16, 8))
        self.end = nn.Conv1d(8, 3, 1)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        kept = []
        for layer in self.down:
            x = self.act(layer(x))
            kept.append(x)
        for layer, skip in zip(self.up, (kept[2], kept[1]), strict=True):
            x = self.act(layer(torch.cat([x, skip], 1)))
        return self.end(torch.cat([x, kept[0]], 1))


class Language(nn.Module):
    """A decoder as people write it: positions, a causal mask, sizes used late, and a tied head."""

    class Layer(nn.Module):
        def __init__(self, width, heads):
            super().__init__()
            self.heads = heads
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

        def forward(self, x, mask):
            B, L, D = x.shape
            q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
            q, k, v = (part.view(B, L, self.heads, D // self.heads).transpose(1, 2) for part in (q, k, v))
            scores = (q @ k.transpose(-2, -1)) / (D // self.heads) ** 0.5
            y = scores.masked_fill(mask[:L, :L], float("-inf")).softmax(-1) @ v
            x = x + self.out(y.transpose(1, 2).reshape(B, L, D))
            return x + self.mlp(self.norm2(x))

    def __init__(self):
        super().__init__()
        self.tokens, self.places = nn.Embedding(11, 8), nn.Embedding(9, 8)
        self.layers = nn.ModuleList(self.Layer(8, 2) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens, weight=None, *, scale: float = 1.0):
        B, L = tokens.size()
        x = self.tokens(tokens) + self.places(torch.arange(L, device=tokens.device))
        mask = torch.ones(L, L, dtype=torch.bool, device=tokens.device).triu(1)
        for layer in self.layers:
            x = layer(x, mask)
        if weight is not None:
            x = x * weight
        x = self.head(self.norm(x)) * scale
        return x.view(B * L, -1)


class Towers(nn.Module):
    """Two towers whose inputs meet at the end, one of them used late."""

    def __init__(self):
        super().__init__()
        self.users, self.items = nn.Embedding(13, 6), nn.EmbeddingBag(17, 6)
        self.user = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))
        self.item = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4))

    def forward(self, user, items, price):
        a = self.user(self.users(user))
        b = self.item(self.items(items))
        return (a * b).sum(-1) + price


class Recurrent(nn.Module):
    """A layer that returns a tuple, and memory that is looked at twice and changed in place."""

    def __init__(self):
        super().__init__()
        self.cells, self.head = nn.LSTM(6, 6, batch_first=True), nn.Linear(6, 6)
        self.last = nn.Linear(6, 3)

    def forward(self, x):
        out, (hidden, _) = self.cells(x)
        y = self.head(out)
        first = y[:, 0]
        y.mul_(2.0)
        y += hidden.transpose(0, 1)
        return self.last(y).sum(1) + self.last(first)


class Torchs(nn.Module):
    """PyTorch's own chain of layers."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, nn.LayerNorm(8), enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x))


class Partly(nn.Module):
    """One submodule decides by values, and another counts its calls: each is one step."""

    def __init__(self, deciding):
        super().__init__()
        self.first, self.deciding, self.last = nn.Linear(6, 6), deciding(), nn.Linear(6, 6)
        self.counting = Setting()

    def forward(self, x):
        return self.last(self.counting(self.deciding(self.first(x))))


def _partly(models):
    return Partly(models.Deciding)


TOKENS = torch.randint(0, 11, (3, 5), generator=torch.Generator().manual_seed(1))
GRAPHS = {
    "Skips": (Skips, torch.randn(3, 2, 8)),
    "Language": (Language, TOKENS),
    "Towers": (Towers, (torch.arange(3), TOKENS, torch.randn(3))),
    "Recurrent": (Recurrent, torch.randn(3, 4, 6)),
    "Torchs": (Torchs, torch.randn(3, 4, 8)),
    "Partly": (_partly, torch.randn(3, 6)),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_is_cut_anywhere_and_its_gradients_are_the_models(models, name):
    torch.manual_seed(0)
    made, inputs = GRAPHS[name]
    model = made(models) if made is _partly else made()
    model = model.double()
    inputs = tuple(
        i.double() if i.is_floating_point() else i for i in (inputs if isinstance(inputs, tuple) else [inputs])
    )
    found = blocks(model, 4, inputs)
    assert len(found) >= 4
    call_model(model, inputs).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    tried = 0
    for cut in legal_cuts(found):
        first, last = Stage(model, found, 0, cut, CPU), Stage(model, found, cut, len(found), CPU)
        handed_on = first(inputs)
        if wire.obstacle(handed_on):
            continue
        tried += 1
        received = [part.detach().clone().requires_grad_(part.requires_grad) for part in wire.tensors(handed_on)]
        copies = [part.clone() for part in received]
        output = last(copies[0] if isinstance(handed_on, torch.Tensor) else tuple(copies))
        model.zero_grad()
        output.square().sum().backward()
        wanted = [(part, like.grad) for part, like in zip(wire.tensors(handed_on), received, strict=True)]
        wanted = [(part, grad) for part, grad in wanted if part.requires_grad and grad is not None]
        if wanted:
            torch.autograd.backward([part for part, _ in wanted], [grad for _, grad in wanted])
        for parameter, gradient in expected.items():
            assert torch.allclose(model.get_parameter(parameter).grad, gradient, rtol=1e-10, atol=1e-12), (
                cut,
                parameter,
            )
    assert tried >= 3


def test_tied_parameters_are_reported_with_the_stages_that_hold_them():
    model = Language()
    found = blocks(model, 2, TOKENS)
    cuts = legal_cuts(found)
    assert cuts == list(range(1, len(found)))
    middle = len(found) // 2
    assert tied(model, found, (middle,)) == {"tokens.weight": (0, 1)}
    assert tied(model, found, (middle, middle + 1)) == {"tokens.weight": (0, 2)}
    assert tied(model, found, ()) == {}
    stages = [Stage(model, found, 0, middle, CPU), Stage(model, found, middle, len(found), CPU)]
    assert all("tokens.weight" in dict(stage.named_parameters()) for stage in stages)


def test_a_stage_keeps_nothing_of_the_others_alive():
    model = Language()
    found = blocks(model, 2, TOKENS)
    stage = Stage(model, found, len(found) - 1, len(found), CPU)
    others = weakref.ref(model), weakref.ref(model.layers[0].qkv.weight)
    del model, found
    gc.collect()
    assert [other() for other in others] == [None, None]
    assert stage.last


def test_what_the_first_sample_lacks_keeps_its_default_and_must_not_come():
    model = Language()
    found = blocks(model, 2, {"tokens": TOKENS})
    stage = Stage(model, found, 0, 1, CPU)
    stage({"tokens": TOKENS})
    with pytest.raises(PlanError, match="called with weight, which the first sample has not"):
        stage({"tokens": TOKENS, "weight": torch.ones(8)})


def test_a_submodule_that_cannot_be_followed_is_named_where_it_is_in_the_way(models):
    with pytest.raises(PlanError, match="forward of Deciding cannot be followed"):
        blocks(Partly(models.Deciding), 30)
    assert "deciding" in [block.name for block in blocks(_partly(models), 2)]
