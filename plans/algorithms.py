"""The algorithms, one record each: its graph, the data it reads, its groups of samples. A graph holds no sizes: those
are the workload's. Losses and advantages are the runtime's, under the same names.

`sequences` are prompt + response tokens; log-probs, values and rewards are per sample or response token. `lengths` are
the tokens of prompt and response of all samples: they go first to every rank that deals samples by them. `routes` are
the experts that generation chose (`plans.routes`).
`pairs` are chosen and rejected responses (two samples per prompt), `examples` are prompt + answer tokens. Names that
end in `_greedy` are of the greedy response to the same prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from plans.errors import SpecError, nearest
from plans.graph import Call, CallKind, DataflowGraph

GREEDY = "_greedy"
ACTOR, REFERENCE = "actor", "ref"
GEN, INF, TRAIN, FN = CallKind.GENERATE, CallKind.INFERENCE, CallKind.TRAIN_STEP, CallKind.FUNCTION


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """What a user may choose of an algorithm. reward_seconds_per_sample: the reward is a Python function of this cost,
    not a model. recompute_logprobs: old log-probs come from a forward pass of their own, as in verl, and the training
    of the actor reads those of the generation too, which tell how far both are apart. router_replay: forward passes of
    the actor send every token to the experts that generation chose; the reference, whose weights are others, chooses
    its own, as in verl and NeMo RL."""

    reward_seconds_per_sample: float | None = None
    recompute_logprobs: bool = False
    router_replay: bool = False


PLAIN = Variant()


def _generate(variant: Variant) -> Call:
    outputs = ("sequences", "gen_logprobs", "lengths", *_routes(variant))
    return Call(name="actor_generate", kind=GEN, model="actor", inputs=("prompts",), outputs=outputs)


def _greedy() -> Call:
    outputs = (f"sequences{GREEDY}", f"gen_logprobs{GREEDY}", f"lengths{GREEDY}")
    return Call(name="actor_greedy", kind=GEN, model="actor", inputs=("prompts",), outputs=outputs)


def _routes(variant: Variant) -> tuple[str, ...]:
    return ("routes",) if variant.router_replay else ()


def _reward(variant: Variant, suffix: str = "") -> Call:
    """A reward model, or with a cost per sample a Python function."""
    reads, writes = (f"sequences{suffix}",), (f"rewards{suffix}",)
    seconds = variant.reward_seconds_per_sample
    if seconds is None:
        return Call(name=f"reward_infer{suffix}", kind=INF, model="reward", inputs=reads, outputs=writes)
    return Call(name=f"reward{suffix}", kind=FN, inputs=reads, outputs=writes, seconds_per_sample=seconds)


def _ref() -> Call:
    return Call(name="ref_infer", kind=INF, model="ref", inputs=("sequences",), outputs=("ref_logprobs",))


def _old_logprobs(variant: Variant) -> tuple[str, tuple[Call, ...], tuple[str, ...]]:
    """The old log-probs, the calls that make them, and what the training of the actor reads beside them."""
    routes = _routes(variant)
    if not variant.recompute_logprobs:
        return "gen_logprobs", (), routes
    reads = ("sequences", *routes)
    call = Call(name="actor_infer", kind=INF, model="actor", inputs=reads, outputs=("old_logprobs",))
    return "old_logprobs", (call,), ("gen_logprobs", *routes)


def ppo(variant: Variant = PLAIN) -> DataflowGraph:
    """PPO with a critic (Ouyang et al. 2022): six calls, seven with recomputed old log-probs."""
    old, extra, beside = _old_logprobs(variant)
    scores = ("sequences", old, "ref_logprobs", "values", "rewards")
    critic = Call(name="critic_infer", kind=INF, model="critic", inputs=("sequences",), outputs=("values",))
    trains = (
        Call(name="actor_train", kind=TRAIN, model="actor", inputs=(*scores, *beside)),
        Call(name="critic_train", kind=TRAIN, model="critic", inputs=scores),
    )
    return DataflowGraph(name="ppo", calls=(_generate(variant), _reward(variant), _ref(), critic, *extra, *trains))


def _critic_free(
    name: str, variant: Variant, baseline: Iterable[Call] = (), keys: tuple[str, ...] = ()
) -> DataflowGraph:
    old, extra, beside = _old_logprobs(variant)
    scores = ("sequences", old, "ref_logprobs", "rewards", *keys, *beside)
    train = Call(name="actor_train", kind=TRAIN, model="actor", inputs=scores)
    return DataflowGraph(name=name, calls=(_generate(variant), *baseline, _reward(variant), _ref(), *extra, train))


def grpo(variant: Variant) -> DataflowGraph:
    """GRPO (Shao et al. 2024): the group's mean reward is the baseline; no critic."""
    return _critic_free("grpo", variant)


def rloo(variant: Variant) -> DataflowGraph:
    """RLOO (Ahmadian et al. 2024): the mean reward of the group's other samples is the baseline."""
    return _critic_free("rloo", variant)


def reinforce_pp(variant: Variant) -> DataflowGraph:
    """REINFORCE++ (Hu 2025): the batch's mean reward is the baseline."""
    return _critic_free("reinforce++", variant)


