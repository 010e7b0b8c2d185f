"""The arithmetic of one share of a batch, the same under every strategy: forward, loss, backward.

Gradients are of the *sum* (mean loss times count), so that shares of any size add up to the gradient of the whole
batch, which is then divided by the true count once. An exception of the user's code comes out as it was raised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tricorn.errors import Diverged, JobFailed, form, note
from tricorn.state.flat import WEIGHT_DTYPES, call_model

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.strategy import Batch, Outcome

_PIECE = 65_536  # elements
_JUDGED: list[Callable[..., Any]] = []  # losses that are means over pairs of an output and its target


def placed(job: Job, value: Any, device: torch.device) -> Any:
    """A tensor, or a tuple or dict of them, on the device; floating point in the precision of the weights."""
    if isinstance(value, Tensor):
        return value.to(device, WEIGHT_DTYPES[job.precision] if value.is_floating_point() else None)
    if isinstance(value, dict):
        return {name: placed(job, item, device) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(placed(job, item, device) for item in value)
    return value


def autocast(job: Job, device: torch.device) -> torch.autocast:
    """The context in which forward and loss run: bfloat16 where the job asks for it."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=job.precision == "bfloat16")


def forward(job: Job, model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch that is not empty."""
    device = _device(model)
    with autocast(job, device):
        return call_model(model, placed(job, batch.inputs, device))


def tensors(value: Any) -> list[Tensor]:
    """All tensors in a tensor, or in tuples and dicts of such, however deep."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors(part)]


def device_of_output(output: Any) -> torch.device:
    """Where a model's output is, whether it is a tensor, a tuple or a dict."""
    return next((tensor.device for tensor in tensors(output)), torch.device("cpu"))


def loss_sum(job: Job, output: Any, batch: Batch) -> Tensor:
    """The loss of the output times the batch's count: a scalar tensor to call ``backward`` on."""
    device = device_of_output(output)
    target = placed(job, batch.target, device)
    with autocast(job, device):
        try:
            loss: Tensor = job.loss(output, target)
        except Exception as error:
            note(error, "loss", output=output, target=target, inputs=batch.inputs)
            raise
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise JobFailed(
                f"the loss gives {form(loss)}, not one number, of output {form(output)} and target {form(target)}",
                remedy='Return a tensor with the mean over the samples given, as with reduction="mean".',
            )
        if job.loss not in _JUDGED and batch.samples > 1:
            _JUDGED.append(job.loss)
            _refuse_sum(job, output, target, batch.samples // 2)
            _refuse_all_pairs(job, output, target)
    return loss * batch.count


def _refuse_sum(job: Job, output: Any, target: Any, half: int) -> None:
    """Raise JobFailed if the loss of twice ``half`` samples is the sum of the losses of the halves.

    An output that is no tensor with a row for each sample, and a loss with a ``count`` of its own, are not judged.
    """
    if type(output) is not Tensor or output.dim() == 0 or job.count is not None:
        return
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            first, second, both = (
                float(job.loss(output[start:stop], rows(target, start, stop)))
                for start, stop in ((0, half), (half, 2 * half), (0, 2 * half))
            )
    except Exception:  # a loss for batches of one size: whether it is a mean cannot be told
        return
    if abs(both) > 1e-6 and abs(both - (first + second)) < 1e-4 * abs(both):
        raise JobFailed(
            "the loss is a sum over the samples given, not their mean: it would depend on how a batch is shared out",
            remedy='Return a mean, as with reduction="mean".',
        )


def _refuse_all_pairs(job: Job, output: Any, target: Any) -> None:
    """Raise JobFailed if the loss of outputs (B, 1) and targets (B,) is one of all pairs (B, B), by broadcasting.

    Then it does not matter which target belongs to which output: reversed targets have the same loss, even beside
    outputs that are right.
    """
    if type(output) is not Tensor or type(target) is not Tensor or job.count is not None:
        return
    if output.shape == target.shape or output.numel() != target.numel() or torch.equal(target, target.flip(0)):
        return
    exact = target.double() if target.is_floating_point() else target
    right = exact.reshape(output.shape).double()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            one, other = (float(job.loss(right, each)) for each in (exact, exact.flip(0)))
    except Exception:  # outputs are of another kind than targets
        return
    if one and abs(one - other) <= 1e-12 * abs(one):  # a sum of all pairs, in another order
        raise JobFailed(
            f"the loss compares every output with every target, not each with its own: {form(output)} is broadcast "
            f"against {form(target)}",
            remedy="Give both one shape: output.squeeze(1) in the model or the loss, or target[:, None] in the data.",
        )


def forward_backward(
    job: Job, model: nn.Module, batch: Batch, before_backward: Callable[[], None] | None = None
) -> float:
    """Add the gradient of the loss sum to the parameters' ``grad`` and return the loss sum.

    A share whose count is 0 adds nothing: the mean over nothing is not a number, its part of the sum is 0.
    """
    if batch.count == 0:
        return 0.0
    total = loss_sum(job, forward(job, model, batch), batch)
    if before_backward is not None:
        before_backward()
    torch.autograd.backward(total)
    return total.item()


def portion(job: Job, batch: Batch, start: int, stop: int) -> Batch:
    """Samples [start, stop) of a batch, at least one of them."""
    inputs, target = rows(batch.inputs, start, stop), rows(batch.target, start, stop)
    count = int(job.count(inputs, target)) if job.count else stop - start
    return replace(batch, inputs=inputs, target=target, samples=stop - start, count=count)


def rows(value: Any, start: int, stop: int) -> Any:
    """Rows [start, stop) of a tensor, or of each in a tuple or dict of them."""
    if isinstance(value, dict):
        return {name: rows(item, start, stop) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return tuple(rows(item, start, stop) for item in value)
    return value[start:stop]


def judge_share(job: Job, model: nn.Module, batch: Batch, judge: Callable[[Any, Batch], None]) -> None:
    """Run the model forward on a batch, as in use and not in training, and hand the output to ``judge``."""
    if not batch.samples:
        return
    model.eval()
    try:
        with torch.no_grad():
            judge(forward(job, model, batch), batch)
    finally:
        model.train()


def check_finite(step: int, outcome: Outcome) -> None:
    """Raise Diverged if the loss of a step is not a number: before it is applied, so that the state stays good."""
    if not math.isfinite(outcome.loss_sum):
        raise Diverged(f"the loss of step {step} is {outcome.loss_sum / max(outcome.count, 1)}")


def learning_rate(job: Job, step: int) -> float:
    """The optimizer's rate for a step, counted from 0, with the job's schedule in it."""
    return float(job.optimizer.lr * schedule_factor(job, step))


def schedule_factor(job: Job, step: int) -> float:
    """What the job's schedule makes of every rate in a step, counted from 0. Raises JobFailed unless it is finite."""
    if job.schedule is None:
        return 1.0
    factor = float(job.schedule(step))
    if not math.isfinite(factor):
        raise JobFailed(
            f"the schedule gives {factor} for step {step}",
            remedy="Return a finite number, by which the learning rate is multiplied.",
        )
    return factor


def clip_factor(job: Job, squared_norm: float) -> float:
    """The factor that bounds a gradient's norm, as ``torch.nn.utils.clip_grad_norm_`` computes it."""
    return 1.0 if job.clip_norm is None else min(1.0, job.clip_norm / (math.sqrt(squared_norm) + 1e-6))


def squared_norm(flat: Tensor) -> float:
    """The squared L2 norm, summed in float64.

    In pieces that stay in the cache: ``vector_norm(dtype=float64)`` of 4 million float32 takes 43 ms, this 5 ms.
    """
    total = 0.0
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE].double()
        total += piece.dot(piece).item()
    return total


def seed_dropout(job: Job, step: int, stream: int) -> None:
    """Begin the random numbers that dropout and its like draw from in a step: a stream of their own for each number."""
    seed = (job.seed * 0x9E3779B1 + step * 0x85EBCA77 + stream) % (1 << 63)
    torch.default_generator.manual_seed(seed)
    if torch.cuda._initialized:  # torch.manual_seed keeps a stack trace for when it will be: 0.3 ms
        torch.cuda.manual_seed_all(seed)


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)  # a model whose parameters are all tables has none
    return first.device if first is not None else torch.device("cpu")
