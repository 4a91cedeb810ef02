"""Memory: the plan's predicted peak against what the card held, for ten plans."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from gpu_check.one_gpu import Settings, device_plan, take, take_alone
from gpu_check.rows import Case, Row, judged
from gpu_check.setting import Setting
from gpu_check.worlds import run_world, world_of
from plans.cluster import GIB
from plans.strategy import Recompute

MOST_UNDER, MOST_OVER = -0.03, 0.05
"""A prediction may be 3 % too low and 5 % too high."""
ITERATIONS = 2
"""Adam makes its moments in the first step: activations beside them are there from the second on."""
GIVEN = {"batch_size": 16, "prompt_tokens": 1024, "response_tokens": 1024}
SAMPLED = {"batch_size": 32, "prompt_tokens": 512, "response_tokens": 64, "minibatches": 2}
SMALL = {"batch_size": 4, "prompt_tokens": 8, "response_tokens": 8}
FULL = Recompute.FULL


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A plan whose memory is measured."""

    name: str
    algorithm: str
    calls: Settings
    sizes: Mapping[str, int] = field(default_factory=lambda: GIVEN)
    ranks: int = 1


def _train(name: str, **settings: object) -> Plan:
    return Plan(name=name, algorithm="sft", calls={"actor_train": {"micro_batches": 8, **settings}})


LARGE = {"*": {"micro_batches": 4}}
TRAINING = {"micro_batches": 8, "recompute": FULL}
PLANS = (
    _train("training"),
    _train("training, selective recomputation", recompute=Recompute.SELECTIVE),
    _train("training, full recomputation", recompute=FULL),
    _train("training, whole minibatch at once, full recomputation", recompute=FULL, micro_batches=2),
    _train("training, optimizer not sharded", shard_optimizer=False),
    Plan(name="preferences with a reference", algorithm="dpo",
         calls={"*": {"micro_batches": 8}, "actor_train": TRAINING}, sizes={**GIVEN, "group_size": 2, "batch_size": 8}),
    Plan(name="generation", algorithm="grpo", calls={**LARGE, "actor_generate": {}, "actor_train": TRAINING},
         sizes={**SAMPLED, "group_size": 8, "batch_size": 16}),
    Plan(name="generation, optimizer offloaded", algorithm="grpo",
         calls={**LARGE, "actor_generate": {}, "actor_train": {**TRAINING, "offload": True}},
         sizes={**SAMPLED, "group_size": 8, "batch_size": 16}),
    Plan(name="four models, offloaded", algorithm="ppo", sizes=SAMPLED,
         calls={**LARGE, "actor_generate": {}, "reward_infer": {"micro_batches": 4, "offload": True},
                "ref_infer": {"micro_batches": 4, "offload": True},
                "actor_train": {**TRAINING, "offload": True}, "critic_train": {**TRAINING, "offload": True}}),
    Plan(name="reallocation, both copies, two ranks", algorithm="grpo", ranks=2, sizes={**SAMPLED, "group_size": 2},
         calls={**LARGE, "actor_generate": {"degrees": "d1 t2 p1"}, "actor_train": TRAINING}),
)  # fmt: skip


def _case(one: Plan) -> Case:
    def run(setting: Setting) -> Iterator[Row]:
        from cost_models.estimate import cost_plan

        small = {key: SMALL.get(key, value) for key, value in one.sizes.items()}
        sizes = setting.pick(one.sizes, {**small, "batch_size": 16 * one.ranks // small.get("group_size", 1)})
        plan = device_plan(setting, one.algorithm, sizes, one.calls, ranks=one.ranks)
        predicted, iterations = cost_plan(plan).memory.peak_bytes, setting.pick(ITERATIONS, 1)
        folder = setting.output / "memory" / one.name.replace(" ", "-").replace(",", "")
        if one.ranks == 1:
            taken = [take_alone(setting, plan, iterations, folder)]
        else:
            taken = run_world(world_of(setting, one.ranks), take, plan, iterations, folder)
        peak = max(rank.peak_bytes for rank in taken)
        allocated = max(rank.allocated_bytes for rank in taken)
        note = f"predicted {predicted / GIB:.2f} GiB, held {peak / GIB:.2f}, in use at once {allocated / GIB:.2f}"
        error = predicted / peak - 1 if peak else 0.0
        if setting.kind == "cuda":
            yield judged(f"{one.name}: predicted over held - 1", error, "", least=MOST_UNDER, most=MOST_OVER, note=note)
        else:
            yield Row(case=f"{one.name}: resident set", value=peak / GIB, unit="GiB", note=note)

    return Case(one.name, run, needs_s=4.0)


CASES = tuple(_case(one) for one in PLANS)
