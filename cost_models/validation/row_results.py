"""One published row recomputed: what is predicted for each measured quantity, or why nothing is."""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.validation.memory_rows import predict_memory
from cost_models.validation.predictions import PREDICTORS
from cost_models.validation.published import Row, Unpredictable
from cost_models.validation.row_schema import is_number, row_problem
from cost_models.validation.strawman import naive_cost
from plans.errors import RealplanError

MEMORY_PREFIX = "peak_mem"


@dataclass(frozen=True, kw_only=True)
class RowResult:
    """One quantity of one row. `predicted` is None where `reason` says why; `naive` is the strawman's unscaled cost."""

    row: Row
    quantity: str
    measured: float
    predicted: float | None
    reason: str = ""
    naive: float | None = None

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
        return self.predicted is not None and counts(self.row, self.quantity)


def counts(row: Row, quantity: str) -> bool:
    """Whether a quantity of a row counts for the figures: rows say so by `bar`, PPO iterations all count."""
    if row.get("stage") == "ci" and not quantity.startswith(MEMORY_PREFIX):
        return False
    bar = row.get("bar", "plan" in row)
    return quantity in bar if isinstance(bar, list) else bool(bar)


def row_results(row: Row) -> list[RowResult]:
    """Every quantity of a row that the cost models know; one unpredicted result where they know none."""
    measured, problem = row["measured"], row_problem(row)
    if problem:
        return _unpredicted(row, problem)
    results = [_time_result(row, quantity) for quantity in PREDICTORS if measured.get(quantity) is not None]
    if any(key.startswith(MEMORY_PREFIX) for key in measured):
        results += _memory_results(row)
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


def _memory_results(row: Row) -> list[RowResult]:
    """The peak memory that a row gives, if any."""
    memory = predict_memory(row)
    if not memory.quantity:
        return []
    truth = row["measured"][memory.quantity]
    reason = memory.reason or _not_positive(memory.quantity, truth) or _not_finite(memory.gib)
    if reason:
        return [_without(row, memory.quantity, reason)]
    return [RowResult(row=row, quantity=memory.quantity, measured=float(truth), predicted=memory.gib)]


def _not_positive(quantity: str, truth: object) -> str:
    positive = isinstance(truth, int | float) and is_number(truth) and truth > 0
    return "" if positive else f"measured {quantity} is {truth!r}; it must be a positive number"


def _not_finite(predicted: float | None) -> str:
    finite = predicted is not None and is_number(predicted) and predicted > 0
    return "" if finite else f"the prediction is {predicted}: the sizes of the row cannot be right"


def _time_result(row: Row, quantity: str) -> RowResult:
    truth = row["measured"][quantity]
    reason = _not_positive(quantity, truth)
    if reason:
        return _without(row, quantity, reason)
    try:
        predicted, naive = PREDICTORS[quantity](row), naive_cost(row, quantity)
    except Unpredictable as why:
        return RowResult(row=row, quantity=quantity, measured=truth, predicted=None, reason=str(why))
    except RealplanError as error:
        return RowResult(row=row, quantity=quantity, measured=truth, predicted=None, reason=error.message)
    reason = _not_finite(predicted)
    if reason:
        return _without(row, quantity, reason)
    return RowResult(row=row, quantity=quantity, measured=truth, predicted=predicted, naive=naive)
