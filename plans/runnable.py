"""What this project's runtime runs and what it does not, so that a search, a check and a run say the same.

A plan that keeps `plans.checks` is legal; one that also keeps these rules runs under `realrun`. Other engines run more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from plans.algorithms import ALGORITHMS, Algorithm, pair_size, tensor_kind
from plans.checks import closest_divisor, divisors
from plans.graph import CallKind, DataflowGraph
from plans.layout import Layout
from plans.model import Head, ModelSpec, Position
from plans.plan import ExecutionPlan
from plans.problems import Problem
from plans.rope import DynamicScaling, LongRopeScaling
from plans.workload import VALUE_ROLES, Workload

RUN_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
RUN_FAMILIES = ("", "phi3", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "olmo2")
"""Values of `ModelSpec.family` whose every trait the runtime computes (empty: Llama, Mistral, Mixtral, Qwen)."""
RUN_DTYPES = ("bf16", "fp32")


def run_problems(plan: ExecutionPlan) -> list[Problem]:
    """Why the runtime would refuse a legal plan, in file order; empty for a plan that runs."""
    problems = workload_problems(plan.workload)
    for i, planned in enumerate(plan.calls):
        layout = plan.layout(planned.call)
        for problem in [*layout_problems(layout), *_pairs(plan, planned.call), *_experts(plan, planned.call)]:
            path = ("calls", i, "strategy")
            problems.append(Problem(problem.rule, f"{planned.call}: {problem.message}", problem.hint, path))
    return problems


def run_note(plan: ExecutionPlan) -> str:
    """One line on why the runtime does not run a plan, empty when it does."""
    problems = run_problems(plan)
    if not problems:
        return ""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"this runtime does not run the plan: {problems[0].message}{more}"


def workload_problems(workload: Workload) -> list[Problem]:
    """What of a workload does not run, whatever the layouts: the algorithm, its groups of samples, the type."""
    name = workload.graph.name
    records = [ALGORITHMS[name]] if name in ALGORITHMS else []
    if not records:
        if faults := list(_own_graph(workload.graph)):
            return faults
        records = [ALGORITHMS[call.loss] for call in workload.graph.calls if call.loss in ALGORITHMS]
    problems = [problem for record in records for problem in _groups(record, workload)]
    if workload.dtype not in RUN_DTYPES:
        message = f"dtype {workload.dtype} needs loss scaling, which this runtime does not have"
        problems.append(Problem("dtype", message, f"dtype {' or '.join(RUN_DTYPES)}", ("workload", "dtype")))
    return [*problems, *_scalings(workload)]


_OUTPUTS: Mapping[CallKind, tuple[tuple[str, ...], ...]] = {
    CallKind.GENERATE: (("sequences", "logprobs", "lengths"), ("sequences", "logprobs", "lengths", "routes")),
    CallKind.INFERENCE: (("rewards",), ("values",), ("logprobs",)),
    CallKind.TRAIN_STEP: ((),),
    CallKind.FUNCTION: (("rewards",),),
}
"""What a call may write, as kinds of tensors."""
_NAMES = {"sequences": "sequences", "logprobs": "gen_logprobs", "lengths": "lengths", "rewards": "rewards_x",
          "routes": "routes", "values": "values"}  # fmt: skip


def _own_graph(graph: DataflowGraph) -> Iterator[Problem]:
    """What a graph of the user's own lacks to be trained on responses that it generates."""
    path, online = ("workload", "graph"), [name for name, record in ALGORITHMS.items() if not record.offline]
    if not graph.trainers:
        message = f"nothing trains in the graph `{graph.name}`; the plan can be searched, costed and drawn"
        yield Problem("algorithm", message, "a call of kind train_step with a loss", path)
    for name in graph.trainers.values():
        loss = graph.call(name).loss
        if loss not in online and ":" not in loss:
            said = f"has loss `{loss}`" if loss else "names no loss"
            message = f"`{name}` of the graph `{graph.name}` {said}; without one the plan can be searched and costed"
            yield Problem("loss", message, f"loss: one of {', '.join(online)}, or file.py:function", path)
    for call in graph.calls:
        made, legal = tuple(tensor_kind(key) for key in call.outputs), _OUTPUTS[call.kind]
        if call.kind is CallKind.INFERENCE:
            legal = tuple(kinds for kinds in legal if (kinds != ("logprobs",)) == (call.model in VALUE_ROLES))
        if made not in legal:
            said = ", ".join(call.outputs) or "nothing"
            message = f"`{call.name}` of the graph `{graph.name}` writes {said}, which a {call.kind} call does not make"
            names = " or ".join(", ".join(_NAMES[kind] for kind in kinds) or "no outputs" for kinds in legal)
            yield Problem("outputs", message, f"outputs: {names}", path)
    if not any(call.kind is CallKind.GENERATE for call in graph.calls):
        message = f"the graph `{graph.name}` generates nothing; graphs of one's own train on generated responses"
        yield Problem("algorithm", message, "a call of kind generate, or an algorithm with given responses", path)


