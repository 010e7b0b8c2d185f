"""A model's trainable parameters, gradients and optimizer slots, each laid end to end in one flat tensor.

One flat tensor means one fused optimizer call, one copy and one message, however many parameters there are.

Legend: N elements of all trainable parameters together.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tricorn.errors import note
from tricorn.state.build import sparing
from tricorn.state.rows import begin_rows
from tricorn.state.runs import Runs, matches
from tricorn.state.shards import CheckpointReader, Piece
from tricorn.state.slabs import Slab, slab_of

if TYPE_CHECKING:
    from tricorn.job import Job
    from tricorn.optim import Optimizer

_DRAWING = threading.Lock()  # models draw from the generator that all threads of a process share
OUTER_PREFIX = "outer"  # of the slots, in a checkpoint, of an optimizer that acts on what local updates came to
WEIGHT_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.float32}


@dataclass(frozen=True)
class Entry:
    """Where a parameter, or the ``slab`` of it that is here, lies in the flat tensors: elements [start, stop)."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    slab: Slab | None = None

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of the user's parameter."""
        return self.slab.shape if self.slab else self.shape


def layout(named: Iterable[tuple[str, Sequence[int]]]) -> tuple[Entry, ...]:
    """Lay parameters of the given shapes end to end."""
    entries, start = [], 0
    for name, shape in named:
        stop = start + prod(shape)
        entries.append(Entry(name, tuple(shape), start, stop))
        start = stop
    return tuple(entries)


def build_model(job: Job) -> nn.Module:
    """The job's model with the initial weights of its seed, in the job's precision, on the CPU."""
    model = model_without_rows(job)
    begin_rows(job, model)
    return model


def model_without_rows(job: Job) -> nn.Module:
    """As ``build_model``, but the tables that the job declares have not the rows that they begin with."""
    with _DRAWING, sparing():
        torch.manual_seed(job.seed)
        model: nn.Module = job.model()
        return model.to(WEIGHT_DTYPES[job.precision]).train()


def device_of(job: Job) -> torch.device:
    """The device a worker computes on. ``auto`` takes CUDA where there is any."""
    if job.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(job.device)


def trained_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters that training changes, by name, in the order of the module."""
    return [(name, p) for name, p in module.named_parameters() if p.requires_grad]


class FlatParameters:
    """Owns the flat weights and gradients of a module, whose parameters and gradients become views into them.

    ``weights_N`` and ``grads_N`` have N elements, on the module's device.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        module.to(device)
        self.module = module
        self._place(trained_parameters(module), device)

    def arrange(self, names: Sequence[str]) -> None:
        """Lay the parameters, given by all their names, end to end in that order. Gradients are cleared."""
        trained = dict(trained_parameters(self.module))
        self._place([(name, trained[name]) for name in names], self.weights_N.device)

    def _place(self, trained: Sequence[tuple[str, nn.Parameter]], device: torch.device) -> None:
        laid = layout((name, p.shape) for name, p in trained)
        self.entries = tuple(replace(entry, slab=slab_of(p)) for entry, (_, p) in zip(laid, trained, strict=True))
        dtype = trained[0][1].dtype if trained else torch.float32
        size = self.entries[-1].stop if trained else 0
        self.weights_N = torch.empty(size, dtype=dtype, device=device)
        self.grads_N = torch.zeros_like(self.weights_N)
        for entry, (_, parameter) in zip(self.entries, trained, strict=True):
            view = self.weights_N[entry.start : entry.stop].view(entry.shape)
            view.copy_(parameter.detach())
            parameter.data = view
            parameter.grad = self.grads_N[entry.start : entry.stop].view(entry.shape)

    def buffer_pieces(self) -> list[Piece]:
        """Copies of the module's buffers."""
        return buffer_pieces(self.module)

    def load_buffers(self, reader: CheckpointReader) -> None:
        """As the function of that name."""
        load_buffers(self.module, reader)


