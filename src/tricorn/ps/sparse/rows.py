"""Optimizer steps on the rows of some ids, where they lie: one kernel for each kind.

A row's numbers are its weights and then its slots. Each step is what ``torch.optim`` does for sparse gradients
(SGD, Adagrad, SparseAdam) or would do if only the given rows existed (momentum, weight decay, AdamW); sums are
rounded where PyTorch rounds them. Adam's bias correction takes the step of the whole run, as SparseAdam does, not
how often the row was updated.

``numbers`` has all rows, one every ``stride`` elements, the first number of the first at ``first``; a place below 0
is a row that there is not. ``constants`` are of the rows' type.

Legend: U ids, D elements of a row.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tricorn.comm.kernel import kernel
from tricorn.optim import FTRL, SGD, Adagrad, Adam, AdamW, RowOptimizer, RowwiseAdagrad
from tricorn.ps.sparse.index import Places
from tricorn.ps.sparse.kernel import fma

Numbers = NDArray[Any]
Step = Callable[[Numbers, int, int, Places, Numbers, Numbers], None]


def slot_widths(optimizer: RowOptimizer, dim: int) -> dict[str, int]:
    """How many numbers a row has in each slot, in the order in which they lie."""
    return {slot: 1 if isinstance(optimizer, RowwiseAdagrad) else dim for slot in optimizer.slots}


def step_of(optimizer: RowOptimizer, step: int, lr: float) -> tuple[Step, list[float]]:
    """The kernel and the constants of one step; ``step`` counts from 1, ``lr`` has the schedule in it."""
    match optimizer:
        case SGD(momentum=0.0):
            return _sgd, [lr, optimizer.weight_decay]
        case SGD():
            return _momentum, [lr, optimizer.weight_decay, optimizer.momentum, optimizer.nesterov]
        case Adagrad():
            return _adagrad, [lr / (1 + (step - 1) * optimizer.lr_decay), optimizer.weight_decay, optimizer.eps]
        case Adam():
            beta1, beta2 = optimizer.betas
            rate = lr * math.sqrt(1 - beta2**step) / (1 - beta1**step)
            decoupled = isinstance(optimizer, AdamW)
            kept = 1 - lr * optimizer.weight_decay if decoupled else 1.0
            added = 0.0 if decoupled else optimizer.weight_decay
            return _adam, [rate, 1 - beta1, 1 - beta2, optimizer.eps, kept, added]
        case FTRL():
            return _ftrl, [lr, lr * optimizer.l1, optimizer.beta + lr * optimizer.l2]
        case RowwiseAdagrad():
            return _rowwise_adagrad, [lr, optimizer.eps]


@kernel
def _sgd(numbers: Numbers, stride: int, first: int, places_U: Places, grads_UD: Numbers, constants: Numbers) -> None:
    rate, decay = -constants[0], constants[1]
    dim = grads_UD.shape[1]
    for u in range(len(places_U)):
        if places_U[u] >= 0:
            at = places_U[u] * stride + first
            w_D, g_D = numbers[at : at + dim], grads_UD[u]
            if decay == 0:
                for d in range(dim):
                    w_D[d] = fma(rate, g_D[d], w_D[d])
            else:
                for d in range(dim):
                    w_D[d] = fma(rate, fma(decay, w_D[d], g_D[d]), w_D[d])


@kernel
def _momentum(
    numbers: Numbers, stride: int, first: int, places_U: Places, grads_UD: Numbers, constants: Numbers
) -> None:
    rate, decay, momentum, nesterov = -constants[0], constants[1], constants[2], constants[3]
    dim = grads_UD.shape[1]
    for u in range(len(places_U)):
        if places_U[u] >= 0:
            at = places_U[u] * stride + first
            w_D, m_D, g_D = numbers[at : at + dim], numbers[at + dim : at + 2 * dim], grads_UD[u]
            for d in range(dim):
                g = fma(decay, w_D[d], g_D[d])
                m_D[d] = momentum * m_D[d] + g
                w_D[d] = fma(rate, fma(momentum, m_D[d], g) if nesterov else m_D[d], w_D[d])


@kernel
def _adagrad(
    numbers: Numbers, stride: int, first: int, places_U: Places, grads_UD: Numbers, constants: Numbers
) -> None:
    rate, decay, eps = -constants[0], constants[1], constants[2]
    dim = grads_UD.shape[1]
    for u in range(len(places_U)):
        if places_U[u] >= 0:
            at = places_U[u] * stride + first
            w_D, sum_D, g_D = numbers[at : at + dim], numbers[at + dim : at + 2 * dim], grads_UD[u]
            for d in range(dim):
                g = fma(decay, w_D[d], g_D[d])
                sum_D[d] += g * g
                w_D[d] = fma(rate, g / (np.sqrt(sum_D[d]) + eps), w_D[d])


@kernel
def _adam(numbers: Numbers, stride: int, first: int, places_U: Places, grads_UD: Numbers, constants: Numbers) -> None:
    rate, new1, new2, eps, kept, added = (
        -constants[0], constants[1], constants[2], constants[3], constants[4], constants[5],
    )  # fmt: skip
    dim = grads_UD.shape[1]
    for u in range(len(places_U)):
        if places_U[u] >= 0:
            at = places_U[u] * stride + first
            w_D, g_D = numbers[at : at + dim], grads_UD[u]
            m_D, v_D = numbers[at + dim : at + 2 * dim], numbers[at + 2 * dim : at + 3 * dim]
            for d in range(dim):
                g = fma(added, w_D[d], g_D[d])
                m_D[d] += (g - m_D[d]) * new1
                v_D[d] += (g * g - v_D[d]) * new2
                w_D[d] = w_D[d] * kept + rate * (m_D[d] / (np.sqrt(v_D[d]) + eps))


@kernel
def _ftrl(numbers: Numbers, stride: int, first: int, places_U: Places, grads_UD: Numbers, constants: Numbers) -> None:
    rate, l1, floor = constants[0], constants[1], constants[2]
    dim = grads_UD.shape[1]
    for u in range(len(places_U)):
        if places_U[u] >= 0:
            at = places_U[u] * stride + first
            w_D, g_D = numbers[at : at + dim], grads_UD[u]
            z_D, n_D = numbers[at + dim : at + 2 * dim], numbers[at + 2 * dim : at + 3 * dim]
            for d in range(dim):
                before = np.sqrt(n_D[d])
                n_D[d] += g_D[d] * g_D[d]
                root = np.sqrt(n_D[d])
                z_D[d] += rate * g_D[d] - (root - before) * w_D[d]
                beyond = max(abs(z_D[d]) - l1, 0 * l1)
                w_D[d] = -np.sign(z_D[d]) * beyond / (root + floor)


@kernel
def _rowwise_adagrad(
    numbers: Numbers, stride: int, first: int, places_U: Places, grads_UD: Numbers, constants: Numbers
) -> None:
    rate, eps = constants[0], constants[1]
    dim = grads_UD.shape[1]
    for u in range(len(places_U)):
        if places_U[u] >= 0:
            at = places_U[u] * stride + first
            w_D, g_D = numbers[at : at + dim], grads_UD[u]
            squares = 0 * rate
            for d in range(dim):
                squares += g_D[d] * g_D[d]
            numbers[at + dim] += squares / numbers.dtype.type(dim)
            scaled = -rate / (np.sqrt(numbers[at + dim]) + eps)
            for d in range(dim):
                w_D[d] = fma(scaled, g_D[d], w_D[d])
