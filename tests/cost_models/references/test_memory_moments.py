"""What is alive at the fullest moment, by hand: Korthikanti et al. 2022, section 4, tensor by tensor, for a gated MLP
with flash attention and without dropout; the logits and the loss beside them; the temporaries of one block.

Per token a block stores both norms' inputs and outputs, query, key and value, the attention's output and its fp32
statistic, gate, up and their product.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from plan_cases import CRITIC_FREE, tiny_plan
from textbook import DENSE, EXPERTS, layout, network

from cost_models.engines.habits import MemoryHabits
from cost_models.memory.activations import block_widths, kept_block_bytes
from cost_models.memory.latent import LATENT_MODELS, LatentSpec, latent_training_terms
from cost_models.memory.memory import call_memory
from cost_models.memory.memory_terms import MemoryTerms
from cost_models.memory.memory_training import state_bytes
from cost_models.memory.moments import CallMemory, memory_profile
from cost_models.memory.training_case import StageParts
from cost_models.validation.memory_rows import training_case_of
from plans.algorithms import algorithm_graph
from plans.cluster import GIB
from plans.lengths import Lengths
from plans.model import ModelSpec, Norm
from plans.program import compile_program
from plans.strategy import Recompute
from plans.workload import Workload

TOKENS = 1536  # of a sample: 512 + 1,024
STREAM, CUT, CORE = 4 * 1536, (12 + 2 * 4) * 128 + 12 * 128 + 3 * 4096, 12 * 4
STORED = 2 * (STREAM + CUT) + CORE
TEMPORARIES = 2 * (2 * 1536 + 3 * 4096)
"""Gradients of the MLP's output and input and of what it stored in between, two bytes."""
LARGEST = 2 * 2 * 4096 * 1536
"""The gradient of gate and up, one matrix, two bytes."""
VOCABULARY, WIDTH = 32_000, 1536
VALUE = DENSE.with_value_head()


def held(
    call: str, spec: ModelSpec = DENSE, *, sizes: dict[str, Any] | None = None, habits: MemoryHabits | None = None,
    constants: dict[str, Any] | None = None, **settings: Any,
) -> MemoryTerms:  # fmt: skip
    """Memory of a call of 64 samples, a minibatch of 16."""
    graph = algorithm_graph("grpo")
    work = {"batch_size": 64, "prompt_tokens": 512, "response_tokens": 1024, "minibatches": 4} | (sizes or {})
    workload = Workload(graph=graph, models=dict.fromkeys(graph.roles, spec), **work)
    at = replace(network(**(constants or {})), habits=habits or MemoryHabits())
    return call_memory(at, workload, call, layout(**settings))


def moment(terms: MemoryTerms) -> tuple[float, float, float]:
    return float(terms.activations[0]), float(terms.logits[0]), float(terms.workspace[0])


def test_the_loss_is_the_fullest_moment_of_a_whole_model() -> None:
    """Beside 24 blocks: logits and their fp32 softmax; input and output of the last norm, input of the head and its
    gradient, and the head's weight gradient."""
    terms = held("actor_train", dp=8, micro_batches=2)
    stored, logits = 24 * STORED * TOKENS, VOCABULARY * (2 + 4) * TOKENS
    workspace = 4 * 2 * WIDTH * TOKENS + 2 * VOCABULARY * WIDTH
    assert moment(terms) == pytest.approx((stored, logits, workspace))
    assert terms.reserve == pytest.approx(0.25 * (stored + logits + workspace))
    assert terms.communicators == pytest.approx(0.3 * GIB), "one group of several ranks: dp"


def test_the_loss_of_a_rank_of_tp_with_sequence_parallel() -> None:
    """Everything is cut over tp but the gathered input of the head and its gradient."""
    terms = held("actor_train", dp=2, tp=4, micro_batches=8, sequence_parallel=True)
    stored = 24 * TOKENS * STORED / 4
    workspace = (2 / 4 + 2) * 2 * WIDTH * TOKENS + 2 * VOCABULARY * WIDTH / 4
    assert moment(terms) == pytest.approx((stored, VOCABULARY / 4 * 6 * TOKENS, workspace))
    assert terms.communicators == pytest.approx(0.6 * GIB)
    whole = held("actor_train", dp=2, tp=4, micro_batches=8)
    assert whole.activations == pytest.approx(24 * TOKENS * (2 * STREAM + (2 * CUT + CORE) / 4))


