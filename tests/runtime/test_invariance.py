"""Plan invariance: every layout of an algorithm on the small model reproduces the one-process run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from invariance import COUNTS, CPU, Outcome, Tokens, Watcher, compare, execute
from plan_cases import CRITIC_FREE, REWARDS, SEVEN_CALLS, TINY, Place, examples, tiny_plan, tiny_run
from ranks import run_ranks
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from plans.algorithms import algorithm_graph
from plans.plan import ExecutionPlan
from plans.strategy import Recompute
from runtime.batches.tokenizer import Tokenizer
from runtime.executor import Executor
from runtime.groups import GroupCache
from runtime.job import prepare_job
from runtime.models.installation import install
from runtime.models.support import check_supported
from runtime.reports.metrics import Metrics
from runtime.reports.records import Recorder

DISJOINT = {
    "actor_generate": ("node 0", "d4 t1 p1", {"waves": 2}),
    "ref_infer": ("node 0 gpus 0-1", "d1 t1 p2", {"micro_batches": 2}),
    "critic_infer": ("node 0 gpus 2-3", "d1 t2 p1"),
    "actor_train": ("node 0 gpus 0-1", "d1 t2 p1", {"sequence_parallel": True, "micro_batches": 2}),
    "critic_train": ("node 0 gpus 2-3", "d2 t1 p1", {"shard_optimizer": False}),
}
SHIFTED = {
    "actor_generate": ("node 0 gpus 2-3", "d1 t1 p2", {"groups": 2, "slots": 3}),
    "ref_infer": ("node 0 gpu 1", "d1 t1 p1", {"micro_batches": 4}),
    "critic_infer": ("node 0", "d2 t1 p2"),
    "actor_train": ("node 0 gpus 0-1", "d1 t1 p2", {"micro_batches": 4}),
    "critic_train": ("node 0 gpus 2-3", "d1 t2 p1"),
}
SHARED = {  # generation and training share a copy, through models with and without sequence parallelism
    "actor_generate": "d1 t2 p1",
    "ref_infer": ("node 0", "d1 t2 p1", {"sequence_parallel": True}),
    "critic_infer": "d1 t2 p1",
    "actor_train": ("node 0", "d1 t2 p1", {"sequence_parallel": True}),
    "critic_train": ("node 0", "d1 t2 p1", {"sequence_parallel": True, "micro_batches": 2}),
}
LAGGED = {
    "actor_generate": ("node 0 gpu 0", "d1 t1 p1"),
    "ref_infer": ("node 0 gpu 0", "d1 t1 p1", {"offload": True}),
    "critic_infer": ("node 0 gpu 1", "d1 t1 p1", {"micro_batches": 2}),
    "actor_train": ("node 0 gpu 0", "d1 t1 p1", {"recompute": Recompute.FULL}),
    "critic_train": ("node 0 gpu 1", "d1 t1 p1", {"lag": 1, "offload": True}),
}
PACKED = {  # bounds that cut each share differently; chunks of stages that take turns
    "actor_generate": "d4 t1 p1",
    "ref_infer": ("node 0", "d2 t1 p2", {"micro_batch_tokens": 20}),
    "critic_infer": ("node 0 gpus 0-1", "d1 t2 p1", {"micro_batch_tokens": 33}),
    "actor_train": ("node 0", "d2 t1 p2 v2", {"micro_batch_tokens": 17}),
    "critic_train": ("node 0", "d2 t2 p1", {"micro_batch_tokens": 21, "sequence_parallel": True}),
}
CONTEXT = {  # packs cut over cp; training and scoring share a copy that they cut tokens over differently
    "actor_generate": ("node 0 gpus 0-1", "d2 t1 p1"),
    "ref_infer": ("node 0", "d1 t1 p1 c4", {"micro_batch_tokens": 40}),
    "critic_infer": ("node 0", "d2 t2 p1", {"sequence_parallel": True}),
    "actor_train": ("node 0", "d1 t1 p2 c2", {"micro_batches": 2}),
    "critic_train": ("node 0", "d1 t2 p1 c2", {"sequence_parallel": True, "micro_batch_tokens": 21}),
}
LAGGED_ORDER = ("actor_generate", "critic_train", "ref_infer", "critic_infer", "actor_train")
REWARDED = {
    "actor_generate": ("node 0", "d4 t1 p1"),
    "reward_infer": ("node 0 gpus 2-3", "d1 t2 p1"),
    "ref_infer": ("node 0 gpus 0-1", "d1 t1 p2"),
    "critic_infer": ("node 0 gpu 3", "d1 t1 p1"),
    "actor_infer": ("node 0 gpus 2-3", "d2 t1 p1"),
    "actor_train": ("node 0", "d2 t1 p2", {"micro_batches": 2}),
    "critic_train": ("node 0 gpus 2-3", "d2 t1 p1"),
}
PLANS: dict[str, ExecutionPlan] = {
    "tp2": tiny_plan(2, "d1 t2 p1"),
    "pp2": tiny_plan(2, "d1 t1 p2"),
    "dp2": tiny_plan(2, "d2 t1 p1"),
    "disjoint": tiny_plan(4, DISJOINT),
    "shifted": tiny_plan(4, SHIFTED),
    "shared": tiny_plan(2, SHARED),
    "lagged": tiny_plan(2, LAGGED, order=LAGGED_ORDER),
    "packed": tiny_plan(4, PACKED),
    "context": tiny_plan(4, CONTEXT),
}
APART = {  # no rank of the training holds a whole group
    "actor_generate": ("node 0", "d4 t1 p1"),
    "actor_greedy": ("node 0 gpus 2-3", "d1 t2 p1"),
    "ref_infer": ("node 0 gpus 0-1", "d2 t1 p1"),
    "actor_train": ("node 0 gpus 2-3", "d2 t1 p1", {"micro_batches": 2}),
}
CRITIC_FREE_LAYOUTS = {"tp2": (2, "d1 t2 p1"), "dp2": (2, "d2 t1 p1"), "disjoint": (4, APART)}


ITERATIONS = 2
"""The second comes from weights that the first has trained."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the one-process run writes, and exports its actor."""
    return tmp_path_factory.mktemp("alone")


