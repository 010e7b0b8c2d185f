"""What one stage hands to the next: a tensor, or a tuple of tensors, and its gradients on the way back.

Shapes may differ from one microbatch to the next, for the last batch is smaller, and sequences have lengths. So the
first value of each kind comes with a header of some hundred bytes that announces it, and every later one only with the
number of its kind. A gradient has the shape and type of the value it belongs to and needs neither.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from tricorn.errors import PlanError, ProtocolError

if TYPE_CHECKING:
    from tricorn.comm.group import Group
    from tricorn.comm.lane import Handle
    from tricorn.mp.schedule import Parcel

MAX_TENSORS = 8
MAX_DIMS = 8
MAX_BYTES = 1 << 34
MOST_KINDS = 256  # to be remembered; of more, each value comes with its header

_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_CPU = torch.device("cpu")
_PER_TENSOR = 3 + MAX_DIMS  # index of the dtype, whether it wants a gradient, number of dims, dims
_HEADER = 2 + MAX_TENSORS * _PER_TENSOR  # whether it is a tuple, number of tensors, then the tensors


class TensorKind(NamedTuple):
    """One tensor of a value."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    wants_gradient: bool


class Kind(NamedTuple):
    """All that must be known of a value to receive it."""

    is_tuple: bool
    parts: tuple[TensorKind, ...]

    @property
    def wanted(self) -> list[TensorKind]:
        """The parts that want a gradient."""
        return [part for part in self.parts if part.wants_gradient]


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


def wanted(value: Any) -> list[Tensor]:
    """The tensors of a value that want a gradient."""
    return [part for part in tensors(value) if part.requires_grad]


class Wire:
    """What one rank exchanges with the others in line.

    Parcels come from each peer in the order in which it sends them, which need not be that in which they are needed:
    one that comes early is kept. Sending takes place beside what is computed. ``waited``: seconds spent on receiving,
    and on sends that were not over by then.
    """

    def __init__(self, line: Group, device: torch.device) -> None:
        self.waited = 0.0
        self._line = line
        self._device = device
        self._announced: dict[int, list[Kind]] = {}  # to and from this rank, by the stage that the values are for
        self._numbers = torch.arange(MOST_KINDS + 1)
        self._sends: list[Handle] = []
        self._expected: dict[int, deque[Parcel]] = {}
        self._kept: dict[Parcel, Any] = {}
        self._owed: dict[tuple[int, int], Kind] = {}  # by stage and microbatch: what was handed on and wants gradients

    def expect(self, arrivals: Mapping[int, Sequence[Parcel]]) -> None:
        """What comes in the next step, from each peer and in its order."""
        self._expected = {peer: deque(parcels) for peer, parcels in arrivals.items()}

    def flush(self) -> None:
        """Wait until all that was sent is out of this rank's memory. Raises PeerLost."""
        sends, self._sends = self._sends, []
        began = time.perf_counter()
        for handle in sends:
            handle.wait()
        self.waited += time.perf_counter() - began

    def send(self, value: Any, parcel: Parcel) -> None:
        """Begin to hand on a value; its tensors must not change until flushed. Raises PlanError if it cannot travel."""
        if found := obstacle(value):
            raise PlanError(f"a stage hands on {found}; let what is at the cut return a tensor or a tuple of tensors")
        kind = kind_of(value)
        known = self._announced.setdefault(parcel.stage, [])
        number = known.index(kind) if kind in known else len(known)
        messages = [self._numbers[number : number + 1]]
        if number == len(known):
            messages.append(encoded(kind))
            known[number:] = [kind] if number < MOST_KINDS else []
        self._owed[parcel.stage - 1, parcel.microbatch] = kind
        self._post([*messages, *(_plain(part) for part in tensors(value))], parcel)

    def send_gradients(self, gradients: Sequence[Tensor | None], value: Kind, parcel: Parcel) -> None:
        """Begin to hand back the gradients of a value of that kind, of what wants one in it; None is zero."""
        made = [
            torch.zeros(part.shape, dtype=part.dtype, device=self._device) if gradient is None else _plain(gradient)
            for gradient, part in zip(gradients, value.wanted, strict=True)
        ]
        self._post(made, parcel)

    def receive(self, parcel: Parcel) -> Any:
        """The value, its tensors marked to want a gradient where the sender's do; or the gradients, as a list."""
        if parcel not in self._kept:
            peer = next(peer for peer, parcels in self._expected.items() if parcel in parcels)
            while parcel not in self._kept:
                coming = self._expected[peer].popleft()
                self._kept[coming] = self._value(peer, coming) if coming.kind == "F" else self._gradients(peer, coming)
        return self._kept.pop(parcel)

    def _post(self, messages: Sequence[Tensor], parcel: Parcel) -> None:
        self._sends += [self._line.send(message, parcel.stage % self._line.size) for message in messages]

    def _value(self, peer: int, parcel: Parcel) -> Any:
        number = int(self._take(peer, (1,), torch.int64, on=_CPU))
        known = self._announced.setdefault(parcel.stage, [])
        if not 0 <= number <= len(known):
            raise ProtocolError(f"a stage hands on a value of kind {number}, but has announced {len(known)}")
        if number == len(known):
            kind = decoded(self._take(peer, (_HEADER,), torch.int64, on=_CPU))
            known[number:] = [kind] if number < MOST_KINDS else []
        else:
            kind = known[number]
        parts = [self._take(peer, part.shape, part.dtype).requires_grad_(part.wants_gradient) for part in kind.parts]
        return tuple(parts) if kind.is_tuple else parts[0]

    def _gradients(self, peer: int, parcel: Parcel) -> list[Tensor]:
        kind = self._owed.pop((parcel.stage, parcel.microbatch))
        return [self._take(peer, part.shape, part.dtype) for part in kind.wanted]

    def _take(self, peer: int, shape: Sequence[int], dtype: torch.dtype, on: torch.device | None = None) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype, device=on or self._device)
        began = time.perf_counter()
        self._line.receive(tensor, peer)
        self.waited += time.perf_counter() - began
        return tensor


