"""Plan files to and from ExecutionPlan: exact round trip, terse, one line per call, every mistake located.

Reading goes text -> JSON -> `PlanFile` (shape) -> domain objects (values) -> `plans.checks` (rules). Each stage
collects all of its problems before the next one starts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from plans.algorithms import ALGORITHMS, algorithm_graph
from plans.cluster import ClusterSpec, GpuSpec, parse_mesh
from plans.documents import BadText, locate, parse_json, read_text
from plans.errors import PlanError, RealplanError, nearest
from plans.files import write_atomically
from plans.graph import DataflowGraph
from plans.graphfile import file_of, graph_of, own_graph_problems
from plans.lengths import keys_of, percentiles_of
from plans.library import load_gpu, load_model, model_names
from plans.lora import Lora
from plans.model import Head, ModelSpec, Norm, Position
from plans.plan import Estimate, ExecutionPlan, PlannedCall
from plans.planfile import FORMAT, CallFile, ClusterFile, LoraFile, ModelFile, PlanFile, WorkloadFile
from plans.problems import Path_, Problem, blank_comments
from plans.rope import scaling_of, values_of
from plans.routes import check_routes, replays_routes
from plans.shapes import shape_problems
from plans.strategy import KEYS, SETTINGS, ParallelStrategy, parse_degrees
from plans.workload import Workload, role_spec, with_lora

LENGTHS = ("prompt_lengths", "response_lengths")
T = TypeVar("T")


class BadPlan(PlanError):
    """A plan file with problems; `problems` are located."""

    def __init__(self, file: str, problems: list[Problem]) -> None:
        super().__init__("\n".join(problem.text(file) for problem in problems))
        self.file, self.problems = file, problems

    def __reduce__(self) -> tuple[type[BadPlan], tuple[str, list[Problem]]]:
        return BadPlan, (self.file, self.problems)


def load_plan(path: Path) -> ExecutionPlan:
    """Read a plan file; raises BadPlan with every problem of shape and value. Rules are `plans.checks.check_plan`."""
    plan, problems = read_plan(plan_text(path))
    if plan is None:
        raise BadPlan(str(path), problems)
    return plan


def plan_text(path: Path) -> str:
    """The text of a plan file; raises PlanError when it cannot be read."""
    return read_text(path, PlanError, "plan", "`realplan search` writes a plan")


def read_plan(text: str) -> tuple[ExecutionPlan | None, list[Problem]]:
    """A plan from the text of a file, or the located problems of its shape and values."""
    try:
        data = parse_json(blank_comments(text))
    except BadText as error:
        return None, [error.problem]
    try:
        file = PlanFile.model_validate(data)
    except ValidationError as error:
        return None, locate(text, shape_problems(PlanFile, data, error, "the plan"))
    reader = _Reader()
    plan = reader.plan(file)
    return (None, locate(text, reader.problems)) if reader.problems else (plan, [])


class _Reader:
    """Builds domain objects and notes every value that cannot be one."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def attempt(self, rule: str, path: Path_, build: Callable[[], T]) -> T | None:
        try:
            return build()
        except RealplanError as error:
            self.problems.append(Problem(rule, error.message, error.hint, path))
            return None

    def plan(self, file: PlanFile) -> ExecutionPlan | None:
        workload = self.workload(file.workload)
        cluster = self.attempt("cluster", ("cluster", "gpu"), lambda: _cluster(file.cluster))
        if workload is None or cluster is None:
            return None
        calls = [self.call(call, ("calls", i), cluster, workload) for i, call in enumerate(file.calls)]
        planned = tuple(call for call in calls if call is not None)
        names = [call.call for call in planned]
        first = {name: i for i, name in reversed(list(enumerate(names)))}
        for i, name in enumerate(names):
            if first[name] < i:
                self.problems.append(Problem("call-twice", f"call `{name}` stands twice", "delete one", ("calls", i)))
        for call in workload.graph.model_calls:
            if not self.problems and call.name not in [entry.call for entry in file.calls]:
                hint = f'add a line {{"call": "{call.name}", "mesh": ..., "strategy": ...}}'
                self.problems.append(Problem("call-missing", f"the plan lacks call `{call.name}`", hint, ("calls",)))
        if self.problems:
            return None
        estimate = Estimate(**file.estimate.model_dump()) if file.estimate else None
        return ExecutionPlan(
            workload=workload,
            cluster=cluster,
            calls=planned,
            estimate=estimate,
            provenance=file.provenance,
            run=file.run,
            notes=file.notes,
        )

    def workload(self, file: WorkloadFile) -> Workload | None:
        function_reward = file.reward_seconds_per_sample is not None
        graph = self.graph(file)
        if graph is None:
            return None
        models = {}
        for role, model in file.models.items():
            path = ("workload", "models", role)
            if role not in graph.roles:
                hint = nearest(role, graph.roles)
                if role == "reward" and function_reward:
                    hint = "delete it, or delete reward_seconds_per_sample"
                self.problems.append(Problem("role", f"graph `{graph.name}` has no role `{role}`", hint, path))
            spec = self.attempt("model", path, lambda model=model: _model(model))  # type: ignore[misc]
            if spec is not None:
                models[role] = role_spec(role, spec)
        for role in graph.roles:
            if role not in file.models:
                hint = f'add "{role}": one of {", ".join(model_names()[:4])}, ...'
                self.problems.append(Problem("role-missing", f"no model for `{role}`", hint, ("workload", "models")))
        if self.problems:
            return None
        lengths = self.lengths(file)
        if self.problems:
            return None
        self.attempt(
            "routes",
            ("workload", "graph" if file.graph else "router_replay"),
            lambda: check_routes(graph, models),
        )
        adapted = self.attempt("lora", ("workload", "lora"), lambda: with_lora(graph, models, lora_of(file.lora)))
        if adapted is None or self.problems:
            return None
        apart = ("graph", "models", *LENGTHS)
        sizes = {f.name: getattr(file, f.name) for f in fields(Workload) if f.name not in apart}
        return self.attempt(
            "workload",
            ("workload", "minibatches"),
            lambda: Workload(graph=graph, models=adapted, **sizes, **lengths),
        )

    def lengths(self, file: WorkloadFile) -> dict[str, Any]:
        return {
            key: self.attempt(
                "lengths",
                ("workload", key),
                lambda key=key: percentiles_of(getattr(file, key)),  # type: ignore[misc]
            )
            for key in LENGTHS
        }

    def graph(self, file: WorkloadFile) -> DataflowGraph | None:
        if file.graph:
            own = file.graph
            faults = own_graph_problems(own)
            if file.router_replay:
                hint = "`routes` among the outputs of its generate call and the inputs of the calls that replay them"
                message = "a graph of one's own says itself who replays routes"
                self.problems.append(Problem("routes", message, hint, ("workload", "router_replay")))
                return None
            if faults:
                self.problems += [fault.at(("workload", "graph")) for fault in faults]
                return None
            return self.attempt("graph", ("workload", "graph"), lambda: graph_of(own, file.staleness))
        offline = file.algorithm in ALGORITHMS and ALGORITHMS[file.algorithm].offline
        return self.attempt(
            "algorithm",
            ("workload", "router_replay" if file.router_replay and offline else "algorithm"),
            lambda: algorithm_graph(
                file.algorithm,
                recompute_logprobs=file.recompute_logprobs,
                router_replay=file.router_replay,
                reward_seconds_per_sample=file.reward_seconds_per_sample,
                staleness=file.staleness,
            ),
        )

    def call(self, file: CallFile, path: Path_, cluster: ClusterSpec, workload: Workload) -> PlannedCall | None:
        names = [call.name for call in workload.graph.model_calls]
        if file.call not in names:
            message = f"graph `{workload.graph.name}` has no call `{file.call}`"
            self.problems.append(Problem("call", message, nearest(file.call, names), (*path, "call")))
        mesh = self.attempt("mesh", (*path, "mesh"), lambda: parse_mesh(file.mesh, cluster))
        settings: dict[str, Any] = {name: SETTINGS[name].type(getattr(file, name)) for name in KEYS}
        strategy = self.attempt(
            "strategy", (*path, "strategy"), lambda: ParallelStrategy(**{**settings, **parse_degrees(file.strategy)})
        )
        if mesh is None or strategy is None:
            return None
        return PlannedCall(call=file.call, mesh=mesh, strategy=strategy, lag=file.lag)


