"""The order of samples: a permutation that is computed, never stored, and the steps that an epoch is cut into.

The order follows from (seed, epoch, fingerprint of the data, size) alone, so any role can compute any part of
it, and no number of workers changes it.

The permutation is a Feistel network over Z_a x Z_b with a*b just above the size (Black and Rogaway 2002,
"Ciphers with arbitrary finite domains": the generalised Feistel cipher, and cycle walking for the few values
that fall outside). The round function is the finaliser of SplitMix64 (Steele, Lea and Flood 2014).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from math import isqrt
from typing import TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ids: TypeAlias = NDArray[np.int64]
_Words: TypeAlias = NDArray[np.uint64]
_Cipher: TypeAlias = Callable[[_Words], _Words]

_ROUNDS = 8


class Permutation:
    """A bijection of [0, size): ``ids(0, size)`` is the order in which an epoch takes its samples."""

    def __init__(self, seed: int, epoch: int, fingerprint: str, size: int) -> None:
        """Raises ValueError unless 1 <= size < 2**62."""
        if not 1 <= size < 2**62:
            raise ValueError(f"a permutation of {size} samples; give from 1 to below 2**62")
        self.size = size
        rows = isqrt(size - 1) + 1
        self._rows, self._columns = np.uint64(rows), np.uint64(-(-size // rows))
        digest = hashlib.shake_256(f"{seed}/{epoch}/{fingerprint}/{size}".encode()).digest(8 * _ROUNDS)
        self._keys = np.frombuffer(digest, dtype="<u8").astype(np.uint64)

    def ids(self, start: int, stop: int) -> Ids:
        """The samples at positions [start, stop)."""
        return self.at(np.arange(start, stop))

    def at(self, positions: ArrayLike) -> Ids:
        """The samples at these positions, of any shape. Raises IndexError outside [0, size)."""
        return self._walk(positions, self._encrypt)

    def position(self, ids: ArrayLike) -> Ids:
        """The inverse: at which positions these samples are taken. Raises IndexError outside [0, size)."""
        return self._walk(ids, self._decrypt)

    def _walk(self, values: ArrayLike, cipher: _Cipher) -> Ids:
        given = np.asarray(values, dtype=np.int64)
        if given.size and not (given.min() >= 0 and given.max() < self.size):
            raise IndexError(f"positions from {given.min()} to {given.max()} of a permutation of {self.size}")
        found = cipher(given.astype(np.uint64).reshape(-1))
        while (outside := found >= self.size).any():
            found[outside] = cipher(found[outside])
        return found.astype(np.int64).reshape(given.shape)

    def _encrypt(self, words: _Words) -> _Words:
        left, right = words // self._columns, words % self._columns
        for key_left, key_right in self._keys.reshape(-1, 2):
            left = _wrapped(left + _mixed(right ^ key_left) % self._rows, self._rows)
            right = _wrapped(right + _mixed(left ^ key_right) % self._columns, self._columns)
        return left * self._columns + right

    def _decrypt(self, words: _Words) -> _Words:
        left, right = words // self._columns, words % self._columns
        for key_left, key_right in self._keys.reshape(-1, 2)[::-1]:
            right = _wrapped(right + self._columns - _mixed(left ^ key_right) % self._columns, self._columns)
            left = _wrapped(left + self._rows - _mixed(right ^ key_left) % self._rows, self._rows)
        return left * self._columns + right


def _wrapped(words: _Words, size: np.uint64) -> _Words:
    """Words below twice the size, modulo it: what is below it turns into a huge number when it is taken away."""
    wrapped: _Words = np.minimum(words, words - size)
    return wrapped


def _mixed(words: _Words) -> _Words:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def steps_per_epoch(size: int, batch_size: int) -> int:
    """How many steps take ``size`` samples; the last may be ragged."""
    return -(-size // batch_size)


def step_range(step: int, size: int, batch_size: int) -> tuple[int, int, int]:
    """(epoch, start, stop): the positions [start, stop) in that epoch's order which a step takes, all from 0.

    A step never crosses the end of an epoch: the last one of each takes what is left.
    """
    epoch, index = divmod(step, steps_per_epoch(size, batch_size))
    start = index * batch_size
    return epoch, start, min(start + batch_size, size)
