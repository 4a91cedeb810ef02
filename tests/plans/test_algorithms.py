"""Records of the algorithms: the README's table and the rules of what runs follow from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plan_cases import CRITIC_FREE, tiny_plan

from plans.algorithms import ALGORITHMS, PLAIN, algorithm_named, pair_size
from plans.errors import SpecError
from plans.graph import CallKind
from plans.library import load_model
from plans.runnable import run_note, run_problems, spec_problems
from plans.strategy import ParallelStrategy

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_has_a_row_for_every_algorithm() -> None:
    rows = [line for line in README.read_text().splitlines() if line.startswith("| `")]
    for record in ALGORITHMS.values():
        columns = ", ".join(f"`{column}`" for column in record.columns)
        assert f"| `{record.name}` ({record.meaning}) | yes | yes | {columns} |" in rows


def test_a_record_fits_its_graph() -> None:
    for name, record in ALGORITHMS.items():
        graph = record.graph(PLAIN)
        assert graph.name == name
        generates = any(call.kind is CallKind.GENERATE for call in graph.calls)
        assert generates != record.offline
        assert record.group_size >= record.least_group
        assert pair_size(graph) == {"dpo": 2, "reward-modelling": 2}.get(name, 1)
    with pytest.raises(SpecError, match="did you mean `grpo`"):
        algorithm_named("grop")


def test_what_runs_and_what_does_not() -> None:
    plan = tiny_plan(2, "d2 t1 p1", algorithm="grpo", order=CRITIC_FREE, group_size=2)
    assert run_problems(plan) == [] and run_note(plan) == ""
    alone = replace(plan, workload=replace(plan.workload, group_size=1))
    assert [p.rule for p in run_problems(alone)] == ["group"]
    half = replace(plan, workload=replace(plan.workload, dtype="fp16"))
    assert "needs loss scaling" in run_note(half)


def test_a_minibatch_has_whole_pairs() -> None:
    plan = tiny_plan(1, "d1 t1 p1", algorithm="dpo", order=("ref_infer", "actor_train"), group_size=2)
    strategy = ParallelStrategy(micro_batches=8)  # more than there are pairs: some are empty
    cut = replace(plan, calls=tuple(replace(call, strategy=strategy) for call in plan.calls))
    assert run_problems(plan) == run_problems(cut) == []
    (problem,) = run_problems(replace(plan, workload=replace(plan.workload, minibatches=16)))
    assert problem.rule == "pairs" and problem.message.startswith("actor_train: minibatches of 1 samples")
    assert problem.path == ("calls", 1, "strategy")


@pytest.mark.parametrize(("model", "words"), [
    ("llama-7b", ""),
    ("phi-4", ""),
    ("gemma-2b", ""),
    ("gemma2-9b", ""),
    ("bloom-176b", "position encoding `alibi`"),
])  # fmt: skip
def test_architectures_that_run(model: str, words: str) -> None:
    problems = [problem.message for problem in spec_problems(load_model(model))]
    assert (not problems) if not words else any(words in problem for problem in problems)