def _scalings(workload: Workload) -> Iterator[Problem]:
    """Scalings that depend on the longest sample of a batch would make a sample's numbers depend on its neighbours."""
    for role, spec in workload.models.items():
        scaling = spec.rope_scaling
        if isinstance(scaling, DynamicScaling | LongRopeScaling) and scaling.original_max_position < workload.tokens:
            least, sizes = scaling.original_max_position, f"{workload.prompt_tokens} + {workload.response_tokens}"
            what = f"{scaling.kind} scaling, which runs up to {least} tokens, for samples of {sizes}"
            yield replace(_of_model(spec, what, f"at most {least} tokens in all"), path=("workload", "models", role))


def _groups(record: Algorithm, workload: Workload) -> Iterator[Problem]:
    size, path = workload.group_size, ("workload", "group_size")
    if size < record.least_group:
        message = f"{record.name} compares the samples of one prompt, and the plan's group_size is {size}"
        yield Problem("group", message, f"plan with group_size {record.least_group} or more", path)
    if record.offline and size != len(record.responses):
        given = f"{len(record.responses)} responses per prompt ({', '.join(record.responses)})"
        message = f"{record.name} has {given}, the plan's group_size is {size}"
        yield Problem("group", message, f"plan with group_size {len(record.responses)}", path)


def _pairs(plan: ExecutionPlan, call: str) -> Iterator[Problem]:
    """A minibatch has whole pairs; inside it they are dealt and packed as such."""
    workload, pair = plan.workload, pair_size(plan.workload.graph)
    size = workload.samples_per_step(call)
    if call in workload.graph.trainers.values() and size % pair:
        message = f"minibatches of {size} samples cut pairs of chosen and rejected responses apart"
        yield Problem("pairs", message, "fewer minibatches, so that each has an even number of samples")


def _experts(plan: ExecutionPlan, call: str) -> Iterator[Problem]:
    """What a call with a mixture of experts needs beside a layout that runs."""
    planned, kind = plan.planned(call), plan.workload.graph.call(call).kind
    spec, s = plan.workload.spec(call), planned.strategy
    if not spec.experts:
        return
    if kind is CallKind.TRAIN_STEP and s.tp > 1 and not s.sequence_parallel:
        message = f"training of experts with tp {s.tp} routes every token {s.tp} times without sequence parallelism"
        yield Problem("experts", message, '"sequence_parallel": true')


def layout_problems(layout: Layout) -> list[Problem]:
    """What of an architecture under a layout does not run."""
    return [*spec_problems(layout.spec), *_degree_problems(layout)]


def spec_problems(spec: ModelSpec) -> list[Problem]:
    """What of an architecture does not run under any layout."""
    rules = (
        (
            spec.position is Position.ROPE,
            f"position encoding `{spec.position}`",
            "only rotary positions run: a model of the Llama or Qwen family",
        ),
        (
            spec.family in RUN_FAMILIES,
            f"traits of the family `{spec.family}` that this runtime does not compute",
            "it can be planned; models of the Llama, Mistral, Mixtral, Qwen, Phi, Gemma, OLMo 2 and GLM-4 families run",
        ),
        (spec.activation in RUN_ACTIVATIONS, f"activation `{spec.activation}`", f"one of {', '.join(RUN_ACTIVATIONS)}"),
        (spec.norms_per_layer in (2, 4), f"{spec.norms_per_layer} norms per layer", "a model with 2 or 4 of them"),
        (not (spec.experts and spec.norms_after), "norms behind experts", "a dense model, or norms before alone"),
        (spec.expert_layers in (0, spec.layers), "layers without experts among others", "experts in every layer"),
        (
            spec.shared_gate or not spec.shared_ffn,
            "a shared expert without a gate",
            "shared_gate true, as in Qwen2-MoE",
        ),
        (not spec.kv_rank, "latent attention", "it can be planned; a model with keys of its own runs"),
        (not spec.sinks, "attention sinks", "it can be planned; a model without them runs"),
        (
            not (spec.tied_embeddings and spec.head is Head.VALUE),
            "a value head tied to its embedding",
            "tied_embeddings false: a value head has weights of its own",
        ),
    )
    return [_of_model(spec, what, hint) for runs, what, hint in rules if not runs]


def _degree_problems(layout: Layout) -> list[Problem]:
    spec, stages = layout.spec, layout.pp * layout.vpp
    rules = (
        (
            spec.kv_heads % layout.tp == 0,
            f"kv_heads {spec.kv_heads}, not a multiple of tp {layout.tp}",
            f"tp one of {divisors(spec.kv_heads)}",
        ),
        (
            spec.experts % layout.ep == 0,
            f"{spec.experts} experts, not a multiple of ep {layout.ep}",
            f"ep {closest_divisor(max(spec.experts, 1), layout.ep)}",
        ),
        (
            spec.layers % stages == 0 if layout.vpp > 1 else layout.pp <= spec.layers,
            f"{spec.layers} layers, which pp {layout.pp} x vpp {layout.vpp} cannot share",
            f"pp x vpp {closest_divisor(spec.layers, stages)}",
        ),
        (layout.vpp == 1 or layout.pp > 1, f"vpp {layout.vpp} without a pipeline", "leave out `v`"),
    )
    return [_of_model(spec, what, hint) for runs, what, hint in rules if not runs]


def _of_model(spec: ModelSpec, what: str, hint: str) -> Problem:
    return Problem("runtime", f"model `{spec.name}` has {what}", hint)