def test_a_block_is_the_fullest_moment_of_a_value_model() -> None:
    terms = held("actor_train", VALUE, dp=8, micro_batches=2)
    assert moment(terms) == pytest.approx((24 * STORED * TOKENS, 0.0, TEMPORARIES * TOKENS + LARGEST))
    cut = held("actor_train", VALUE, tp=8, micro_batches=16, sequence_parallel=True)
    temporaries = 2 * (2 * 1536 + 3 * 4096 / 8)
    assert moment(cut) == pytest.approx((24 * STORED / 8 * TOKENS, 0.0, temporaries * TOKENS + LARGEST / 8))
    narrow = held("actor_train", replace(VALUE, ffn=128), tp=8, micro_batches=16)
    assert narrow.workspace == pytest.approx(3 * 2 * 1536 * TOKENS + 2 * 2560 * 1536 / 8), "a norm: three streams"


def test_recomputation_keeps_inputs_and_holds_one_block_again() -> None:
    terms = held("actor_train", VALUE, dp=8, micro_batches=2, recompute=Recompute.FULL)
    workspace = (STORED + TEMPORARIES) * TOKENS + LARGEST
    assert moment(terms) == pytest.approx((24 * 2 * WIDTH * TOKENS, 0.0, workspace))
    cut = held("actor_train", VALUE, tp=8, micro_batches=16, sequence_parallel=True, recompute=Recompute.FULL)
    assert cut.activations == pytest.approx(24 * 2 * WIDTH * TOKENS / 8)


def test_the_gradient_of_the_embedding_comes_when_a_micro_batch_is_done() -> None:
    """Samples so short that the embedding counts for more: the activations of this micro-batch are gone."""
    short = {"prompt_tokens": 1, "response_tokens": 1}
    terms = held("actor_train", VALUE, sizes=short, dp=8, micro_batches=2)
    assert moment(terms) == (0.0, 0.0, 2 * VOCABULARY * WIDTH)
    first = held("actor_train", VALUE, sizes=short, dp=4, pp=2, micro_batches=4)
    assert moment(first) == (12 * STORED * 2, 0.0, 2 * VOCABULARY * WIDTH), "one of two in flight is left"


@pytest.mark.parametrize(("micro_batches", "flight"), [(1, 1), (2, 2), (16, 4)])
def test_the_first_stage_stores_as_many_micro_batches_as_there_are_stages(micro_batches: int, flight: int) -> None:
    terms = held("actor_train", VALUE, tp=2, pp=4, micro_batches=micro_batches)
    per_token = 2 * STREAM + (2 * CUT + CORE) / 2
    assert terms.activations == pytest.approx(flight * 6 * per_token * TOKENS * 16 / micro_batches)


def test_interleaved_stages_keep_what_they_sent() -> None:
    """pp 4 in 2 chunks: 2 x 3 + 4 + 1 chunks at once, half a stage each, and every chunk's output."""
    settings = {"tp": 2, "pp": 4, "vpp": 2, "micro_batches": 16}
    per_token = 3 * (2 * STREAM + (2 * CUT + CORE) / 2)
    plain, keeping = (
        held("actor_train", VALUE, habits=MemoryHabits(keeps_outputs=keeps), **settings) for keeps in (False, True)
    )
    assert plain.activations == pytest.approx(11 * per_token * TOKENS)
    assert keeping.activations == pytest.approx(11 * (per_token + 2 * WIDTH) * TOKENS)
    cut = held("actor_train", VALUE, habits=MemoryHabits(keeps_outputs=True), sequence_parallel=True, **settings)
    assert cut.activations == pytest.approx(11 * (3 * STORED + 2 * WIDTH) / 2 * TOKENS), "everything is cut over tp"


