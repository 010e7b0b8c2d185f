"""How roles talk: authentication, frames, groups of workers, and the ``torch.distributed`` backend ``tricorn``.

Importing this package makes the backend known to ``torch.distributed``: at once if PyTorch has been imported, and
otherwise as soon as it is, since a role that needs no tensors should not pay for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType

_C10D = "torch.distributed.distributed_c10d"


class _WhenImported(importlib.abc.MetaPathFinder):
    """Registers the backend when somebody imports c10d: finds it as usual, and adds a last line to it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _C10D:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.origin is not None:
            spec.loader = _Registering(name, spec.origin)
        return spec


class _Registering(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        _register(module)


def _register(c10d: ModuleType) -> None:
    def create(options: object, _: object) -> object:
        from tricorn.comm.backend import create

        return create(options)

    if "tricorn" not in c10d.Backend.backend_list:
        c10d.Backend.register_backend("tricorn", create, extended_api=True, devices=["cpu", "cuda"])


if module := sys.modules.get(_C10D):
    _register(module)
else:
    sys.meta_path.insert(0, _WhenImported())
