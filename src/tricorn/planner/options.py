"""Fields of a plan that are settled before planning: what is wrong with them, and whether a strategy has all. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec

from tricorn.errors import PlanError
from tricorn.fields import nearest, suggestion
from tricorn.job import belongs
from tricorn.plan import Plan, StrategyName

STRATEGIES: tuple[StrategyName, ...] = ("dp", "ps", "mp", "ps+dp", "ps+mp")


def decided(given: Mapping[str, object]) -> dict[str, Any]:
    """What is given, without a strategy that ``auto`` leaves open."""
    return {name: value for name, value in given.items() if (name, value) != ("strategy", "auto")}


def settled(strategy: object, given: Mapping[str, object]) -> Plan:
    """The plainest plan of a strategy, with what is given. Raises PlanError for unknown names and wrong values."""
    plan = checked({"strategy": strategy, "servers": 1 if str(strategy).startswith("ps") else 0, **given})
    if "workers" in given:
        return plan
    return msgspec.structs.replace(plan, workers=max(plan.workers, plan.replicas * plan.tensor))


def checked(given: Mapping[str, object], beside: Iterable[str] = ()) -> Plan:
    """The plan of these fields. Raises PlanError with all unknown names and wrong values of them.

    ``beside`` are other names that could have been meant.
    """
    names = [*_types(), *beside]
    wrong = [f"no such option: {name}; {_instead(name, names)}" for name in given if name not in _types()]
    wrong += [said for name, value in given.items() if name in _types() and (said := _wrong(name, value))]
    if wrong:
        raise PlanError(
            "the options have mistakes:\n" + "\n".join(f"  - {one}" for one in wrong),
            remedy="Correct them; help(tricorn.Plan) explains each.",
        )
    return msgspec.convert(given, Plan)


def refuse_mistakes(given: Mapping[str, object]) -> None:
    """Raises PlanError, with what is wrong, if no strategy has all that is given."""
    strategies = [given["strategy"]] if "strategy" in given else STRATEGIES
    wrong = min((settled(strategy, given).mistakes() for strategy in strategies), key=len)
    if wrong:
        raise PlanError(
            "no plan has these options:\n" + "\n".join(f"  - {one}" for one in wrong), remedy="Change or drop them."
        )


@cache
def _types() -> dict[str, Any]:
    return {field.name: field.type for field in msgspec.structs.fields(Plan)}


def _instead(name: str, names: Iterable[str]) -> str:
    near = nearest(name, names, alike=0.8)
    where = "" if near else belongs(name)
    return f"it belongs to the job: {where}" if where else suggestion(name, names)


def _wrong(name: str, value: object) -> str:
    """What is wrong with the value of a field, in the words of the command line; empty if nothing is."""
    try:
        msgspec.convert(value, _types()[name])
    except msgspec.ValidationError:
        near = nearest(value, _choices(_types()[name])) if isinstance(value, str) else ""
        return f"{name}: {value!r} is not {_kind(_types()[name])}" + (f"; did you mean {near}?" if near else "")
    return ""


def _choices(kind: Any) -> tuple[str, ...]:
    own = get_args(kind)
    return own if get_origin(kind) is Literal else tuple(one for each in own for one in _choices(each))


def _kind(kind: Any) -> str:
    """A type as a person says it."""
    of = get_args(kind)
    if get_origin(kind) in (Union, UnionType):
        return " or ".join("None" if each is type(None) else _kind(each) for each in of)
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, of))
    if get_origin(kind) is dict:
        return f"a dict of names to {_kind(of[1])}"
    return {int: "a whole number", bool: "True or False"}.get(kind, "a tuple of whole numbers")
