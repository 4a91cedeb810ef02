"""Predictions of published quantities: row -> {quantity: prediction in the row's own unit}."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from cost_models.candidates import Candidates
from cost_models.engines.engine import Engine, NamedEngine
from cost_models.terms import Terms
from cost_models.time.calls import call_time
from cost_models.time.generation import Generation, decode_terms, generation_time
from cost_models.time.inference import ForwardPass, forward_terms
from cost_models.time.training import TrainingStep, training_time
from cost_models.validation.published import (
    Row,
    Unpredictable,
    inference_engine_name,
    number,
    ppo_cluster,
    row_dtype,
    row_machine,
    row_spec,
    train_engine_name,
    whole,
)
from cost_models.validation.row_layouts import inference_candidates, train_candidates
from plans.algorithms import ppo
from plans.cluster import ClusterSpec
from plans.lengths import Lengths
from plans.library import load_model
from plans.strategy import ParallelStrategy, Recompute
from plans.workload import Workload

EngineOf = Callable[[str], Engine]
"""The engine that predicts rows of an engine of that name; a fit puts its own in."""


def step_time_s(row: Row, engine_of: EngineOf = NamedEngine) -> float:
    """Seconds of a training step."""
    machine = row_machine(row, engine_of(train_engine_name(row)))
    step = TrainingStep(row_spec(row), number(row, "gbs"), number(row, "seq_len"))
    return float(training_time(machine, step, train_candidates(row, machine.cluster)).total_s[0])


def _generation(row: Row) -> Generation:
    responses = Lengths(round(number(row, "output_len")))
    return Generation(row_spec(row), number(row, "batch"), number(row, "input_len"), responses)


def prefill_ms(row: Row, engine_of: EngineOf = NamedEngine) -> float:
    """Milliseconds to the first token of a batch."""
    machine = row_machine(row, engine_of(inference_engine_name(row)))
    candidates, work = inference_candidates(row, machine.cluster), _generation(row)
    prompts = ForwardPass(work.spec, work.samples, work.prompt_tokens, head_tokens=1.0, scored=False)
    return 1e3 * float(Terms(forward_terms(machine, prompts, candidates, candidates.micro_batches)).total_s[0])


def decode_ms_per_token(row: Row, engine_of: EngineOf = NamedEngine) -> float:
    """Milliseconds of one decode step of the whole batch, mean over the response."""
    machine, work = row_machine(row, engine_of(inference_engine_name(row))), _generation(row)
    if work.responses.longest < 2:
        raise Unpredictable("output_len leaves no decode step")
    terms = decode_terms(machine, work, inference_candidates(row, machine.cluster))
    return 1e3 * float(Terms(terms).total_s[0]) / (work.responses.longest - 1)


def total_latency_ms(row: Row, engine_of: EngineOf = NamedEngine) -> float:
    """Milliseconds of prefill and all decode steps."""
    machine = row_machine(row, engine_of(inference_engine_name(row)))
    return 1e3 * float(
        generation_time(machine, _generation(row), inference_candidates(row, machine.cluster)).total_s[0]
    )


def iteration_s(row: Row, engine_of: EngineOf = NamedEngine) -> float:
    """Seconds of a PPO iteration of `real-heuristic`: six calls in turn on all GPUs, TP in the node, PP over nodes."""
    if row.get("plan") != "real-heuristic":
        raise Unpredictable(f"plan `{row.get('plan')}` is not a known layout")
    if set(row.get("models") or ()) < {"actor", "ref", "critic", "reward"}:
        raise Unpredictable("models must name actor, ref, critic and reward")
    cluster, workload = ppo_cluster(row), _ppo_workload(row)
    _check_heuristic(row, cluster, workload)
    machine = engine_of("real").on(cluster, workload.dtype)
    total = 0.0
    for call in workload.graph.model_calls:
        candidates = Candidates.of([(cluster.whole, heuristic_strategy(call.name, call.model, cluster))])
        total += float(call_time(machine, workload, call.name, candidates).total_s[0])
    return total


def _ppo_workload(row: Row) -> Workload:
    models = {role: load_model(name) for role, name in row["models"].items()}
    models |= {role: models[role].with_value_head() for role in ("critic", "reward")}
    return Workload(
        graph=ppo(),
        models=models,
        batch_size=whole(row, "batch_size"),
        prompt_tokens=whole(row, "prompt_tokens"),
        response_tokens=whole(row, "response_tokens"),
        minibatches=whole(row, "minibatches"),
        dtype=row_dtype(row),
    )


def _check_heuristic(row: Row, cluster: ClusterSpec, workload: Workload) -> None:
    """Raise where a row states other degrees than the heuristic's, or the models have too few layers or heads."""
    for key, value in (("tp", cluster.gpus_per_node), ("pp", cluster.nodes), ("dp", 1)):
        if whole(row, key, value) != value:
            raise Unpredictable(f"{key} is {row[key]}; `real-heuristic` has {value} on these GPUs")
    for role, spec in workload.models.items():
        if spec.layers < cluster.nodes or spec.heads < cluster.gpus_per_node:
            raise Unpredictable(
                f"`real-heuristic` on {cluster.nodes} nodes of {cluster.gpus_per_node} GPUs cuts {role} into more "
                f"parts than its {spec.layers} layers and {spec.heads} heads"
            )


def heuristic_strategy(call: str, role: str, cluster: ClusterSpec) -> ParallelStrategy:
    """ReaL's heuristic for one call: TP = GPUs of a node, PP = nodes, DP 1; sequence parallel but for generation;
    reference and reward offloaded; twice as many micro-batches as stages in training, as many in the other calls."""
    training, nodes = call.endswith("_train"), cluster.nodes
    return ParallelStrategy(
        tp=cluster.gpus_per_node,
        pp=nodes,
        micro_batches=2 * nodes if training else nodes,
        groups=nodes if call == "actor_generate" else 1,
        sequence_parallel=call != "actor_generate",
        recompute=Recompute.FULL if training else Recompute.NONE,
        offload=role in ("ref", "reward"),
    )


class Predictor(Protocol):
    """What predicts one quantity of a row."""

    def __call__(self, row: Row, engine_of: EngineOf = NamedEngine) -> float:
        """The quantity in the row's own unit; raises Unpredictable."""
        ...


PREDICTORS: Mapping[str, Predictor] = {
    "step_time_s": step_time_s,
    "prefill_ms": prefill_ms,
    "decode_ms_per_token": decode_ms_per_token,
    "total_latency_ms": total_latency_ms,
    "iteration_s": iteration_s,
}
"""Quantity of a row's `measured` -> its prediction."""