def test_zero_3_holds_two_whole_layers_and_the_fp32_gradient_of_one() -> None:
    block = 1536 * 2560 + 1536 * 1536 + 3 * 1536 * 4096 + 2 * 1536
    sharded = held("actor_train", VALUE, constants={"shards_weights": True}, dp=8, micro_batches=2)
    ends = (VOCABULARY * WIDTH + WIDTH + WIDTH) / 24
    expected = TEMPORARIES * TOKENS + LARGEST + (block + ends) * (2 * 2 + 4)
    assert sharded.workspace == pytest.approx(expected, rel=1e-3)


def test_zero_3_holds_them_during_the_loss_too() -> None:
    block = 1536 * 2560 + 1536 * 1536 + 3 * 1536 * 4096 + 2 * 1536
    terms = held("actor_train", constants={"shards_weights": True}, dp=8, micro_batches=2)
    ends = (2 * VOCABULARY * WIDTH + WIDTH) / 24
    loss = 4 * 2 * WIDTH * TOKENS + 2 * VOCABULARY * WIDTH
    assert terms.logits > 0
    assert terms.workspace == pytest.approx(loss + (block + ends) * (2 * 2 + 4), rel=1e-3)


def test_what_is_offloaded_stays_nowhere_on_the_gpu() -> None:
    terms = held("actor_train", dp=8, micro_batches=2, offload=True)
    assert terms.resident_bytes.tolist() == (terms.weights + terms.communicators).tolist()


def test_weight_gradients_that_stay_beside_the_others() -> None:
    """One buffer for every shape of a block: query-key-value, output, gate and up, down."""
    shapes = 2 * (1536 * 2560 + 1536 * 1536 + 3 * 1536 * 4096)
    habits = MemoryHabits(wgrad_buffers=True)
    block = held("actor_train", VALUE, habits=habits, dp=8, micro_batches=2)
    assert block.workspace == pytest.approx(TEMPORARIES * TOKENS + shapes)
    loss = held("actor_train", habits=habits, dp=8, micro_batches=2)
    assert loss.workspace == pytest.approx(4 * 2 * WIDTH * TOKENS + 2 * VOCABULARY * WIDTH + shapes)


def test_a_loss_in_parts_has_two_fp32_copies_of_a_part() -> None:
    habits = MemoryHabits(logit_bytes=0.0, head_elements=2**20)
    terms = held("actor_train", habits=habits, dp=8, micro_batches=2)
    assert terms.logits == pytest.approx(2 * VOCABULARY * TOKENS + 8 * 2**20)
    few = held("actor_train", habits=replace(habits, head_elements=2**40), dp=8, micro_batches=2)
    assert few.logits == pytest.approx((2 + 8) * VOCABULARY * TOKENS)
    responses = held("actor_train", constants={"response_head": True}, dp=8, micro_batches=2)
    assert responses.logits == pytest.approx(VOCABULARY * 6 * 1024), "of 1,024 tokens of 1,536"


FORWARD = 2 * (2 * 1536 + 3 * 4096)
"""Residual, norm output and all steps of the MLP, which are more than attention's."""


def test_a_forward_pass_holds_one_block() -> None:
    terms = held("ref_infer", dp=8, micro_batches=2)
    tokens = 4 * TOKENS
    assert moment(terms) == pytest.approx((FORWARD * tokens, VOCABULARY * (2 + 8) * tokens, 0.0))
    assert terms.reserve == pytest.approx(0.25 * (terms.activations + terms.logits))
    assert terms.communicators == 0, "no rank of dp needs another"
    cut = held("ref_infer", tp=8, micro_batches=8)
    norm = 2 * 1536 + 3 * 2 * 1536
    assert moment(cut) == pytest.approx((norm * 8 * TOKENS, VOCABULARY / 8 * 10 * 8 * TOKENS, 0.0))
    slim = held("ref_infer", replace(DENSE, ffn=1024), dp=8, micro_batches=2)
    attention = 2 * (2 * 1536 + 2 * 2560 + 1536)
    assert slim.activations == pytest.approx(attention * tokens)
    context = held("ref_infer", cp=8, micro_batches=64)
    assert context.activations == pytest.approx(FORWARD * TOKENS / 8)
    assert context.communicators == pytest.approx(0.3 * GIB)


