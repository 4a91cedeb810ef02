"""How evenly lengths can be dealt: what the busiest dp rank has beyond the mean, and the fullest micro-batch.

Both are found by the functions of `plans.batches` by which the runtime deals samples, on lengths that are drawn with a
fixed seed. Equal lengths are dealt evenly, so that nothing is drawn for them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import islice

import numpy as np

from cost_models.candidates import Array, Candidates
from plans.batches import evenly, packs, sample_work
from plans.graph import CallKind
from plans.lengths import Lengths
from plans.model import ModelSpec
from plans.strategy import ParallelStrategy
from plans.workload import Workload

MOST_DRAWN = 2048
"""Samples that stand for a pass: of more, dp ranks have so many each that they differ little."""
_PASSES = 4


@dataclass(frozen=True, eq=False)
class Packing:
    """imbalance: work of the busiest dp rank over the mean. fullest: tokens of the fullest micro-batch over their mean.
    Arrays [candidates], 1 for equal lengths."""

    imbalance: Array | float = 1.0
    fullest: Array | float = 1.0

    def width(self, candidates: Candidates) -> Array | float:
        """Tokens that a micro-batch is computed as, over the mean: at pp above 1 all are as wide as the fullest."""
        return np.where(candidates.pp > 1, self.fullest, 1.0)


EQUAL = Packing()


def attended(prompts: Lengths, responses: Lengths) -> float:
    """E[n^2] / E[n] of n = prompt + response, tokens: causal attention over packed samples costs what it does over
    equal ones of this length. By quantiles, the two independent."""
    if prompts.full and responses.full:
        return float(prompts.longest + responses.longest)
    (p, p2), (r, r2) = _two_means(prompts), _two_means(responses)
    return (p2 + 2.0 * p * r + r2) / (p + r)


@lru_cache(maxsize=256)
def _two_means(lengths: Lengths, parts: int = 512) -> tuple[float, float]:
    """Mean, and mean of the square."""
    if lengths.full:
        return float(lengths.longest), float(lengths.longest) ** 2
    drawn = np.array([lengths.quantile((i + 0.5) / parts) for i in range(parts)])
    mean, square = float(drawn.mean()), float((drawn**2).mean())
    return lengths.mean, square * (lengths.mean / mean) ** 2 if mean else square


def packed(workload: Workload, call: str, candidates: Candidates) -> Candidates:
    """The candidates with as many micro-batches as packs of `micro_batch_tokens` are expected, where they say so."""
    c = candidates
    if not c.micro_batch_tokens.any() or workload.graph.call(call).kind is CallKind.GENERATE:
        return c
    counts = _dealt_cases(workload, call, c)[2]
    return replace(c, micro_batches=np.where(c.micro_batch_tokens > 0, counts, c.micro_batches))


def packing_of(workload: Workload, call: str, candidates: Candidates) -> Packing:
    """How evenly a call's samples are dealt under every candidate."""
    if workload.prompts.full and workload.responses.full:
        return EQUAL
    imbalance, fullest, _ = _dealt_cases(workload, call, candidates)
    return Packing(imbalance, fullest)


def _dealt_cases(workload: Workload, call: str, candidates: Candidates) -> tuple[Array, Array, Array]:
    """Imbalance, fullest micro-batch and their number for every candidate; candidates that deal alike once."""
    c, samples = candidates, workload.samples_per_step(call)
    rounds = np.where(c.vpp > 1, c.pp, 1.0)
    cases, inverse = np.unique(
        np.stack([c.dp, c.micro_batches, c.micro_batch_tokens, rounds], axis=1), axis=0, return_inverse=True
    )
    passes = min(_PASSES, workload.samples // samples)
    drawn = _drawn(workload.prompts, workload.responses, workload.group_size, min(samples, MOST_DRAWN), passes)
    spec = workload.spec(call)
    found = [
        _dealt(spec, drawn, samples, ParallelStrategy(dp=dp, micro_batches=count, micro_batch_tokens=limit), multiple)
        for dp, count, limit, multiple in cases.astype(int).tolist()
    ]
    imbalance, fullest, counts = np.array(found)[inverse.ravel()].T
    return imbalance, fullest, counts


Passes = tuple[tuple[int, ...], ...]
"""Tokens of the samples of each pass."""


@lru_cache(maxsize=16)
def _drawn(prompts: Lengths, responses: Lengths, group: int, samples: int, passes: int) -> Passes:
    count = samples * passes
    groups = prompts.draw(-(-count // group))
    tokens = [groups[i // group] + response for i, response in enumerate(responses.draw(count, seed=1))]
    rows = iter(tokens)
    return tuple(tuple(islice(rows, samples)) for _ in range(passes))


@lru_cache(maxsize=64)
def _work(spec: ModelSpec, tokens: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sample_work(spec, t) for t in tokens)


@lru_cache(maxsize=4096)
def _dealt(
    spec: ModelSpec, drawn: Passes, samples: int, strategy: ParallelStrategy, multiple: int
) -> tuple[float, float, float]:
    """Imbalance over dp; of the rank with most tokens the fullest micro-batch over the mean, and how many it has, a
    `multiple` of that; means over the passes. Of more samples than are drawn a rank has proportionally more."""
    busiest = work_sum = fullest = counts = 0.0
    for tokens in drawn:
        ranks, scale = min(strategy.dp, len(tokens)), samples / len(tokens)
        work = _work(spec, tokens)
        shares = evenly(work, ranks)
        sums = [sum(work[i] for i in share) for share in shares]
        busiest, work_sum = busiest + max(sums), work_sum + sum(sums) / ranks
        own = [tokens[i] for i in max(shares, key=lambda share: sum(tokens[i] for i in share))]
        if strategy.micro_batch_tokens:
            parts = packs(own, strategy.micro_batch_tokens)
        else:
            parts = evenly(own, max(1, min(round(strategy.micro_batches / scale), len(own))))
        most = max(sum(own[i] for i in part) for part in parts)
        fullest += most * len(parts) / (sum(tokens) / ranks)
        counts += -(-len(parts) * scale // multiple) * multiple
    return busiest / work_sum, max(fullest / len(drawn), 1.0), counts / len(drawn)


def bound_tokens(workload: Workload, call: str, candidates: Candidates) -> Array:
    """Most tokens of a micro-batch that memory must have room for: what the strategy says; or three standard deviations
    above the mean of a dp rank's share, packed as unevenly as is likely, the longest sample at least, and never more
    than all at the longest."""
    c = candidates
    share = workload.samples_per_step(call) / c.dp
    bound: Array = np.ceil(share / c.micro_batches) * workload.tokens
    if not (workload.prompts.full and workload.responses.full):
        (p, p2), (r, r2) = _two_means(workload.prompts), _two_means(workload.responses)
        spread = np.sqrt(share * (max(p2 - p * p, 0.0) + max(r2 - r * r, 0.0)))
        likely = (share * (p + r) + 3.0 * spread) / c.micro_batches * packing_of(workload, call, c).fullest
        bound = np.minimum(bound, np.maximum(likely, float(workload.tokens)))
    return np.where(c.micro_batch_tokens > 0, np.minimum(c.micro_batch_tokens, share * workload.tokens), bound)
