"""Batch tensors between meshes of different layouts, on gloo ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from ranks import run_ranks

from plans.algorithms import algorithm_graph
from plans.batches import batch_transfers, rank_rows
from plans.cluster import parse_mesh
from plans.library import load_cluster
from plans.model import ModelSpec
from plans.plan import ExecutionPlan, PlannedCall
from plans.program import StepKind, compile_program
from plans.strategy import ParallelStrategy, parse_degrees
from plans.workload import Workload
from runtime.batches.transfer import BatchStore, fields
from runtime.launching.describe import step_bytes

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


def value(key: str, iteration: int, row: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What a field holds for a row: a number that names all of them."""
    return torch.full(shape, len(key) * 1000 + iteration * 100 + row, dtype=dtype)


def transfers() -> None:
    p, rank = plan(), dist.get_rank()
    store, graph = BatchStore(p, torch.device("cpu")), p.workload.graph
    for iteration in range(3):
        for producer in ("actor_generate", "reward", "ref_infer"):
            rows = rank_rows(p, producer).get(rank, ())
            for key in graph.call(producer).outputs if rows else ():
                made = {
                    f.name: torch.stack([value(f.name, iteration, row, f.shape, f.dtype) for row in rows])
                    for f in fields(key, p.workload)
                }
                store.put(iteration, key, rows, made)
            for edge in graph.edges:
                if edge.source == producer and edge.target in LAYOUTS:
                    store.transfer(iteration, producer, edge.target)
    for iteration in reversed(range(3)):
        for consumer, key in [
            ("ref_infer", "sequences"),
            ("critic_train", "sequences"),
            ("critic_train", "rewards"),
            ("actor_train", "ref_logprobs"),
        ]:
            rows = rank_rows(p, consumer).get(rank, ())
            if rows:
                store.arrive(iteration, consumer)
                found = store.get(iteration, key, rows)
                for f in fields(key, p.workload):
                    wanted = torch.stack([value(f.name, iteration, row, f.shape, f.dtype) for row in rows])
                    assert torch.equal(found[f.name], wanted)
        for consumer in LAYOUTS:
            store.arrive(iteration, consumer)
        store.settle(iteration)
        store.drop(iteration)
    assert not store._rows


def test_rows_reach_the_ranks_that_need_them() -> None:
    run_ranks(4, transfers)


def test_rows_are_sent_once_and_nothing_is_missing() -> None:
    p = plan()
    graph = p.workload.graph
    for producer in ("actor_generate", "reward", "ref_infer", "critic_infer"):
        made = rank_rows(p, producer)
        held = {(rank, key, row) for rank, rows in made.items() for key in graph.call(producer).outputs for row in rows}
        sent = batch_transfers(p, producer)
        for consumer in dict.fromkeys(edge.target for edge in graph.edges if edge.source == producer):
            for message in sent.get(consumer, ()):
                for key in message.keys:
                    for row in message.rows:
                        assert row in made[message.source] and (message.target, key, row) not in held
                        held.add((message.target, key, row))
            keys = set(graph.call(consumer).inputs) & set(graph.call(producer).outputs)
            wanted = {(r, key, row) for r, rows in rank_rows(p, consumer).items() for key in keys for row in rows}
            assert wanted <= held


def test_bytes_in_words_are_those_of_the_messages() -> None:
    program = compile_program(plan())
    workload = program.plan.workload
    for step in program.steps:
        if step.kind is StepKind.TRANSFER:
            messages = program.messages[step.subject, step.consumer]
            sent = sum(f.row_bytes * len(m.rows) for m in messages for key in m.keys for f in fields(key, workload))
            assert step_bytes(program, step) == sent > 0


def test_a_function_sends_right_before_its_first_reader() -> None:
    steps = [step.name for step in compile_program(plan()).steps]
    at = steps.index("actor_train")
    sent = [i for i, name in enumerate(steps) if name.startswith("transfer reward -> ")]
    assert sent and all(steps.index("critic_infer") < i < at for i in sent), steps
