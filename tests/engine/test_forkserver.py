"""What is said of a role that was killed."""

from __future__ import annotations

import pytest

from tricorn.engine.forkserver import want_of_memory


@pytest.mark.parametrize(
    ("before", "now", "limit", "said"),
    [
        (1, 1, 10**9, ""),
        (1, 2, 10**9, " for want of memory: it may have 1,000 MB; `tricorn plan` lists what each plan needs"),
        (0, 2, None, " for want of memory; `tricorn plan` lists what each plan needs"),
        (None, 1, 10**9, ", perhaps for want of memory"),
        (1, None, 10**9, ", perhaps for want of memory"),
    ],
)
def test_a_role_killed_by_the_kernel_lacked_memory(before, now, limit, said):
    assert want_of_memory(before, now, limit) == said
