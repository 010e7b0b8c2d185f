"""Where samples come from, and in which order they are taken."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tricorn.data.sources import Source, arrays, as_source

__all__ = ["Source", "arrays", "as_source"]


def __getattr__(name: str) -> Any:
    # Imported on first use: the coordinator takes the order of samples from here and must not import PyTorch.
    if name in __all__:
        from tricorn.data import sources

        return getattr(sources, name)
    raise AttributeError(f"module 'tricorn.data' has no attribute {name!r}")