def kind_of(value: Any) -> Kind:
    """The kind of a value that can travel."""
    parts = tuple(TensorKind(tuple(part.shape), part.dtype, part.requires_grad) for part in tensors(value))
    return Kind(not isinstance(value, Tensor), parts)


def encoded(kind: Kind) -> Tensor:
    """The header that announces a kind."""
    fields = [int(kind.is_tuple), len(kind.parts)]
    for part in kind.parts:
        fields += [_DTYPES.index(part.dtype), int(part.wants_gradient), len(part.shape)]
        fields += [*part.shape, *[0] * (MAX_DIMS - len(part.shape))]
    return torch.tensor(fields + [0] * (_HEADER - len(fields)), dtype=torch.int64)


def decoded(header: Tensor) -> Kind:
    """The kind that a header announces. Raises ProtocolError if there can be none such."""
    is_tuple, count, *fields = header.tolist()
    if not 0 <= count <= MAX_TENSORS or (count != 1 and not is_tuple):
        raise ProtocolError(f"a stage announces {count} tensors; at most {MAX_TENSORS} are allowed")
    parts = []
    for at in range(0, count * _PER_TENSOR, _PER_TENSOR):
        dtype_number, wants_gradient, ndim, *dims = fields[at : at + _PER_TENSOR]
        plausible = 0 <= dtype_number < len(_DTYPES) and 0 <= ndim <= MAX_DIMS
        if not (plausible and all(0 <= dim <= MAX_BYTES for dim in dims)):
            raise ProtocolError("a stage announces a tensor that cannot be")
        shape, dtype = tuple(dims[:ndim]), _DTYPES[dtype_number]
        if prod(shape) * dtype.itemsize > MAX_BYTES:
            raise ProtocolError(f"a stage announces a tensor of shape {shape}; at most {MAX_BYTES} bytes are allowed")
        if wants_gradient and not (dtype.is_floating_point or dtype.is_complex):
            raise ProtocolError(f"a stage wants the gradient of a tensor of {dtype}")
        parts.append(TensorKind(shape, dtype, bool(wants_gradient)))
    return Kind(bool(is_tuple), tuple(parts))


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().contiguous()