@pytest.fixture(scope="module")
def alone(folder: Path) -> Outcome:
    """The one-process run."""
    return execute(tiny_plan(1, "d1 t1 p1"), tiny_run(folder, iterations=ITERATIONS), folder, export=True)


@pytest.mark.parametrize("name", PLANS)
def test_same_tokens_and_losses(name: str, alone: Outcome, tmp_path: Path) -> None:
    found = execute(PLANS[name], tiny_run(tmp_path, iterations=ITERATIONS), tmp_path)
    compare(found, alone, samples=ITERATIONS * 8)


@pytest.mark.parametrize(("algorithm", "layouts", "sizes"), [
    ("grpo", CRITIC_FREE_LAYOUTS, {"batch_size": 2, "group_size": 4}),
    ("rloo", ["dp2"], {"batch_size": 2, "group_size": 4}),
    ("reinforce++", ["dp2"], {}),
    ("remax", ["disjoint"], {}),  # two generations, each in a layout of its own
    ("remax", ["dp2"], {"reward_model": True}),
])  # fmt: skip
def test_critic_free_algorithms(algorithm: str, layouts: Sequence[str], sizes: dict[str, Any], tmp_path: Path) -> None:
    def outcome(name: str, gpus: int, places: str | dict[str, Place]) -> Outcome:
        graph = algorithm_graph(algorithm, reward_seconds_per_sample=None if "reward_model" in sizes else 0.0,
                                recompute_logprobs="reward_model" in sizes)  # fmt: skip
        order = [call.name for call in graph.model_calls]
        plan = tiny_plan(gpus, places, algorithm=algorithm, order=order, **sizes)
        run = tiny_run(tmp_path / name, iterations=2, weights={"actor": str(TINY), "reward": "random"})
        return execute(plan, run, tmp_path / name)

    wanted = outcome("alone", 1, "d1 t1 p1")
    assert wanted[0][0]["actor/grad_norm"] > 0 and wanted[0][0]["critic/advantages/max"] > 0
    for name in layouts:
        compare(outcome(name, *CRITIC_FREE_LAYOUTS[name]), wanted, samples=2 * 8)


EVERYTHING = {
    "clip_high": 0.28, "dual_clip": 3.0, "entropy_coefficient": 0.01, "ratio": "sequence", "loss_average": "sequence",
    "kl_in": "loss", "kl_estimator": "k2", "divide_by_deviation": False, "overlong_tokens": 4, "train_prompts": 1,
}  # fmt: skip


