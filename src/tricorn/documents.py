"""JSON that may be damaged: torn by a full disk or a dying process, turned by a bad one, edited by hand."""

from __future__ import annotations

import msgspec

# What reading and decoding of it may raise. Text that is not UTF-8 is no DecodeError of msgspec, nor is deep nesting.
UNREADABLE = (OSError, msgspec.DecodeError, UnicodeDecodeError, RecursionError)
