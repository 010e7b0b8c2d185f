"""Each declared optimizer beside the class of ``torch.optim`` that it stands for, bit for bit."""

from __future__ import annotations

import math
from itertools import product
from typing import Any

import msgspec
import pytest
import torch

from tricorn import optim

FUSED, PLAIN = {"fused": True}, {"foreach": False}

CASES: list[tuple[type, type, dict[str, bool], dict[str, Any]]] = [
    *(
        (optim.SGD, torch.optim.SGD, FUSED, {"momentum": momentum, "nesterov": nesterov, "weight_decay": decay})
        for momentum, nesterov, decay in product((0.0, 0.9), (False, True), (0.0, 0.01))
        if momentum or not nesterov
    ),
    *(
        (optim.Adagrad, torch.optim.Adagrad, PLAIN, {"lr_decay": lr_decay, "weight_decay": decay, "eps": eps})
        for lr_decay, decay, eps in product((0.0, 0.1), (0.0, 0.01), (1e-10, 1e-3))
    ),
    *(
        (ours, theirs, FUSED, {"betas": betas, "eps": eps, "weight_decay": decay})
        for (ours, theirs), betas, eps, decay in product(
            ((optim.Adam, torch.optim.Adam), (optim.AdamW, torch.optim.AdamW)),
            ((0.9, 0.999), (0.0, 0.95)),
            (1e-8, 1e-3),
            (0.0, 0.01),
        )
    ),
]


def named(case: Any) -> str:
    return getattr(case, "__name__", "") or ",".join(f"{key}={value}" for key, value in case.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("ours", "theirs", "kernel", "options"), CASES, ids=named)
