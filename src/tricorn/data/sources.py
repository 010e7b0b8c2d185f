"""Sources: any data, read as batches of numbered samples.

Legend: an item is ``(inputs, target)``; ``inputs`` is a tensor, a tuple or a dict of tensors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from tricorn.errors import DataError, UsageError, users_line

Array: TypeAlias = "NDArray[Any] | Tensor"
Ids: TypeAlias = NDArray[np.int64]

_HASHED_WHOLE = 64 << 20  # bytes; more than that is sampled, so that a large array does not delay the start
_STRIDES = 1024
_NUMERIC = "biufc"  # NumPy's kinds of element types


class Source(Protocol):
    """Samples numbered from 0, fetched in batches."""

    def __len__(self) -> int: ...

    def fetch(self, ids: Ids) -> tuple[Any, Any]:
        """The samples of these numbers, at least one, as (inputs, target): tensors whose first dimension is theirs.

        Raises DataError for a sample that cannot be read or batched.
        """

    @property
    def fingerprint(self) -> str:
        """Hexadecimal; the same in every process, and another one for other data."""


def arrays(inputs: Any, target: Array) -> Source:
    """Samples held in memory: row i of every array belongs to sample i.

    ``inputs`` is a NumPy array or tensor, or a tuple or dict of them. Memory is shared with what is given where
    possible; element types stay as they are. Raises UsageError if the first dimensions differ or if a value is
    not numeric.
    """
    return _Arrays(_mapped(_as_tensor, inputs), _as_tensor(target))


def as_source(data: Any) -> Source:
    """Any map-style ``torch.utils.data.Dataset`` (or sequence) of items as a source; a source as it is."""
    source: Source = data if hasattr(data, "fetch") else _Items(data)
    return source


class _Arrays:
    def __init__(self, inputs: Any, target: Tensor) -> None:
        sizes = {name: tensor.shape[0] if tensor.ndim else None for name, tensor in _named(inputs, target)}
        if None in sizes.values() or len(set(sizes.values())) > 1:
            shown = ", ".join(f"{name} {'a single number' if n is None else n}" for name, n in sizes.items())
            raise UsageError(
                f"the arrays have different numbers of samples: {shown}",
                remedy="Give arrays whose first dimension is the same number of samples.",
            )
        self.inputs, self.target = inputs, target

    def __len__(self) -> int:
        return len(self.target)

    def fetch(self, ids: Ids) -> tuple[Any, Any]:
        rows = torch.from_numpy(ids)
        return _mapped(lambda tensor: tensor.index_select(0, rows), self.inputs), self.target.index_select(0, rows)

    @cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in _named(self.inputs, self.target):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            for part in _sampled(tensor):
                digest.update(part)
        return digest.hexdigest()


class _Items:
    """Items fetched one by one from a map-style dataset and batched as ``torch.utils.data.DataLoader`` does."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def fetch(self, ids: Ids) -> tuple[Any, Any]:
        items = [self._checked(sample) for sample in ids.tolist()]
        inputs, target = map(list, zip(*items, strict=True))
        if isinstance(inputs[0], tuple | list):
            columns = zip(*inputs, strict=True)
            return tuple(default_collate(list(column)) for column in columns), default_collate(target)
        return default_collate(inputs), default_collate(target)

    @cached_property
    def fingerprint(self) -> str:
        # Of the form only: a dataset that augments its samples at random gives other values in every process.
        text = f"{type(self.dataset).__qualname__} {len(self)} {self._first}"
        return hashlib.sha256(text.encode()).hexdigest()

    @cached_property
    def _first(self) -> dict[str, str]:
        return self._read(0)[1]

    def _checked(self, sample: int) -> Any:
        """The item, which has the form of the first: so one that differs is named whatever its batch."""
        item, form = self._read(sample)
        for name in {**self._first, **form} if form != self._first else ():
            here, first = form.get(name, "missing"), self._first.get(name, "missing")
            if here != first:
                message = f"{name} of sample {sample} is {here}, but of sample 0 it is {first}"
                raise DataError(message, where=_definition(self.dataset))
        return item

    def _read(self, sample: int) -> tuple[Any, dict[str, str]]:
        try:
            item = self.dataset[sample]
        except Exception as error:
            message = f"sample {sample} cannot be read: {type(error).__name__}: {error}"
            raise DataError(message, where=users_line(error)) from error
        try:
            return item, _form(item)
        except TypeError as error:
            raise DataError(f"sample {sample} cannot be batched: {error}", where=_definition(self.dataset)) from None


def _as_tensor(value: Array) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    array = np.asarray(value)
    if array.dtype.kind not in _NUMERIC:
        raise UsageError(
            f"an array of {array.dtype} is not numeric", remedy="Turn it into numbers of one type, such as float32."
        )
    # PyTorch can share neither read-only memory nor negative strides nor another byte order.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="), order="C")
    return torch.from_numpy(array)


def _mapped(function: Callable[[Any], Any], inputs: Any) -> Any:
    """Inputs of the same structure, the function applied to each tensor."""
    if isinstance(inputs, Mapping):
        return {name: function(value) for name, value in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(function(value) for value in inputs)
    return function(inputs)


def _named(inputs: Any, target: Any) -> Iterator[tuple[str, Any]]:
    """Each tensor of an item under the name that a message calls it by."""
    if isinstance(inputs, Mapping):
        yield from ((f"inputs[{name!r}]", value) for name, value in inputs.items())
    elif isinstance(inputs, tuple | list):
        yield from ((f"inputs[{index}]", value) for index, value in enumerate(inputs))
    else:
        yield "inputs", inputs
    yield "target", target


def _form(item: Any) -> dict[str, str]:
    """The shape and type of each tensor of an item. Raises TypeError if it is no item."""
    if not isinstance(item, tuple | list):
        raise TypeError(
            f"it is a {type(item).__name__} instead of (inputs, target); "
            "whole arrays or tensors are given as tricorn.data.arrays(inputs, target)"
        )
    if len(item) != 2:
        raise TypeError(f"it is a {type(item).__name__} of {len(item)} values instead of (inputs, target)")
    return {name: _form_of(name, value) for name, value in _named(*item)}


def _form_of(name: str, value: Any) -> str:
    if isinstance(value, Tensor) or (isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _NUMERIC):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"
    if isinstance(value, bool | int | float):
        return type(value).__name__
    raise TypeError(f"its {name} is a {type(value).__name__} instead of a tensor, an array of numbers or a number")


def _definition(dataset: Any) -> str:
    code = getattr(type(dataset).__getitem__, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno} in {code.co_qualname}" if code else ""


def _sampled(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, or evenly strided runs of them if there are too many."""
    flat = tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy()
    if flat.nbytes <= _HASHED_WHOLE:
        yield flat.data
        return
    length = _HASHED_WHOLE // _STRIDES
    for start in np.linspace(0, flat.nbytes - length, _STRIDES, dtype=np.int64).tolist():
        yield flat[start : start + length].data
