"""A contender: a plan in a comparison, with its cost under the engines of the system that would run it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice

from cost_models.engines.engine import Engine
from cost_models.estimate import PlanCost
from planner.space.layouts import Placement, Pruned, Shape
from planner.space.pricing import Priced, price_call
from plans.cluster import ClusterSpec, DeviceMesh
from plans.errors import Infeasible
from plans.plan import ExecutionPlan, PlannedCall
from plans.strategy import ParallelStrategy
from plans.workload import Workload

Price = Callable[[ExecutionPlan], PlanCost]
Keep = Callable[[ParallelStrategy], bool]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A named plan with its cost. engines: which engine prices what, in words. caveats: what is not modelled."""

    name: str
    cost: PlanCost
    engines: str
    caveats: tuple[str, ...] = ()

    @property
    def plan(self) -> ExecutionPlan:
        """The plan."""
        return self.cost.program.plan


@dataclass(frozen=True, slots=True)
class Ladder:
    """Layouts of one call from the fastest to the smallest: each is slower than the one before and needs less."""

    call: str
    rungs: tuple[Placement, ...]
    fastest_s: float


class NoLayoutError(Exception):
    """A call has no layout of the kind that a system offers; carries the typed reason."""

    def __init__(self, reason: Infeasible) -> None:
        super().__init__(reason.reason)
        self.reason = reason


def price_on(workload: Workload, cluster: ClusterSpec, call: str, mesh: DeviceMesh, engine: Engine) -> Priced:
    """Every layout of a call on one mesh, under an engine."""
    return price_call(workload, call, cluster, engine, Pruned(), [Shape(mesh.gpus, mesh.nodes)])


def climb(call: str, mesh: DeviceMesh, priced: Priced, keep: Keep) -> Ladder:
    """The layouts that a system offers (`keep`); raises NoLayoutError when there is none."""
    kept = [i for i, strategy in enumerate(priced.strategies) if keep(strategy)]
    if not kept:
        reason = f"`{call}` has no layout of this system on {mesh.size} GPUs"
        raise NoLayoutError(Infeasible(reason, "a number of GPUs that divides the samples of a minibatch"))
    rungs: list[Placement] = []
    least = float("inf")
    for i in sorted(kept, key=lambda i: float(priced.time_s[i])):
        need = float(priced.resident[i] + priced.transient[i])
        if need < least:
            rungs.append((mesh, priced.strategies[i]))
            least = need
    return Ladder(call, tuple(rungs), float(priced.time_s[kept].min()))


def settle(workload: Workload, cluster: ClusterSpec, ladders: Iterable[Ladder], price: Price) -> PlanCost:
    """Every call on its fastest rung; while the plan does not fit, the call at the memory peak steps down.

    Where that call is on its last rung, the call with most rungs left steps down, until none has any: then the plan
    does not fit, and its cost says so.
    """
    by_call = {ladder.call: ladder.rungs for ladder in ladders}
    at = dict.fromkeys(by_call, 0)
    while True:
        entries = {call: by_call[call][i] for call, i in at.items()}
        calls = tuple(
            PlannedCall(call=call, mesh=mesh, strategy=strategy, lag=workload.graph.first_lags[call])
            for call, (mesh, strategy) in entries.items()
        )
        cost = price(ExecutionPlan(workload=workload, cluster=cluster, calls=calls))
        left = {call: len(by_call[call]) - 1 - i for call, i in at.items()}
        if cost.fits or not any(left.values()):
            return cost
        peak = cost.memory.peak_step
        step = peak if left.get(peak) else max(left, key=lambda call: left[call])
        at[step] += 1


def best(costs: Iterable[PlanCost], most: int = 8) -> PlanCost | None:
    """The fastest that fits among the first few, or the first of all where none fits."""
    tried = list(islice(costs, most))
    fitting = [cost for cost in tried if cost.fits]
    return min(fitting, key=lambda cost: cost.iteration_s) if fitting else (tried[0] if tried else None)


def plain(name: str, way: Callable[[Workload, ClusterSpec, Engine], PlanCost | Infeasible]) -> Way:
    """A baseline that runs on the engine of the searched plan."""

    def costed(workload: Workload, cluster: ClusterSpec, engine: Engine) -> Contender | Infeasible:
        cost = way(workload, cluster, engine)
        return cost if isinstance(cost, Infeasible) else Contender(name=name, cost=cost, engines=engine.name)

    return costed


Way = Callable[[Workload, ClusterSpec, Engine], Contender | Infeasible]
