"""What a run file asks of its plan: keys that need a call, a group or a model which the plan may not have."""

from __future__ import annotations

from dataclasses import replace

from plans.algorithms import ACTOR, ALGORITHMS, REFERENCE, loss_of
from plans.graph import CallKind
from plans.plan import ExecutionPlan
from plans.runfile import RunFile, RunFileError


def check_run(plan: ExecutionPlan, run: RunFile) -> None:
    """Raise RunFileError for the first key that the plan has no use for."""
    for check in (_failed_rewards, _importance, _train_prompts, _reference):
        check(plan, run)


def _failed_rewards(plan: ExecutionPlan, run: RunFile) -> None:
    """A loss of the user's own weighs its samples itself, so that nobody else can leave one out."""
    graph = plan.workload.graph
    own = [loss for call in graph.calls if call.kind is CallKind.TRAIN_STEP
           and (loss := loss_of(graph, call)) not in ALGORITHMS]  # fmt: skip
    if own and run.reward_limits.on_failure == "drop":
        message = f"reward_limits.on_failure is drop, and loss `{own[0]}` weighs its samples itself"
        raise RunFileError(message, "on_failure: zero, or stop")


def _importance(plan: ExecutionPlan, run: RunFile) -> None:
    graph = plan.workload.graph
    trains = [call for call in graph.calls if call.kind is CallKind.TRAIN_STEP]
    if run.ppo.importance_cap is not None and not any({"old_logprobs", "gen_logprobs"} <= {*c.inputs} for c in trains):
        message = (
            "ppo.importance_cap weighs recomputed log-probs against those of generation, which are all the plan has"
        )
        raise RunFileError(message, "a plan with them: `realplan search --recompute-logprobs`")


def _train_prompts(plan: ExecutionPlan, run: RunFile) -> None:
    """Groups lie whole in minibatches, which get equal parts of the prompts that are trained on."""
    workload, wanted = plan.workload, run.ppo.train_prompts
    if not wanted:
        return
    if wanted > workload.batch_size or wanted % workload.minibatches or workload.batch_size % workload.minibatches:
        raise RunFileError(
            f"ppo.train_prompts is {wanted}, of {workload.batch_size} prompts in {workload.minibatches} minibatches",
            f"a multiple of {workload.minibatches} up to {workload.batch_size}, the plan's batch_size too",
        )
    if workload.group_size < 2:
        raise RunFileError(
            "ppo.train_prompts picks groups by the spread of their scores", "plan with group_size 2 or more"
        )


def _reference(plan: ExecutionPlan, run: RunFile) -> None:
    models, trained = plan.workload.models, plan.workload.graph.trainers
    if not run.reference.every:
        return
    if ACTOR not in trained or REFERENCE not in models or REFERENCE in trained:
        message = f"reference.every has a frozen `{REFERENCE}` follow a trained `{ACTOR}`, and the plan has not both"
        raise RunFileError(message, "reference.every=0")
    actor, reference = models[ACTOR], models[REFERENCE]
    if actor.lora:
        message = f"`{ACTOR}` is trained through adapters, whose base `{REFERENCE}` is: it cannot follow them"
        raise RunFileError(message, "reference.every=0, or a plan without lora")
    if replace(actor, name="") != replace(reference, name=""):
        message = f"`{REFERENCE}` ({reference.name}) is another model than `{ACTOR}` ({actor.name}), which it follows"
        raise RunFileError(message, "reference.every=0, or a reference of the actor's architecture")
