"""Time of calls against hand calculation, brute force and measured tables of others."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from cost_models.candidates import Candidates
from cost_models.engines.constants import Constants, engine_names, load_constants
from cost_models.engines.engine import MEGATRON, NamedEngine
from cost_models.engines.machine import Machine, machine_of
from cost_models.slots import quadrature
from cost_models.stages import default_layers, stage_layers
from cost_models.terms import Terms
from cost_models.time.calls import call_time
from cost_models.time.data_parallel import gradient_reduce
from cost_models.time.generation import Generation, decode_step, decode_terms
from cost_models.time.pipeline import fill_and_drain
from cost_models.time.training import TrainingStep, training_time
from plans.algorithms import ppo
from plans.cluster import DeviceMesh
from plans.errors import SpecError
from plans.layout import default_split
from plans.lengths import Lengths
from plans.library import gpu_names, load_cluster, load_model
from plans.strategy import ParallelStrategy, Recompute
from plans.workload import Workload

LLAMA = load_model("llama-7b")


def machine(gpus: int = 8, gpu: str = "a100-80gb", **constants: object) -> Machine:
    cluster = load_cluster(gpu, gpus=gpus)
    return machine_of(cluster, replace(load_constants("megatron", cluster.gpu.name), **constants))  # type: ignore[arg-type]


def layout(gpus: int, **settings: object) -> Candidates:
    mesh = DeviceMesh(first_node=0, nodes=max(gpus // 8, 1), first_gpu=0, gpus=min(gpus, 8))
    return Candidates.of([(mesh, ParallelStrategy(**settings))])  # type: ignore[arg-type]


def array(*values: float) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.array(values, dtype=np.float64)


def step_s(at: Machine, candidates: Candidates, samples: float = 64, tokens: float = 2048) -> float:
    return float(training_time(at, TrainingStep(LLAMA, samples, tokens), candidates).total_s[0])


def test_gemm_follows_the_measured_passage_from_streaming_to_compute() -> None:
    """Median TFLOP/s over n, k >= 4096 on A100, bf16 (NVIDIA's table in aiconfigurator-core 0.12.0)."""
    measured = {1: 1.4, 16: 22.3, 64: 88.2, 128: 152.9, 256: 217.6, 512: 254.0, 2048: 277.2, 8192: 286.8}
    at = machine(measured_kernels=False, gemm_efficiency=0.93, gemm_half_extent=16.0)
    m = array(*measured)
    seconds = at.kernels.gemm(m, 8192.0, 8192.0)
    reached = 2 * m * 8192 * 8192 / seconds / 1e12
    assert reached == pytest.approx(list(measured.values()), rel=0.11)


@pytest.mark.parametrize(
    ("gpu", "size", "megabytes", "microseconds"),
    [
        ("a100-80gb", 8, 512, 2288.0),
        ("a100-80gb", 2, 128, 496.4),
        ("b200-180gb", 8, 128, 215.25),
        ("h100-80gb-sxm", 4, 512, 1268.3),
    ],
)
def test_all_gather_matches_nccl(gpu: str, size: int, megabytes: float, microseconds: float) -> None:
    """nccl-tests all_gather times inside a node (NVIDIA's tables)."""
    seconds = machine(gpu=gpu).kernels.all_gather(array(megabytes * 2**20), array(size), array(size))
    assert 1e6 * seconds[0] == pytest.approx(microseconds, rel=0.2)


def test_collectives_of_one_rank_are_free_and_nodes_share_their_network() -> None:
    at = machine(64)
    message = array(1e9)
    for collective in (at.kernels.all_reduce, at.kernels.all_gather, at.kernels.all_to_all):
        assert collective(message, array(1), array(1))[0] == 0
    alone = at.kernels.all_reduce(message, array(8), array(1))[0]
    ring = at.kernels.all_reduce(message, array(64), array(8))[0]
    assert alone == pytest.approx(2 * 7 / 8 * 1e9 / at.network_bytes_per_s, rel=0.3)
    assert ring < 0.25 * alone
    assert at.kernels.all_reduce(message, array(8), array(8))[0] < ring


def simulate_1f1b(forward: list[float], backward: list[float], micro_batches: int) -> float:
    """Event simulation of 1F1B: each stage runs pp - stage warm-up forwards, then alternates."""
    pp = len(forward)
    ends: dict[tuple[str, int, int], float] = {}
    orders = []
    for stage in range(pp):
        warm = min(pp - stage, micro_batches)
        order = [("f", m) for m in range(warm)]
        for m in range(micro_batches):
            order.append(("b", m))
            if warm + m < micro_batches:
                order.append(("f", warm + m))
        orders.append(order)
    clock, position = [0.0] * pp, [0] * pp
    while any(p < len(o) for p, o in zip(position, orders, strict=True)):
        for stage in range(pp):
            while position[stage] < len(orders[stage]):
                kind, m = orders[stage][position[stage]]
                before = (kind, stage - 1, m) if kind == "f" else (kind, stage + 1, m)
                if before not in ends and 0 <= before[1] < pp:
                    break
                start = max(clock[stage], ends.get(before, 0.0))
                clock[stage] = start + (forward if kind == "f" else backward)[stage]
                ends[kind, stage, m] = clock[stage]
                position[stage] += 1
    return max(clock)


@pytest.mark.parametrize(("pp", "micro_batches", "head"), itertools.product((1, 2, 4, 8), (1, 4, 16), (0.0, 0.7)))
def test_pipeline_formula_is_the_simulated_schedule(pp: int, micro_batches: int, head: float) -> None:
    forward, backward = [1.0] * pp, [2.0] * pp
    forward[-1] += head / 3
    backward[-1] += 2 * head / 3
    simulated = simulate_1f1b(forward, backward, micro_batches)
    slots = micro_batches * (3.0 + head)
    formula = slots + fill_and_drain(array(1), array(3.0 * pp + head), array(3.0 + head))[0]
    assert formula == pytest.approx(simulated, rel=0.02)


def test_stages_are_those_of_the_layout() -> None:
    for layers in (1, 5, 61, 94, 126):
        degrees = [pp for pp in range(1, 17) if pp <= layers]
        fullest, last = default_layers(layers, array(*degrees))
        splits = [default_split(layers, pp) for pp in degrees]
        assert fullest.tolist() == [max(split) for split in splits]
        assert last.tolist() == [split[-1] for split in splits]
    own = ParallelStrategy(pp=4, layers_per_stage=(7, 9, 10, 6))
    fullest, last = stage_layers(LLAMA, Candidates.of([(load_cluster("h100-80gb-sxm").whole, own)]))
    assert (fullest[0], last[0]) == (10, 6)


def test_training_is_never_faster_than_its_flops() -> None:
    at = machine(16)
    flops = 6 * LLAMA.params * 64 * 2048
    for dp, tp, pp in ((16, 1, 1), (2, 8, 1), (4, 2, 2), (1, 4, 4)):
        seconds = step_s(at, layout(16, dp=dp, tp=tp, pp=pp, micro_batches=64 // dp))
        assert flops / (16 * at.peak_flops) < seconds < 8 * flops / (16 * at.peak_flops)


def test_recomputation_costs_about_a_third_more() -> None:
    at = machine(8)
    plain, selective, full = (step_s(at, layout(8, dp=8, micro_batches=4, recompute=mode)) for mode in Recompute)
    assert plain < selective < full
    assert full / plain == pytest.approx(4 / 3, rel=0.05)


def test_settings_move_time_the_right_way() -> None:
    at = machine(16)
    base = step_s(at, layout(16, dp=2, tp=8, micro_batches=8))
    assert step_s(at, layout(16, dp=2, tp=8, micro_batches=32)) > base
    assert step_s(at, layout(16, dp=2, tp=8, micro_batches=8, sequence_parallel=True)) < base
    few = step_s(at, layout(16, tp=8, pp=2, micro_batches=2))
    assert step_s(at, layout(16, tp=8, pp=2, micro_batches=8)) < few
    parts = {"tp": 8, "pp": 2, "micro_batches": 8, "sequence_parallel": True}
    assert step_s(at, layout(16, vpp=4, **parts)) < step_s(at, layout(16, **parts))


def test_whole_activations_take_longer_between_stages_than_parts() -> None:
    at = machine(16)
    split = machine_of(at.cluster, replace(at.constants, splits_sends=True))
    deep = layout(16, tp=8, pp=2, micro_batches=8)
    assert step_s(split, deep) < step_s(at, deep)
    parts = layout(16, tp=8, pp=2, micro_batches=8, sequence_parallel=True)
    assert step_s(split, parts) == step_s(at, parts)


def test_tied_embeddings_are_summed_between_the_ends_of_a_pipeline() -> None:
    at, tied = machine(16), load_model("qwen2.5-1.5b")
    assert tied.tied_embeddings
    apart = replace(tied, tied_embeddings=False)
    found = [gradient_reduce(at, spec, layout(16, dp=8, pp=2), np.zeros(1)) for spec in (tied, apart)]
    message = tied.padded_vocab * tied.hidden * 4.0
    assert found[0] - found[1] == pytest.approx(message / at.network_bytes_per_s, rel=0.2)
    whole = [gradient_reduce(at, spec, layout(16, dp=16), np.zeros(1)) for spec in (tied, apart)]
    assert whole[0] < whole[1], "one matrix less"


def test_sharded_weights_cost_communication_in_every_micro_batch() -> None:
    at = machine(16)
    sharded = machine_of(at.cluster, replace(at.constants, shards_weights=True))
    one, many = (layout(16, dp=16, micro_batches=m) for m in (1, 4))
    terms = [training_time(sharded, TrainingStep(LLAMA, 64, 2048), c)["weight_gather"][0] for c in (one, many)]
    assert terms[1] > terms[0] > 0
    assert training_time(at, TrainingStep(LLAMA, 64, 2048), one)["weight_gather"][0] == 0


def test_tensor_parallel_across_nodes_is_dear() -> None:
    at = machine(16)
    assert step_s(at, layout(16, tp=16)) > 1.5 * step_s(at, layout(16, dp=2, tp=8))


@pytest.mark.parametrize("mean", [0, 100, 300, 600])
def test_response_lengths_keep_their_mean(mean: int) -> None:
    responses = Lengths(1024, mean)
    position, weight = quadrature(responses, 1023.0)
    assert weight.sum() == pytest.approx(1023)
    alive = np.array([responses.beyond(at) for at in position])
    assert (weight * alive).sum() == pytest.approx(mean or 1023, rel=0.02)


def test_only_layers_with_experts_sort_rows_by_expert() -> None:
    """DeepSeek-V3 has 61 layers, the first three of them dense; Llama has none with experts."""
    candidates = layout(8, dp=8)
    for model, layers in (("deepseek-v3", 58), ("llama-7b", 0)):
        with_it, without = (
            Terms(decode_step(machine(decode_experts_s=s), load_model(model), candidates, 64, 100.0)).total_s[0]
            for s in (1e-3, 0.0)
        )
        assert with_it - without == pytest.approx(layers * 1e-3)


@pytest.mark.parametrize(("mean", "groups", "pp"), [(0, 1, 1), (0, 4, 4), (300, 1, 1), (300, 2, 4)])
def test_decode_quadrature_equals_the_sum_over_every_step(mean: int, groups: int, pp: int) -> None:
    at, work = machine(8), Generation(LLAMA, 256, 128, Lengths(1024, mean))
    candidates = layout(8, tp=8 // pp, pp=pp, groups=groups)
    quick = Terms(decode_terms(at, work, candidates)).total_s[0]
    first = 0 if at.constants.burst_steps else 1  # tokens of a response that prefill makes
    wait = max(at.constants.burst_steps - 1, 0) / 2 if mean else 0.0
    rate, slow = work.responses.hazard, 0.0
    for token in range(first, 1024):
        alive = float(np.exp(-rate * max(token - first - wait, 0.0)))
        running = 1.0 - (1.0 - alive) ** 256
        slow += running * Terms(decode_step(at, LLAMA, candidates, 256 * alive, 128.0 + token)).total_s[0]
    assert quick == pytest.approx(slow, rel=0.02)


def test_decoding_streams_weights_and_long_tails_save_less_than_their_mean() -> None:
    at = machine(8, host_decode_layer_s=0.0, decode_layer_s=0.0, decode_step_s=0.0)
    one = layout(1, tp=1)
    token = Terms(decode_step(at, LLAMA, one, 1, 1)).total_s[0]
    weights = 2 * (LLAMA.params - LLAMA.embedding_params)
    assert token == pytest.approx(weights / at.memory_bytes_per_s, rel=0.15)
    forced, tailed = (
        Terms(decode_terms(at, Generation(LLAMA, 64, 128, Lengths(1024, mean)), one)).total_s[0] for mean in (0, 256)
    )
    assert forced / 4 < tailed < forced


def workload(**settings: object) -> Workload:
    graph = ppo()
    return Workload(graph=graph, models=dict.fromkeys(graph.roles, LLAMA), **settings)  # type: ignore[arg-type]


def test_calls_scale_with_their_work() -> None:
    cluster = load_cluster("h100-80gb-sxm", gpus=8)
    at = MEGATRON.on(cluster, "bf16")
    candidates = layout(8, dp=2, tp=4, micro_batches=8)

    def seconds(call: str, **settings: object) -> float:
        return float(call_time(at, workload(**settings), call, candidates).total_s[0])

    for call in ("actor_generate", "ref_infer", "actor_train"):
        assert seconds(call, batch_size=1024) > 1.5 * seconds(call, batch_size=512)
    assert seconds("actor_generate", response_tokens=2048) > 1.8 * seconds("actor_generate")
    assert seconds("actor_generate", mean_response_tokens=256) < seconds("actor_generate")
    assert seconds("actor_train") > 2.5 * seconds("ref_infer")


def test_offload_pays_for_the_bus() -> None:
    cluster = load_cluster("a100-80gb", gpus=8)
    at = MEGATRON.on(cluster, "bf16")
    kept, offloaded = (layout(8, dp=8, micro_batches=8, offload=flag) for flag in (False, True))
    terms = [call_time(at, workload(), "ref_infer", c) for c in (kept, offloaded)]
    assert terms[0]["offload"][0] == 0
    bus = cluster.gpu.pcie_gbps * 1e9 * at.constants.offload_efficiency
    assert terms[1]["offload"][0] == pytest.approx(2 * LLAMA.params / bus, rel=0.01)


def test_every_engine_costs_every_call_on_every_device() -> None:
    for gpu, name in itertools.product(gpu_names(), engine_names()):
        cluster = load_cluster("local-cpu" if gpu == "cpu" else gpu)
        work = workload(dtype="fp32" if gpu == "cpu" else "bf16")
        at = NamedEngine(name).on(cluster, work.dtype)
        mesh = cluster.whole
        candidates = Candidates.of([(mesh, ParallelStrategy(dp=mesh.size, micro_batches=4))])
        for call in work.graph.model_calls:
            assert 0 < call_time(at, work, call.name, candidates).total_s[0] < np.inf


def test_vector_and_single_costs_agree() -> None:
    cluster = load_cluster("h100-80gb-sxm", gpus=32)
    at = MEGATRON.on(cluster, "bf16")
    mesh = cluster.whole
    strategies = [
        ParallelStrategy(dp=32 // (tp * pp), tp=tp, pp=pp, micro_batches=4, groups=pp, recompute=recompute)
        for tp, pp, recompute in itertools.product((1, 4, 8), (1, 4), Recompute)
    ]
    candidates = Candidates.of([(mesh, s) for s in strategies])
    for call in workload().graph.model_calls:
        together = call_time(at, workload(), call.name, candidates).total_s
        alone = [call_time(at, workload(), call.name, candidates.take([i])).total_s[0] for i in range(len(strategies))]
        assert together == pytest.approx(alone)


def test_unknown_engine_offers_names() -> None:
    with pytest.raises(SpecError, match="megatron-te"):
        NamedEngine("megatron-tee")
    with pytest.raises(SpecError, match="megatron-te"):
        load_constants("megatron-tee", "a100-80gb")
    assert load_constants("fsdp", "h100-80gb-sxm", "fp16") == load_constants("fsdp", "h100-80gb-sxm", "bf16")
    assert isinstance(load_constants("megatron", "h200-141gb"), Constants)


def test_sharded_weights_are_gathered_for_inference_and_prefill() -> None:
    cluster = load_cluster("a100-80gb", gpus=16)
    candidates = layout(16, dp=16, micro_batches=8)
    plain, sharded = (NamedEngine(name).on(cluster, "bf16") for name in ("megatron", "fsdp"))
    assert call_time(plain, workload(), "ref_infer", candidates)["weight_gather"][0] == 0
    assert call_time(sharded, workload(), "ref_infer", candidates)["weight_gather"][0] > 0
