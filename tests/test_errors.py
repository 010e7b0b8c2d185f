"""The tree of errors: drawn where it is defined, with an exit code and a remedy for each that a person meets."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

import tricorn
from tricorn import errors
from tricorn.errors import TricornError, UsageError, users_line

NEEDS_OWN_REMEDY = {"UsageError", "PlanError"}  # what to do depends on the mistake: given where it is raised
INTERNAL = {"PeerLost"}


def tree(cls: type[TricornError], depth: int = 0) -> Iterator[tuple[int, type[TricornError]]]:
    yield depth, cls
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child, depth + 1)


def test_the_tree_is_drawn_as_it_is() -> None:
    drawn = re.findall(r"^([│ ├└─]*)(\w+)", errors.__doc__.split("\n\n")[1], flags=re.MULTILINE)
    assert [(len(branch) // 4, name) for branch, name in drawn] == [
        (depth, c.__name__) for depth, c in tree(TricornError)
    ]


def test_the_drawn_exit_codes_are_the_real_ones() -> None:
    drawn = dict(re.findall(r"(\w+) +exit (\d+)", errors.__doc__))
    assert drawn == {name: str(getattr(errors, name).exit_code) for name in drawn}
    assert {cls.exit_code for _, cls in tree(TricornError)} == {1, 2, 3, 130}


@pytest.mark.parametrize("cls", [cls for _, cls in tree(TricornError)], ids=lambda cls: cls.__name__)
def test_each_that_a_person_meets_has_a_remedy(cls: type[TricornError]) -> None:
    is_leaf = not cls.__subclasses__()
    if is_leaf and cls.__name__ not in NEEDS_OWN_REMEDY | INTERNAL:
        assert cls.remedy.endswith(".")


def test_a_remedy_can_be_given_with_the_error() -> None:
    error = UsageError("no such file", remedy="Name one that exists.", where="job.py:3 in <module>")
    assert (str(error), error.remedy, error.where) == ("no such file", "Name one that exists.", "job.py:3 in <module>")


def test_the_users_line_is_the_last_of_their_own() -> None:
    def theirs() -> None:
        int(re.sub("a", lambda _: {}["missing"], "a"))  # the error arises below a frame of Python's own re

    with pytest.raises(KeyError) as caught:
        theirs()
    assert re.fullmatch(rf"{re.escape(__file__)}:\d+ in <lambda>: int\(re.*", users_line(caught.value))


def test_the_forms_of_values_are_told() -> None:
    given = {"ids": torch.zeros(2, 3, dtype=torch.int64), "rest": (np.zeros(4, np.float32), 5)}
    error = ValueError("no")
    errors.note(error, "count", inputs=given)
    said = "inputs {ids: int64 (2, 3), rest: (float32 (4,), int)}"
    assert errors.in_words(error) == f"ValueError: no\nin the job's count, given {said}"


def test_frames_of_libraries_are_passed_over() -> None:
    with pytest.raises(re.error) as caught:
        re.compile("(")
    assert users_line(caught.value).startswith(f"{__file__}:")
    assert "re.compile" in users_line(caught.value)


def test_code_that_python_generates_is_passed_over() -> None:
    with pytest.raises(errors.JobError) as caught:
        tricorn.Job(model=None, loss=None, optimizer=None, train=None, batch_size=0, epochs=0)
    assert users_line(caught.value).startswith(f"{__file__}:")
    assert "tricorn.Job(model=None" in users_line(caught.value)


def test_an_error_that_was_never_raised_has_no_line() -> None:
    assert users_line(ValueError()) == ""
