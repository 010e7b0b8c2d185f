"""What encoding gradients takes is measured of every encoding there is."""

from __future__ import annotations

from typing import get_args

import torch

from tricorn.plan import Compression
from tricorn.planner.coding import SIDES, coding


def test_every_encoding_is_measured_and_larger_tensors_take_longer() -> None:
    torch.set_num_threads(1)
    found = dict(coding())
    assert {"none", *found} == set(get_args(Compression))
    for points in found.values():
        assert [point.x for point in points] == [4 * side * side for side in SIDES]
        assert 0 < points[0].seconds < points[-1].seconds
