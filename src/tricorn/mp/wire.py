"""What one stage hands to the next: a tensor, or a tuple of tensors, behind a header of fixed size.

The header comes with every value, because shapes may differ from one microbatch to the next: the last batch is
smaller, and sequences have lengths. It is a few hundred bytes. A gradient has the shape and type of the value it
belongs to and needs none.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tricorn.errors import PlanError, ProtocolError

if TYPE_CHECKING:
    from tricorn.comm.group import Group
    from tricorn.comm.lane import Handle

MAX_TENSORS = 8
MAX_DIMS = 8
MAX_BYTES = 1 << 34

_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_PER_TENSOR = 3 + MAX_DIMS  # index of the dtype, whether it wants a gradient, number of dims, dims
_HEADER = 2 + MAX_TENSORS * _PER_TENSOR  # whether it is a tuple, number of tensors, then the tensors


def obstacle(value: Any) -> str | None:
    """What about a value keeps it from being handed to the next stage; None if nothing does."""
    if not isinstance(value, Tensor | tuple | list):
        return f"a {type(value).__name__}"
    parts = tensors(value)
    if not all(isinstance(part, Tensor) for part in parts):
        return "a tuple of more than tensors"
    if len(parts) > MAX_TENSORS or any(part.ndim > MAX_DIMS for part in parts):
        return f"more than {MAX_TENSORS} tensors or {MAX_DIMS} dims"
    if unusual := [part for part in parts if part.dtype not in _DTYPES or part.layout != torch.strided]:
        return f"a tensor of {unusual[0].dtype} and {unusual[0].layout}"
    return None


def tensors(value: Any) -> tuple[Tensor, ...]:
    """The tensors that a value is made of."""
    return (value,) if isinstance(value, Tensor) else tuple(value)


def send(group: Group, value: Any, peer: int) -> list[Handle]:
    """Begin to hand on a value; its tensors must not change until waited for. Raises PlanError if it cannot travel."""
    if found := obstacle(value):
        raise PlanError(f"a stage hands on {found}; let what stands at the cut return a tensor or a tuple of tensors")
    return [group.send(part, peer) for part in (encoded(value), *(_plain(part) for part in tensors(value)))]


def receive(group: Group, peer: int, device: torch.device) -> Any:
    """The next value of ``peer``, on the device, its tensors marked to want a gradient where the sender's do."""
    header = torch.empty(_HEADER, dtype=torch.int64)
    group.receive(header, peer)
    is_tuple, like = decoded(header)
    parts = []
    for shape, dtype, wants_gradient in like:
        part = torch.empty(shape, dtype=dtype, device=device)
        group.receive(part, peer)
        parts.append(part.requires_grad_(wants_gradient))
    return tuple(parts) if is_tuple else parts[0]


def send_gradients(group: Group, value: Any, peer: int) -> list[Handle]:
    """Begin to hand back the gradients of a value that was received; one that was not used has a gradient of zero."""
    wanted = [part for part in tensors(value) if part.requires_grad]
    return [group.send(_plain(torch.zeros_like(p) if p.grad is None else p.grad), peer) for p in wanted]


def receive_gradients(group: Group, wanted: Sequence[Tensor], peer: int) -> list[Tensor]:
    """The gradients of tensors that were handed on."""
    gradients = [torch.empty(part.shape, dtype=part.dtype, device=part.device) for part in wanted]
    for gradient in gradients:
        group.receive(gradient, peer)
    return gradients


def encoded(value: Any) -> Tensor:
    """The header of a value."""
    parts = tensors(value)
    fields = [not isinstance(value, Tensor), len(parts)]
    for part in parts:
        fields += [_DTYPES.index(part.dtype), part.requires_grad, part.ndim]
        fields += [*part.shape, *[0] * (MAX_DIMS - part.ndim)]
    return torch.tensor([int(field) for field in fields] + [0] * (_HEADER - len(fields)), dtype=torch.int64)


def decoded(header: Tensor) -> tuple[bool, list[tuple[tuple[int, ...], torch.dtype, bool]]]:
    """Whether a tuple comes, and shape, type and wish for a gradient of each tensor. Raises ProtocolError."""
    is_tuple, count, *fields = header.tolist()
    if not 0 <= count <= MAX_TENSORS or (count != 1 and not is_tuple):
        raise ProtocolError(f"a stage announces {count} tensors; at most {MAX_TENSORS} are allowed")
    found = []
    for at in range(0, count * _PER_TENSOR, _PER_TENSOR):
        kind, wants_gradient, ndim, *dims = fields[at : at + _PER_TENSOR]
        if not (0 <= kind < len(_DTYPES) and 0 <= ndim <= MAX_DIMS and all(0 <= dim <= MAX_BYTES for dim in dims)):
            raise ProtocolError("a stage announces a tensor that cannot be")
        shape, dtype = tuple(dims[:ndim]), _DTYPES[kind]
        if prod(shape) * dtype.itemsize > MAX_BYTES:
            raise ProtocolError(f"a stage announces a tensor of shape {shape}; at most {MAX_BYTES} bytes are allowed")
        if wants_gradient and not (dtype.is_floating_point or dtype.is_complex):
            raise ProtocolError(f"a stage wants the gradient of a tensor of {dtype}")
        found.append((shape, dtype, bool(wants_gradient)))
    return bool(is_tuple), found


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().contiguous()