def test_scores_in_parts_exist_a_part_at_a_time() -> None:
    terms = held("ref_infer", habits=MemoryHabits(head_elements=2**20), dp=8)
    assert terms.logits == pytest.approx((2 + 8 + 8) * 2**20)
    few = held("ref_infer", habits=MemoryHabits(head_elements=2**40), dp=8, micro_batches=8)
    assert few.logits == pytest.approx(18 * VOCABULARY * TOKENS)
    responses = held("ref_infer", constants={"response_head": True}, dp=8, micro_batches=8)
    assert responses.logits == pytest.approx(10 * VOCABULARY * 1024)


def test_a_cache_that_grows_is_fullest_before_most_sequences_have_ended() -> None:
    """64 sequences from the start: the most of how many are still alive times how long they are."""
    sizes = {"mean_response_tokens": 800}
    terms = held("actor_generate", sizes=sizes, habits=MemoryHabits(grows=True), dp=1)
    lengths = Lengths(1024, 800)
    fullest = max(64 * lengths.beyond(t) * (512 + t) for t in range(1024))
    assert terms.kv_cache == pytest.approx(fullest * 24 * 2 * 4 * 128 * 2, rel=0.02)


def test_generation_holds_a_prefill_and_a_row_of_logits_for_every_sequence() -> None:
    """32 sequences of a rank in 2 groups: 16 prompts of 512 tokens at once; 26 bytes an entry of the vocabulary."""
    terms = held("actor_generate", habits=MemoryHabits(mask_bytes=3.0), pp=2, dp=2, tp=2, groups=2)
    block = 2 * (2 * 1536 + 3 * 4096 / 2)
    assert moment(terms) == pytest.approx((block * 16 * 512, VOCABULARY / 2 * 26 * 16, 3 * 16 * 512**2))
    packed = held("actor_generate", constants={"prefill_tokens": 2048.0}, pp=2, dp=2, tp=2, groups=2)
    assert packed.activations == pytest.approx(block * 2048)
    lone = held("actor_generate", constants={"prefill_tokens": 100.0}, pp=2, dp=2, tp=2, groups=2)
    assert lone.activations == pytest.approx(block * 512), "a prompt is not cut"


def test_a_cache_in_blocks_has_one_to_spare_for_every_group() -> None:
    """1,535 tokens are kept, in six blocks of 256; a token of a stage of 12 layers has 2 x 12 x 2 x 128 numbers."""
    terms = held("actor_generate", habits=MemoryHabits(block_tokens=256), pp=2, dp=2, tp=2, groups=2)
    token = 2 * 12 * 2 * 128 * 2
    assert terms.kv_cache == pytest.approx(token * 2 * (16 * 6 + 1) * 256)
    lone = held("actor_generate", habits=MemoryHabits(block_tokens=256), pp=8, groups=64, slots=64)
    assert lone.kv_cache == pytest.approx(2 * 3 * 4 * 128 * 2 * 64 * (6 + 1) * 256)


def published_params(spec: LatentSpec, layers: int, dense: int) -> int:
    """Embedding and head, dense layers, layers of experts."""
    experts = layers - dense
    blocks = dense * spec.dense_layer_params + experts * (spec.expert_params + spec.expert_layer_dense_params)
    return 2 * spec.vocab * spec.hidden + blocks


def test_deepseek_has_the_parameters_that_its_authors_published() -> None:
    """671 billion in 61 layers, of which three are dense (2024, table 1 and section 4.2), and 236 billion in 60, of
    which one is; norms are left out here."""
    assert published_params(LATENT_MODELS["deepseekv3"], 61, 3) == pytest.approx(671.02e9, rel=5e-5)
    assert published_params(LATENT_MODELS["deepseekv2"], 60, 1) == pytest.approx(235.74e9, rel=5e-5)


