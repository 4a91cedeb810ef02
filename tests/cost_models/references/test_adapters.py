"""What adapters cost by hand (Hu et al. 2021): thin products, no gradient of a frozen weight, state and messages of the
adapters alone, and a base that is there once where copies can share it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from plan_cases import CRITIC_FREE, tiny_plan
from textbook import DENSE, NANO, TextbookKernels, compute, layout, machine, nanoseconds, network

from cost_models.estimate import cost_plan
from cost_models.memory.memory import call_memory
from cost_models.memory.memory_terms import MemoryTerms
from cost_models.time.inference import ForwardPass, inference_time
from cost_models.time.training import TrainingStep, training_time
from plans.algorithms import algorithm_graph
from plans.lora import Lora
from plans.model import ModelSpec
from plans.workload import Workload, with_lora

RANK = 8
ADAPTED = replace(DENSE, lora=Lora(RANK))
HIDDEN, QKV, FFN, LAYERS = 1536, (12 + 2 * 4) * 128, 4096, 24
CUT = RANK * (QKV + HIDDEN + 2 * FFN + FFN)
"""B of query-key-value, A of attention's output, B of gate and up, A of down; the others are whole."""
WHOLE = RANK * 4 * HIDDEN
BASE = LAYERS * (HIDDEN * QKV + HIDDEN * HIDDEN + 3 * HIDDEN * FFN) + 2 * 32_000 * HIDDEN
STEP, WORK = TrainingStep(ADAPTED, 32, 2048), ForwardPass(ADAPTED, 32, 2048, head_tokens=2048)
DEGREES = {"dp": 2, "tp": 4, "micro_batches": 4}
TOKENS, SLOTS = 8192, LAYERS * 4


def held(call: str, **settings: object) -> MemoryTerms:
    graph = algorithm_graph("grpo")
    models: dict[str, ModelSpec] = dict.fromkeys(graph.roles, DENSE)
    sizes = {"batch_size": 64, "prompt_tokens": 512}
    workload = Workload(graph=graph, models=with_lora(graph, models, Lora(RANK)), **sizes)  # type: ignore[arg-type]
    return call_memory(network(), workload, call, layout(**settings))


def test_state_is_that_of_the_adapters() -> None:
    adapters = LAYERS * (CUT / 2 + WHOLE)
    trained, copy, frozen = (held(call, dp=4, tp=2) for call in ("actor_train", "actor_generate", "ref_infer"))
    for terms in (trained, copy):
        assert terms.weights == 2 * adapters
        assert terms.base == pytest.approx(2 * BASE / 2, rel=1e-3)
    assert trained.gradients == 4 * adapters
    assert trained.masters == 4 * adapters / 4 and trained.optimizer == 8 * adapters / 4
    stays = trained.base + trained.weights + trained.gradients + 3 * trained.masters
    assert trained.resident_bytes == pytest.approx(stays + trained.communicators)
    assert copy.copy_bytes < 3 * copy.weights + 1
    assert copy.resident_bytes == pytest.approx(copy.base + copy.communicators)
    assert frozen.base == 0 and frozen.weights == pytest.approx(trained.base)


def test_frozen_weights_have_one_product_backward_and_adapters_two() -> None:
    products = 2 * TOKENS * (BASE - 2 * 32_000 * HIDDEN) / LAYERS / 4
    thin = 2 * TOKENS * (CUT / 4 + WHOLE)
    scored = inference_time(compute(), WORK, layout(**DEGREES))
    trained = training_time(compute(), STEP, layout(**DEGREES))
    assert nanoseconds(scored["linears"]) == pytest.approx(SLOTS * (products + thin))
    assert nanoseconds(trained["linears"]) == pytest.approx(SLOTS * (2 * products + 3 * thin))
    head = 2 * TOKENS * HIDDEN * 32_000 / 4
    assert nanoseconds(trained["head_and_loss"]) == pytest.approx(4 * 2 * head)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_what_ranks_exchange_for_adapters_is_thin(sequence_parallel: bool) -> None:
    """Beside the four sums of hidden states: two of [tokens, rank], and without sequence parallelism two of B."""
    at = machine(TextbookKernels(byte=NANO), memory_efficiency=1e12)
    settings = DEGREES | {"sequence_parallel": sequence_parallel}
    plain, adapted = (
        training_time(at, replace(STEP, spec=spec), layout(**settings))["tensor_parallel"] for spec in (DENSE, ADAPTED)
    )
    ring = 2 * 3 / 4
    sums = 2 * TOKENS * RANK * 2 + (0 if sequence_parallel else 2 * HIDDEN * RANK * 2)
    assert nanoseconds(adapted - plain) == pytest.approx(SLOTS * ring * sums)


def test_reductions_and_adam_take_the_adapters() -> None:
    at = machine(TextbookKernels(byte=NANO), optimizer_bytes=1.0, accumulate_bytes=1.0)
    terms = training_time(at, STEP, layout(**DEGREES))
    adapters = LAYERS * (CUT / 4 + WHOLE)
    assert nanoseconds(terms["gradient_reduce"]) == pytest.approx(4 * adapters / 2)
    assert nanoseconds(terms["parameter_gather"]) == pytest.approx(2 * adapters / 2)
    assert nanoseconds(terms["optimizer"]) == pytest.approx(adapters / 2)
    assert nanoseconds(terms["accumulation"]) == pytest.approx(4 * adapters)


def test_the_base_is_there_once_where_copies_hold_the_same() -> None:
    """The reference lies in the base of the training; a generation in another layout has a base of its own."""
    sizes = {"algorithm": "grpo", "order": CRITIC_FREE, "group_size": 2, "lora": Lora(2)}
    same = cost_plan(tiny_plan(2, "d2 t1 p1", **sizes)).memory  # type: ignore[arg-type]
    places = {"actor_generate": "d1 t2 p1", "ref_infer": "d1 t1 p2", "actor_train": "d2 t1 p1"}
    apart = cost_plan(tiny_plan(2, places, **sizes)).memory  # type: ignore[arg-type]
    bases = [{k: v for k, v in m.peak_terms.items() if k.startswith(("base", "weights ref"))} for m in (same, apart)]
    assert len(bases[0]) == 1 and len(bases[1]) == 3
    assert sum(bases[1].values()) == pytest.approx(2 * sum(bases[0].values()), rel=0.1)