def test_variants_are_the_same_under_every_layout(tmp_path: Path) -> None:
    """All switches at once; a reward that leaves some groups without spread."""

    def outcome(name: str, gpus: int, places: Any) -> Outcome:
        plan = tiny_plan(gpus, places, algorithm="grpo", order=CRITIC_FREE, batch_size=4, group_size=2, minibatches=1)
        keys = {"reward": f"{REWARDS}:rarely", "actor": {"lr": 1e-3, "schedule": "cosine"}, "iterations": 2}
        return execute(plan, tiny_run(tmp_path / name, ppo=EVERYTHING, **keys), tmp_path / name)

    wanted = outcome("alone", 1, "d1 t1 p1")
    assert wanted[0][0]["actor/dropped_samples"] == 3 / 4 and wanted[0][1]["actor/lr"] == 0
    places = dict.fromkeys(CRITIC_FREE, "d2 t1 p1") | {"actor_train": ("node 0", "d1 t1 p1 c2", {})}
    for number, layout in enumerate(["d2 t1 p1", places]):
        compare(outcome(str(number), 2, layout), wanted, samples=2 * 8)


def test_samples_whose_reward_failed_are_left_out_under_every_layout(tmp_path: Path) -> None:
    """Of PPO in groups, so that a critic leaves them out too: the same under every layout, and not as if they had 0."""

    def outcome(name: str, gpus: int, places: Any, policy: str = "drop") -> Outcome:
        plan = tiny_plan(gpus, places, minibatches=1)
        limits, samples = {"on_failure": policy}, 8
        run = tiny_run(tmp_path / name, reward=f"{REWARDS}:seldom", reward_limits=limits, iterations=2, samples=samples)
        return execute(plan, run, tmp_path / name)

    wanted, zero = outcome("alone", 1, "d1 t1 p1"), outcome("zero", 1, "d1 t1 p1", "zero")
    failed = [len([1 for text in texts(wanted, i) if len(text) % 3 == 0]) / 8 for i in range(2)]
    first = wanted[0][0]
    assert [line["critic/score/failed"] for line in wanted[0]] == failed and 0 < failed[0] < 1
    assert first["actor/dropped_samples"] == failed[0] == zero[0][0]["critic/score/failed"]
    scores = [len(text) for text in texts(wanted, 0) if len(text) % 3]
    assert first["critic/score/mean"] == pytest.approx(sum(scores) / len(scores))
    assert zero[0][0]["critic/score/mean"] == pytest.approx(sum(scores) / 8)
    compare(outcome("apart", 2, DEALT), wanted, samples=2 * 8)


DEALT = {
    "actor_generate": "d2 t1 p1", "ref_infer": "d2 t1 p1", "critic_infer": ("node 0 gpu 0", "d1 t1 p1"),
    "actor_train": ("node 0", "d2 t1 p1", {"micro_batches": 2}), "critic_train": ("node 0 gpu 1", "d1 t1 p1"),
}  # fmt: skip


def texts(outcome: Outcome, iteration: int) -> list[str]:
    """The responses of an iteration."""
    tokenizer = Tokenizer.of_folder(TINY)
    return [tokenizer.decode(response) for (i, _), (_, response) in outcome[1].items() if i == iteration]


OFFLINE_LAYOUTS = {
    "sft": ("d2 t1 p1", {"actor_train": ("node 0", "d1 t1 p2", {"micro_batches": 4})}),
    "dpo": ({"ref_infer": ("node 0 gpu 1", "d1 t1 p1", {"micro_batches": 8}), "actor_train": "d2 t1 p1"},),
    "reward-modelling": ("d1 t2 p1",),
}


