"""A plan and its timeline as text, and the timeline file, against a page by hand and what runs at each moment."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from plans.algorithms import algorithm_graph
from plans.cluster import ClusterSpec, parse_mesh
from plans.errors import PlanError
from plans.library import load_gpu, load_model
from plans.plan import Estimate, ExecutionPlan, PlannedCall
from plans.render import marks, render_plan, render_timeline
from plans.strategy import ParallelStrategy, Recompute
from plans.timeline import Span, Timeline, load_timeline
from plans.workload import Workload

CLUSTER = ClusterSpec(nodes=4, gpus_per_node=4, gpu=load_gpu("h100-80gb-sxm"), inter_node_gbps=50)


@pytest.fixture
def small() -> ExecutionPlan:
    """GRPO with a Python reward: generation everywhere, scores on one GPU, training on two nodes."""
    graph = algorithm_graph("grpo", reward_seconds_per_sample=0.01)
    spec = load_model("llama2-7b")
    workload = Workload(graph=graph, models=dict.fromkeys(graph.roles, spec), batch_size=64, group_size=2)
    train = ParallelStrategy(dp=4, tp=2, micro_batches=8, sequence_parallel=True, recompute=Recompute.FULL)
    places = (
        ("actor_generate", "nodes 0-3", ParallelStrategy(dp=8, tp=2)),
        ("ref_infer", "node 0 gpu 0", ParallelStrategy(micro_batches=32, offload=True)),
        ("actor_train", "nodes 2-3", train),
    )
    calls = tuple(PlannedCall(call=call, mesh=parse_mesh(mesh, CLUSTER), strategy=s) for call, mesh, s in places)
    return ExecutionPlan(workload=workload, cluster=CLUSTER, calls=calls)


def span(name: str, kind: str, begin: float, end: float, ranks: range, iteration: int = 1) -> Span:
    return Span(name=name, kind=kind, iteration=iteration, start_s=begin, end_s=end, ranks=tuple(ranks))


def timeline() -> Timeline:
    """Ten seconds an iteration; the second one is shown first."""
    spans = [
        part
        for turn in range(3)
        for at in (10.0 * turn,)
        for part in (
            span("actor_generate", "call", at, at + 4, range(16), turn),
            span("reward", "function", at + 4, at + 5, range(4), turn),
            span("ref_infer", "call", at + 5, at + 7.5, range(1), turn),
            span("transfer", "transfer", at + 7.5, at + 8, range(16), turn),
            span("actor@train", "reallocate", at + 4, at + 6, range(8, 16), turn),
            span("actor_train", "call", at + 6, at + 9, range(8, 16), turn),
        )
    ]
    return Timeline(source="predicted", period_s=10.0, spans=tuple(spans))


def test_every_character_says_what_runs_then(small: ExecutionPlan) -> None:
    """Generation g, reference i, training A, the function f, reallocation =; others are not shown."""
    head, *lanes, key = render_timeline(timeline(), CLUSTER, small).splitlines()
    names = [lane.split("|")[0].rstrip() for lane in lanes]
    assert names == ["node 0 gpu 0", "node 0 gpus 1-3", "node 1", "nodes 2-3"]
    assert key == "key: g actor_generate, i ref_infer, A actor_train, = reallocation, . idle; upper case trains"
    letters = {"actor_generate": "g", "ref_infer": "i", "actor_train": "A", "reward": "f", "actor@train": "="}
    cells = [lane.split("|")[1] for lane in lanes]
    assert {len(lane) for lane in lanes} == {100}
    second = 20.0 / len(cells[0])
    assert head == f"GPUs over time, 10.0 s to 30.0 s ({second:.2g} s per character)"
    for rank, row in zip((0, 1, 4, 8), cells, strict=True):
        for column, mark in enumerate(row):
            first, last = 10.0 + column * second, 10.0 + (column + 1) * second
            here = [s for s in timeline().spans if rank in s.ranks and s.kind != "transfer"]
            borders = [b for s in here for b in (s.start_s, s.end_s) if first - second / 2 <= b <= last + second / 2]
            running = [s for s in here if s.start_s <= first and last <= s.end_s]
            if not borders:
                assert mark == (letters[running[0].name] if running else "."), (rank, column)


def test_a_call_shorter_than_a_character_is_one(small: ExecutionPlan) -> None:
    spans = (
        span("actor_generate", "call", 0.0, 50.0, range(16), 0),
        span("ref_infer", "call", 50.0, 50.01, range(1), 0),
        span("x", "reallocate", 60.0, 60.01, range(1), 0),
        span("actor_train", "call", 90.0, 300.0, range(16), 0),
    )
    first = render_timeline(Timeline(source="predicted", period_s=50.0, spans=spans), CLUSTER, small).splitlines()[1]
    label, row, rest = first.split("|")
    assert row.count("i") == 1 and "=" not in row and rest == ""
    assert row == "g" * row.index("i") + "i" + "." * row.count(".") + "A" * row.count("A"), "cut at two periods"
    assert row.index("i") == round(len(row) / 2) and row.count("A") == round(len(row) / 10)
    assert label == "node 0 gpu 0    ", "as wide as `node 0 gpus 1-3`, and a space"
    assert render_timeline(Timeline(source="predicted", period_s=1.0, spans=()), CLUSTER, small) == ""


PAGE = """\
GRPO: 64 prompts x 2 samples, 1024 + 1024 tokens, 4 minibatches, bf16
16 x h100-80gb-sxm (4 nodes of 4, 50 GB/s per GPU between nodes)
models: actor llama2-7b, ref llama2-7b
estimate (megatron): 12.35 s per iteration, peak 61.2 of 79.1 GiB (actor_train)

   call            does              where                dp tp pp  settings                 seconds
