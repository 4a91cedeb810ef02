"""Metrics of an iteration under verl's names, out of the records of all ranks; the measured timeline."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median

from plans.files import OutputError, writing
from plans.plan import ExecutionPlan
from plans.program import Program, StepKind
from plans.timeline import Span, Timeline
from runtime.reports.records import Record
from runtime.reports.stats import Stat, merge_stats

# verl's names of the phases of an iteration, by the names of our calls.
TIMING_NAMES = {
    "actor_generate": "gen",
    "actor_greedy": "gen_max",
    "actor_infer": "old_log_prob",
    "ref_infer": "ref",
    "critic_infer": "values",
    "reward": "reward",
    "reward_infer": "reward",
    "reward_greedy": "reward_max",
    "reward_infer_greedy": "reward_max",
    "actor_train": "update_actor",
    "critic_train": "update_critic",
    "reward_train": "update_reward",
}
PEAK = "memory/peak_gib"
MOST_RANKS = 64
"""Whose memory a line of metrics has rank by rank."""
# Statistics of which the mean, the maximum and the minimum are reported; of the others the mean.
SPREAD = (
    "critic/score",
    "critic/score_greedy",
    "critic/rewards",
    "critic/advantages",
    "critic/returns",
    "critic/values",
    "rollout_corr/rollout_is",
    "response_length",
    "prompt_length",
)
Metrics = dict[str, float]


def json_line(metrics: Metrics) -> str:
    """Metrics as one line of JSON, which has no word for a number that is not finite: null."""
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def spans_of(records: Iterable[Record]) -> list[Span]:
    """The spans of all ranks of an iteration."""
    return [
        Span(name=name, kind=kind, iteration=r.iteration, start_s=start, end_s=end, ranks=(r.rank,))
        for r in records
        for name, kind, start, end in r.spans
    ]


def iteration_metrics(program: Program, records: Sequence[Record]) -> Metrics:
    """One line of `metrics.jsonl`. Times are those of the slowest rank."""
    plan, spans = program.plan, spans_of(records)
    seconds = Timeline(source="measured", period_s=0.0, spans=tuple(spans)).call_seconds()
    step_s = max(s.end_s for s in spans) - min(s.start_s for s in spans)
    stats = {name: merge_stats(r.stats[name] for r in records if name in r.stats) for name in _names(records)}
    metrics: Metrics = {"iteration": records[0].iteration}
    metrics |= _spread(stats)
    metrics |= _timing(program, seconds, spans, step_s)
    metrics |= _performance(plan, stats, step_s)
    return metrics | _predicted(plan, seconds) | _peaks(plan, records)


def _names(records: Iterable[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.stats))


def _spread(stats: dict[str, Stat]) -> Metrics:
    metrics: Metrics = {}
    for name, stat in stats.items():
        if name in SPREAD:
            metrics |= {f"{name}/mean": stat.mean, f"{name}/max": stat.high, f"{name}/min": stat.low}
        elif not name.startswith("memory/"):
            metrics[name] = stat.mean
    return metrics


def _timing(program: Program, seconds: dict[str, float], spans: Sequence[Span], step_s: float) -> Metrics:
    metrics: Metrics = {}
    roles = {str(StepKind.REALLOCATE) + " " + copy.name: copy.role for copy in program.copies}
    for name, value in seconds.items():
        if name in roles:
            key = f"timing_s/realloc_{roles[name]}"
            metrics[key] = metrics.get(key, 0.0) + value
        elif name in program.copy_of or name in TIMING_NAMES:
            metrics[f"timing_s/{TIMING_NAMES.get(name, name)}"] = value
    moved = sum(value for name, value in seconds.items() if name.startswith(str(StepKind.TRANSFER)))
    return metrics | {"timing_s/transfer": moved, "timing_s/step": step_s}


def _performance(plan: ExecutionPlan, stats: dict[str, Stat], step_s: float) -> Metrics:
    tokens = sum(stats[name].total for name in ("prompt_length", "response_length") if name in stats)
    return {
        "perf/total_num_tokens": tokens,
        "perf/time_per_step": step_s,
        "perf/throughput": tokens / (step_s * plan.cluster.size),
        "perf/max_memory_allocated_gb": stats["memory/device_gb"].high,
        "perf/cpu_memory_used_gb": stats["memory/host_gb"].total,
    }


def _predicted(plan: ExecutionPlan, seconds: dict[str, float]) -> Metrics:
    metrics: Metrics = {}
    predicted = plan.estimate.calls_s if plan.estimate else {}
    for call in plan.workload.graph.calls:
        if call.name in predicted:
            metrics[f"plan/{call.name}/predicted_s"] = predicted[call.name]
        if call.name in seconds:
            metrics[f"plan/{call.name}/measured_s"] = seconds[call.name]
    return metrics


def _peaks(plan: ExecutionPlan, records: Sequence[Record]) -> Metrics:
    """The most memory of a rank so far: on a GPU what torch allocated there, on the CPU by how much its process grew
    after it had loaded its libraries. Predicted beside it, of the fullest rank and with CUDA's context."""
    found = {r.rank: r.stats[PEAK].high for r in records if PEAK in r.stats}
    metrics: Metrics = {"plan/peak/predicted_gib": plan.estimate.peak_gib} if plan.estimate else {}
    if found:
        metrics["plan/peak/measured_gib"] = max(found.values())
    if len(found) <= MOST_RANKS:
        metrics |= {f"plan/peak/rank_{rank}_gib": peak for rank, peak in found.items()}
    return metrics


class MetricsLog:
    """Collects iterations: a line each in `metrics.jsonl`, and at the end the measured timeline."""

    def __init__(self, program: Program, path: Path, earlier: Sequence[Metrics] = ()) -> None:
        self._program = program
        self._path = path
        with writing(path):
            self._file = path.open("wb", buffering=0)
        self._write("".join(map(json_line, earlier)))
        self._spans: list[Span] = []
        self._ends: list[float] = []
        self.lines: list[Metrics] = list(earlier)

    def add(self, records: Sequence[Record]) -> Metrics:
        """Take in the records of one iteration; its metrics."""
        metrics = iteration_metrics(self._program, records)
        spans = spans_of(records)
        self._spans += spans
        self._ends.append(max(span.end_s for span in spans))
        self.lines.append(metrics)
        self._write(json_line(metrics))
        return metrics

    def _write(self, text: str) -> None:
        """Append whole lines; where the disk is full, no part of them. Raises OutputError."""
        before, left = self._file.tell(), text.encode()
        try:
            with writing(self._path):
                while left:
                    left = left[self._file.write(left) :]
        except OutputError:
            with suppress(OSError):
                self._file.truncate(before)
            raise

    def timeline(self) -> Timeline:
        """Every span so far; the period is the median time from one iteration's end to the next one's, since memory is
        touched for the first time in the first few."""
        if len(self._ends) > 1:
            period_s = median(after - before for before, after in pairwise(self._ends))
        else:
            period_s = self.lines[-1]["timing_s/step"] if self.lines else 0.0
        spans = sorted(self._spans, key=lambda span: (span.start_s, span.ranks))
        return Timeline(source="measured", period_s=period_s, spans=tuple(spans))
