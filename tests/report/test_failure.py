from __future__ import annotations

import io
import shlex

import pytest

from tricorn.errors import Interrupted, PeerLost, TricornError, UserCodeError
from tricorn.report.failure import located, show


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


@pytest.mark.parametrize(
    ("run", "python", "way"),
    [
        ("runs/1", False, "tricorn train --resume runs/1"),
        ("my RUN's/1", False, """tricorn train --resume 'my RUN'"'"'s/1'"""),
        ("runs/1", True, "tricorn.train(job, resume='runs/1')"),
        ("my RUN's/1", True, """tricorn.train(job, resume="my RUN's/1")"""),
    ],
)
def test_a_remedy_names_the_run_and_the_way_on(run: str, python: bool, way: str) -> None:
    assert located("Go on with `tricorn train --resume RUN`.", run, python=python) == f"Go on with `{way}`."
    assert located("Read RUN/logs.", run, python=python) == f"Read {shlex.quote(run)}/logs."