def test_twenty_updates_equal_torch(
    ours: type, theirs: type, kernel: dict[str, bool], options: dict[str, Any], dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(1003, dtype=dtype, generator=generator)
    declared = ours(lr=0.05, **options)
    param, slots = start.clone(), {slot: torch.zeros_like(start) for slot in declared.slots}
    expected = start.clone().requires_grad_()
    reference = theirs([expected], lr=0.05, **options, **kernel)
    for step in range(1, 21):
        grad = torch.randn(start.shape, dtype=dtype, generator=generator)
        lr = 0.05 / step
        reference.param_groups[0]["lr"] = lr
        expected.grad = grad.clone()
        reference.step()
        declared.update(param, grad.clone(), slots, step=step, lr=lr)
        assert torch.equal(param, expected.detach()), f"update {step}"
    for slot, tensor in slots.items():
        assert torch.equal(tensor, reference.state[expected][slot]), slot


@pytest.mark.parametrize(
    "declared",
    [
        optim.SGD(lr=0.1, momentum=0.9),
        optim.Adagrad(lr=0.1),
        optim.Adam(lr=0.1),
        optim.AdamW(lr=0.1),
        optim.FTRL(lr=0.1, l1=0.1),
    ],
    ids=lambda declared: type(declared).__name__,
)
def test_updating_in_parts_equals_updating_whole(declared: optim.Optimizer) -> None:
    """So that a server may hold any slice of the parameters."""
    generator = torch.Generator().manual_seed(2)
    whole = torch.randn(1003, dtype=torch.float64, generator=generator)
    parts = whole.clone()
    slots = {slot: torch.zeros_like(whole) for slot in declared.slots}
    slots_of_parts = {slot: torch.zeros_like(whole) for slot in declared.slots}
    for step in range(1, 6):
        grad = torch.randn(whole.shape, dtype=whole.dtype, generator=generator)
        declared.update(whole, grad.clone(), slots, step=step, lr=0.1)
        for part in (slice(0, 1), slice(1, 400), slice(400, 1003)):
            sliced = {slot: tensor[part] for slot, tensor in slots_of_parts.items()}
            declared.update(parts[part], grad[part].clone(), sliced, step=step, lr=0.1)
    torch.testing.assert_close(parts, whole, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("declared", "fields"),
    [
        (optim.SGD(lr=-1.0, momentum=1.0, weight_decay=-0.1), {"lr", "momentum", "weight_decay"}),
        (optim.SGD(lr=0.1, nesterov=True), {"nesterov"}),
        (optim.SGD(lr=float("nan")), {"lr"}),
        (optim.Adagrad(lr=float("inf"), lr_decay=-1.0, eps=-1.0), {"lr", "lr_decay", "eps"}),
        (optim.Adam(lr=0.1, betas=(1.0, 0.9)), {"betas"}),
        (optim.AdamW(lr=0.1, weight_decay=-1.0, eps=-1.0), {"weight_decay", "eps"}),
        (optim.Adam(lr=0.1), set()),
        (optim.FTRL(lr=-1.0, beta=0.0, l1=-1.0, l2=float("nan")), {"lr", "beta", "l1", "l2"}),
        (optim.RowwiseAdagrad(lr=0.1, eps=-1.0), {"eps"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_impossible_numbers_are_named(declared: optim.Optimizer, fields: set[str]) -> None:
    assert {field for field, _, _ in declared.mistakes()} == fields


@pytest.mark.parametrize(
    "declared",
    [
        *(kind(lr=0.25, weight_decay=0.5) for kind in (optim.SGD, optim.Adagrad, optim.Adam, optim.AdamW)),
        optim.FTRL(lr=0.25, l1=0.5),
        optim.RowwiseAdagrad(lr=0.25, eps=0.5),
    ],
    ids=lambda declared: type(declared).__name__,
)
def test_a_declaration_survives_the_wire(declared: optim.RowOptimizer) -> None:
    assert msgspec.json.decode(msgspec.json.encode(declared), type=optim.RowOptimizer) == declared


@pytest.mark.parametrize(("l1", "l2"), [(0.0, 0.0), (0.5, 0.0), (0.3, 0.2)])
def test_ftrl_follows_the_paper(l1: float, l2: float) -> None:
    """Algorithm 1 of McMahan et al. 2013, one number at a time."""
    alpha, beta = 0.1, 1.0
    random = torch.Generator().manual_seed(3)
    param, slots = torch.zeros(50, dtype=torch.float64), {s: torch.zeros(50, dtype=torch.float64) for s in ("z", "n")}
    w, z, n = [0.0] * 50, [0.0] * 50, [0.0] * 50
    for step in range(1, 21):
        grad = torch.randn(50, dtype=torch.float64, generator=random)
        optim.FTRL(lr=alpha, beta=beta, l1=l1, l2=l2).update(param, grad.clone(), slots, step=step, lr=alpha)
        for i, g in enumerate(grad.tolist()):
            sigma = (math.sqrt(n[i] + g * g) - math.sqrt(n[i])) / alpha
            z[i] += g - sigma * w[i]
            n[i] += g * g
            w[i] = 0.0
            if abs(z[i]) > l1:
                w[i] = -(z[i] - math.copysign(l1, z[i])) / ((beta + math.sqrt(n[i])) / alpha + l2)
    torch.testing.assert_close(param, torch.tensor(w, dtype=torch.float64), rtol=1e-12, atol=1e-15)
    assert (param == 0).any() == (l1 > 0)


def test_a_schedule_does_not_move_the_weights_that_ftrl_has() -> None:
    declared = optim.FTRL(lr=0.1)
    param, slots = torch.zeros(3), {slot: torch.zeros(3) for slot in declared.slots}
    declared.update(param, torch.tensor([1.0, -2.0, 3.0]), slots, step=1, lr=0.1)
    before = param.clone()
    for step, lr in ((2, 0.0), (3, 0.001), (4, 10.0)):
        declared.update(param, torch.zeros(3), slots, step=step, lr=lr)
        torch.testing.assert_close(param, before)


@pytest.mark.parametrize(
    ("declared", "same"),
    [
        (optim.SGD(lr=0.1), True),
        (optim.SGD(lr=0.1, momentum=0.9), False),
        (optim.SGD(lr=0.1, weight_decay=0.1), False),
        (optim.Adagrad(lr=0.1, lr_decay=0.1), True),
        (optim.Adagrad(lr=0.1, weight_decay=0.1), False),
        (optim.Adam(lr=0.1), False),
        (optim.AdamW(lr=0.1, weight_decay=0.0), False),
        (optim.FTRL(lr=0.1), False),
    ],
    ids=repr,
)
def test_by_rows_means_that_a_gradient_of_zero_changes_nothing(declared: optim.Optimizer, same: bool) -> None:
    """A row that had a gradient once and then has none, beside one that never had any."""
    param, slots = torch.ones(2), {slot: torch.zeros(2) for slot in declared.slots}
    declared.update(param, torch.tensor([1.0, 0.0]), slots, step=1, lr=0.1)
    changed = not torch.equal(param[1:], torch.ones(1))
    before = [tensor.clone() for tensor in (param, *slots.values())]
    declared.update(param, torch.zeros(2), slots, step=2, lr=0.1)
    changed |= any(not torch.equal(*pair) for pair in zip(before, (param, *slots.values()), strict=True))
    assert declared.by_rows is same
    assert changed is not same