@pytest.mark.parametrize("algorithm", OFFLINE_LAYOUTS)
def test_algorithms_with_given_responses(algorithm: str, tmp_path: Path) -> None:
    order = [call.name for call in algorithm_graph(algorithm).calls]
    sizes = {"batch_size": 8} if algorithm == "sft" else {"batch_size": 4, "group_size": 2}
    data = {"source": str(examples(tmp_path / "examples.jsonl"))}

    def metrics(name: str, gpus: int, places: Any, iterations: int) -> list[Metrics]:
        plan = tiny_plan(gpus, places, algorithm=algorithm, order=order, **sizes)
        check_supported(plan)
        return execute(plan, tiny_run(tmp_path, data=data, iterations=iterations), tmp_path / name)[0]

    wanted, role = metrics("alone", 1, "d1 t1 p1", iterations=6), order[-1].removesuffix("_train")
    assert wanted[-1][f"{role}/loss"] < 0.8 * wanted[0][f"{role}/loss"]
    for number, places in enumerate(OFFLINE_LAYOUTS[algorithm]):
        found = metrics(str(number), 2, places, iterations=3)
        for iteration, (ours, theirs) in enumerate(zip(found, wanted[:3], strict=True)):
            named = [key for key in theirs if key.startswith((f"{role}/", "response_length"))]
            for key in [key for key in named if not key.endswith(COUNTS)]:
                limit = (1e-5 if iteration == 0 else 1e-4) * max(1.0, abs(theirs[key]))
                assert abs(ours[key] - theirs[key]) <= limit, f"iteration {iteration}: {key}"


def test_reward_model_groups_and_recomputed_logprobs(tmp_path: Path) -> None:
    """With generation that runs ahead, whose ratio to the recomputed policy is cut at a cap: 1 while its weights are
    those that train."""
    outcomes = []
    for gpus, places in [(1, "d1 t1 p1"), (4, REWARDED)]:
        folder = tmp_path / str(gpus)
        sizes = {"batch_size": 4, "group_size": 2, "staleness": 1}
        plan = tiny_plan(gpus, places, order=SEVEN_CALLS, reward_model=True, **sizes)
        run = tiny_run(folder, weights={"actor": str(TINY), "reward": "random"}, sampling={"temperature": 0.8},
                       ppo={"importance_cap": 1.01}, actor={"lr": 1e-3})  # fmt: skip
        outcomes.append(execute(plan, run, folder))
    compare(outcomes[1], outcomes[0], samples=3 * 8)
    fresh, stale = outcomes[0][0][0], outcomes[0][0][1]
    ratio = "rollout_corr/rollout_is"
    assert fresh[f"{ratio}/max"] == pytest.approx(1, abs=1e-4) and fresh[f"{ratio}/clip_ratio"] == 0
    assert stale[f"{ratio}/max"] > 1.01 and stale[f"{ratio}/clip_ratio"] > 0
    assert stale["rollout_corr/k3_kl"] > 1e-6 > abs(fresh["rollout_corr/kl"])
    assert outcomes[0][0][0]["critic/score/max"] > outcomes[0][0][0]["critic/score/min"]
    for iteration, line in enumerate(outcomes[1][0]):
        dealt = {name: line[f"plan/{name}/imbalance"] for name in REWARDED if name != "actor_generate"}
        best = least_imbalance([sum(map(len, outcomes[1][1][iteration, row])) for row in range(8)])
        assert best - 1e-6 <= dealt.pop("actor_infer") <= 4 / 3 * best, "no worse than the largest first (Graham)"
        assert dealt.pop("actor_train") > 1 and dealt.pop("critic_train") > 1
        assert set(dealt.values()) == {1.0} and "plan/actor_generate/imbalance" not in line


def least_imbalance(tokens: list[int]) -> float:
    """Work of the busier of two ranks over their mean, in the best of all ways to deal samples of so many tokens: each
    weight of the blocks once per token, and half of all pairs of tokens for keys and for values."""
    config = LlamaConfig.from_pretrained(TINY)
    blocks = LlamaForCausalLM(config).model.layers.parameters()
    weights = sum(weight.numel() for weight in blocks if weight.dim() == 2)
    work = [t * weights + t * t * config.num_hidden_layers * config.hidden_size for t in tokens]
    splits = (sum(part) for n in range(len(work) + 1) for part in combinations(work, n))
    return min(max(one, sum(work) - one) for one in splits) / (sum(work) / 2)


AHEAD = {  # the actor trains two periods late, before the generation that it must not feed
    "actor_generate": ("node 0 gpu 0", "d1 t1 p1"),
    "ref_infer": ("node 0 gpu 1", "d1 t1 p1"),
    "critic_infer": ("node 0 gpu 1", "d1 t1 p1", {"lag": 1}),
    "actor_train": ("node 0 gpu 1", "d1 t1 p1", {"lag": 2}),
    "critic_train": ("node 0", "d2 t1 p1", {"lag": 1}),
}


