"""Building a model that is larger than the memory: what goes beyond a share of it is made in files.

While the user's code runs, each large new tensor beyond that share is moved to a file that has no name any more and
that the kernel can take from memory page by page. The numbers are the same, for the same operations fill them in the
same order. What a worker keeps it copies to real memory (state/flat.py), and the files end with the tensors.

A ``TorchFunctionMode``, for ``TorchDispatchMode`` imports sympy and torch._dynamo: 1.8 s.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tricorn.errors import StorageError
from tricorn.state.memory import free_file_systems, limit_bytes

LARGE = 1 << 20  # bytes of a tensor that is worth a file
SHARE = 0.25  # of a limit: as much of a model is made in memory

_UNFILLED = frozenset({torch.empty, torch.zeros, torch.empty_strided, Tensor.new_empty, Tensor.new_zeros})

_FILLING = frozenset({"fill_", "normal_", "trunc_normal_", "uniform_", "zero_", "kaiming_uniform_", "xavier_uniform_"})


@contextlib.contextmanager
def sparing(limit: int | None = None) -> Iterator[None]:
    """Make the large tensors beyond a share of ``limit`` bytes in files meanwhile; None: of what this process may have.

    Raises StorageError if there is no room for the files.
    """
    limit = limit_bytes() if limit is None else limit
    with _Sparing(sys.maxsize if limit is None else int(SHARE * limit)):
        yield


class _Sparing(TorchFunctionMode):
    def __init__(self, room: int) -> None:
        super().__init__()
        self._room = room  # bytes that may still be made in memory

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        filled = args[0] if args else kwargs.get("tensor")
        if isinstance(filled, Tensor) and filled.is_meta and getattr(func, "__name__", "") in _FILLING:
            return filled  # there is nothing to fill, and PyTorch would import torch._dynamo to do it
        made = func(*args, **kwargs)
        if isinstance(made, Tensor) and _is_large(made) and not _shares(made, (*args, *kwargs.values())):
            self._room -= made.untyped_storage().nbytes()
            if self._room < 0:
                made.data = _in_file(made.data, filled=func not in _UNFILLED)
        return made


def _is_large(made: Tensor) -> bool:
    return (
        made.layout == torch.strided
        and made.device.type == "cpu"
        and made.untyped_storage().nbytes() >= LARGE
        and made.is_contiguous()
        and made.numel() * made.itemsize == made.untyped_storage().nbytes()
    )


def _shares(made: Tensor, given: Iterable[Any]) -> bool:
    """Whether the memory is that of something given: the result of a change in place, or a view."""
    at = made.untyped_storage().data_ptr()
    return any(isinstance(value, Tensor) and value.untyped_storage().data_ptr() == at for value in given)


def _in_file(tensor: Tensor, *, filled: bool) -> Tensor:
    """The tensor in a file instead; what is not ``filled`` may be zero."""
    release()
    folder = next(free_file_systems(), Path(tempfile.gettempdir()))
    size = tensor.numel() * tensor.itemsize
    try:
        with tempfile.TemporaryFile(prefix="tricorn-", dir=folder) as file:
            os.posix_fallocate(file.fileno(), 0, size)  # a page that finds no room later would end the process
            mapped = mmap.mmap(file.fileno(), size)
    except OSError as error:
        raise StorageError(
            f"the model does not fit the memory, and its {size / 1e6:.0f} MB of weights not the disk: {error}",
            remedy=f"Free space in {folder} or set TMPDIR; under RLIMIT_AS, where files count as memory, limit the "
            "memory by a control group instead.",
        ) from None
    _files.add(mapped)
    copy = torch.frombuffer(mapped, dtype=tensor.dtype).view(tensor.shape)
    if filled:
        copy.copy_(tensor)
    return copy


_files: WeakSet[mmap.mmap] = WeakSet()  # those that tensors lie in


def release() -> None:
    """Give the memory back in which files of tensors are seen; it comes again page by page when it is looked at."""
    for mapped in _files:
        mapped.madvise(mmap.MADV_DONTNEED)
