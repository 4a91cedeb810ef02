"""Measured kernels: a machine whose GPU kind has a kernel table, which answers where it has the shape.

What nobody measured falls back to the formulas. `RecordingKernels` are the same kernels with a memory: provenance asks
them where the seconds of a call came from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from cost_models.candidates import Array, Flags
from cost_models.distinct import on_distinct
from cost_models.engines import collectives
from cost_models.engines.analytic import AnalyticKernels
from cost_models.tables.interpolation import Answer, Source
from cost_models.tables.tables import CostTable

HEAD_DIM = 128
"""Head dimension of the measured attention kernels."""
RANKS = (2.0, 4.0, 8.0)
"""Group sizes of the measured collectives."""
REACH = 2.0
"""Sizes beyond the measured ones by more than this factor count as analytic."""


@dataclass(frozen=True, eq=False)
class MeasuredKernels:
    """See `Kernels` for what each function answers.

    A stream of matrix kernels takes `throttle` seconds more per second of its FLOPs at vendor peak than the table says
    of kernels that ran alone.
    """

    analytic: AnalyticKernels
    table: CostTable

    def used(self, answer: Answer, *, grows: bool = False) -> Array:
        """The seconds of an answer; every answer passes here. grows: beyond the table they follow its last slope, as
        those of long messages do; shares of a peak keep the edge's."""
        return answer.value

    def gemm(self, m: Array, n: Array | float, k: Array | float) -> Array:
        """2 m n k / peak x (1 / measured share + throttle)."""
        ideal = m * n * k * (2.0 / self.analytic.rates.peak_flops)
        fallback = ideal / self.analytic.gemm(m, n, k)
        return self._throttled(ideal, self.table.answer("gemm_efficiency", {"m": m, "n": n, "k": k}, fallback))

    def gemm_and_backward(self, m: Array, n: Array | float, k: Array | float) -> tuple[Array, Array]:
        """dgrad and wgrad are the same product with the roles exchanged: (m, k, n) and (k, n, m); half of the engine's
        backward ratio multiplies the two."""
        dgrad, wgrad = self.gemm(m, np.asarray(k), n), self.gemm(np.asarray(k), n, m)
        ratio = 0.5 * self.analytic.rates.constants.backward_gemm_ratio
        return self.gemm(m, n, k), (dgrad + wgrad) * ratio

    def attention(self, head_dim: int, tokens: Array, length: Array, heads: Array) -> Array:
        """2 x tokens x length x heads x head_dim FLOPs (half of the scores) at the share of `lanes`: heads x sequences,
        of which there are tokens / length."""
        rates = self.analytic.rates
        ideal = 2.0 * tokens * length * heads * (head_dim / rates.peak_flops)
        points = {"lanes": heads * tokens / length, "sequence_tokens": length}
        share = self._attention_share("prefill", head_dim, points, rates.constants.attention_efficiency)
        return self._throttled(ideal, share)

    def cache_read(self, head_dim: int, rows: Array, length: Array, kv_heads: Array) -> Array:
        """rows x length x 2 x kv_heads x head_dim elements at the measured share of the memory bandwidth."""
        rates = self.analytic.rates
        kv_bytes = 2.0 * head_dim * rates.element_bytes * rows * kv_heads * length
        points = {"lanes": rows * kv_heads, "cached_tokens": length}
        share = self._attention_share("decode", head_dim, points, rates.constants.kv_efficiency)
        seconds = kv_bytes / rates.vendor_memory_bytes_per_s / share.value
        return self.used(Answer(seconds, share.source, share.beyond))

    def all_reduce(self, message: Array, size: Array, per_node: Array) -> Array:
        """The table inside a node, the formula across nodes."""
        return self._inside("all_reduce", message, size, per_node, self.analytic.all_reduce)

    def all_gather(self, message: Array, size: Array, per_node: Array) -> Array:
        """The table inside a node, the formula across nodes."""
        return self._inside("all_gather", message, size, per_node, self.analytic.all_gather)

    def reduce_scatter(self, message: Array, size: Array, per_node: Array) -> Array:
        """The table inside a node, the formula across nodes."""
        return self._inside("reduce_scatter", message, size, per_node, self.analytic.reduce_scatter)

    def scattered_all_reduce(self, message: Array, size: Array, per_node: Array) -> Array:
        """Both operations as the table has them."""
        return self.reduce_scatter(message, size, per_node) + self.all_gather(message, size, per_node)

    def all_to_all(self, message: Array, size: Array, per_node: Array) -> Array:
        """The longer of what stays inside the node, at an all-gather's speed, and of what leaves it."""
        inside = self.all_gather(message, size, size)
        leaving = collectives.leaving_node(self.analytic.rates, message, size, per_node)
        return np.where(size > 1, np.maximum(inside, leaving), 0.0)

    def send(self, message: Array, across: Flags) -> Array:
        """Nobody measured sends for all hosts: the formula."""
        return self.analytic.send(message, across)

    def _throttled(self, ideal: Array, share: Answer) -> Array:
        seconds = ideal * (1.0 / share.value + self.analytic.rates.constants.throttle)
        return self.used(Answer(seconds, share.source, share.beyond))

    def _attention_share(self, kind: str, head_dim: int, points: Mapping[str, Array], analytic: float) -> Answer:
        """Share of the peak or bandwidth; the engine's constant for head dimensions that nobody measured."""
        table = self.table if head_dim == HEAD_DIM else _NOTHING
        return table.answer(f"attention_{kind}_efficiency", points, analytic)

    def _inside(
        self,
        operation: str,
        message: Array,
        size: Array,
        per_node: Array,
        formula: Callable[[Array, Array, Array], Array],
    ) -> Array:
        """A collective, the measured seconds in place of the formula's where the group is inside a node. Below the
        smallest measured message it takes that one's time: latency."""
        seconds = formula(message, size, per_node)
        entry = self.table.entries.get(f"{operation}_node")
        if entry is None:
            return seconds
        least = entry.axes["bytes"][0]
        message, size, per_node = np.broadcast_arrays(message, size, per_node)
        inside = (size == per_node) & np.isin(size, RANKS)

        def measured(message: Array, size: Array) -> Array:
            points = {"ranks": size, "bytes": np.maximum(message, least)}
            return self.used(self.table.answer(f"{operation}_node", points, np.nan), grows=True)

        if inside.any():
            seconds[inside] = on_distinct(measured, message[inside], size[inside])
        return seconds


@dataclass(frozen=True, eq=False)
class RecordingKernels(MeasuredKernels):
    """Measured kernels that note how far beyond the measured sizes each was asked, in `beyond`, and stretch the answers
    of one source by `stretch`: how a call's seconds follow says how many of them come from there."""

    stretched: Source = Source.MEASURED
    stretch: float = 0.0
    beyond: list[float] = field(default_factory=list)

    def used(self, answer: Answer, *, grows: bool = False) -> Array:
        """The seconds, stretched where they are of the source."""
        if not grows:
            self.beyond.append(float(answer.beyond.max()))
        source = np.where(answer.beyond > REACH, Source.ANALYTIC, answer.source)
        return answer.value * np.where(source == self.stretched, 1.0 + self.stretch, 1.0)


_NOTHING = CostTable(hardware="", device="", precision="", date="", source="")