def lora_of(file: LoraFile | None) -> Lora | None:
    """Adapters from their keys in a file; raises SpecError."""
    return None if file is None else Lora(file.rank, file.alpha, tuple(file.targets))


def _lora_file(lora: Lora | None) -> LoraFile | None:
    return None if lora is None else LoraFile(rank=lora.rank, alpha=lora.alpha, targets=list(lora.targets))  # type: ignore[arg-type]


def _model(model: str | ModelFile) -> ModelSpec:
    if isinstance(model, str):
        return load_model(model)
    data = model.model_dump(exclude={"rope_scaling"})
    scaling = scaling_of(model.rope_scaling.model_dump(exclude_unset=True)) if model.rope_scaling else None
    data |= {"norm": Norm(data["norm"]), "position": Position(data["position"])}
    return ModelSpec(rope_scaling=scaling, **data)


def _cluster(file: ClusterFile) -> ClusterSpec:
    gpu = load_gpu(file.gpu) if isinstance(file.gpu, str) else GpuSpec(**file.gpu.model_dump())
    return ClusterSpec(**{**file.model_dump(), "gpu": gpu})


def save_plan(plan: ExecutionPlan, path: Path) -> None:
    """Write a plan file atomically."""
    write_atomically(path, dump_plan(plan))


def dump_plan(plan: ExecutionPlan) -> str:
    """The text of a plan file: stable order, defaults left out, one line per call."""
    parts = [f'"format": {json.dumps(FORMAT)}']
    if plan.notes:
        parts.append(f'"notes": {json.dumps(plan.notes)}')
    if plan.run:
        parts.append(f'"run": {json.dumps(plan.run)}')
    core = _core(plan)
    workload = dict(core["workload"])
    models = workload.pop("models")
    head = json.dumps(workload)[:-1]
    parts.append(f'"workload": {head},\n    "models": {json.dumps(models)}}}')
    parts.append(f'"cluster": {json.dumps(core["cluster"])}')
    calls = ",\n".join(f"    {json.dumps(call)}" for call in core["calls"])
    parts.append(f'"calls": [\n{calls}\n  ]')
    if plan.estimate:
        parts.append(f'"estimate": {json.dumps(asdict(plan.estimate))}')
    if plan.provenance:
        parts.append(f'"provenance": {json.dumps(plan.provenance)}')
    return "{\n  " + ",\n  ".join(parts) + "\n}\n"


