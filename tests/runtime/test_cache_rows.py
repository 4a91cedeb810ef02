"""What is said of KV caches under a version of torch that has them in whole rows, against hand-made sums."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
from plan_cases import CRITIC_FREE, tiny_plan

from cost_models.candidates import Candidates
from cost_models.engines.engine import NamedEngine
from cost_models.memory.memory import call_memory
from plans.errors import RealplanError
from plans.kvcache import LEAST_TORCH, PAGED_TORCH, release
from plans.library import load_cluster, load_model
from plans.plan import Estimate, ExecutionPlan
from runtime.generation.attention import paged_kernel
from runtime.launching.cache_rows import cache_bytes, check_cache

GIB = 2**30
OLD, NEW = "2.11.0+cu130", "2.12.1"


def big_plan(slots: int, degrees: str = "d1 t1 p1", **sizes: object) -> ExecutionPlan:
    """GRPO of Llama-2 7B on H100s, 8 samples of a prompt, 1,024 + 1,024 tokens in bf16."""
    sizes = {"batch_size": 64, "group_size": 8, "prompt_tokens": 1024, "response_tokens": 1024} | sizes
    gpus = 1
    for part in degrees.split()[:3]:
        gpus *= int(part[1:])
    plan = tiny_plan(gpus, degrees, algorithm="grpo", order=CRITIC_FREE, dtype="bf16", **sizes)
    cluster = replace(plan.cluster, gpu=load_cluster("h100-80gb-sxm").gpu)
    models = dict.fromkeys(plan.workload.models, load_model("llama-7b"))
    calls = [replace(c, strategy=replace(c.strategy, slots=slots)) if c.call == "actor_generate" else c
             for c in plan.calls]  # fmt: skip
    return replace(plan, cluster=cluster, calls=tuple(calls), workload=replace(plan.workload, models=models))


def test_rows_and_blocks_of_a_cache() -> None:
    """A token of Llama-2 7B has 32 layers x (keys, values) x 4,096 x 2 bytes: half a MiB."""
    plan = big_plan(64)
    assert cache_bytes(plan, "actor_generate", block_tokens=0) == 64 * 2048 * 2**19
    # 3 whole blocks of a prompt, for 8 prompts and as many that still end; 5 of a slot's own; one to spare.
    assert cache_bytes(plan, "actor_generate", block_tokens=256) == (64 * 5 + 16 * 3 + 1) * 256 * 2**19
    cut = big_plan(64, "d2 t2 p2")
    assert cache_bytes(cut, "actor_generate", block_tokens=0) == 64 * 2048 * 2**19 // 4


def test_the_cost_model_prices_the_blocks() -> None:
    for plan in (big_plan(64), big_plan(20, "d2 t2 p2")):
        planned = plan.planned("actor_generate")
        machine = NamedEngine("megatron").on(plan.cluster, "bf16")
        candidates = Candidates.of([(planned.mesh, planned.strategy)])
        priced = call_memory(machine, plan.workload, planned.call, candidates).kv_cache
        assert priced.item() == cache_bytes(plan, planned.call, block_tokens=256)


def test_what_is_said_of_rows() -> None:
    (words,) = check_cache(big_plan(64), OLD)
    assert words == (
        "`actor_generate`: under torch 2.11.0+cu130 its KV cache is whole rows, 64.00 GiB of a GPU; blocks,"
        " which torch 2.12 has and plans count on, take 46.12: the rows may not fit"
    )
    with pytest.raises(
        RealplanError, match=r"rows, 72.00 GiB .* the 12.55 GiB beside them .* do not fit the 79.1 GiB"
    ) as raised:
        check_cache(big_plan(72), OLD)
    assert raised.value.hint == "torch 2.12 or later, or fewer `slots` in this call"
    for silent in (
        (big_plan(72), NEW),
        (big_plan(64, group_size=1, minibatches=1, prompt_tokens=1, response_tokens=200), OLD),  # rows take less
        (replace(big_plan(72), workload=replace(big_plan(72).workload, dtype="fp32")), "2.6.0"),
        (tiny_plan(1, "d1 t1 p1", dtype="bf16"), "2.6.0"),
    ):
        assert check_cache(*silent) == ()


def test_the_plan_s_estimate_counts() -> None:
    """65 GiB at the peak of generation, of which 46.12 are blocks: 18.9 and 64 GiB of rows are too many."""
    words = {"iteration_s": 1.0, "latency_s": 1.0, "calls_s": {}, "peak_gib": 65.0, "host_gib": 0.0, "of": ""}
    estimate = Estimate(**words, engine="megatron", peak_at="actor_generate, rank 0")  # type: ignore[arg-type]
    plan = big_plan(64).with_estimate(estimate)
    with pytest.raises(RealplanError, match=r"with the 18.88 GiB beside them"):
        check_cache(plan, OLD)
    for other in (replace(estimate, peak_at="actor_train, rank 0"), replace(estimate, engine="fsdp")):
        assert len(check_cache(plan.with_estimate(other), OLD)) == 1


def test_half_precision_needs_a_scale() -> None:
    order = ("ref_infer", "actor_train")
    plan = tiny_plan(1, "d1 t1 p1", algorithm="dpo", order=order, dtype="bf16", group_size=2)
    plan = replace(plan, cluster=replace(plan.cluster, gpu=load_cluster("h100-80gb-sxm").gpu))
    assert check_cache(plan, OLD) == (), "nothing generates"
    with pytest.raises(RealplanError, match=r"torch 2.10.1 has no packed attention") as raised:
        check_cache(plan, "2.10.1")
    assert raised.value.hint == "torch 2.11 or later"


def test_the_floor_of_the_runtime() -> None:
    """The extra asks for what half precision needs; the rule by version is that of the kernel which is installed."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))["project"]
    assert f"torch>={'.'.join(map(str, LEAST_TORCH))}" in project["optional-dependencies"]["run"]
    assert paged_kernel() == (release(version("torch")) >= PAGED_TORCH)
    assert [release(text) for text in ("2.11.0a0+nv26", "10.2", "?")] == [(2, 11), (10, 2), (0, 0)]
