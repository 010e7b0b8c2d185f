"""What to train. A job says nothing of machines; a plan (plan.py) says nothing of the task."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from tricorn.errors import JobError, Problem
from tricorn.fields import Named, nearest, shown
from tricorn.table import Table

Precision = Literal["float32", "float64", "bfloat16"]


@dataclass(frozen=True, kw_only=True)
class Job(metaclass=Named):
    """A training task, the same for every strategy and any number of machines.

    An item of data is ``(inputs, target)``; ``inputs`` is a tensor, a tuple or a dict, handed to the model as
    argument, arguments or keyword arguments.

    Fields:
        model: a callable without arguments that builds the ``nn.Module``.
        loss: ``(output, target)`` -> scalar tensor, the mean over the things given (see ``count``).
        optimizer: a declaration of ``tricorn.optim``.
        train: ``tricorn.data.arrays(...)`` or any map-style ``torch.utils.data.Dataset``.
        batch_size: samples in one step of the whole job, whatever the number of workers.
        epochs: passes over ``train``.
        seed: of the initial weights, the order of samples, and dropout.
        evaluate: data judged after each epoch, or None.
        metrics: name -> ``(output, target)`` -> mean over the samples given.
        count: ``(inputs, target)`` -> int, what the loss is a mean over; None means samples. For a language
            model, the number of tokens that count.
        schedule: step (from 0) -> factor on the learning rate; None means 1.
        clip_norm: bound on the global L2 norm of the gradient; None means none.
        precision: ``float32``, ``float64``, or ``bfloat16`` (autocast in forward, float32 weights).
        device: ``auto``, ``cpu`` or ``cuda``.
        tables: name of an ``nn.Embedding`` or ``nn.EmbeddingBag`` of the model -> ``tricorn.Table``. None takes
            every embedding of a million elements or more whose rows are updated alike by rows or as a whole (plain
            SGD, Adagrad), with the weights that the model gives it.

    A parameter that a step does not use has a zero gradient in that step, under every strategy.

    Raises ``JobError`` that lists every mistake at once.
    """

    model: Callable[[], Any]
    loss: Callable[[Any, Any], Any]
    optimizer: Any
    train: Any
    batch_size: int
    epochs: int
    seed: int = 0
    evaluate: Any = None
    metrics: Mapping[str, Callable[[Any, Any], Any]] = field(default_factory=dict)
    count: Callable[[Any, Any], int] | None = None
    schedule: Callable[[int], float] | None = None
    clip_norm: float | None = None
    precision: Precision = "float32"
    device: str = "auto"
    tables: Mapping[str, Table] | None = None

    def __post_init__(self) -> None:
        if problems := list(_problems(self)):
            raise JobError(problems)


def belongs(name: str) -> str:
    """Where a job says what has that name, or nearly: ``tricorn.Job(epochs=...)``; empty if it does not."""
    from tricorn import optim

    if near := nearest(name, (field.name for field in fields(Job)), alike=0.8):
        return f"tricorn.Job({near}=...)"
    name = "lr" if name == "learning_rate" else name
    kinds = (optim.SGD, optim.Adam, optim.Adagrad, optim.FTRL)
    kind = next((kind.__name__ for kind in kinds if name in kind.__struct_fields__), "")
    return kind and f"tricorn.Job(optimizer=tricorn.optim.{kind}({name}=...))"


def _problems(job: Job) -> Iterator[Problem]:
    for name, what in (("model", "a callable that builds the module"), ("loss", "a function of (output, target)")):
        if not callable(getattr(job, name)):
            yield Problem(name, shown(getattr(job, name)), f"give {what}")
    if hasattr(job.model, "named_parameters") and not isinstance(job.model, type):
        yield Problem("model", f"a {type(job.model).__name__}", "give what builds it, not the module: model=Net")
    elif callable(job.model) and (needed := _required_parameters(job.model)):
        yield Problem("model", f"a callable that needs {needed}", "wrap it: model=lambda: Net(...)")
    if hasattr(job.optimizer, "mistakes") and hasattr(job.optimizer, "update"):
        for name, given, would_do in job.optimizer.mistakes():
            yield Problem(f"optimizer.{name}", given, would_do)
    else:
        would_do = "give tricorn.optim.SGD, Adagrad, Adam, AdamW or FTRL (RowwiseAdagrad only to a tricorn.Table)"
        yield Problem("optimizer", shown(job.optimizer), would_do)
    yield from _data_problems(job)
    for name, low in (("batch_size", 1), ("epochs", 1), ("seed", 0)):
        value = getattr(job, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            yield Problem(name, shown(value), f"give a whole number of at least {low}")
    for name in ("count", "schedule"):
        if getattr(job, name) is not None and not callable(getattr(job, name)):
            yield Problem(name, shown(getattr(job, name)), "give a function, or None")
    clip = job.clip_norm
    if clip is not None and (
        isinstance(clip, bool) or not isinstance(clip, int | float) or not 0 < clip < float("inf")
    ):
        yield Problem("clip_norm", shown(clip), "give a number above 0, or None")
    if job.precision not in get_args(Precision):
        yield Problem("precision", shown(job.precision), "give one of " + ", ".join(get_args(Precision)))
    if job.tables is not None:
        yield from _table_problems(job.tables)
    if not (isinstance(job.device, str) and job.device.split(":")[0] in ("auto", "cpu", "cuda")):
        yield Problem("device", shown(job.device), "give auto, cpu or cuda")


def _table_problems(tables: object) -> Iterator[Problem]:
    if not isinstance(tables, Mapping):
        yield Problem("tables", shown(tables), "give a dict of an embedding's name -> tricorn.Table(...), or None")
        return
    for name, table in tables.items():
        if isinstance(table, Table):
            for field, given, would_do in table.mistakes():
                yield Problem(f"tables[{name!r}].{field}", given, would_do)
        else:
            yield Problem(f"tables[{name!r}]", shown(table), "give tricorn.Table(...)")


def _data_problems(job: Job) -> Iterator[Problem]:
    would_do = "give tricorn.data.arrays(x, y) or a map-style Dataset with __len__ and __getitem__"
    for name in ("train", "evaluate"):
        data = getattr(job, name)
        if data is None and name == "evaluate":
            continue
        if not (hasattr(data, "__len__") and (hasattr(data, "fetch") or hasattr(data, "__getitem__"))):
            yield Problem(name, shown(data), would_do)
        elif len(data) == 0:
            yield Problem(name, "data without samples", "give at least one sample")
    if job.evaluate is None and job.metrics:
        yield Problem(
            "metrics", f"{', '.join(job.metrics)} without evaluate", "give evaluate=..., or leave metrics out"
        )
    if not isinstance(job.metrics, Mapping):
        yield Problem("metrics", shown(job.metrics), "give a dict of name -> function of (output, target)")
        return
    for metric, function in job.metrics.items():
        if not callable(function):
            yield Problem(f"metrics[{metric!r}]", shown(function), "give a function of (output, target)")


def _required_parameters(model: Callable[..., Any]) -> str:
    try:
        parameters = inspect.signature(model).parameters.values()
    except (TypeError, ValueError):
        return ""
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return ", ".join(p.name for p in parameters if p.default is p.empty and p.kind not in variadic)
