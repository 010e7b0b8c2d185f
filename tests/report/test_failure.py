from __future__ import annotations

import io

from tricorn.errors import Interrupted, PeerLost, TricornError, UserCodeError
from tricorn.report.failure import show


def shown(error: TricornError) -> str:
    stream = io.StringIO()
    show(error, stream)
    return stream.getvalue()


def test_an_error_ends_with_the_users_line_and_the_remedy() -> None:
    error = UserCodeError("ZeroDivisionError: division by zero", where="net.py:12 in forward: x / 0")
    assert shown(error).splitlines() == [
        "",
        "error: ZeroDivisionError: division by zero",
        "where: net.py:12 in forward: x / 0",
        f"what to do: {UserCodeError.remedy}",
    ]


def test_an_interruption_is_no_error() -> None:
    assert shown(Interrupted("interrupted by the user at step 7", remedy="Go on with `x`.")).splitlines() == [
        "",
        "interrupted by the user at step 7",
        "Go on with `x`.",
    ]


def test_what_is_not_known_is_not_shown() -> None:
    assert shown(PeerLost("worker-1 is gone")) == "\nerror: worker-1 is gone\n"
