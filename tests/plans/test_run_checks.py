"""Keys of a run file that a plan has no use for are named before anything starts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from plan_cases import CRITIC_FREE, SEVEN_CALLS, tiny_plan, tiny_run

from plans.plan import ExecutionPlan
from plans.run_checks import check_run
from plans.runfile import RunFileError

PPO = tiny_plan(1, "d1 t1 p1")
SEVEN = tiny_plan(1, "d1 t1 p1", order=SEVEN_CALLS, reward_model=True)
GROUPS = tiny_plan(1, "d1 t1 p1", algorithm="grpo", order=CRITIC_FREE, batch_size=8, group_size=2)
SFT = tiny_plan(1, "d1 t1 p1", algorithm="sft", order=("actor_train",))
WORK = GROUPS.workload
OTHER = replace(GROUPS, workload=replace(WORK, models={**WORK.models, "ref": replace(WORK.models["ref"], ffn=64)}))
OWN = replace(
    PPO,
    workload=replace(
        PPO.workload,
        graph=replace(
            PPO.workload.graph,
            name="mine",
            calls=tuple(
                replace(call, loss="mine.py:loss") if call.name == "actor_train" else call
                for call in PPO.workload.graph.calls
            ),
        ),
    ),
)


@pytest.mark.parametrize(("plan", "keys"), [
    (SEVEN, {"ppo": {"importance_cap": 2.0}}), (GROUPS, {"ppo": {"train_prompts": 4}}),
    (GROUPS, {"reference": {"every": 3}}), (PPO, {"reward_limits": {"on_failure": "drop"}}), (SFT, {}),
])  # fmt: skip
def test_what_a_plan_has_is_taken(plan: ExecutionPlan, keys: dict[str, Any]) -> None:
    check_run(plan, tiny_run(Path("out"), **keys))


@pytest.mark.parametrize(("plan", "keys", "words"), [
    (PPO, {"ppo": {"importance_cap": 2.0}}, ["ppo.importance_cap", "--recompute-logprobs"]),
    (GROUPS, {"ppo": {"train_prompts": 3}}, ["is 3, of 8 prompts in 2 minibatches", "a multiple of 2"]),
    (GROUPS, {"ppo": {"train_prompts": 16}}, ["ppo.train_prompts is 16", "up to 8"]),
    (PPO, {"ppo": {"train_prompts": 4}}, ["ppo.train_prompts picks groups", "group_size 2 or more"]),
    (SFT, {"reference": {"every": 3}}, ["the plan has not both", "reference.every=0"]),
    (OTHER, {"reference": {"every": 3}}, ["`ref`", "is another model than `actor`", "architecture"]),
    (OWN, {"reward_limits": {"on_failure": "drop"}}, ["loss `mine.py:loss` weighs its samples", "zero, or stop"]),
])  # fmt: skip
def test_what_it_lacks_is_named(plan: ExecutionPlan, keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(RunFileError) as raised:
        check_run(plan, tiny_run(Path("out"), **keys))
    assert all(word in str(raised.value) for word in words), str(raised.value)


def test_a_coefficient_of_zero_has_nothing_to_adapt() -> None:
    with pytest.raises(ValueError, match="kl_target changes kl_coefficient by factors, and it is 0"):
        tiny_run(Path("out"), ppo={"kl_target": 1.0, "kl_coefficient": 0.0})