def sealed(plan: ExecutionPlan, estimate: Estimate) -> Estimate:
    """An estimate of a plan with the digest that holds both together."""
    return replace(estimate, of=digest(plan, estimate))


def is_stale(plan: ExecutionPlan) -> bool:
    """Whether a plan's estimate was computed from another plan, or its figures were edited."""
    # A digest of the plan alone is how older files have it.
    return plan.estimate is not None and plan.estimate.of not in (digest(plan, plan.estimate), digest(plan))


def digest(plan: ExecutionPlan, estimate: Estimate | None = None) -> str:
    """Digest of all that an estimate depends on, and of its figures where it is given."""
    figures = {name: value for name, value in asdict(estimate).items() if name != "of"} if estimate else {}
    text = json.dumps({**_core(plan), "estimate": figures} if figures else _core(plan), sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()[:16]


def _core(plan: ExecutionPlan) -> dict[str, Any]:
    return {
        "workload": _workload_file(plan.workload),
        "cluster": _cluster_file(plan.cluster),
        "calls": [_call_file(call, plan) for call in plan.calls],
    }


def _workload_file(workload: Workload) -> dict[str, Any]:
    graph = workload.graph
    own = file_of(graph)
    lengths: dict[str, Any] = {key: keys_of(getattr(workload, key)) for key in LENGTHS}
    costs = [call.seconds_per_sample for call in graph.calls if not call.model and not own]
    file = WorkloadFile(
        algorithm=graph.name,
        graph=own,
        staleness=graph.staleness,
        recompute_logprobs=not own and any(call.name == "actor_infer" for call in graph.calls),
        router_replay=not own and replays_routes(graph),
        reward_seconds_per_sample=costs[0] if costs else None,
        models={},
        lora=_lora_file(workload.lora),
        **lengths,
        **{f.name: getattr(workload, f.name) for f in fields(Workload) if f.name not in ("graph", "models", *LENGTHS)},
    )
    keep = {"algorithm", "batch_size", "prompt_tokens", "response_tokens", "minibatches"}
    data = {k: v for k, v in file.model_dump().items() if k in keep or v != WorkloadFile.model_fields[k].default}
    return {**data, "models": {role: _model_file(workload.models[role]) for role in graph.roles}}


def _model_file(spec: ModelSpec) -> str | dict[str, Any]:
    """The library name when the library means the same architecture, else the architecture; adapters aside."""
    spec = spec.base
    if spec.name in model_names():
        named = load_model(spec.name)
        if spec in (named, named.with_value_head()):
            return spec.name
    data = asdict(spec) | {"rope_scaling": values_of(spec.rope_scaling) if spec.rope_scaling else None}
    tied = spec.head is Head.LM and spec.tied_embeddings
    del data["head"], data["lora"]
    defaults = {name: field.default for name, field in ModelFile.model_fields.items()}
    return {k: v for k, v in {**data, "tied_embeddings": tied}.items() if v != defaults.get(k)}


def _cluster_file(cluster: ClusterSpec) -> dict[str, Any]:
    try:
        named = load_gpu(cluster.gpu.name) == cluster.gpu
    except RealplanError:
        named = False
    data = asdict(cluster)
    return {**data, "gpu": cluster.gpu.name if named else asdict(cluster.gpu)}


def _call_file(planned: PlannedCall, plan: ExecutionPlan) -> dict[str, Any]:
    data: dict[str, Any] = {
        "call": planned.call,
        "mesh": planned.mesh.text(plan.cluster),
        "strategy": planned.strategy.degrees,
    }
    for name in KEYS:
        value = getattr(planned.strategy, name)
        if value != SETTINGS[name].default:
            data[name] = value
    return {**data, "lag": planned.lag} if planned.lag else data