class FlatState(FlatParameters):
    """The state of a module: weights, gradients and optimizer slots.

    Each of ``slots`` has N elements, on the module's device, or as many as there are in ``own``, the elements that
    are updated here; ``step`` is the number of updates in the weights.
    """

    def __init__(
        self, module: nn.Module, optimizer: Optimizer, device: torch.device, *, share: tuple[int, int] = (0, 1)
    ) -> None:
        """``share`` (i, n): what is updated here is part i of n equal parts, counted from 0."""
        super().__init__(module, device)
        self.optimizer = optimizer
        size, (index, parts) = len(self.weights_N), share
        self.bounds = [size * part // parts for part in range(parts + 1)]
        self.own = slice(self.bounds[index], self.bounds[index + 1])
        self.slots = {slot: torch.zeros_like(self.weights_N[self.own]) for slot in optimizer.slots}
        self.step = 0

    def arrange(self, names: Sequence[str]) -> None:
        """Lay the parameters, given by all their names, end to end in that order, and the slots alike."""
        old = {entry.name: entry for entry in self.entries}
        super().arrange(names)
        self.slots = {
            slot: torch.cat([flat[old[name].start : old[name].stop] for name in names])
            for slot, flat in self.slots.items()
        }

    def update(self, *, lr: float) -> None:
        """Apply the gradient in ``grads_N`` as the next update of what is ``own``, and clear it."""
        own = self.own
        self.optimizer.update(self.weights_N[own], self.grads_N[own], self.slots, step=self.step + 1, lr=lr)
        self.step += 1
        self.grads_N.zero_()

    def tensors(self) -> dict[str, Tensor]:
        """The flat tensors of what is ``own``, by prefix: what a peer needs to hold the same state."""
        return {"param": self.weights_N[self.own]} | {f"optim/{slot}": t for slot, t in self.slots.items()}

    def pieces(self) -> list[Piece]:
        """Copies of what is ``own`` and of the buffers, ready to be written while training goes on."""
        return flat_pieces(self.tensors(), self.entries, self.own.start, self.own.stop) + self.buffer_pieces()

    def load(self, reader: CheckpointReader) -> None:
        """Take the state from a checkpoint written under any strategy and any number of workers.

        Raises UsageError if it is that of a model with other shapes, CheckpointDamaged if a part is not there.
        """
        fill(reader, {"param": self.weights_N}, self.entries)
        slots = {f"optim/{slot}": flat for slot, flat in self.slots.items()}
        fill(reader, slots, self.entries, self.own.start, self.own.stop)
        self.load_buffers(reader)
        self.step = reader.step
        self.grads_N.zero_()


def buffer_pieces(module: nn.Module) -> list[Piece]:
    """Copies of the module's buffers."""
    return [
        piece
        for name, buffer in module.named_buffers()
        for piece in flat_pieces({"buffer": buffer.flatten()}, [_entry_of(name, buffer)])
    ]


def load_buffers(module: nn.Module, reader: CheckpointReader) -> None:
    """Take the module's buffers from a checkpoint; one that it does not hold stays as it is.

    Raises UsageError if one has another shape there.
    """
    for name, buffer in module.named_buffers():
        if f"buffer/{name}" in reader:
            flat = buffer.flatten()
            fill(reader, {"buffer": flat}, [_entry_of(name, buffer)])
            buffer.copy_(flat.view(buffer.shape))


def _entry_of(name: str, buffer: Tensor) -> Entry:
    return Entry(name, tuple(buffer.shape), 0, buffer.numel(), slab_of(buffer))


def flat_pieces(
    flats: dict[str, Tensor], entries: Sequence[Entry], start: int = 0, stop: int | None = None
) -> list[Piece]:
    """The pieces of elements [start, stop) of the flat layout, copied to the CPU.

    ``flats`` maps a prefix to a tensor of ``stop - start`` elements.
    """
    places = list(_places(entries, start, stop))
    found = []
    for prefix, flat in flats.items():
        copy = flat.detach().to("cpu", copy=True)
        for entry, there, here in places:
            found.append(Piece.of(f"{prefix}/{entry.name}", entry.whole, there, here.of(copy).reshape(-1)))
    return found


def fill(
    reader: CheckpointReader,
    flats: dict[str, Tensor],
    entries: Sequence[Entry],
    start: int = 0,
    stop: int | None = None,
) -> None:
    """Take elements [start, stop) of the flat layout from a checkpoint; raises as ``CheckpointReader.read_part``.

    ``flats`` maps a prefix to a contiguous tensor of ``stop - start`` elements.
    """
    places = list(_places(entries, start, stop))
    for prefix, flat in flats.items():
        for entry, there, here in places:
            part = reader.read_part(f"{prefix}/{entry.name}", entry.whole, there)
            here.of(flat).copy_(part.view(here.times, here.length))


def _places(entries: Sequence[Entry], start: int, stop: int | None) -> Iterator[tuple[Entry, Runs, Runs]]:
    """Where elements [start, stop) of the flat layout lie in the user's parameters, and where counted from start."""
    for entry in entries:
        low = max(entry.start, start)
        high = entry.stop if stop is None else min(entry.stop, stop)
        for there, here in matches(entry.slab, low - entry.start, high - entry.start):
            yield entry, there, here._replace(start=here.start + entry.start - start)


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Hand inputs to the model as argument, arguments or keyword arguments."""
    try:
        if isinstance(inputs, dict):
            return model(**inputs)
        if isinstance(inputs, tuple | list):
            return model(*inputs)
        return model(inputs)
    except Exception as error:
        note(error, "model", inputs=inputs)
        raise