def test_deepseek_has_the_sizes_of_its_published_config() -> None:
    """`config.json` of DeepSeek-V2 and V3: heads of 128 + 64 and 128, ranks of 1536 and 512."""
    shared = {"heads": 128, "q_rank": 1536, "kv_rank": 512, "nope_dim": 128, "rope_dim": 64, "value_dim": 128}
    second = {"hidden": 5120, "ffn": 12_288, "vocab": 102_400, "experts": 160, "experts_per_token": 6}
    third = {"hidden": 7168, "ffn": 18_432, "vocab": 129_280, "experts": 256, "experts_per_token": 8}
    assert LATENT_MODELS["deepseekv2"] == LatentSpec(**shared, **second, expert_ffn=1536, shared_ffn=2 * 1536)
    assert LATENT_MODELS["deepseekv3"] == LatentSpec(**shared, **third, expert_ffn=2048, shared_ffn=2048)


SMALL = LatentSpec(
    hidden=96, heads=4, ffn=200, vocab=1000, q_rank=24, kv_rank=16, nope_dim=12, rope_dim=8, value_dim=10, experts=6,
    experts_per_token=2, expert_ffn=40, shared_ffn=50,
)  # fmt: skip


def test_stages_of_latent_attention_by_hand() -> None:
    """Four layers on two stages: embedding, a dense layer, one of experts; two of experts, the last norm, the head."""
    attention = 96 * 24 + 24 * 4 * 20 + 96 * (16 + 8) + 16 * 4 * (12 + 10) + 4 * 10 * 96
    expert, rest = 6 * 3 * 96 * 40, attention + 3 * 96 * 50 + 96 * 6
    first = 1000 * 96 + (attention + 3 * 96 * 200) + rest + 4 * 96 + expert
    last = 1000 * 96 + 2 * rest + (4 + 1) * 96 + 2 * expert
    case = training_case_of(dp=1, pp=2, micro_batch=1, seq_len=64, micro_batches=2)
    habits = MemoryHabits(reserve=0.0)
    terms = latent_training_terms(SMALL, 4, case, habits)
    assert last > first and terms.gradients == 4 * last
    width = 2 * (24 + 16) + 8 + 2 * 4 * 20 + 4 * (12 + 2 * 10)
    mlp = 2 * (3 * 40 + 2 * 96) + 3 * 50
    stored = 2 * (4 * 96 + width + mlp) + 4 * 4
    assert terms.activations == 2 * stored * 64
    assert terms.logits == 1000 * (2 + 4) * 64
    assert terms.workspace == 4 * 2 * 96 * 64 + 2 * 1000 * 96
    ring = training_case_of(dp=1, pp=2, cp=2, micro_batch=1, seq_len=64, micro_batches=2)
    gathered = latent_training_terms(SMALL, 4, ring, habits)
    assert gathered.activations == 2 * (stored + 2 * 4 * (12 + 8 + 10)) * 32, "keys and values of the other rank"
    alone = latent_training_terms(SMALL, 2, training_case_of(dp=1, micro_batch=1, seq_len=64), habits)
    assert alone.gradients == 4 * (first + 96 + 1000 * 96)
    half = 2 * (4 * 96 + width + (3 * 200 + mlp) / 2) + 4 * 4
    assert alone.activations == 2 * half * 64


