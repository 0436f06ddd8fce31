"""What one ClusterQueue of Kueue may use of each resource of each flavor, alone and within its cohort."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from orchestrator.cluster.forecast.amounts import ZERO, amount
from orchestrator.cluster.forecast.answer import Object

Cell = tuple[str, str]
"""Flavor and resource."""


@dataclass(slots=True)
class Pool:
    """What one ClusterQueue may use of one flavor's resource; sums over its cohort where it has one."""

    nominal: Decimal = ZERO
    used: Decimal = ZERO
    guaranteed: Decimal = ZERO
    """What it lends to nobody."""
    most: Decimal | None = None
    """Nominal and what it may borrow; None: no bound of its own."""
    lent: Decimal = ZERO
    """What the whole cohort shares, its own share included."""
    lent_used: Decimal = ZERO

    @property
    def ever(self) -> Decimal:
        whole = self.guaranteed + self.lent
        return whole if self.most is None else min(whole, self.most)

    @property
    def now(self) -> Decimal:
        left = self.lent - self.lent_used + max(ZERO, self.guaranteed - self.used)
        return left if self.most is None else min(left, self.most - self.used)

    @property
    def after_taking_back(self) -> Decimal:
        """Its own quota, whoever has borrowed it meanwhile."""
        return max(self.now, self.nominal - self.used)


def pools_of(own: Object, every: Sequence[Object]) -> dict[Cell, Pool]:
    cohort = (own.get("spec") or {}).get("cohort")
    members = [one for one in every if cohort and (one.get("spec") or {}).get("cohort") == cohort] or [own]
    pools: dict[Cell, Pool] = {}
    for member in members:
        used = _usage(member)
        for cell, quota in _quotas(member):
            pool = pools.setdefault(cell, Pool())
            nominal = amount(quota["nominalQuota"])
            lends = amount(quota["lendingLimit"]) if quota.get("lendingLimit") is not None else nominal
            lends = lends if cohort else ZERO
            pool.lent += lends
            pool.lent_used += max(ZERO, used.get(cell, ZERO) - (nominal - lends))
            if member["metadata"]["name"] == own["metadata"]["name"]:
                pool.nominal, pool.used, pool.guaranteed = nominal, used.get(cell, ZERO), nominal - lends
                limit = quota.get("borrowingLimit")
                pool.most = nominal if not cohort else None if limit is None else nominal + amount(limit)
    return {cell: pool for cell, pool in pools.items() if cell in dict(_quotas(own))}


def _quotas(queue: Object) -> list[tuple[Cell, Object]]:
    groups = (queue.get("spec") or {}).get("resourceGroups") or []
    return [
        ((flavor["name"], resource["name"]), resource)
        for group in groups
        for flavor in group["flavors"]
        for resource in flavor["resources"]
    ]


def _usage(queue: Object) -> dict[Cell, Decimal]:
    """What is reserved, admitted or not."""
    status = queue.get("status") or {}
    return {
        (flavor["name"], resource["name"]): amount(resource.get("total") or 0)
        for flavor in status.get("flavorsReservation") or status.get("flavorsUsage") or []
        for resource in flavor["resources"]
    }
