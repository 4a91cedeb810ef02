"""Data parallelism, ZeRO and offload by hand: Rajbhandari et al. 2020; Megatron's distributed optimizer reduces fp32
gradients and gathers bf16 weights; Adam keeps two fp32 moments, and fp32 masters beside 16-bit weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from textbook import DENSE, EXPERTS, FAR, NANO, TextbookKernels, layout, machine, memory, nanoseconds, network

from cost_models.engines.machine import Machine
from cost_models.packing import Packing
from cost_models.time.calls import call_time
from cost_models.time.inference import ForwardPass, inference_time
from cost_models.time.training import TrainingStep, training_time
from plans.algorithms import algorithm_graph
from plans.workload import Workload

STEP = TrainingStep(DENSE, 32, 2048)
BLOCK = 1536 * (12 + 2 * 4) * 128 + 12 * 128 * 1536 + 3 * 1536 * 4096
EMBEDDING = 32_000 * 1536
PARAMS = 24 * BLOCK + 2 * EMBEDDING
NORMS = 3e-4
"""Norms are left out here, less than this share of all."""


def term(at: Machine, name: str, spec: object = DENSE, **settings: object) -> float:
    step = replace(STEP, spec=spec)  # type: ignore[arg-type]
    return nanoseconds(training_time(at, step, layout(**settings))[name])


def close(expected: float) -> object:
    return pytest.approx(expected, rel=NORMS)


def test_gradients_are_summed_in_fp32_over_dp_and_cp() -> None:
    ring = 7 / 8 * 4 * PARAMS
    assert term(network(), "gradient_reduce", dp=8, shard_optimizer=False) == close(2 * ring)
    assert term(network(), "gradient_reduce", dp=8) == close(ring), "a reduce-scatter is half of an all-reduce"
    assert term(network(), "gradient_reduce", dp=2, cp=4) == close(ring)
    assert term(network(), "gradient_reduce", dp=2, tp=4) == close(1 / 2 * 4 * PARAMS / 4)
    assert term(network(gradient_bytes=2), "gradient_reduce", dp=8) == close(ring / 2)


def test_a_sharded_optimizer_gathers_weights_in_two_bytes() -> None:
    assert term(network(), "parameter_gather", dp=8) == close(7 / 8 * 2 * PARAMS)
    assert term(network(), "parameter_gather", dp=2, cp=2, tp=2) == close(3 / 4 * 2 * PARAMS / 2)
    assert term(network(), "parameter_gather", dp=8, shard_optimizer=False) == 0


def test_a_stage_has_its_layers_and_one_embedding() -> None:
    held = 12 * BLOCK + EMBEDDING
    assert term(network(), "gradient_reduce", dp=4, pp=2) == close(3 / 4 * 4 * held)


def test_replicas_that_are_not_on_one_node_reduce_over_the_network() -> None:
    """tp 4 leaves two replicas on a node of eight, and dp 4 needs two nodes; tp 8 leaves one."""
    assert term(network(), "gradient_reduce", dp=4, tp=4) == close(FAR * 3 / 4 * 4 * PARAMS / 4)
    assert term(network(), "parameter_gather", dp=2, tp=8) == close(FAR * 1 / 2 * 2 * PARAMS / 8)


def test_experts_are_reduced_among_the_ranks_that_hold_the_same() -> None:
    """16 ranks in runs of ep 4: dp x cp x tp / ep = 4 ranks have the same experts, dp x cp the same of the rest."""
    expert_block, dense_block = 16 * 3 * 1536 * 640, 1536 * 20 * 128 + 1536 * 1536 + 16 * 1536
    dense = (24 * dense_block + 2 * EMBEDDING) / 2
    experts = 24 * expert_block / 4
    found = term(network(), "gradient_reduce", EXPERTS, dp=4, cp=2, tp=2, ep=4)
    assert found == close(FAR * 4 * (7 / 8 * dense + 3 / 4 * experts))
    gathered = term(network(), "parameter_gather", EXPERTS, dp=4, cp=2, tp=2, ep=4)
    assert gathered == close(FAR * 2 * (7 / 8 * dense + 3 / 4 * experts))
    update = term(memory(optimizer_bytes=30), "optimizer", EXPERTS, dp=4, cp=2, tp=2, ep=4)
    assert update == close(30 * (dense / 8 + experts / 4))
    alone = term(memory(optimizer_bytes=30), "optimizer", EXPERTS, dp=4, cp=2, tp=2, ep=16)
    assert alone == close(30 * (dense / 8 + 24 * expert_block / 16)), "nobody else has these experts"


def test_what_hides_behind_the_backward_pass_is_not_waited_for() -> None:
    """Half of the reduction may hide, where the last backward pass is long enough; the gather half as long."""
    forward = 2 * 8192 * BLOCK + 2 * 8192 * 2048 * 12 * 128
    attention = 2 * 8192 * 2048 * 12 * 128
    backward = 24 * (2 * (forward - attention) + 2.5 * attention)
    ring, gather = 7 / 8 * 4 * PARAMS, 7 / 8 * 2 * PARAMS
    settings = {"dp": 8, "micro_batches": 1}
    for share in (0.01, 0.1, 10.0):
        flop = share * ring / backward * NANO
        at = machine(TextbookKernels(byte=NANO, flop=flop), data_overlap=0.5, gather_overlap=0.5)
        hidden, gathered = min(0.5 * ring, share * ring), min(0.5 * gather, 0.5 * share * ring)
        assert term(at, "gradient_reduce", **settings) == close(ring - hidden)
        assert term(at, "parameter_gather", **settings) == close(gather - gathered)


@pytest.mark.parametrize(("tp", "pp", "pace"), [(2, 4, 1.0), (8, 2, FAR)])
def test_tied_embeddings_are_summed_between_the_ends_of_a_pipeline(tp: int, pp: int, pace: float) -> None:
    """An all-reduce over two ranks sends the message once; the matrix is counted once at either end."""
    tied = replace(DENSE, tied_embeddings=True)
    found = term(network(), "gradient_reduce", tied, tp=tp, pp=pp)
    assert found == pytest.approx(pace * EMBEDDING / tp * 4)
    assert term(network(), "gradient_reduce", tied, dp=8) == close(7 / 8 * 4 * (PARAMS - EMBEDDING))
    assert term(network(), "gradient_reduce", tied.with_value_head(), tp=tp, pp=pp) == 0


def test_gradients_are_added_up_once_per_micro_batch() -> None:
    at = memory(accumulate_bytes=10)
    assert term(at, "accumulation", dp=2, tp=4, micro_batches=4) == close(4 * 10 * PARAMS / 4)


def test_adam_updates_a_rank_s_shard() -> None:
    at = memory(optimizer_bytes=30)
    assert term(at, "optimizer", dp=2, tp=2, cp=2) == close(30 * PARAMS / 2 / 4)
    assert term(at, "optimizer", dp=2, tp=2, cp=2, shard_optimizer=False) == close(30 * PARAMS / 2)
    sharded = memory(optimizer_bytes=30, shards_weights=True)
    assert term(sharded, "optimizer", dp=8, shard_optimizer=False) == close(30 * PARAMS / 8)


def test_shards_need_not_be_whole() -> None:
    """A model so small that a part of a parameter counts: 40 ranks have the same."""
    tiny = replace(DENSE, layers=2, hidden=3, heads=1, kv_heads=1, head_dim=5, ffn=7, vocab=11)
    block = 3 * 3 * 5 + 5 * 3 + 3 * 3 * 7 + 2 * 3
    params = 2 * block + 2 * tiny.padded_vocab * 3
    at = memory(optimizer_bytes=30)
    assert params % 40 and params % (2 * 40)
    assert term(at, "optimizer", tiny, dp=40) == pytest.approx(30 * params / 40)
    assert term(at, "optimizer", tiny, dp=20, pp=2) == pytest.approx(30 * (params - tiny.padded_vocab * 3 - block) / 20)
    assert term(network(), "parameter_gather", tiny, dp=40) == pytest.approx(FAR * 39 / 40 * 2 * params)
    found = term(network(shards_weights=True), "weight_gather", tiny, dp=8, tp=8, micro_batches=1)
    assert found == pytest.approx(2 * (2 * 2 + 4) * FAR * 7 / 8 * tiny.layer_params / 8) and block % 8


def test_zero_3_gathers_a_layer_twice_and_scatters_its_gradient_in_every_micro_batch() -> None:
    at = network(shards_weights=True, gradient_bytes=2)
    found = term(at, "weight_gather", dp=4, tp=2, micro_batches=4)
    assert found == close(24 * 4 * 3 * (3 / 4 * 2 * BLOCK / 2))
    fp32 = term(network(shards_weights=True), "weight_gather", dp=2, cp=2, tp=2, micro_batches=4)
    assert fp32 == close(24 * 4 * (2 * 2 + 4) * 3 / 4 * BLOCK / 2)
    for name in ("gradient_reduce", "parameter_gather"):
        assert term(at, name, dp=4, tp=2) == 0, "the scatter is the reduction, and no weight is whole"
    assert term(network(), "weight_gather", dp=8) == 0


def test_zero_3_gathers_once_in_a_forward_pass() -> None:
    work = ForwardPass(DENSE, 32, 2048, head_tokens=2048)
    terms = inference_time(network(shards_weights=True), work, layout(dp=4, tp=2, micro_batches=4))
    assert nanoseconds(terms["weight_gather"]) == close(24 * 4 * 3 / 4 * 2 * BLOCK / 2)
    over = inference_time(network(shards_weights=True), work, layout(dp=16, micro_batches=2))
    assert nanoseconds(over["weight_gather"]) == close(FAR * 24 * 2 * 15 / 16 * 2 * BLOCK)
    assert inference_time(network(), work, layout(dp=8))["weight_gather"] == 0


def test_zero_3_hides_a_share_of_what_runs_beside_compute() -> None:
    """Gather against the forward pass, gather and scatter against the backward one: 0.4 x the shorter is hidden."""
    forward = 2 * 8192 * BLOCK + 2 * 8192 * 2048 * 12 * 128
    attention = 2 * 8192 * 2048 * 12 * 128
    backward = 2 * (forward - attention) + 2.5 * attention
    gather = 7 / 8 * 2 * BLOCK
    for flop in (0.1 * gather / forward, 100 * gather / forward):
        at = machine(
            TextbookKernels(byte=NANO, flop=flop * NANO), shards_weights=True, gradient_bytes=2, data_overlap=0.4
        )
        first = gather - 0.4 * min(gather, flop * forward)
        second = 2 * gather - 0.4 * min(2 * gather, flop * backward)
        assert term(at, "weight_gather", dp=8, micro_batches=1) == close(24 * (first + second))


def offloaded(call: str, dtype: str = "bf16", spec: object = DENSE, **settings: object) -> float:
    graph = algorithm_graph("grpo")
    workload = Workload(graph=graph, models=dict.fromkeys(graph.roles, spec), dtype=dtype, batch_size=64)  # type: ignore[arg-type]
    at = replace(memory(), dtype=dtype)
    return nanoseconds(call_time(at, workload, call, layout(offload=True, **settings))["offload"])


def test_optimizer_state_comes_from_the_host_and_goes_back() -> None:
    """Two fp32 moments and fp32 masters are 12 bytes a parameter; fp32 weights are their own masters, 8 bytes."""
    assert offloaded("actor_train", dp=4, tp=2) == close(2 * 12 * PARAMS / 2 / 4)
    assert offloaded("actor_train", dp=2, cp=2, tp=2, shard_optimizer=False) == close(2 * 12 * PARAMS / 2)
    assert offloaded("actor_train", "fp32", dp=4, tp=2) == close(2 * 8 * PARAMS / 2 / 4)


def test_frozen_weights_come_from_the_host_and_are_dropped() -> None:
    assert offloaded("ref_infer", dp=4, tp=2) == close(2 * PARAMS / 2)
    assert offloaded("ref_infer", "fp32", dp=2, pp=2, tp=2) == close(4 * (12 * BLOCK + EMBEDDING) / 2)
    dense_block = 1536 * 20 * 128 + 1536 * 1536 + 16 * 1536
    held = (24 * dense_block + 2 * EMBEDDING) / 2 + 24 * 16 * 3 * 1536 * 640 / 4
    assert offloaded("ref_infer", spec=EXPERTS, dp=4, tp=2, ep=4) == close(2 * held)


def test_a_call_computes_every_sample_once_whatever_its_minibatches() -> None:
    """Forward and twice as much backward: 6 FLOPs a weight and token, of 64 samples of 2,048 tokens on 8 ranks."""
    graph = algorithm_graph("grpo")
    for minibatches in (1, 4, 8):
        workload = Workload(
            graph=graph, models=dict.fromkeys(graph.roles, DENSE), batch_size=64, minibatches=minibatches
        )
        terms = call_time(machine(TextbookKernels(flop=NANO)), workload, "actor_train", layout(dp=8))
        assert nanoseconds(terms["linears"]) == close(6 * 24 * BLOCK * 64 * 2048 / 8)


def test_the_busiest_rank_works_longer_than_the_mean() -> None:
    """A fifth more work than the mean, of 24 inner layers and none of the head."""
    uneven = replace(STEP, packing=Packing(imbalance=1.2))
    at = machine(TextbookKernels(flop=NANO))
    terms = training_time(at, uneven, layout(dp=8, micro_batches=2))
    tokens = 32 * 2048 / 8
    layer = 2 * tokens * BLOCK * 3 + 2 * tokens * 2048 * 12 * 128 * 3.5
    head = 3 * 2 * tokens * 32_000 * 1536
    assert nanoseconds(terms["imbalance"]) == close(0.2 * (24 * layer + head))


def test_the_busiest_rank_scores_longer_than_the_mean() -> None:
    """A fifth of all that the mean rank computes, in however many micro-batches."""
    work = ForwardPass(DENSE, 32, 2048, head_tokens=2048, packing=Packing(imbalance=1.2))
    for micro_batches in (1, 8):
        at = machine(TextbookKernels(flop=NANO))
        terms = inference_time(at, work, layout(dp=8, micro_batches=micro_batches))
        computed = sum(terms[name] for name in ("linears", "attention", "head_and_loss"))
        assert nanoseconds(terms["imbalance"]) == close(0.2 * nanoseconds(computed))


def test_backward_of_a_layer_hides_what_it_communicates_too() -> None:
    """The backward pass that a reduction hides behind has the forward's all-reduces in it."""
    plain = network(data_overlap=1.0)
    reduced = term(plain, "gradient_reduce", dp=2, tp=4, micro_batches=16)
    tensor = 24 * 2 * 2 * 3 / 4 * (2048 * 2 * 1536)
    assert reduced == close(max(1 / 2 * 4 * PARAMS / 4 - tensor, 0.0))


def test_a_training_call_is_as_many_steps_as_there_are_minibatches() -> None:
    graph = algorithm_graph("grpo")
    workload = Workload(graph=graph, models=dict.fromkeys(graph.roles, DENSE), batch_size=64, minibatches=4)
    candidates = layout(dp=8)
    terms = call_time(network(call_s=3.0), workload, "actor_train", candidates)
    assert nanoseconds(terms["gradient_reduce"]) == close(4 * 7 / 8 * 4 * PARAMS)
    assert terms["call"] == 3.0
    assert terms["offload"] == np.zeros(1)
