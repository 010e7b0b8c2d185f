"""A job tells all its mistakes at once, each with its field, what was given and what would do."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tricorn
from tricorn.errors import JobError


def mean_error(output: Any, target: Any) -> Any:
    return (output - target).abs().mean()


GOOD: dict[str, Any] = {
    "model": lambda: torch.nn.Linear(2, 1),
    "loss": mean_error,
    "optimizer": tricorn.optim.SGD(lr=0.1),
    "train": tricorn.data.arrays(np.zeros((4, 2), np.float32), np.zeros((4, 1), np.float32)),
    "evaluate": tricorn.data.arrays(np.zeros((2, 2), np.float32), np.zeros((2, 1), np.float32)),
    "metrics": {"error": mean_error},
    "batch_size": 2,
    "epochs": 1,
}

# field: (a bad value, what the message shows of it, what it says would do)
BAD: dict[str, tuple[Any, str, str]] = {
    "model": (torch.nn.Linear, "needs in_features, out_features", "lambda: Net(...)"),
    "tables": (["users"], "['users'] (list)", "a dict of an embedding's name"),
    "loss": ("cross_entropy", "'cross_entropy' (str)", "a function of (output, target)"),
    "optimizer": (torch.optim.SGD, "SGD", "tricorn.optim.SGD, Adagrad, Adam, AdamW or FTRL"),
    "train": (7, "7 (int)", "tricorn.data.arrays(x, y)"),
    "evaluate": ([], "data without samples", "at least one sample"),
    "metrics": ([mean_error], "(list)", "a dict of name -> function"),
    "batch_size": (0, "0 (int)", "a whole number of at least 1"),
    "epochs": (1.5, "1.5 (float)", "a whole number of at least 1"),
    "seed": (-1, "-1 (int)", "a whole number of at least 0"),
    "count": (3, "3 (int)", "a function, or None"),
    "schedule": ("cosine", "'cosine' (str)", "a function, or None"),
    "clip_norm": (0.0, "0.0 (float)", "a number above 0, or None"),
    "precision": ("float16", "'float16' (str)", "float32, float64, bfloat16"),
    "device": ("tpu", "'tpu' (str)", "auto, cpu or cuda"),
}


def test_a_good_job_is_accepted() -> None:
    job = tricorn.Job(**GOOD)
    assert (job.seed, job.precision, job.device) == (0, "float32", "auto")


@pytest.mark.parametrize("field", BAD)
def test_a_mistake_names_field_given_and_cure(field: str) -> None:
    value, given_text, would_do = BAD[field]
    with pytest.raises(JobError) as caught:
        tricorn.Job(**{**GOOD, field: value})
    (problem,) = caught.value.problems
    assert problem.field == field
    assert given_text in problem.given
    assert would_do in problem.would_do
    assert str(problem) in str(caught.value)


@given(st.sets(st.sampled_from(sorted(BAD)), min_size=1))
def test_all_mistakes_are_told_together(fields: set[str]) -> None:
    with pytest.raises(JobError) as caught:
        tricorn.Job(**{**GOOD, **{field: BAD[field][0] for field in fields}})
    assert {problem.field for problem in caught.value.problems} == fields
    assert str(caught.value).count("\n  - ") == len(fields)


@given(
    st.one_of(
        st.none(), st.booleans(), st.floats(), st.text(), st.binary(), st.lists(st.integers()), st.integers(max_value=0)
    )
)
def test_no_value_of_another_kind_passes_for_a_number_of_samples(value: Any) -> None:
    with pytest.raises(JobError, match="batch_size: given"):
        tricorn.Job(**{**GOOD, "batch_size": value})


def test_an_optimizers_mistakes_carry_its_name() -> None:
    with pytest.raises(JobError) as caught:
        tricorn.Job(**{**GOOD, "optimizer": tricorn.optim.Adam(lr=-1.0, betas=(0.9, 2.0))})
    assert [problem.field for problem in caught.value.problems] == ["optimizer.lr", "optimizer.betas"]


def test_metrics_need_data_to_judge() -> None:
    with pytest.raises(JobError, match="metrics: given error without evaluate"):
        tricorn.Job(**{**GOOD, "evaluate": None})


def test_a_metric_that_is_no_function_is_named() -> None:
    with pytest.raises(JobError, match=r"metrics\['error'\]: given 0.5"):
        tricorn.Job(**{**GOOD, "metrics": {"error": 0.5}})


def test_an_unknown_field_is_refused_with_the_nearest() -> None:
    given = {name: value for name, value in GOOD.items() if name not in ("batch_size", "epochs")}
    with pytest.raises(JobError) as caught:
        tricorn.Job(**given, batchsize=3, learning_rate=0.1)
    assert [str(problem) for problem in caught.value.problems] == [
        "Job.batchsize: given 3 (int); no such field; did you mean batch_size?",
        "Job.learning_rate: given 0.1 (float); no such field; there are batch_size, epochs, seed, count, schedule, "
        "clip_norm, precision, device, tables",
        "Job.epochs: given nothing; it has no default",
    ]

    class Mine(tricorn.Job):
        pass

    for kind in (tricorn.Job, Mine):
        assert list(inspect.signature(kind).parameters)[:2] == ["model", "loss"]
    with pytest.raises(JobError, match=r"Mine\.sede: .* did you mean seed"):
        Mine(**GOOD, sede=3)


@pytest.mark.parametrize(
    ("declare", "said"),
    [
        (lambda: tricorn.optim.SGD(lr=0.1, momentom=0.9), "SGD.momentom: .* did you mean momentum"),
        (lambda: tricorn.optim.AdamW(learning_rate=0.1), "there are lr, betas, eps, weight_decay"),
        (lambda: tricorn.optim.Adam(0.1), r"Adam: given 0.1 \(float\) without a name; write Adam\(lr=...\)"),
        (lambda: tricorn.Table(max_row=5), "Table.max_row: .* did you mean max_rows"),
        (lambda: tricorn.Job(torch.nn.Linear, train=[]), r"without a name; write Job\(model=...\)"),
    ],
)
def test_every_declaration_names_its_fields(declare: Callable[[], object], said: str) -> None:
    with pytest.raises(JobError, match=said):
        declare()


def test_a_module_instead_of_what_builds_it() -> None:
    with pytest.raises(JobError, match=r"model: given a Linear; give what builds it"):
        tricorn.Job(**{**GOOD, "model": torch.nn.Linear(2, 1)})


def test_the_mistakes_of_a_table_are_told() -> None:
    table = tricorn.Table(std=-1.0, admit=0, max_rows=0)
    with pytest.raises(JobError) as caught:
        tricorn.Job(**{**GOOD, "tables": {"users": table}})
    assert [problem.field for problem in caught.value.problems] == [
        f"tables['users'].{field}" for field in ("std", "admit", "max_rows")
    ]
