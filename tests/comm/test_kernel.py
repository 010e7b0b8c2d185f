"""Machine code where there is no place to keep it."""

from __future__ import annotations

import ctypes

import pytest
from numba import types
from numba.core.caching import CacheImpl

from tricorn.comm import kernel


@pytest.fixture(params=[False, True])
def unwritable(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What numba finds when neither the module's folder nor the user's can be written."""
    if request.param:
        monkeypatch.setattr(CacheImpl, "_locator_classes", [])


def double(number: int) -> int:
    return 2 * number


@pytest.mark.usefixtures("unwritable")
def test_code_is_compiled_whether_it_can_be_kept_or_not():
    assert kernel.kernel(double)(21) == 42
    address = kernel.callback(types.int64(types.int64), double).address
    assert ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)(21) == 42
