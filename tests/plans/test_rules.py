"""Every rule of a plan at its edge: what it refuses, what it still takes, and the legal value that it names."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from plan_cases import all_meshes

from plans.checks import check_plan, closest_divisor, sample_problems
from plans.cluster import ClusterSpec, DeviceMesh, check_mesh, parse_mesh
from plans.errors import SpecError
from plans.layout import Layout
from plans.library import load_cluster, load_gpu, load_model
from plans.model import Norm, Position
from plans.plan import ExecutionPlan
from plans.problems import Problem
from plans.rope import DynamicScaling
from plans.runnable import layout_problems, run_note, run_problems, spec_problems, workload_problems
from plans.strategy import ParallelStrategy


def edited(plan: ExecutionPlan, call: str, **settings: Any) -> ExecutionPlan:
    """The plan with other settings of one call."""
    changed = tuple(
        replace(planned, strategy=replace(planned.strategy, **settings)) if planned.call == call else planned
        for planned in plan.calls
    )
    return replace(plan, calls=changed)


def found(plan: ExecutionPlan, rule: str) -> list[Problem]:
    """Problems of one rule."""
    return [problem for problem in check_plan(plan) if problem.rule == rule]


def modelled(plan: ExecutionPlan, **fields: Any) -> ExecutionPlan:
    """The plan with other architectures."""
    models = {role: replace(spec, **fields) for role, spec in plan.workload.models.items()}
    return replace(plan, workload=replace(plan.workload, models=models))


# 512 samples, 128 a minibatch; 80 layers, 8 KV heads, ffn 28672, vocabulary 32000; training on 64 GPUs of 128.
REFUSED: tuple[tuple[str, dict[str, Any], str, str, str], ...] = (
    ("actor_train", {"dp": 4}, "mesh-size", "dp 4 x tp 8 x pp 4 = 128 but mesh `nodes 0-7` has 64 GPUs", "d2 t8 p4"),
    ("actor_train", {"pp": 3}, "mesh-size", "dp 2 x tp 8 x pp 3 = 48 but", "d64 t1 p1"),
    ("actor_train", {"pp": 2, "cp": 4}, "mesh-size", "dp 2 x tp 8 x pp 2 x cp 4 = 128 but", "d1 t8 p2"),
    ("actor_train", {"dp": 1, "tp": 1, "pp": 1}, "mesh-size", ": dp 1 = 1 but", "d64 t1 p1"),
    ("actor_train", {"tp": 16}, "kv-heads", "tp 16 does not divide the 8 KV heads of llama2-70b", "[1, 2, 4, 8]"),
    ("actor_train", {"tp": 3}, "tp-divides", "tp 3 does not divide the ffn 28672 of", "tp 2"),
    ("actor_train", {"tp": 7}, "tp-divides", "tp 7 does not divide the padded vocabulary 32000 of", "tp 8"),
    ("actor_train", {"tp": 16}, "tp-in-node", "does not divide the 8 GPUs of the mesh on each node", "[1, 2, 4, 8]"),
    ("actor_train", {"pp": 81}, "layers", "pp 81 is more than the 80 layers of llama2-70b", "pp 80 or less"),
    ("actor_train", {"vpp": 3}, "layers", "80 layers of llama2-70b do not divide into pp 4 x vpp 3", "pp x vpp 10"),
    ("ref_infer", {"pp": 2, "vpp": 2}, "interleaving", "vpp 2 needs a train_step with pp above 1", "leave out `v`"),
    ("actor_train", {"pp": 1, "vpp": 2}, "interleaving", "vpp 2 needs a train_step", "leave out `v`"),
    ("actor_train", {"vpp": 2, "micro_batches": 5}, "interleaving", "5 to be a multiple of pp 4", "micro_batches 4"),
    ("actor_train", {"vpp": 2, "micro_batches": 7}, "interleaving", "7 to be a multiple of pp 4", "micro_batches 8"),
    ("actor_train", {"vpp": 2, "micro_batches": 1}, "interleaving", "1 to be a multiple of pp 4", "micro_batches 4"),
    ("actor_train", {"layers_per_stage": (20, 20, 40)}, "split", "has 3 stages, pp is 4", "[20, 20, 20, 20]"),
    ("actor_train", {"layers_per_stage": (20, 20, 20, 19)}, "split", "adds up to 79, llama2-70b has 80", "[20, 20, 20"),
    ("actor_train", {"layers_per_stage": (20,) * 4, "vpp": 5}, "split", "vpp 5 interleaves equal chunks", "leave out"),
    ("actor_train", {"layers_per_stage": (20,), "pp": 81}, "split", "has 1 stages, pp is 81", "another pp"),
    ("actor_train", {"dp": 3}, "batch", "dp 3 does not divide the 128 samples of a minibatch", "dp 2"),
    ("ref_infer", {"dp": 3}, "batch", "dp 3 does not divide the 512 samples of a batch", "dp 2"),
    ("actor_train", {"micro_batches": 5}, "batch", "5 does not divide the 64 samples that a dp rank has of a", "4"),
    ("actor_generate", {"pp": 2, "groups": 3}, "batch", "groups 3 does not divide the 32 samples", "groups 2"),
    ("actor_generate", {"waves": 3}, "batch", "waves 3 does not divide the 32 samples", "waves 2"),
    ("actor_generate", {"pp": 2, "waves": 3, "groups": 2}, "batch", "waves 3 does not divide the 16 sam", "waves 2"),
    ("ref_infer", {"tp": 1, "sequence_parallel": True}, "sequence-parallel", "needs tp above 1, it is 1", "leave it"),
    ("actor_generate", {"micro_batches": 2}, "kind", "micro_batches 2 does not apply to a call of kind gener", "_ba"),
    ("actor_generate", {"cp": 2}, "kind", "cp 2 does not apply to a call of kind generate", "leave out `c`"),
    ("actor_generate", {"groups": 2}, "groups", "groups 2 in flight need a pipeline, pp is 1", "groups 1"),
    ("actor_generate", {"offload": True}, "offload", "belongs to the training call", "released after the call"),
    ("actor_train", {"ep": 2}, "experts", "ep 2 does not divide the 0 experts of llama2-70b", "leave out `e`"),
)  # fmt: skip


@pytest.mark.parametrize(("call", "settings", "rule", "words", "hint"), REFUSED)
def test_what_a_rule_refuses(
    plan: ExecutionPlan, call: str, settings: dict[str, Any], rule: str, words: str, hint: str
) -> None:
    assert check_plan(plan) == []
    problem = found(edited(plan, call, **settings), rule)[0]
    assert problem.message.startswith(f"{call}: ") and words in problem.message
    assert problem.hint.endswith(hint) or hint in problem.hint
    assert problem.path[:2] == ("calls", [planned.call for planned in plan.calls].index(call))
    key = problem.path[2]
    assert key == "strategy" or key in settings


@pytest.mark.parametrize(
    ("call", "settings", "rule"),
    [
        ("actor_train", {"pp": 80}, "layers"),
        ("actor_train", {"vpp": 5}, "layers"),
        ("actor_train", {"vpp": 5, "micro_batches": 8}, "interleaving"),
        ("actor_train", {"vpp": 5, "micro_batches": 1, "micro_batch_tokens": 8192}, "interleaving"),
        ("actor_train", {"layers_per_stage": (19, 20, 20, 21)}, "split"),
        ("actor_train", {"dp": 128, "micro_batches": 1}, "batch"),
        ("actor_train", {"micro_batches": 64}, "batch"),
        ("actor_generate", {"waves": 16, "groups": 2, "pp": 2}, "batch"),
        ("ref_infer", {"tp": 2, "sequence_parallel": True}, "sequence-parallel"),
        ("actor_generate", {"groups": 2, "pp": 2}, "groups"),
        ("actor_train", {"offload": True}, "offload"),
        ("ref_infer", {"offload": True}, "offload"),
    ],
)
def test_what_a_rule_still_takes(plan: ExecutionPlan, call: str, settings: dict[str, Any], rule: str) -> None:
    assert found(edited(plan, call, **settings), rule) == []


def test_experts_are_shared_out_equally(plan: ExecutionPlan) -> None:
    moe = modelled(plan, experts=12, experts_per_token=2)
    (problem,) = found(edited(moe, "actor_train", ep=8), "experts")
    assert "ep 8 does not divide the 12 experts" in problem.message and problem.hint == "ep one of [1, 2, 3, 4, 6, 12]"
    assert found(edited(moe, "actor_train", ep=4), "experts") == []


def test_the_closest_divisor() -> None:
    assert [closest_divisor(36, wanted) for wanted in (1, 5, 7, 8, 15, 24, 99)] == [1, 4, 6, 9, 12, 18, 36]


@pytest.mark.parametrize(
    ("prompt", "response", "hint"),
    [(1024, 3072, ""), (1024, 3073, "response_tokens 3072 or less"), (4096, 1, "at most 4096 tokens in all")],
)
def test_samples_fit_in_the_context(plan: ExecutionPlan, prompt: int, response: int, hint: str) -> None:
    workload = replace(plan.workload, prompt_tokens=prompt, response_tokens=response)
    problems = sample_problems(workload)
    assert {problem.hint for problem in problems} == ({f"{hint}, or --allow-long to insist"} if hint else set())
    assert len(problems) == (4 if hint else 0)
    assert sample_problems(replace(workload, allow_long=True)) == []


def test_samples_have_responses_of_tokens_that_every_model_knows(plan: ExecutionPlan) -> None:
    (none,) = sample_problems(replace(plan.workload, response_tokens=0))
    assert none.message == "response_tokens is 0: there is nothing to learn from"
    assert (none.hint, none.path) == ("response_tokens 1 or more", ("workload", "response_tokens"))
    models = plan.workload.models
    reward = replace(models["reward"], vocab=31_999)
    (small,) = sample_problems(replace(plan.workload, models={**models, "reward": reward}))
    assert small.message == f"`reward` ({reward.name}) knows 31999 tokens, fewer than the 32000 of `actor`"
    assert small.hint == "a model for `reward` with the tokenizer of `actor` and 32000 tokens or more"
    assert small.path == ("workload", "models", "reward")
    larger = {role: replace(spec, vocab=32_001) if role != "actor" else spec for role, spec in models.items()}
    assert sample_problems(replace(plan.workload, models=larger)) == []


def nodes_of(per_node: int, nodes: int = 16) -> ClusterSpec:
    return ClusterSpec(nodes=nodes, gpus_per_node=per_node, gpu=load_gpu("h100-80gb-sxm"), inter_node_gbps=50)


def test_meshes_are_whole_nodes_or_aligned_powers_of_two_of_one() -> None:
    """All rectangles of three nodes of four, against a list of the legal ones."""
    cluster = nodes_of(4, 3)
    legal = set(all_meshes(cluster))
    for first_node, nodes, first_gpu, gpus in product(range(4), range(1, 5), range(5), range(1, 6)):
        mesh = DeviceMesh(first_node=first_node, nodes=nodes, first_gpu=first_gpu, gpus=gpus)
        if mesh in legal:
            check_mesh(mesh, cluster)
            assert parse_mesh(mesh.text(cluster), cluster) == mesh
        else:
            with pytest.raises(SpecError):
                check_mesh(mesh, cluster)


def test_meshes_overlap_where_they_have_a_gpu_in_common() -> None:
    cluster = nodes_of(4, 3)
    for one, other in product(all_meshes(cluster), repeat=2):
        assert one.overlaps(other) == bool(set(one.ranks(cluster)) & set(other.ranks(cluster)))
    assert parse_mesh("node 2 gpus 2-3", cluster).ranks(cluster) == range(10, 12)


@pytest.mark.parametrize(
    ("text", "per_node", "words", "hint"),
    [
        ("nodes 10-16", 8, "reaches node 16; the cluster has nodes 0-15", "a mesh inside `nodes 0-15`"),
        ("node 0 gpus 4-8", 8, "reaches GPU 8; a node has GPUs 0-7", "a range inside `gpus 0-7`"),
        ("nodes 2-4 gpus 2-3", 8, "takes 2 of 8 GPUs on 3 nodes", "`nodes 2-4` or `node 2 gpus 2-3`"),
        ("node 1 gpus 0-2", 8, "has 3 GPUs; a part of a node has a power-of-two size", "2 GPUs or 4"),
        ("node 1 gpus 0-4", 8, "has 5 GPUs", "4 GPUs or 8"),
        ("node 1 gpus 0-4", 6, "has 5 GPUs", "4 GPUs"),
        ("node 1 gpus 3-4", 8, "starts at GPU 3; a part of 2 GPUs starts at a multiple of 2", "`node 1 gpus 2-3`"),
        ("nodes 3-2", 8, "counts backwards", "the smaller number first"),
        ("node 3 gpus 3-2", 8, "counts backwards", "the smaller number first"),
        ("nodes a-b", 8, "is not a mesh", "`node 8 gpu 1`"),
    ],
)
def test_a_mesh_off_the_grid_is_told_the_nearest(text: str, per_node: int, words: str, hint: str) -> None:
    with pytest.raises(SpecError) as raised:
        parse_mesh(text, nodes_of(per_node))
    assert raised.value.message.startswith(f"mesh `{text}` ") and words in raised.value.message
    assert raised.value.hint.endswith(hint)


@pytest.mark.parametrize(("per_node", "nodes", "hint"), [(8, 8193, "nodes 8192 or less"), (65_537, 1, "nodes 1 or")])
def test_a_cluster_beyond_the_most(per_node: int, nodes: int, hint: str) -> None:
    with pytest.raises(SpecError, match=hint):
        nodes_of(per_node, nodes)
    assert nodes_of(8, 8192).size == 65_536


def test_gpus_that_do_not_fill_their_nodes() -> None:
    with pytest.raises(SpecError, match="20 GPUs do not fill nodes of 8") as raised:
        load_cluster("h100-80gb-sxm", gpus=20)
    assert "hint: 16 or 24 GPUs" in str(raised.value)
    small = load_cluster("h100-80gb-sxm", gpus=3)
    assert (small.nodes, small.gpus_per_node) == (1, 3), "less than a node is a smaller node"
    two = load_cluster("h100-80gb-sxm", gpus=8, gpus_per_node=4)
    assert (two.nodes, two.gpus_per_node) == (2, 4)
    with pytest.raises(SpecError, match="-1 GPUs; it must be at least 1"):
        load_cluster("h100-80gb-sxm", gpus=-1)


def test_sizes_of_a_model_are_positive_and_go_together() -> None:
    spec = load_model("llama2-7b")
    for field in ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn", "vocab", "max_context"):
        for value in (0, -1, 1.5):
            with pytest.raises(SpecError, match=f"{field} is {value}; it must be a positive whole number"):
                replace(spec, **{field: value})
    assert replace(spec, max_context=1).max_context == 1
    for dim, legal in ((3, 2), (-2, 0), (130, 128)):
        with pytest.raises(SpecError, match=f"rotary_dim is {dim}; it must be even, and 128 at most") as raised:
            replace(spec, rotary_dim=dim)
        assert f"hint: rotary_dim {legal}, for example" in str(raised.value)
    for dim in (0, 2, 128):
        assert replace(spec, rotary_dim=dim).rotated == (dim or 128)
    with pytest.raises(SpecError, match="32 x 6251 experts; 200,000 at most\nhint: experts 6250, for example"):
        replace(spec, experts=6251)
    assert replace(spec, experts=6250, experts_per_token=6250).experts == 6250
    with pytest.raises(SpecError, match="experts_per_token 3 exceeds experts 2"):
        replace(spec, experts=2, experts_per_token=3)
    with pytest.raises(SpecError, match="heads 32 must be a multiple of kv_heads 12\nhint: kv_heads 4"):
        replace(spec, kv_heads=12)


def test_parameters_of_a_block_by_hand() -> None:
    """GPT-2 XL, layer for layer: 1600 wide, biases everywhere, two LayerNorms of two vectors, learned positions."""
    spec = replace(
        load_model("llama2-7b"), layers=48, hidden=1600, heads=25, kv_heads=25, head_dim=64, ffn=6400, vocab=50_257,
        gated_mlp=False, linear_bias=True, norm=Norm.LAYER, position=Position.LEARNED, max_context=1024,
        tied_embeddings=True,
    )  # fmt: skip
    attention = 1600 * 4800 + 4800 + 1600 * 1600 + 1600
    assert spec.layer_params == attention + 1600 * 6400 + 6400 + 6400 * 1600 + 1600 + 2 * 2 * 1600
    assert spec.params == 1_557_611_200, "as OpenAI's checkpoint has"
    assert spec.padded_vocab == 50_304


def test_what_the_runtime_does_not_run(plan: ExecutionPlan) -> None:
    spec = load_model("llama2-7b")
    assert spec_problems(spec) == [] and run_problems(plan) == [] and run_note(plan) == ""
    cases = {
        "position encoding `alibi`": {"position": Position.ALIBI},
        "traits of the family `gpt_oss`": {"family": "gpt_oss"},
        "activation `tanh`": {"activation": "tanh"},
        "3 norms per layer": {"norms_per_layer": 3},
        "latent attention": {"kv_rank": 16, "rotary_dim": 8},
        "attention sinks": {"sinks": True},
        "layers without experts among others": {"experts": 4, "experts_per_token": 2, "dense_first": 1, "dense_ffn": 8},
        "a shared expert without a gate": {"experts": 4, "experts_per_token": 2, "shared_ffn": 8, "shared_gate": False},
    }
    for words, fields in cases.items():
        (problem,) = spec_problems(replace(spec, **fields))
        assert words in problem.message
    tied = replace(spec.with_value_head(), tied_embeddings=True)
    assert "a value head tied to its embedding" in spec_problems(tied)[0].message
    assert spec_problems(replace(spec, tied_embeddings=True)) == []
    one = modelled(plan, norms_per_layer=3)
    first, *others = run_problems(one)
    assert first.message.startswith("actor_generate: model `llama2-70b` has 3 norms") and len(others) == 5
    assert run_note(one) == f"this runtime does not run the plan: {first.message} (and 5 more)"
    assert first.path == ("calls", 0, "strategy") and others[-1].path == ("calls", 5, "strategy")
    lone = edited(modelled(plan, experts=8, experts_per_token=2), "actor_train", sequence_parallel=False)
    assert run_note(lone).endswith("routes every token 8 times without sequence parallelism")


def test_degrees_that_the_runtime_does_not_run() -> None:
    spec = replace(load_model("llama2-70b"), experts=12, experts_per_token=2)

    def words(**degrees: int) -> list[str]:
        size = degrees.get("dp", 1) * degrees.get("tp", 1) * degrees.get("pp", 1)
        layout = Layout(spec, tuple(range(size)), **degrees)
        return [problem.message.removeprefix("model `llama2-70b` has ") for problem in layout_problems(layout)]

    assert words(tp=8) == words(pp=80) == words(pp=4, vpp=5) == words(pp=3) == []
    assert words(tp=16) == ["kv_heads 8, not a multiple of tp 16"]
    assert words(dp=8, ep=8) == ["12 experts, not a multiple of ep 8"]
    assert words(pp=81) == ["80 layers, which pp 81 x vpp 1 cannot share"]
    assert words(pp=4, vpp=3) == ["80 layers, which pp 4 x vpp 3 cannot share"]
    assert words(vpp=2) == ["vpp 2 without a pipeline"]


def test_experts_that_the_runtime_does_not_run(plan: ExecutionPlan) -> None:
    moe = modelled(plan, experts=8, experts_per_token=2)
    assert run_problems(moe) == []
    assert run_problems(edited(moe, "actor_generate", ep=8)) == [], "the experts of the tp ranks of a replica"
    assert run_problems(edited(modelled(plan, experts=16, experts_per_token=2), "actor_generate", ep=16)) == []
    assert run_problems(edited(moe, "ref_infer", ep=4, sequence_parallel=False)) == []


@pytest.mark.parametrize("limit", [2048, 2047])
def test_scalings_reach_the_longest_sample(plan: ExecutionPlan, limit: int) -> None:
    """1,024 + 1,024 tokens: a first length of 2,048 is enough, one less is not. Windows are applied."""
    dynamic = DynamicScaling(factor=2.0, original_max_position=limit)
    assert workload_problems(modelled(plan, window=limit).workload) == []
    scalings = workload_problems(modelled(plan, rope_scaling=dynamic).workload)
    assert len(scalings) == (0 if limit == 2048 else 4)
    for problem in scalings:
        assert f"{limit} tokens" in problem.message and "samples of 1024 + 1024" in problem.message


def test_degrees_and_their_bounds() -> None:
    with pytest.raises(SpecError, match="ep 5 must divide dp x cp x tp = 12\nhint: ep 4, for example"):
        ParallelStrategy(dp=3, tp=2, cp=2, ep=5)
    with pytest.raises(SpecError, match="ep 24 must divide dp x cp x tp = 12\nhint: ep 12, for example"):
        ParallelStrategy(dp=3, tp=2, cp=2, ep=24)
    with pytest.raises(SpecError, match="has a stage without layers"):
        ParallelStrategy(pp=2, layers_per_stage=(2, 0))
    for value in (0, -1, 1.5):
        with pytest.raises(SpecError, match=r"tp is .*; it must be a whole number from 1 to .*\nhint: tp 1, for"):
            ParallelStrategy(tp=value)  # type: ignore[arg-type]
    assert ParallelStrategy(dp=3, tp=2, cp=5, pp=7, ep=10).size == 210
