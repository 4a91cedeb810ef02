"""Memory model: against published formulas and figures, published peaks, and its own bookkeeping."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.resources import files
from typing import Any

import numpy as np
import pytest
from textbook import layout

from cost_models.candidates import Candidates
from cost_models.engines.constants import engine_names
from cost_models.engines.engine import MEGATRON, memory_habits
from cost_models.memory.activations import block_widths, kept_block_bytes
from cost_models.memory.memory import call_memory
from cost_models.memory.memory_inference import kv_cache_bytes
from cost_models.memory.memory_terms import MemoryTerms
from cost_models.memory.memory_training import in_flight, stage_terms, training_terms
from cost_models.memory.training_case import TrainingCase, model_parts, stage_parts
from cost_models.time.training import TrainingStep, training_time
from cost_models.validation.memory_rows import predict_memory, training_case_of
from plans.algorithms import algorithm_graph
from plans.cluster import DeviceMesh
from plans.errors import SpecError
from plans.layout import Layout, model_units
from plans.library import load_cluster, load_model
from plans.model import ModelSpec, Norm, Position
from plans.reallocation import buffer_bytes
from plans.strategy import ParallelStrategy, Recompute
from plans.workload import Workload

GPT_22B = ModelSpec(
    name="gpt-22b",
    layers=48,
    hidden=6144,
    heads=64,
    kv_heads=64,
    head_dim=96,
    ffn=4 * 6144,
    vocab=51200,
    gated_mlp=False,
    norm=Norm.LAYER,
    position=Position.LEARNED,
    linear_bias=True,
    max_context=2048,
)
"""Korthikanti et al. 2022, table 3: the 22B model, micro-batch 4, sequence length 2,048, t = 8."""


def training_memory(spec: ModelSpec, case: TrainingCase) -> MemoryTerms:
    return training_terms(spec, case, memory_habits("megatron-te"))


def published_rows() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for name in ("peak_memory", "training_steps"):
        data = json.loads((files("cost_models") / "library" / "measurements" / f"{name}.json").read_text())
        rows += [row for row in data["rows"] if any("peak_mem" in key for key in row["measured"])]
    return list({row["id"]: row for row in reversed(rows)}.values())


def block_bytes(recompute: str, *, sequence_parallel: bool, flash: bool = False) -> float:
    case = training_case_of(
        dp=1,
        tp=8,
        micro_batch=4,
        seq_len=2048,
        recompute=recompute,
        sequence_parallel=sequence_parallel,
        flash=flash,
        dropout=True,
    )
    widths = block_widths(GPT_22B, fused_pointwise=True, fused_rotary=True)
    return float((kept_block_bytes(widths, case, gathers_keys=True) * case.rank_tokens)[0])


class TestKorthikanti:
    """Table 2 of the paper: activation bytes per layer, s = 2048, b = 4, h = 6144, a = 64, t = 8."""

    SBH = 2048 * 4 * 6144
    SCORES = 5 * 64 * 2048 / 6144

    @pytest.mark.parametrize(
        ("recompute", "sequence_parallel", "factor"),
        [
            ("none", False, 10 + 24 / 8 + SCORES / 8),
            ("none", True, 34 / 8 + SCORES / 8),
            ("selective", False, 10 + 24 / 8),
            ("selective", True, 34 / 8),
            ("full", False, 2),
            ("full", True, 2 / 8),
        ],
    )
    def test_bytes_per_layer(self, recompute: str, sequence_parallel: bool, factor: float) -> None:
        # Without the score matrix one fp32 statistic per head and row stays, which the paper does not count.
        statistics = 0.0 if recompute != "selective" else 4 * 64 * 2048 * 4 / 8
        expected = self.SBH * factor + statistics
        assert block_bytes(recompute, sequence_parallel=sequence_parallel) == pytest.approx(expected, rel=1e-12)

    def test_flash_attention_stores_no_scores(self) -> None:
        flash = block_bytes("none", sequence_parallel=True, flash=True)
        assert flash == block_bytes("selective", sequence_parallel=True)


def test_1f1b_keeps_pp_micro_batches_on_the_first_stage_and_one_on_the_last() -> None:
    stage, pp, vpp = np.arange(4.0), np.full(4, 4.0), np.ones(4)
    assert in_flight(stage, pp, vpp, np.full(4, 16.0)).tolist() == [4, 3, 2, 1]
    assert in_flight(stage, pp, vpp, np.full(4, 2.0)).tolist() == [2, 2, 2, 1]


def test_interleaving_keeps_the_papers_factor_on_the_first_stage() -> None:
    pp, vpp = np.array([8.0]), np.array([3.0])
    flight = in_flight(np.zeros(1), pp, vpp, np.array([64.0]))
    assert flight[0] == pytest.approx(8 * (1 + (8 - 1) / (8 * 3)))


def test_state_is_six_plus_twelve_over_d_bytes_per_parameter() -> None:
    spec = load_model("llama2-7b")
    held = model_units(spec)
    params = sum(unit.sharded + unit.replicated for unit in held)
    for dp in (1, 2, 8):
        case = training_case_of(dp=dp, seq_len=128)
        terms = training_memory(spec, case)
        state = terms.weights + terms.gradients + terms.masters + terms.optimizer
        assert state[0] == pytest.approx(params * (6 + 12 / dp), rel=1e-12)
    unsharded = training_memory(spec, training_case_of(dp=8, seq_len=128, zero=0))
    assert (unsharded.masters + unsharded.optimizer)[0] == pytest.approx(params * 12)
    full_precision = training_memory(spec, training_case_of(dp=1, seq_len=128, precision="fp32"))
    assert full_precision.masters[0] == 0 and full_precision.weights[0] == pytest.approx(params * 4)


@pytest.mark.parametrize("name", ["llama2-70b", "qwen2.5-0.5b", "gpt3-125m"])
@pytest.mark.parametrize("pp", [1, 2, 4])
def test_stage_elements_are_the_layouts(name: str, pp: int) -> None:
    spec = load_model(name)
    units = {unit.name: unit for unit in model_units(spec)}
    layout = Layout(spec, tuple(range(pp)), pp=pp)
    for last in (False, True):
        held = [units[unit] for unit in layout.stage_units(pp - 1 if last else 0)]
        stage = stage_parts(spec, np.array([float(pp)]), last=last)
        assert stage.sharded[0] == sum(unit.sharded for unit in held)
        assert stage.replicated[0] == sum(unit.replicated for unit in held)


@pytest.mark.parametrize("name", ["llama2-70b", "gpt3-125m"])
@pytest.mark.parametrize("vpp", [1, 3])
def test_no_stage_between_is_fuller_than_first_and_last(name: str, vpp: int) -> None:
    spec, pp, habits = load_model(name), 4, memory_habits("megatron-te")
    units = {unit.name: unit for unit in model_units(spec)}
    case = training_case_of(dp=1, pp=pp, vpp=vpp, micro_batches=8, micro_batch=2, seq_len=2048)
    first = stage_parts(spec, case.pp, last=False)
    widths = block_widths(spec, fused_pointwise=True, fused_rotary=True)
    fullest = training_memory(spec, case).peak_bytes[0]
    for index in (1, 2):
        held = [units[unit] for unit in Layout(spec, tuple(range(pp)), pp=pp).stage_units(index)]
        middle = replace(
            first,
            index=np.array([float(index)]),
            sharded=np.array([float(sum(unit.sharded for unit in held))]),
            replicated=np.array([float(sum(unit.replicated for unit in held))]),
            embedding=np.zeros(1),
        )
        assert stage_terms(middle, widths, case, habits).peak_bytes[0] <= fullest


@pytest.mark.parametrize(("name", "tp", "pp", "expected"), [
    ("llama2-70b", 1, 1, 320 * 1024),  # 80 layers of 8 key-value heads of 128 numbers, in bf16
    ("llama2-70b", 8, 4, 10 * 1024),
    ("deepseek-v3", 1, 1, 70_272), ("deepseek-v3", 8, 1, 70_272),
    ("llama3.1-405b", 1, 1, 516_096), ("llama3.1-405b", 8, 1, 64_512),
])  # fmt: skip
def test_a_token_has_its_published_bytes_of_cache(name: str, tp: int, pp: int, expected: int) -> None:
    """DeepSeek-V3 caches 70 KB a token where Llama-3.1-405B caches 516 KB (Zhao et al. 2025, arXiv:2505.09343, table
    1); Grattafiori et al. count 2 x 126 x 8 x 128 numbers. Latent vectors lie whole on every tp rank."""
    cache = kv_cache_bytes(load_model(name), layout(dp=1, tp=tp, pp=pp), np.ones(1), 1.0, 2.0)
    assert cache.tolist() == [expected]


def test_experts_are_cut_by_ep() -> None:
    spec = load_model("mixtral-8x7b")
    parts = model_parts(spec)
    per_expert = 3 * spec.hidden * spec.ffn
    assert parts.block.experts == spec.experts * per_expert
    whole, cut = (training_memory(spec, training_case_of(dp=8, ep=ep, seq_len=128)) for ep in (1, 8))
    saved = spec.layers * parts.block.experts * (1 - 1 / 8)
    assert (whole.weights - cut.weights)[0] == pytest.approx(2 * saved)
    assert (whole.optimizer + whole.masters)[0] == pytest.approx((cut.optimizer + cut.masters)[0])


class TestPublishedPeaks:
    def errors(self) -> Mapping[str, float]:
        found = {}
        for row in published_rows():
            if row["bar"]:
                prediction = predict_memory(row)
                assert prediction.gib is not None, f"{row['id']}: {prediction.reason}"
                found[row["id"]] = prediction.gib / row["measured"][prediction.quantity] - 1.0
        return found

    def test_mean_error_and_no_underestimate(self) -> None:
        errors = np.array(list(self.errors().values()))
        assert len(errors) >= 36
        assert np.abs(errors).mean() <= 0.02
        assert abs(errors.mean()) <= 0.01
        assert errors.min() > -0.02

    def test_reserved_memory_of_the_same_rows(self) -> None:
        found = []
        for row in published_rows():
            reserved = row["measured"].get("peak_mem_reserved_gib")
            if reserved:
                only = row | {"measured": {"peak_mem_reserved_gib": reserved}}
                prediction = predict_memory(only)
                assert prediction.gib is not None
                found.append(prediction.gib / reserved - 1.0)
        assert np.abs(np.array(found)).mean() <= 0.04

    def test_a_row_that_says_too_little_is_refused_with_the_reason(self) -> None:
        reasons = {row["id"]: predict_memory(row).reason for row in published_rows() if predict_memory(row).gib is None}
        assert reasons and all(reasons.values())
        assert any("vocab" in reason for reason in reasons.values())
        assert any("fp8" in reason for reason in reasons.values())


def ppo_workload(model: str, **settings: Any) -> Workload:
    graph = algorithm_graph("ppo")
    spec = load_model(model)
    models = {
        "actor": spec,
        "ref": spec,
        "critic": spec.with_value_head(),
        "reward": spec.with_value_head(),
    }
    return Workload(graph=graph, models=models, **settings)


def memory_of(
    call: str, workload: Workload, *strategies: ParallelStrategy, cluster: str = "h100-80gb-sxm"
) -> MemoryTerms:
    mesh = DeviceMesh(first_node=0, nodes=1, first_gpu=0, gpus=8)
    machine = MEGATRON.on(load_cluster(cluster), workload.dtype)
    return call_memory(machine, workload, call, Candidates.of([(mesh, strategy) for strategy in strategies]))


class TestCalls:
    WORKLOAD = ppo_workload("llama2-70b")

    def test_70b_weights_fill_17_gb_of_each_of_eight_gpus(self) -> None:
        terms = memory_of("ref_infer", self.WORKLOAD, ParallelStrategy(tp=8, micro_batches=64))
        assert terms.weights[0] == pytest.approx(68.98e9 * 2 / 8, rel=0.003)
        assert terms.resident_bytes[0] == terms.weights[0] + terms.communicators[0]
        assert terms.copy_bytes[0] == 0

    def test_offloaded_frozen_weights_are_loaded_for_the_call(self) -> None:
        stays, leaves = ParallelStrategy(tp=8), ParallelStrategy(tp=8, offload=True)
        terms = memory_of("ref_infer", self.WORKLOAD, stays, leaves)
        assert terms.peak_bytes[0] == terms.peak_bytes[1]
        assert terms.resident_bytes[0] - terms.resident_bytes[1] == terms.weights[0]
        assert terms.host.tolist() == [0, terms.weights[1]]

    def test_kv_cache_of_70b_is_320_kib_per_token(self) -> None:
        workload = ppo_workload("llama2-70b", batch_size=64, minibatches=1)
        terms = memory_of("actor_generate", workload, ParallelStrategy(tp=8), ParallelStrategy(dp=2, tp=4))
        spare = 256  # tokens of a block that free slots write to
        assert terms.kv_cache.tolist() == [320 * 1024 / tp * (64 // dp * 2048 + spare) for dp, tp in ((1, 8), (2, 4))]
        assert terms.copy_bytes[0] == terms.weights[0]
        assert terms.resident_bytes[0] == terms.communicators[0]

    def test_replicas_that_share_experts_gather_their_prompts(self) -> None:
        """8,192 tokens of 4,096 bf16 numbers that came from all eight, and as many sums; an eighth of the experts."""
        apart, joined = ParallelStrategy(dp=8), ParallelStrategy(dp=8, ep=8)
        terms = memory_of("actor_generate", ppo_workload("mixtral-8x7b"), apart, joined)
        assert (terms.workspace[1] - terms.workspace[0]) == 2 * 8192 * 4096 * 2
        experts = 32 * 8 * 3 * 4096 * 14336 * 2
        assert terms.weights[0] - terms.weights[1] == pytest.approx(experts * 7 / 8)

    def test_logits_beyond_a_bound_are_not_kept(self) -> None:
        """2^29 kept and 2^25 made at a time, of 2 bytes, and two fp32 temporaries of 2^25."""
        sizes = {"batch_size": 2, "minibatches": 1, "prompt_tokens": 1024}
        most, few = (ppo_workload("qwen2.5-0.5b", response_tokens=tokens, **sizes) for tokens in (8192, 2048))
        alone = ParallelStrategy(micro_batches=2)
        long, short = (memory_of("actor_train", work, alone).logits[0] for work in (most, few))
        vocab = most.spec("actor_train").padded_vocab
        assert 2048 * vocab < 2**29 < 8192 * vocab
        assert long == (2**29 + 2**25) * 2 + 2**25 * 8 and short == pytest.approx(2048 * vocab * 2 + 2**25 * 8)
        machine = MEGATRON.on(load_cluster("h100-80gb-sxm"), "bf16")
        keeps = replace(machine, habits=replace(machine.habits, kept_logits=0))
        step = TrainingStep(most.spec("actor_train"), 2, 9216, 8192)
        some = Candidates.of([(load_cluster("h100-80gb-sxm").whole, alone)])
        kept, again = (training_time(one, step, some)["head_and_loss"][0] for one in (keeps, machine))
        products = 2 * 2 * (8192 * vocab - 2**29) * most.spec("actor_train").hidden  # FLOPs of what is not kept
        assert 0.4 < products / (again - kept) / machine.cluster.gpu.bf16_tflops / 1e12 < 0.9

    def test_a_copy_needs_room_for_what_is_on_its_way(self) -> None:
        """Two waves each way of 64 MiB, and never more than what moves; the call itself comes later."""
        assert [buffer_bytes(moved) / 2**20 for moved in (0, 3 * 2**20, 2**40)] == [0, 6, 256]
        workload = ppo_workload("smollm2-135m", batch_size=2, prompt_tokens=8, response_tokens=8, minibatches=1)
        terms = memory_of("actor_generate", workload, ParallelStrategy())
        used = (terms.activations + terms.logits + terms.kv_cache + terms.workspace + terms.reserve)[0]
        assert used < 256 * 2**20 < terms.weights[0]
        assert terms.transient_bytes[0] == pytest.approx(terms.weights[0] + 256 * 2**20)
        assert terms.copy_bytes[0] == pytest.approx(terms.weights[0] + 256 * 2**20 - used)

    def test_home_copy_stays_and_offloaded_optimizer_does_not(self) -> None:
        home = ParallelStrategy(tp=8, micro_batches=128, sequence_parallel=True, recompute=Recompute.FULL)
        terms = memory_of("actor_train", self.WORKLOAD, home, replace(home, offload=True))
        state = terms.masters + terms.optimizer
        assert terms.resident_bytes[0] == pytest.approx(
            (terms.weights + terms.gradients + state + terms.communicators)[0]
        )
        assert terms.resident_bytes[1] == pytest.approx((terms.weights + terms.communicators)[1])
        assert terms.host.tolist() == [0, state[1]]
        assert terms.peak_bytes[0] == pytest.approx(terms.peak_bytes[1])

    def test_a_value_head_has_no_logits(self) -> None:
        actor, critic = (memory_of(f"{m}_train", self.WORKLOAD, ParallelStrategy(tp=8)) for m in ("actor", "critic"))
        assert critic.logits[0] == 0
        assert critic.weights[0] < actor.weights[0]

    def test_recompute_and_sequence_parallel_save_memory(self) -> None:
        modes = [ParallelStrategy(tp=8, micro_batches=64, recompute=mode) for mode in Recompute]
        parallel = [replace(mode, sequence_parallel=True) for mode in modes]
        peak = memory_of("actor_train", self.WORKLOAD, *modes, *parallel).peak_bytes
        assert peak[0] >= peak[1] > peak[2]
        assert (peak[3:] < peak[:3]).all()

    def test_cpu_has_no_communicators_and_no_context(self) -> None:
        workload = ppo_workload("smollm2-135m", dtype="fp32")
        terms = memory_of("actor_train", workload, ParallelStrategy(dp=2), cluster="local-cpu")
        assert terms.communicators[0] == 0 and MEGATRON.on(load_cluster("local-cpu"), "fp32").context_bytes == 0
        assert terms.masters[0] == 0
        assert MEGATRON.on(load_cluster("h100-80gb-sxm"), "bf16").context_bytes > 0

    def test_generation_on_a_cpu_lays_out_the_134_515_008_numbers_of_the_model(self) -> None:
        for dtype, laid_out in (("fp32", 134_515_008 * 4), ("bf16", 0)):
            workload = ppo_workload("smollm2-135m", dtype=dtype)
            terms = memory_of("actor_generate", workload, ParallelStrategy(), cluster="local-cpu")
            assert terms.workspace[0] == laid_out
        workload = ppo_workload("smollm2-135m", dtype="fp32")
        assert memory_of("actor_generate", workload, ParallelStrategy()).workspace[0] == 0, "not on a GPU"

    def test_terms_add_up(self) -> None:
        terms = memory_of("actor_train", self.WORKLOAD, ParallelStrategy(tp=4, pp=2))
        assert sum(value[0] for value in terms.terms().values()) == pytest.approx(terms.peak_bytes[0])
        assert (terms.resident_bytes + terms.transient_bytes)[0] == pytest.approx(terms.peak_bytes[0])


def test_every_engine_of_the_time_model_has_memory_habits() -> None:
    for name in engine_names():
        assert memory_habits(name).context_gib > 0
    with pytest.raises(SpecError, match="unknown engine"):
        memory_habits("megatrn")