def remax(variant: Variant) -> DataflowGraph:
    """ReMax (Li et al. 2024): the reward of a greedy response to the same prompt is the baseline."""
    return _critic_free("remax", variant, (_greedy(), _reward(variant, GREEDY)), (f"rewards{GREEDY}",))


def dpo(variant: Variant) -> DataflowGraph:
    """DPO (Rafailov et al. 2023): reference log-probs of pairs, then one training call."""
    ref = Call(name="ref_infer", kind=INF, model="ref", inputs=("pairs",), outputs=("ref_logprobs",))
    train = Call(name="actor_train", kind=TRAIN, model="actor", inputs=("pairs", "ref_logprobs"))
    return DataflowGraph(name="dpo", calls=(ref, train), sources=("pairs",))


def sft(variant: Variant) -> DataflowGraph:
    """Supervised fine-tuning: one training call."""
    train = Call(name="actor_train", kind=TRAIN, model="actor", inputs=("examples",))
    return DataflowGraph(name="sft", calls=(train,), sources=("examples",))


def reward_modelling(variant: Variant) -> DataflowGraph:
    """Training of a reward model on pairs (Bradley-Terry)."""
    train = Call(name="reward_train", kind=TRAIN, model="reward", inputs=("pairs",))
    return DataflowGraph(name="reward-modelling", calls=(train,), sources=("pairs",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """What every part of the project knows of an algorithm.

    meaning: in a few words. graph: its calls. responses: the columns of the data that hold the responses to a prompt,
    empty where responses are generated. group_size: samples per prompt where the user says nothing; least_group: the
    fewest that it can learn from. kl_in_loss: the KL to the reference is a term of the loss and not of the reward.
    """

    name: str
    meaning: str
    graph: Callable[[Variant], DataflowGraph]
    responses: tuple[str, ...] = ()
    group_size: int = 1
    least_group: int = 1
    kl_in_loss: bool = False

    @property
    def offline(self) -> bool:
        """Whether it learns from given responses."""
        return bool(self.responses)

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the data that it reads."""
        return ("prompt", *self.responses)


_PAIR = ("chosen", "rejected")
ALGORITHMS: Mapping[str, Algorithm] = {
    record.name: record
    for record in (
        Algorithm(name="ppo", meaning="a critic's advantages", graph=ppo),
        Algorithm(
            name="grpo",
            meaning="distance to the group's mean reward",
            graph=grpo,
            group_size=8,
            least_group=2,
            kl_in_loss=True,
        ),
        Algorithm(name="rloo", meaning="reward against the rest of the group", graph=rloo, group_size=8, least_group=2),
        Algorithm(name="remax", meaning="reward against a greedy response", graph=remax),
        Algorithm(name="reinforce++", meaning="rewards normalised over the batch", graph=reinforce_pp),
        Algorithm(name="dpo", meaning="preferences between pairs", graph=dpo, responses=_PAIR, group_size=2),
        Algorithm(name="sft", meaning="cross-entropy of given responses", graph=sft, responses=("response",)),
        Algorithm(
            name="reward-modelling",
            meaning="a reward model of pairs",
            graph=reward_modelling,
            responses=_PAIR,
            group_size=2,
        ),
    )
}
"""Name -> record of every algorithm that has a name."""


def algorithm_named(name: str) -> Algorithm:
    """The record of a named algorithm."""
    if name not in ALGORITHMS:
        raise SpecError(f"unknown algorithm `{name}`", nearest(name, list(ALGORITHMS)))
    return ALGORITHMS[name]


def tensor_kind(key: str) -> str:
    """What a tensor of a graph is, by the beginning of its name: `sequences` (tokens), `lengths` (of all samples),
    `rewards` (a number per sample), `routes` (experts of each token), `values` or else `logprobs` (a number per
    response token)."""
    kinds = ("sequences", "lengths", "rewards", "routes", "values")
    return next((kind for kind in kinds if key == kind or key.startswith(f"{kind}_")), "logprobs")


def loss_of(graph: DataflowGraph, call: Call) -> str:
    """What a training call minimises: the name of an algorithm or `file.py:function`; empty where a graph of the user's
    own does not say."""
    return call.loss or (graph.name if graph.name in ALGORITHMS else "")


def is_offline(graph: DataflowGraph) -> bool:
    """Whether responses are given; a graph of the user's own that trains generates them."""
    record = ALGORITHMS.get(graph.name)
    return record is not None and record.offline


def pair_size(graph: DataflowGraph) -> int:
    """Samples that a training call of a graph must keep together in a micro-batch: 2 for pairs."""
    record = ALGORITHMS.get(graph.name)
    return len(record.responses) if record and record.offline else 1


def algorithm_graph(
    name: str,
    *,
    reward_seconds_per_sample: float | None = None,
    recompute_logprobs: bool = False,
    router_replay: bool = False,
    staleness: int = 0,
) -> DataflowGraph:
    """The graph of a named algorithm in a variant; generation runs `staleness` iterations ahead. Raises SpecError for
    an unknown name, and for router replay where nothing is generated."""
    record = algorithm_named(name)
    if router_replay and record.offline:
        raise SpecError(f"router replay: {name} generates nothing whose routes could be replayed", "leave it out")
    variant = Variant(
        reward_seconds_per_sample=reward_seconds_per_sample,
        recompute_logprobs=recompute_logprobs,
        router_replay=router_replay,
    )
    return replace(record.graph(variant), staleness=staleness)