def test_backward_pass_of_latent_blocks_holds_the_wider_mlp() -> None:
    """On a stage without a head: one dense layer alone, then one of each kind."""
    habits, case = MemoryHabits(reserve=0.0), training_case_of(dp=1, pp=4, micro_batch=1, seq_len=64, micro_batches=1)
    wide = replace(SMALL, vocab=1, expert_ffn=400)
    terms = latent_training_terms(wide, 8, case, habits)
    experts = 2 * (3 * 400 + 2 * 96) + 3 * 50
    largest = max(4 * 10 * 96, 24 * 4 * 20, 2 * 96 * 400)
    assert np.isclose(terms.workspace[0], 2 * (2 * 96 + experts) * 64 + 2 * largest)

    narrow = replace(SMALL, vocab=1, expert_ffn=8, shared_ffn=8, ffn=8)
    terms = latent_training_terms(narrow, 8, case, habits)
    experts = 2 * (3 * 8 + 2 * 96) + 3 * 8
    assert np.isclose(terms.workspace[0], 2 * (2 * 96 + experts) * 64 + 2 * (4 * 10 * 96)), "attention's output"

    broad = replace(SMALL, vocab=1, ffn=1000)
    terms = latent_training_terms(broad, 8, case, habits)
    assert np.isclose(terms.workspace[0], 2 * (2 * 96 + 3 * 1000) * 64 + 2 * (2 * 96 * 1000)), "the dense layer's"
    beside = latent_training_terms(broad, 8, case, replace(habits, wgrad_buffers=True))
    shapes = 4 * 10 * 96 + 24 * 4 * (12 + 8) + 3 * 96 * 1000
    assert np.isclose(beside.workspace[0], 2 * (2 * 96 + 3 * 1000) * 64 + 2 * shapes), "one of each shape"


@pytest.mark.parametrize(("zero", "dense_ranks", "expert_ranks"), [(0, 1, 1), (1, 8, 4)])
def test_state_is_cut_where_it_is_sharded_alone(zero: int, dense_ranks: int, expert_ranks: int) -> None:
    """1,600 parameters in tp 2, 50 on every rank, and 3,200 of experts in ep 4, on dp 8: a rank of experts shares with
    dp x tp / ep = 4 others what ZeRO shards."""
    nothing = np.zeros(1)
    stage = StageParts(
        index=nothing, layers=np.ones(1), sharded=np.array([1600.0]), replicated=np.array([50.0]),
        experts=np.array([3200.0]), embedding=nothing, vocabulary=nothing, shapes=0.0, largest=0.0,
    )  # fmt: skip
    state = state_bytes(stage, training_case_of(dp=8, tp=2, ep=4, zero=zero, seq_len=64))
    sharded = 850 / dense_ranks + 800 / expert_ranks
    assert (state.weights, state.gradients) == (2 * 1650, 4 * 1650)
    assert (state.masters, state.optimizer) == (4 * sharded, 8 * sharded)


def test_what_plain_kernels_store_beside() -> None:
    """RMSNorm in plain PyTorch: its input in fp32 and the normalised input too; the projection beside rotated queries
    and keys; silu(gate) and the other half of the MLP. A fused LayerNorm has input and output alone."""
    plain = block_widths(DENSE, fused_pointwise=False, fused_rotary=False)
    assert plain.stream == (2 + 4 / 2) * 2 * 1536 and plain.norm_bytes == (3 * 4 + 2) * 1536
    assert plain.mlp == 5 * 4096 and plain.cut == 20 * 128 + 16 * 128 + 12 * 128 + 5 * 4096
    full = block_widths(DENSE, fused_pointwise=False, fused_rotary=False, element=4.0)
    assert full.stream == 3 * 2 * 1536 and full.norm_bytes == 12 * 1536
    layer = block_widths(replace(DENSE, norm=Norm.LAYER, gated_mlp=False), fused_pointwise=False, fused_rotary=False)
    assert layer.stream == 4 * 1536 and layer.norm_bytes == 6 * 1536 and layer.mlp == 2 * 4096
    routed = block_widths(replace(EXPERTS, shared_ffn=100), fused_pointwise=True, fused_rotary=True)
    assert routed.mlp == 4 * (3 * 640 + 2 * 1536) + 3 * 100
    assert routed.cut == 20 * 128 + 12 * 128 + routed.mlp


def test_every_other_product_again() -> None:
    """torchtitan's selective mode: the input of a block, and half of what tp cuts."""
    case = training_case_of(dp=1, tp=2, micro_batch=1, seq_len=64, recompute="selective-op")
    kept = kept_block_bytes(block_widths(DENSE, fused_pointwise=True, fused_rotary=True), case, gathers_keys=True)
    assert kept == pytest.approx(2 * 1536 + 0.5 * 2 * CUT / 2)


