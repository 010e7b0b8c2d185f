"""Declarations whose fields are named: what is misspelt, missing or nameless is one error with the nearest name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import msgspec

from tricorn.errors import JobError, PlanError, Problem


def nearest(name: str, names: Iterable[str], alike: float = 0.6) -> str:
    """Which of the names somebody may have meant who wrote another; empty if none is ``alike`` (1 is the same)."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(name, list(names), n=1, cutoff=alike)), "")


def suggestion(name: str, names: Iterable[str]) -> str:
    """The nearest of the names as a question, or all that there are."""
    names = list(names)
    return f"did you mean {near}?" if (near := nearest(name, names)) else "there are " + ", ".join(names)


def shown(value: object) -> str:
    """A value and its type, not too long."""
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


class Named(type):
    """Of a dataclass: a call with wrong names raises JobError, where Python has a TypeError."""

    @property
    def __signature__(cls) -> inspect.Signature:
        own = inspect.signature(inspect.getattr_static(cls, "__init__"))
        return own.replace(parameters=[*own.parameters.values()][1:], return_annotation=cls)

    def __call__(cls, *positional: Any, **given: Any) -> Any:
        return _made(super().__call__, cls, positional, given)


class NamedStruct(msgspec.StructMeta):
    """Of a struct: the same. What is decoded does not come this way."""

    def __call__(cls, *positional: Any, **given: Any) -> Any:
        return _made(super().__call__, cls, positional, given)


class NamedPlan(NamedStruct):
    """Of a plan: the same as PlanError."""

    def __call__(cls, *positional: Any, **given: Any) -> Any:
        try:
            return super().__call__(*positional, **given)
        except JobError as error:
            raise PlanError(
                "the plan has mistakes:\n" + "\n".join(f"  - {one}" for one in error.problems),
                remedy="Correct them; help(tricorn.Plan) explains each.",
            ) from None


def _made(make: Callable[..., Any], cls: type, positional: tuple[object, ...], given: Mapping[str, object]) -> Any:
    try:
        return make(*positional, **given)
    except TypeError:
        problems = [*_problems(cls, positional, given)]
        if not problems:
            raise
    raise JobError(problems)


def _problems(cls: type, positional: tuple[object, ...], given: Mapping[str, object]) -> Iterator[Problem]:
    names = inspect.signature(cls).parameters
    if positional:
        first = next(iter(names))
        yield Problem(cls.__name__, f"{shown(positional[0])} without a name", f"write {cls.__name__}({first}=...)")
        return
    left = [name for name in names if name not in given]
    for name in given:
        if name not in names:
            yield Problem(f"{cls.__name__}.{name}", shown(given[name]), f"no such field; {suggestion(name, left)}")
    meant = {nearest(name, left) for name in given if name not in names}
    for name in left:
        if names[name].default is inspect.Parameter.empty and name not in meant:
            yield Problem(f"{cls.__name__}.{name}", "nothing", "it has no default")
