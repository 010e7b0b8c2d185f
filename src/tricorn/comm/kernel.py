"""How loops become machine code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from numba import cfunc, njit

F = TypeVar("F", bound=Callable[..., Any])


def kernel(function: F) -> F:
    """Compile with numba, without the interpreter's lock; the code is kept on disk for the next process.

    It is kept beside the module or else in the user's cache folder (NUMBA_CACHE_DIR names another); where neither
    can be written, every process compiles for itself.
    """
    compiled: F
    try:
        compiled = njit(cache=True, nogil=True, error_model="numpy")(function)
    except RuntimeError:
        compiled = njit(nogil=True, error_model="numpy")(function)
    return compiled


def callback(signature: Any, function: Callable[..., Any]) -> Any:
    """Compile for callers that know the function by its ``address`` and by nothing else; kept as by ``kernel``."""
    try:
        return cfunc(signature, cache=True)(function)
    except RuntimeError:
        return cfunc(signature)(function)