g  actor_generate  sample responses  nodes 0-3             8  2  1                              4.00
i  ref_infer       score             node 0 gpu 0          1  1  1  32 micro-batches,           2.50
                                                                    offloaded
A  actor_train     train             nodes 2-3             4  2  1  8 micro-batches,            3.00
                                                                    sequence parallel,
                                                                    recompute full
   reward          Python function   with actor_generate                                        1.00

GPUs over time, 10.0 s to 30.0 s (0.24 s per character)
"""


def test_a_page_by_hand(small: ExecutionPlan) -> None:
    estimate = Estimate(
        engine="megatron",
        iteration_s=12.345678,
        latency_s=13.0,
        calls_s={},
        peak_gib=61.23,
        peak_at="actor_train",
        host_gib=1.0,
        of="sha256:0",
    )
    page = render_plan(replace(small, estimate=estimate), timeline())
    assert page.startswith(PAGE), page
    assert max(map(len, page.splitlines())) == 100 and page.count("\n\n") == 2


def test_ppo_s_marks(plan: ExecutionPlan) -> None:
    """The last word's initial where it is free, then the letters of the name; capitals train."""
    assert marks(plan) == ["g", "i", "r", "c", "A", "C"]


def test_seconds_of_a_call_are_the_mean_of_its_slowest_ranks() -> None:
    spans = (
        span("a", "call", 0.0, 2.0, range(1), 0),
        span("a", "call", 0.0, 3.0, range(1, 2), 0),
        span("a", "call", 10.0, 15.0, range(2), 1),
        span("b", "call", 1.0, 1.5, range(2), 1),
    )
    measured = Timeline(source="measured", period_s=10.0, spans=spans)
    assert measured.call_seconds() == {"a": (3.0 + 5.0) / 2, "b": 0.5}
    assert measured.iteration(1) == spans[2:] and measured.iteration(2) == ()


def test_a_timeline_reads_back(tmp_path: Path) -> None:
    """Times to the microsecond, a span a line."""
    path = tmp_path / "timeline.json"
    spans = (span("a", "call", 0.12345678, 1.0, range(3)), span("b", "call", 1.0, 1.0, range(2, 3), 2))
    Timeline(source="measured", period_s=2.5, spans=spans).save(path)
    assert len(path.read_text().splitlines()) == 4
    again = load_timeline(path)
    assert again == Timeline(source="measured", period_s=2.5, spans=(replace(spans[0], start_s=0.123457), spans[1]))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"end_s": 1.0', '"end_s": 0.05', ": spans.0 ends at 0.05 s, before it starts at 0.1 s"),
        ('"ranks": [0]', '"ranks": [-1]', "spans.0.ranks.0 is -1"),
        ('"ranks": [0]', '"ranks": [65537]', "spans.0.ranks.0 is 65537"),
        ("measured", "guessed", "source is"),
        ('"period_s": 2.5', '"period_s": -1', "period_s is -1"),
        ("realplan-timeline/1", "realplan-timeline/9", "format"),
        ("]}", "]", ""),
    ],
)
def test_a_timeline_that_is_none(old: str, new: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "timeline.json"
    Timeline(source="measured", period_s=2.5, spans=(span("a", "call", 0.1, 1.0, range(1)),)).save(path)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(PlanError) as raised:
        load_timeline(path)
    assert str(path) in raised.value.message and words in raised.value.message
    if "0.05" in new:
        line = path.read_text().splitlines()[1]
        assert f"{path}:2:{line.index('0.05') + 1}:" in raised.value.message
