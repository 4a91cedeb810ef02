"""Records of ranks, and the metrics and the timeline that come of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from plan_cases import tiny_plan

from plans.program import Step, StepKind, compile_program
from runtime.reports.metrics import MetricsLog, iteration_metrics
from runtime.reports.monitor import progress_line, summary
from runtime.reports.records import Record, Recorder, RecordReader, records_path
from runtime.reports.stats import Stat, merge_stats

PLACES = {
    "actor_generate": "d2 t1 p1",
    "ref_infer": ("node 0 gpu 0", "d1 t1 p1"),
    "critic_infer": ("node 0 gpu 1", "d1 t1 p1"),
    "actor_train": ("node 0 gpu 0", "d1 t1 p1"),
    "critic_train": ("node 0 gpu 1", "d1 t1 p1"),
}
PROGRAM = compile_program(tiny_plan(2, PLACES))
MEMORY = {"memory/device_gb": Stat.one(1.5), "memory/host_gb": Stat.one(2.0)}


def record(rank: int, iteration: int, spans: list[tuple[str, str, float, float]], **stats: Stat) -> Record:
    peak = {"memory/peak_gib": Stat.one(0.25 + rank / 2)}
    return Record(rank, iteration, tuple(spans), {**MEMORY, **peak, **stats})


def both(iteration: int, start: float) -> tuple[Record, Record]:
    """Two ranks: generation of 2 and 3 seconds, then training side by side."""
    realloc = ("reallocate actor@actor_generate", "reallocate", start, start + 0.5)
    first = [
        realloc,
        ("actor_generate", "call", start + 0.5, start + 2.5),
        ("actor_train", "call", start + 4, start + 8),
    ]
    second = [realloc, ("actor_generate", "call", start + 0.5, start + 3.5)]
    second.append(("transfer reward -> actor_train", "transfer", start + 3.5, start + 3.75))
    lengths = [torch.tensor([4.0, 6.0]), torch.tensor([8.0, 2.0])]
    parts = [{"response_length": Stat.of(x), "prompt_length": Stat.of(x + 1)} for x in lengths]
    return tuple(  # type: ignore[return-value]
        record(rank, iteration, spans, **{k: v for k, v in parts[rank].items() if v})
        for rank, spans in enumerate((first, second))
    )


def test_statistics_of_parts_are_those_of_the_whole() -> None:
    values = torch.randn(100)
    whole, merged = Stat.of(values), merge_stats(s for part in values.split(30) if (s := Stat.of(part)))
    assert whole is not None and merged.mean == pytest.approx(whole.mean)
    assert (merged.low, merged.high, merged.count) == (whole.low, whole.high, 100)
    assert Stat.of(values[:0]) is None


def test_verl_names_and_the_slowest_rank() -> None:
    metrics = iteration_metrics(PROGRAM, both(0, 10.0))
    assert metrics["timing_s/gen"] == 3.0 and metrics["timing_s/update_actor"] == 4.0
    assert metrics["timing_s/realloc_actor"] == 0.5 and metrics["timing_s/transfer"] == 0.25
    assert metrics["timing_s/step"] == 8.0 and metrics["plan/actor_generate/measured_s"] == 3.0
    assert metrics["response_length/mean"] == 5.0 and metrics["response_length/max"] == 8.0
    assert metrics["perf/total_num_tokens"] == 20 + 24
    assert metrics["perf/throughput"] == pytest.approx(44 / 8 / 2)
    assert (metrics["plan/peak/rank_0_gib"], metrics["plan/peak/rank_1_gib"]) == (0.25, 0.75)
    assert metrics["plan/peak/measured_gib"] == 0.75
    assert metrics["perf/max_memory_allocated_gb"] == 1.5 and metrics["perf/cpu_memory_used_gb"] == 4.0


def test_the_timeline_has_every_span_and_the_period(tmp_path: Path) -> None:
    log = MetricsLog(PROGRAM, tmp_path / "metrics.jsonl")
    for i in range(3):
        log.add(both(i, 10.0 + 7 * i))
    timeline = log.timeline()
    assert timeline.period_s == 7.0 and len(timeline.spans) == 3 * 6
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2]


def test_records_are_read_as_they_appear(tmp_path: Path) -> None:
    reader = RecordReader(tmp_path, (0, 1))
    assert not list(reader.poll())
    recorders = [Recorder(tmp_path, rank, 0.0) for rank in (0, 1)]
    step = Step(StepKind.CALL, "actor_generate", (0, 1))
    for iteration in (0, 1):
        with recorders[0].span(step, iteration):
            pass
        recorders[0].add(iteration, {"x": Stat.one(iteration)})
        recorders[0].finish(iteration)
    assert not list(reader.poll())
    recorders[1].finish(0)
    with records_path(tmp_path, 1).open("a") as file:
        file.write('{"iteration": 1, ')
    (found,) = reader.poll()
    assert [r.iteration for r in found] == [0, 0] and found[0].spans[0][:2] == ("actor_generate", "call")
    with records_path(tmp_path, 1).open("a") as file:
        file.write('"spans": [], "stats": {}, "samples": []}\n')
    (found,) = reader.poll()
    assert found[0].stats["x"].mean == 1


def test_what_a_person_reads() -> None:
    metrics = iteration_metrics(PROGRAM, both(1, 0.0))
    lines = [metrics | {"critic/score/mean": score, "actor/reward_kl_penalty": 0.1} for score in (0.0, 0.5, 0.25, 1.0)]
    line = progress_line(lines[1], 24)
    assert line.startswith("iteration  2/24  reward +0.500  kl 0.1000  8.00 s") and "gen 38%" in line
    assert summary(PROGRAM.plan, lines) == ["reward: first quarter +0.000, last quarter +1.000 (mean score per sample)"]
