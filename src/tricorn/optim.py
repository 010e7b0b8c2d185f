"""Optimizers as declared values: what a job says, and the update that any role can run on flat tensors.

A declaration holds numbers only, so it can cross a socket and run on a parameter server. ``update`` works in
place on flat tensors with PyTorch's fused kernels and equals the fused ``torch.optim`` class of the same name, where
there is one, bit for bit. No ``torch.optim`` object is built: its constructor imports ``torch._dynamo``, two seconds of
start-up (docs/decisions/0002-own-optimizer-steps.md).

Every ``update(param, grad, slots, step=, lr=)`` takes flat tensors of one length, dtype and device; ``slots``
has a tensor for each name in ``.slots``, zero at the start; ``step`` counts updates from 1; ``lr`` is the rate of
this step with the schedule already in it; ``grad`` may be overwritten.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import msgspec

from tricorn.fields import NamedStruct

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

_Range = tuple[str, float, float]
_PIECE = 1 << 16  # elements


class _Declared(
    msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", forbid_unknown_fields=True, metaclass=NamedStruct
):
    lr: float

    ranges: ClassVar[tuple[_Range, ...]] = (("lr", 0.0, float("inf")),)

    @property
    def by_rows(self) -> bool:
        """Whether to update only the rows that have a gradient comes to the same as to update all."""
        return False

    def mistakes(self) -> list[tuple[str, str, str]]:
        """(field, given, what would do) for each impossible number."""
        found = []
        for field, low, high in self.ranges:
            value = getattr(self, field)
            if not (isinstance(value, int | float) and low <= value < high):
                found.append((field, repr(value), f"give a number from {low:g} to below {high:g}"))
        return found


class SGD(_Declared, frozen=True, kw_only=True, tag="sgd"):
    """Stochastic gradient descent, with momentum and Nesterov's variant (as ``torch.optim.SGD``)."""

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    ranges: ClassVar[tuple[_Range, ...]] = (*_Declared.ranges, ("momentum", 0.0, 1.0), ("weight_decay", 0.0, 1e9))

    @property
    def slots(self) -> tuple[str, ...]:
        return ("momentum_buffer",) if self.momentum else ()

    @property
    def by_rows(self) -> bool:
        return not self.momentum and not self.weight_decay

    def mistakes(self) -> list[tuple[str, str, str]]:
        found = super().mistakes()
        if self.nesterov and not self.momentum:
            found.append(("nesterov", "True without momentum", "give a momentum above 0, or leave nesterov out"))
        return found

    def update(self, param: Tensor, grad: Tensor, slots: dict[str, Tensor], *, step: int, lr: float) -> None:
        import torch

        # A zero momentum buffer makes the first step equal to torch's, which starts from the gradient.
        torch._fused_sgd_(
            [param], [grad], [slots["momentum_buffer"]] if self.momentum else [],
            weight_decay=self.weight_decay, momentum=self.momentum, lr=lr, dampening=0.0,
            nesterov=self.nesterov, maximize=False, is_first_step=False,
        )  # fmt: skip


class Adagrad(_Declared, frozen=True, kw_only=True, tag="adagrad"):
    """Adagrad (Duchi et al. 2011, as ``torch.optim.Adagrad``)."""

    lr_decay: float = 0.0
    weight_decay: float = 0.0
    eps: float = 1e-10

    ranges: ClassVar[tuple[_Range, ...]] = (
        *_Declared.ranges, ("lr_decay", 0.0, 1e9), ("weight_decay", 0.0, 1e9), ("eps", 0.0, 1e9),
    )  # fmt: skip

    @property
    def slots(self) -> tuple[str, ...]:
        return ("sum",)

    @property
    def by_rows(self) -> bool:
        return not self.weight_decay

    def update(self, param: Tensor, grad: Tensor, slots: dict[str, Tensor], *, step: int, lr: float) -> None:
        if self.weight_decay:
            grad = grad.add_(param, alpha=self.weight_decay)
        rate = lr / (1 + (step - 1) * self.lr_decay)
        for weights, gradient, total in _pieces(param, grad, slots["sum"]):
            root = total.addcmul_(gradient, gradient, value=1).sqrt()
            weights.addcdiv_(gradient, root.add_(self.eps), value=-rate)