def test_an_iteration_moment_by_moment() -> None:
    """Two GPUs: the actor trains with tp 2 and generates with dp 2, the reference is on the first alone. In GiB:
    a context of 1; at home 10 of weights and 20 of state, and 7 of the reference; the copy for generation has 12."""
    places = {"actor_generate": "d2 t1 p1", "ref_infer": ("node 0 gpu 0", "d1 t1 p1"), "actor_train": "d1 t2 p1"}
    plan = tiny_plan(2, places, algorithm="grpo", order=CRITIC_FREE, group_size=2)
    terms: dict[str, tuple[dict[str, float], tuple[str, ...], tuple[str, ...], float]] = {
        "actor_generate": ({"weights": 12, "cache": 30}, (), ("cache",), 0),
        "ref_infer": ({"weights": 7, "logits": 5}, (), ("logits",), 3),
        "actor_train": ({"weights": 10, "state": 20, "stored": 41}, ("state",), ("stored",), 2),
    }
    calls = {
        name: CallMemory(terms={k: v * GIB for k, v in t.items()}, resident=stays, transient=goes, host=host * GIB)
        for name, (t, stays, goes, host) in terms.items()
    }
    profile = memory_profile(compile_program(plan), calls, 1.0 * GIB)
    found = {m.step.name: (m.bytes_by_rank / GIB).tolist() for m in profile.moments}
    by_kind = {name: seen for name, seen in found.items() if name in places}
    assert by_kind == {"actor_generate": [80, 73], "ref_infer": [43, 31], "actor_train": [79, 72]}
    assert [seen for name, seen in found.items() if name not in places] == [[50.25, 43.25]], "a copy, and its buffers"
    assert (profile.peak_gib, profile.peak_rank, profile.peak_step) == (80, 0, "actor_generate")
    assert (profile.by_rank / GIB).tolist() == [80, 73]
    largest = {name: size / GIB for name, size in profile.peak_terms.items()}
    assert list(largest.values()) == [30, 20, 12, 10, 7, 1] and next(iter(largest)) == "cache actor_generate"
    assert [(group.ranks, group.peak_bytes / GIB, group.step) for group in profile.groups] == [
        ((0,), 80, "actor_generate"), ((1,), 73, "actor_generate"),
    ]  # fmt: skip
    assert (profile.host_bytes_by_node / GIB).tolist() == [3 * 1 + 2 * 2]


def test_a_copy_stays_until_its_last_reader_and_an_offloaded_one_comes_for_its_call() -> None:
    """ReMax on two GPUs: the copy of 12 for both generations lies beside the reference's call between them, whose 7 of
    weights are on the GPU for that call alone. In GiB, beside a context of 1 and 10 of the actor's home."""
    places = {
        "actor_generate": "d2 t1 p1", "ref_infer": ("node 0", "d2 t1 p1", {"offload": True}),
        "actor_greedy": "d2 t1 p1", "actor_train": "d1 t2 p1",
    }  # fmt: skip
    plan = tiny_plan(2, places, algorithm="remax", order=tuple(places))
    terms = {
        "actor_generate": {"weights": 12, "cache": 3}, "ref_infer": {"weights": 7, "logits": 50},
        "actor_greedy": {"weights": 12, "cache": 4}, "actor_train": {"weights": 10, "stored": 5},
    }  # fmt: skip
    calls = {
        name: CallMemory(terms={k: v * GIB for k, v in t.items()}, resident=(), transient=tuple(t)[1:], host=0.0)
        for name, t in terms.items()
    }
    profile = memory_profile(compile_program(plan), calls, 1.0 * GIB)
    found = {m.step.name: m.bytes_by_rank[0] / GIB for m in profile.moments if m.step.name in places}
    assert found == {"actor_generate": 26, "ref_infer": 80, "actor_greedy": 27, "actor_train": 16}
    for m in profile.moments:
        assert sum(m.terms.values()) == pytest.approx(m.bytes_by_rank.max()), m.step.name
    assert sorted(size / GIB for size in profile.peak_terms.values()) == [1, 7, 10, 12, 50]
