"""Batch tensors between meshes of different layouts, on gloo ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from plans.algorithms import algorithm_graph
from plans.batches import batch_transfers, rank_samples
from plans.cluster import parse_mesh
from plans.library import load_cluster
from plans.model import ModelSpec
from plans.plan import ExecutionPlan, PlannedCall
from plans.program import StepKind, compile_program
from plans.strategy import ParallelStrategy, parse_degrees
from plans.workload import Workload
from runtime.batches.transfer import BatchStore
from runtime.launching.describe import step_bytes
from runtime.sequences import Sequences

LAYOUTS = {
    "actor_generate": ("node 0", "d4 t1 p1"),
    "ref_infer": ("node 0 gpus 0-1", "d1 t2 p1"),
    "critic_infer": ("node 0 gpus 2-3", "d2 t1 p1"),
    "actor_train": ("node 0", "d2 t1 p2"),
    "critic_train": ("node 0 gpu 3", "d1 t1 p1"),
}


def plan() -> ExecutionPlan:
    spec = ModelSpec(name="tiny", layers=4, hidden=8, heads=4, kv_heads=2, head_dim=2, ffn=16, vocab=128)
    cluster = load_cluster("local-cpu", gpus=4, gpus_per_node=4)
    graph = algorithm_graph("ppo", reward_seconds_per_sample=0.0)
    models = {"actor": spec, "ref": spec, "critic": spec.with_value_head()}
    workload = Workload(
        graph=graph, models=models, batch_size=8, prompt_tokens=3, response_tokens=2, minibatches=2, dtype="fp32"
    )
    calls = tuple(
        PlannedCall(call=name, mesh=parse_mesh(mesh, cluster), strategy=ParallelStrategy(**parse_degrees(degrees)))
        for name, (mesh, degrees) in LAYOUTS.items()
    )
    return ExecutionPlan(workload=workload, cluster=cluster, calls=calls)


LENGTHS = [(3, 2), (1, 0), (2, 2), (3, 1), (1, 2), (3, 2), (1, 1), (2, 0)]
"""Tokens of prompt and response of every sample of iteration 0; each iteration moves them on by one."""


def lengths(iteration: int) -> list[tuple[int, int]]:
    return LENGTHS[iteration:] + LENGTHS[:iteration]


def row_of(key: str, iteration: int, row: int) -> Tensor:
    """What a tensor holds for a row: as many numbers as the row has, which name all of them."""
    prompt, response = lengths(iteration)[row]
    count = {"sequences": prompt + response, "rewards": 1}.get(key, response)
    return torch.full((count,), len(key) * 1000 + iteration * 100 + row, dtype=torch.float32)


def rows_of(p: ExecutionPlan, call: str, iteration: int) -> tuple[int, ...]:
    made_before = call in ("actor_generate", "reward")
    tokens = None if made_before else [sum(pair) for pair in lengths(iteration)]
    return rank_samples(p, call, tokens).get(dist.get_rank(), ())


def transfers() -> None:
    p = plan()
    store, graph = BatchStore(p, torch.device("cpu")), p.workload.graph
    store.begin(2)  # a run that goes on where another one ended
    for iteration in range(2, 5):
        for producer in ("actor_generate", "reward", "ref_infer"):
            rows = rows_of(p, producer, iteration)
            if rows:
                store.arrive(iteration, producer)
            if rows and producer == "actor_generate":
                store.put(iteration, "lengths", range(8), torch.tensor(lengths(iteration)))
            for key in graph.call(producer).outputs[: 2 if rows else 0]:
                store.put(iteration, key, rows, torch.cat([row_of(key, iteration, row) for row in rows]))
            for edge in graph.edges:
                members = {*p.ranks(graph.host(producer)), *p.ranks(graph.host(edge.target))}
                if edge.source == producer and edge.target in LAYOUTS and dist.get_rank() in members:
                    store.transfer(iteration, producer, edge.target)
    for iteration in reversed(range(2, 5)):
        for consumer, key in [
            ("ref_infer", "sequences"),
            ("critic_train", "sequences"),
            ("critic_train", "rewards"),
            ("actor_train", "ref_logprobs"),
        ]:
            rows = rows_of(p, consumer, iteration)
            if rows:
                store.arrive(iteration, consumer)
                found = store.get(iteration, key, rows)
                flat = found.tokens if isinstance(found, Sequences) else found
                wanted = torch.cat([row_of(key, iteration, row) for row in rows])
                assert torch.equal(flat.float(), wanted)
                assert store.lengths(iteration, consumer) == lengths(iteration)
        for consumer in LAYOUTS:
            store.arrive(iteration, consumer)
        store.settle(iteration)
        store.drop(iteration)
    assert not store._rows and not store._steps and not store._arrivals


def test_rows_reach_the_ranks_that_need_them() -> None:
    run_ranks(4, transfers)


@pytest.mark.parametrize("tokens", [None, [9, 1, 1, 1, 7, 2, 2, 5]])
def test_rows_are_sent_once_and_nothing_is_missing(tokens: list[int] | None) -> None:
    p = plan()
    graph = p.workload.graph
    for producer in ("actor_generate", "reward", "ref_infer", "critic_infer"):
        made = rank_samples(p, producer, tokens)
        held = {(rank, key, row) for rank, rows in made.items() for key in graph.call(producer).outputs for row in rows}
        sent = batch_transfers(p, producer, tokens)
        for consumer in dict.fromkeys(edge.target for edge in graph.edges if edge.source == producer):
            for message in sent.get(consumer, ()):
                for key in message.keys:
                    for row in message.rows:
                        assert row in made[message.source] and (message.target, key, row) not in held
                        held.add((message.target, key, row))
            keys = set(graph.call(consumer).inputs) & set(graph.call(producer).outputs)
            ranks = rank_samples(p, consumer, tokens)
            wanted = {(r, key, row) for r, rows in ranks.items() for key in keys for row in rows}
            assert wanted <= held


def test_bytes_in_words_are_those_of_the_messages() -> None:
    program = compile_program(plan())
    workload = program.plan.workload
    for step in program.steps:
        if step.kind is StepKind.TRANSFER:
            messages = program.messages[step.subject, step.consumer]
            sizes = {"sequences": 8 * workload.tokens, "rewards": 4}
            sent = sum(sizes.get(key, 4 * workload.response_tokens) * len(m.rows) for m in messages for key in m.keys)
            assert step_bytes(program, step) == sent


def test_a_function_sends_right_before_its_first_reader() -> None:
    steps = [step.name for step in compile_program(plan()).steps]
    at = steps.index("actor_train")
    sent = [i for i, name in enumerate(steps) if name.startswith("transfer reward -> ")]
    assert sent and all(steps.index("critic_infer") < i < at for i in sent), steps