class Adam(_Declared, frozen=True, kw_only=True, tag="adam"):
    """Adam (Kingma and Ba 2015, as ``torch.optim.Adam``); ``weight_decay`` adds to the gradient."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    ranges: ClassVar[tuple[_Range, ...]] = (*_Declared.ranges, ("eps", 0.0, 1e9), ("weight_decay", 0.0, 1e9))

    @property
    def slots(self) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def mistakes(self) -> list[tuple[str, str, str]]:
        found = super().mistakes()
        if not (
            isinstance(self.betas, tuple)
            and len(self.betas) == 2
            and all(isinstance(beta, int | float) and 0.0 <= beta < 1.0 for beta in self.betas)
        ):
            found.append(("betas", repr(self.betas), "give two numbers from 0 to below 1"))
        return found

    def update(self, param: Tensor, grad: Tensor, slots: dict[str, Tensor], *, step: int, lr: float) -> None:
        import torch

        self._apply(torch._fused_adam_, param, grad, slots, step, lr)

    def _apply(
        self, kernel: Callable[..., None], param: Tensor, grad: Tensor, slots: dict[str, Tensor], step: int, lr: float
    ) -> None:
        import torch

        steps = torch.tensor(float(step), device=param.device)
        kernel(
            [param], [grad], [slots["exp_avg"]], [slots["exp_avg_sq"]], [], [steps],
            lr=lr, beta1=self.betas[0], beta2=self.betas[1], weight_decay=self.weight_decay, eps=self.eps,
            amsgrad=False, maximize=False,
        )  # fmt: skip


class AdamW(Adam, frozen=True, kw_only=True, tag="adamw"):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, as ``torch.optim.AdamW``)."""

    weight_decay: float = 1e-2

    def update(self, param: Tensor, grad: Tensor, slots: dict[str, Tensor], *, step: int, lr: float) -> None:
        import torch

        self._apply(torch._fused_adamw_, param, grad, slots, step, lr)


class FTRL(_Declared, frozen=True, kw_only=True, tag="ftrl"):
    """FTRL-Proximal (McMahan et al. 2013, algorithm 1), for sparse models: ``l1`` makes weights exactly zero.

    ``lr`` is the paper's alpha, and the slot ``z`` is alpha times the paper's, so that a schedule changes the rate of
    new gradients and not the weights that there are. A weight follows from its slots, which know nothing of what it
    was at first: give such tables ``std=0``.
    """

    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0

    ranges: ClassVar[tuple[_Range, ...]] = (
        *_Declared.ranges, ("beta", 1e-12, 1e9), ("l1", 0.0, 1e9), ("l2", 0.0, 1e9),
    )  # fmt: skip

    @property
    def slots(self) -> tuple[str, ...]:
        return ("z", "n")

    def update(self, param: Tensor, grad: Tensor, slots: dict[str, Tensor], *, step: int, lr: float) -> None:
        for weights, gradient, z, n in _pieces(param, grad, slots["z"], slots["n"]):
            before = n.sqrt()
            root = n.addcmul_(gradient, gradient).sqrt()
            z.add_(gradient, alpha=lr).addcmul_(root - before, weights, value=-1)
            beyond = z.abs().sub_(lr * self.l1).clamp_(min=0)
            weights.copy_(beyond.mul_(z.sign()).neg_().div_(root.add_(self.beta + lr * self.l2)))


class RowwiseAdagrad(_Declared, frozen=True, kw_only=True, tag="rowwise_adagrad"):
    """Adagrad with one accumulator for a row, of the mean of its squared gradients: a state of 1/dim of the size.

    For tables only: a row of a dense parameter means nothing in particular.
    """

    eps: float = 1e-10

    ranges: ClassVar[tuple[_Range, ...]] = (*_Declared.ranges, ("eps", 0.0, 1e9))

    @property
    def slots(self) -> tuple[str, ...]:
        return ("sum",)

    @property
    def by_rows(self) -> bool:
        return True


Optimizer = SGD | Adagrad | Adam | AdamW | FTRL
RowOptimizer = Optimizer | RowwiseAdagrad


def _pieces(*flats: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Parts of flat tensors: what is made on the way is as small, and stays in the cache. Whole ones on a GPU."""
    import torch

    size = _PIECE if flats[0].is_cpu else max(1, len(flats[0]))
    return zip(*(torch.split(flat, size) for flat in flats), strict=True)