def test_generation_runs_ahead_by_exactly_what_the_graph_says(alone: Outcome, tmp_path: Path) -> None:
    """Whatever the layouts, the first two iterations come from the weights that the run began with."""

    def outcome(name: str, plan: ExecutionPlan, lr: float = 3e-4) -> Outcome:
        return execute(plan, tiny_run(tmp_path / name, actor={"lr": lr}), tmp_path / name)

    ahead = tiny_plan(1, "d1 t1 p1", staleness=1)
    wanted = outcome("ahead", ahead)
    assert [line["actor/staleness"] for line in wanted[0]] == [0, 1, 1]
    assert abs(wanted[0][0]["actor/stale_ppo_kl"]) < 1e-6 < abs(wanted[0][2]["actor/stale_ppo_kl"])
    order = ("actor_train", "actor_generate", "ref_infer", "critic_infer", "critic_train")
    for number, plan in enumerate(
        [tiny_plan(2, AHEAD, order=order, staleness=1), tiny_plan(2, "d1 t2 p1", staleness=1)]
    ):
        compare(outcome(str(number), plan), wanted, samples=3 * 8)
    still = outcome("still", ahead, lr=0.0)[1]
    for iteration, as_still in enumerate([True, True, False]):
        assert all(wanted[1][iteration, row] == still[iteration, row] for row in range(8)) == as_still, iteration
    for iteration, as_fresh in enumerate([True, False]):
        assert all(wanted[1][iteration, row] == alone[1][iteration, row] for row in range(8)) == as_fresh, iteration


def test_the_reference_run_moves(alone: Outcome) -> None:
    first, last = alone[0][0], alone[0][-1]
    assert first["actor/grad_norm"] > 0 and first["critic/vf_loss"] > 0
    assert abs(first["actor/reward_kl_penalty"]) < 1e-5 < abs(last["actor/reward_kl_penalty"])


def test_logprobs_are_those_of_transformers(tmp_path: Path) -> None:
    plan, run = PLANS["shifted"], tiny_run(tmp_path, iterations=1)

    def rank() -> tuple[Tokens, dict[tuple[int, int], Tensor]]:
        install(CPU)
        with pytest.MonkeyPatch.context() as monkeypatch:
            watcher = Watcher(monkeypatch)
            recorder = Recorder(tmp_path, dist.get_rank(), time.time())
            Executor(prepare_job(plan, run), GroupCache(CPU), CPU, recorder).run(1)
        return watcher.tokens, watcher.ref

    tokens, ref = run_ranks(4, rank)[1]
    reference = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    assert len(tokens) == len(ref) == 8
    for place, (prompt, response) in tokens.items():
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logprobs = reference(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None]).squeeze(1)
        torch.testing.assert_close(ref[place], logprobs[len(prompt) - 1 :], atol=2e-5, rtol=0)


def test_the_exported_actor_is_the_trained_one(alone: Outcome, folder: Path, tmp_path: Path) -> None:
    cut = execute(tiny_plan(4, "d1 t2 p2"), tiny_run(tmp_path, iterations=ITERATIONS), tmp_path, export=True)
    compare(cut, alone, samples=ITERATIONS * 8)
    found, wanted = (LlamaForCausalLM.from_pretrained(place / "actor") for place in (tmp_path, folder))
    before = LlamaForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.arange(2, 34)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, wanted(ids).logits, atol=1e-3, rtol=0)
        assert (before(ids).logits - wanted(ids).logits).abs().max() > 0.05


def test_random_weights_need_no_files(tmp_path: Path) -> None:
    """Nothing else would end a response, so that its length is drawn from the workload's distribution."""
    sizes = {"response_tokens": 24, "response_lengths": ((0.0, 2), (100.0, 20))}
    plan = tiny_plan(2, "d1 t1 p2", order=SEVEN_CALLS, reward_model=True, **sizes)
    run = tiny_run(tmp_path, weights="random", data={"source": ""}, iterations=1)
    metrics, tokens = execute(plan, run, tmp_path, export=True)
    assert len(tokens) == 8 and metrics[0]["prompt_length/min"] == plan.workload.prompt_tokens
    assert metrics[0]["response_length/mean"] == pytest.approx(11, abs=0.5)
    assert sorted(len(response) for _, response in tokens.values()) == sorted(plan.workload.responses.draw(8))
    assert metrics[0]["response_length/p100"] == metrics[0]["response_length/max"] > 17
    assert (tmp_path / "actor" / "config.json").is_file()
