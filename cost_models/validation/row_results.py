"""One published row recomputed: what is predicted for each measured quantity, or why nothing is."""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.validation.memory_rows import predict_memory
from cost_models.validation.predictions import PREDICTORS
from cost_models.validation.published import Row, Unpredictable
from cost_models.validation.row_schema import MEMORY_QUANTITIES, is_magnitude, is_number, row_problem, short
from cost_models.validation.strawman import naive_cost
from plans.errors import RealplanError

MEMORY_PREFIX = "peak_mem"


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """One quantity of one row. `predicted` is None where `reason` says why; `naive` is the strawman's unscaled cost.
    `all_count`: no row that was given says by `bar` what counts, so that every prediction does."""

    row: Row
    quantity: str
    measured: float
    predicted: float | None
    reason: str = ""
    naive: float | None = None
    all_count: bool = False

    @property
    def id(self) -> str:
        """The row's id."""
        return str(self.row["id"])

    @property
    def unit(self) -> str:
        """Unit of predicted and measured."""
        return "GiB" if self.quantity.startswith(MEMORY_PREFIX) else "ms" if "_ms" in self.quantity else "s"

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        assert self.predicted is not None
        return self.predicted / self.measured - 1.0

    @property
    def counted(self) -> bool:
        """Whether it counts for the figures and is predicted."""
        return self.predicted is not None and (self.all_count or counts(self.row, self.quantity))


def counts(row: Row, quantity: str) -> bool:
    """Whether a quantity of a row counts for the figures: rows say so by `bar`, PPO iterations all count. Where a row
    that counts as a whole has several peaks of memory, the first does: they are one run."""
    memory = quantity.startswith(MEMORY_PREFIX)
    if row.get("stage") == "ci" and not memory:
        return False
    bar = row.get("bar")
    if bar is None:
        return "plan" in row
    if isinstance(bar, list):
        return quantity in bar
    first = next((key for key in MEMORY_QUANTITIES if row["measured"].get(key) is not None), "")
    return bool(bar) and (not memory or quantity == first)


def row_results(row: Row) -> list[RowResult]:
    """Every quantity of a row that the cost models know; one unpredicted result where they know none."""
    measured, problem = row["measured"], row_problem(row)
    if problem:
        return _unpredicted(row, problem)
    results = [_time_result(row, quantity) for quantity in PREDICTORS if measured.get(quantity) is not None]
    peaks = [key for key in measured if key.startswith(MEMORY_PREFIX) and measured[key] is not None]
    results += [_memory_result(row, quantity) for quantity in peaks]
    if results:
        return results
    known = ", ".join(PREDICTORS)
    quantity = next((key for key, value in measured.items() if isinstance(value, (int, float))), "")
    reason = f"no model of `{quantity}` (known: {known}, peak memory)" if quantity else "nothing was measured"
    return [_without(row, quantity, reason)]


def _unpredicted(row: Row, reason: str) -> list[RowResult]:
    """A result without a prediction for everything that was measured."""
    known = (*PREDICTORS, *(key for key in row["measured"] if key.startswith(MEMORY_PREFIX)))
    return [_without(row, key, reason) for key in known if row["measured"].get(key) is not None] or [
        _without(row, "", reason)
    ]


def _without(row: Row, quantity: str, reason: str) -> RowResult:
    truth = row["measured"].get(quantity)
    measured = float(truth) if is_number(truth) else 0.0
    return RowResult(row=row, quantity=quantity, measured=measured, predicted=None, reason=reason)


def _memory_result(row: Row, quantity: str) -> RowResult:
    """One of the peaks of memory that a row gives."""
    memory, truth = predict_memory(row, quantity), row["measured"][quantity]
    reason = memory.reason or _not_measurable(quantity, truth) or _not_credible(memory.gib)
    if reason:
        return _without(row, quantity, reason)
    return RowResult(row=row, quantity=quantity, measured=float(truth), predicted=memory.gib)


def _not_measurable(quantity: str, truth: object) -> str:
    if is_magnitude(truth):
        return ""
    return f"measured {quantity} is {short(truth)}; it must be a positive number from 1e-15 to 1e15"


def _not_credible(predicted: float | None) -> str:
    return "" if is_magnitude(predicted) else f"the prediction is {predicted}: the sizes of the row cannot be right"


def _time_result(row: Row, quantity: str) -> RowResult:
    truth = row["measured"][quantity]
    reason = _not_measurable(quantity, truth)
    if reason:
        return _without(row, quantity, reason)
    try:
        predicted, naive = PREDICTORS[quantity](row), naive_cost(row, quantity)
    except Unpredictable as why:
        return _without(row, quantity, str(why))
    except RealplanError as error:
        return _without(row, quantity, error.message)
    reason = _not_credible(predicted)
    if reason:
        return _without(row, quantity, reason)
    return RowResult(row=row, quantity=quantity, measured=float(truth), predicted=predicted, naive=naive)
