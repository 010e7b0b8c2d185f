"""Fields of a plan that are settled before planning: whether any strategy has them together. Pure."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from tricorn.errors import PlanError
from tricorn.plan import Plan, StrategyName

STRATEGIES: tuple[StrategyName, ...] = ("dp", "ps", "mp", "ps+dp", "ps+mp")


def settled(strategy: object, given: Mapping[str, object]) -> Plan:
    """The plainest plan of a strategy, with what is given. Raises PlanError for values of wrong types."""
    defaults = {"strategy": strategy, "servers": 1 if str(strategy).startswith("ps") else 0}
    try:
        plan = msgspec.convert({**defaults, **given}, Plan)
        if "workers" in given:
            return plan
        return msgspec.structs.replace(plan, workers=max(plan.workers, plan.replicas * plan.tensor))
    except msgspec.ValidationError as error:
        raise PlanError(f"an option of the plan: {error}", remedy="See tricorn.Plan for what there is.") from None


def refuse_mistakes(given: Mapping[str, object]) -> None:
    """Raises PlanError, with what is wrong, if no strategy has all that is given."""
    strategies = [given["strategy"]] if "strategy" in given else STRATEGIES
    wrong = min((settled(strategy, given).mistakes() for strategy in strategies), key=len)
    if wrong:
        raise PlanError(
            "no plan has these options:\n" + "\n".join(f"  - {one}" for one in wrong), remedy="Change or drop them."
        )
