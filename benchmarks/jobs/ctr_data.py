"""A click-through set of Criteo's shape: 26 ids of one table of a million rows, 13 numbers, a click or none.

Ids follow a power law (Zipf, 1.2) and are scrambled, so that frequent ones do not lie together. What is clicked
depends on the ids and numbers by a planted rule, with noise. NumPy only: every system reads the same.
"""

import numpy as np

FIELDS, NUMBERS, ROWS, DIM, HIDDEN = 26, 13, 1_000_000, 16, (128, 64)
BATCH, RATE = 512, 0.05
_SCRAMBLE = np.uint64(0x9E3779B97F4A7C15)


def samples(count, seed=0):
    """ids [count, 26] int64, numbers [count, 13] float32, clicks [count] float32."""
    random = np.random.default_rng(seed)
    ids = random.zipf(1.2, (count, FIELDS)).astype(np.uint64)
    ids = ((ids * _SCRAMBLE) % np.uint64(ROWS)).astype(np.int64)
    numbers = random.standard_normal((count, NUMBERS), dtype=np.float32)
    taste = ((ids.astype(np.uint64) * _SCRAMBLE) >> np.uint64(40)).astype(np.float32) / 2**24 - 0.5
    logit = taste.sum(1) * 1.5 + numbers[:, 0] - 0.5 * numbers[:, 1]
    clicks = (random.random(count) < 1 / (1 + np.exp(-logit))).astype(np.float32)
    return ids, numbers, clicks
