"""Graphs of the common RLHF algorithms by name. A graph holds no sizes: those are the workload's.

`sequences` are prompt + response tokens with their lengths; log-probs, values and rewards are per sample or token.
"""

from __future__ import annotations

from collections.abc import Callable

from plans.errors import SpecError, nearest
from plans.graph import Call, CallKind, DataflowGraph

GEN, INF, TRAIN, FN = CallKind.GENERATE, CallKind.INFERENCE, CallKind.TRAIN_STEP, CallKind.FUNCTION


def _generate() -> Call:
    return Call(
        name="actor_generate", kind=GEN, model="actor", inputs=("prompts",), outputs=("sequences", "gen_logprobs")
    )


def _reward(seconds_per_sample: float | None) -> Call:
    """A reward model, or with a cost per sample a Python function."""
    if seconds_per_sample is not None:
        return Call(
            name="reward",
            kind=FN,
            inputs=("sequences",),
            outputs=("rewards",),
            seconds_per_sample=seconds_per_sample,
        )
    return Call(name="reward_infer", kind=INF, model="reward", inputs=("sequences",), outputs=("rewards",))


def _old_logprobs(recompute: bool) -> tuple[str, tuple[Call, ...]]:
    if not recompute:
        return "gen_logprobs", ()
    call = Call(name="actor_infer", kind=INF, model="actor", inputs=("sequences",), outputs=("old_logprobs",))
    return "old_logprobs", (call,)


def ppo(*, reward_seconds_per_sample: float | None = None, recompute_logprobs: bool = False) -> DataflowGraph:
    """PPO with a critic: six calls, seven when old log-probs are recomputed in their own forward pass."""
    old, extra = _old_logprobs(recompute_logprobs)
    scores = ("sequences", old, "ref_logprobs", "values", "rewards")
    return DataflowGraph(
        name="ppo",
        calls=(
            _generate(),
            _reward(reward_seconds_per_sample),
            Call(name="ref_infer", kind=INF, model="ref", inputs=("sequences",), outputs=("ref_logprobs",)),
            Call(name="critic_infer", kind=INF, model="critic", inputs=("sequences",), outputs=("values",)),
            *extra,
            Call(name="actor_train", kind=TRAIN, model="actor", inputs=scores),
            Call(name="critic_train", kind=TRAIN, model="critic", inputs=scores),
        ),
    )


ALGORITHMS: dict[str, Callable[..., DataflowGraph]] = {"ppo": ppo}


def algorithm_graph(
    name: str, *, reward_seconds_per_sample: float | None = None, recompute_logprobs: bool = False
) -> DataflowGraph:
    """The graph of a named algorithm. With `reward_seconds_per_sample` the reward is a function of that cost."""
    if name not in ALGORITHMS:
        raise SpecError(f"unknown algorithm `{name}`", nearest(name, list(ALGORITHMS)))
    return ALGORITHMS[name](reward_seconds_per_sample=reward_seconds_per_sample, recompute_logprobs=recompute_logprobs)
