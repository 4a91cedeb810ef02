"""The layouts of the cost ledger, and what the cost models say about each: seconds and bytes by term.

The ledger is a seismograph: it says that a number moved, never that it is right. What is right stands in
the tests that reckon by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from plan_cases import FIXTURES

from cost_models.calibration.profiled import profiled_engine
from cost_models.candidates import Candidates
from cost_models.engines.engine import MEGATRON, Engine, NamedEngine
from cost_models.memory.memory import call_memory
from cost_models.reallocation import reallocation_time
from cost_models.time.calls import call_time
from plans.algorithms import algorithm_graph
from plans.cluster import ClusterSpec, parse_mesh
from plans.layout import Layout
from plans.library import load_cluster, load_model
from plans.lora import Lora
from plans.strategy import ParallelStrategy, Recompute, parse_degrees
from plans.workload import Workload, with_lora

TABLE = FIXTURES / "costs" / "llama2-7b-h100.json"
"""A cost table of a made-up machine, as `realplan profile` writes it."""
VALUE_CALLS = ("critic_train", "critic_infer", "reward_infer")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call of PPO under one layout. `settings` are those of the strategy beside its degrees."""

    call: str
    degrees: str
    model: str = "llama2-7b"
    engine: str = "megatron"
    gpu: str = "h100-80gb-sxm"
    mesh: str = "node 0"
    gpus: int = 8
    lora: int = 0
    dtype: str = "bf16"
    settings: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)


def train(degrees: str, **more: Any) -> Case:
    """A training call of the actor."""
    fields = {key: more.pop(key) for key in list(more) if key in Case.__dataclass_fields__}
    settings = {"micro_batches": 4, "recompute": Recompute.NONE, "sequence_parallel": "t1" not in degrees} | more
    return Case(**({"call": "actor_train", "degrees": degrees, "settings": settings} | fields))


def infer(degrees: str, **more: Any) -> Case:
    """A scoring call of the reference."""
    fields = {key: more.pop(key) for key in list(more) if key in Case.__dataclass_fields__}
    settings = {"micro_batches": 4, "sequence_parallel": "t1" not in degrees} | more
    return Case(**({"call": "ref_infer", "degrees": degrees, "settings": settings} | fields))


def generate(degrees: str, **more: Any) -> Case:
    """A generation call of the actor."""
    fields = {key: more.pop(key) for key in list(more) if key in Case.__dataclass_fields__}
    return Case(**({"call": "actor_generate", "degrees": degrees, "settings": more} | fields))


TWO, FOUR = {"mesh": "nodes 0-1", "gpus": 16}, {"mesh": "nodes 0-3", "gpus": 32}
MOE, SHARED = {"model": "qwen3-30b-a3b"}, {"model": "qwen2-57b-a14b"}
A100, B200 = {"gpu": "a100-80gb"}, {"gpu": "b200-180gb"}
LONG = {"sizes": {"batch_size": 64, "prompt_tokens": 8192, "response_tokens": 8192}}
TAIL = {"sizes": {"response_tokens": 4096, "mean_response_tokens": 700}}

CASES: Mapping[str, Case] = {
    "train/dp": train("d8 t1 p1"),
    "train/dp over nodes, optimizer whole": train("d16 t1 p1", shard_optimizer=False, **TWO),
    "train/long tail": train("d4 t2 p1", **TAIL),
    "train/long tail, packs of tokens": train("d2 t2 p2", micro_batches=1, micro_batch_tokens=16384, **TAIL),
    "train/tp and sequence parallel": train("d1 t8 p1"),
    "train/tp alone": train("d2 t4 p1", sequence_parallel=False),
    "train/tp of a grouped-query model": train("d1 t8 p4", model="llama2-70b", **FOUR),
    "train/pp": train("d1 t4 p4", micro_batches=8, **TWO),
    "train/pp of uneven stages": train("d1 t8 p4", model="llama3.1-405b", micro_batches=16, **FOUR),
    "train/interleaved": train("d2 t4 p2 v4", micro_batches=8, **TWO),
    "train/cp inside a node": train("d1 t2 p1 c4", **LONG),
    "train/cp over nodes": train("d2 t4 p1 c4", **FOUR, **LONG),
    "train/selective recomputation": train("d2 t4 p1", recompute=Recompute.SELECTIVE),
    "train/full recomputation": train("d2 t4 p1", recompute=Recompute.FULL),
    "train/full recomputation, host bound": train("d8 t1 p1", model="qwen2.5-0.5b", recompute=Recompute.FULL),
    "train/value head": train("d2 t2 p2", call="critic_train"),
    "train/tied embeddings, pp": train("d2 t2 p2", model="llama3.2-1b"),
    "train/tied embeddings, pp over nodes": train("d2 t4 p2", model="qwen2.5-3b", **TWO),
    "train/offload": train("d2 t4 p1", offload=True),
    "train/offload, optimizer whole": train("d2 t4 p1", offload=True, shard_optimizer=False),
    "train/experts": train("d8 t1 p1 e8", **MOE),
    "train/experts over nodes": train("d16 t1 p2 e16", **FOUR, **MOE),
    "train/experts and a shared one, tp": train("d4 t2 p1 e4", **SHARED),
    "train/layer norm, learned positions": train("d2 t4 p1", model="gpt3-6.7b"),
    "train/fp32": train("d2 t4 p1", dtype="fp32"),
    "train/fp32, offload": train("d2 t4 p1", dtype="fp32", offload=True),
    "train/a100": train("d2 t4 p2", **A100, **TWO),
    "train/b200": train("d1 t8 p1", model="llama2-70b", **B200),
    "train/h800, links of its own": train("d1 t8 p1", gpu="h800-80gb"),
    "train/gpu without a table": train("d2 t4 p1", gpu="rtx-4090"),
    "train/cpu": train("d2 t2 p1", model="smollm2-135m", gpu="local-cpu", gpus=4, dtype="fp32"),
    "train/megatron-te": train("d2 t4 p2", engine="megatron-te", **TWO),
    "train/megatron-te, a100, full recomputation": train(
        "d2 t4 p1", engine="megatron-te", recompute=Recompute.FULL, **A100
    ),
    "train/megatron-unfused": train("d1 t8 p2", engine="megatron-unfused", **A100, **TWO),
    "train/megatron-unfused, selective": train("d2 t4 p1", engine="megatron-unfused", recompute=Recompute.SELECTIVE),
    "train/megatron-deepspeed": train("d2 t4 p2", engine="megatron-deepspeed", **A100, **TWO),
    "train/zero 3": train("d16 t1 p1", engine="fsdp", **TWO),
    "train/zero 3 and tp": train("d4 t4 p1", engine="fsdp", model="llama2-70b", **A100, **TWO),
    "train/zero 3, full recomputation": train("d8 t1 p1", engine="fsdp", recompute=Recompute.FULL, micro_batches=16),
    "train/real": train("d1 t8 p2", engine="real", recompute=Recompute.FULL, **A100, **TWO),
    "train/profiled": train("d2 t4 p1", engine="table"),
    "infer/dp": infer("d8 t1 p1"),
    "infer/long tail": infer("d4 t2 p1", **TAIL),
    "infer/tp, offload": infer("d2 t4 p1", offload=True),
    "infer/tp without sequence parallel": infer("d2 t4 p1", sequence_parallel=False),
    "infer/pp over nodes": infer("d1 t8 p2", **TWO),
    "infer/cp": infer("d1 t2 p1 c4", **LONG),
    "infer/reward model": infer("d2 t2 p2", call="reward_infer"),
    "infer/experts": infer("d8 t1 p1 e8", **MOE),
    "infer/experts and a shared one, tp": infer("d4 t2 p1 e4", **SHARED),
    "infer/host bound": infer("d8 t1 p1", model="qwen2.5-0.5b", micro_batches=64),
    "infer/fp32": infer("d2 t4 p1", dtype="fp32"),
    "infer/zero 3": infer("d16 t1 p1", engine="fsdp", **TWO),
    "infer/zero 3 and tp": infer("d4 t4 p1", engine="fsdp", **TWO),
    "infer/eager": infer("d2 t4 p1", engine="eager", **A100),
    "infer/profiled": infer("d2 t4 p1", engine="table"),
    "generate/dp": generate("d8 t1 p1"),
    "generate/tp": generate("d1 t8 p1"),
    "generate/tp of a grouped-query model, waves": generate("d4 t4 p1", model="llama2-70b", waves=2, **TWO),
    "generate/pp, a group per stage": generate("d1 t4 p4", groups=4, **TWO),
    "generate/pp, fewer groups than stages": generate("d1 t4 p4", groups=2, **TWO),
    "generate/pp, more groups than stages, waves": generate("d2 t4 p2", groups=4, waves=2, **TWO),
    "generate/uneven stages": generate("d1 t8 p4", model="llama3.1-405b", groups=4, **FOUR),
    "generate/prefill in micro-batches": generate("d8 t1 p1", micro_batches=8),
    "generate/long tail": generate("d4 t2 p1", **TAIL),
    "generate/long tail, slots": generate("d4 t2 p1", slots=32, **TAIL),
    "generate/long tail, a cache that grows": generate("d4 t2 p1", engine="cuda-graphs", slots=32, **A100, **TAIL),
    "generate/groups of samples": generate("d4 t2 p1", sizes={"batch_size": 64, "group_size": 8}),
    "generate/experts": generate("d8 t1 p1 e8", **MOE),
    "generate/experts and a shared one, tp": generate("d4 t2 p1 e4", **SHARED),
    "generate/more ranks than key-value heads": generate("d1 t8 p1", model="qwen2.5-1.5b"),
    "generate/fp32": generate("d4 t2 p1", dtype="fp32"),
    "generate/l40s": generate("d4 t2 p1", gpu="l40s", sizes={"batch_size": 64}),
    "generate/cpu": generate("d2 t2 p1", model="smollm2-135m", gpu="local-cpu", gpus=4, dtype="fp32"),
    "generate/eager": generate("d4 t2 p1", engine="eager", **A100),
    "generate/cuda-graphs": generate("d4 t2 p1", engine="cuda-graphs", **A100),
    "generate/native, pp": generate("d1 t4 p4", engine="native", groups=4, **A100, **TWO),
    "generate/trt-llm": generate("d4 t2 p1", engine="trt-llm", **A100),
    "generate/turbomind": generate("d4 t2 p1", engine="turbomind", **A100),
    "generate/real": generate("d1 t8 p2", engine="real", groups=2, **A100, **TWO),
    "generate/profiled": generate("d4 t2 p1", engine="table"),
    "train/adapters": train("d2 t4 p2", lora=16, **TWO),
    "train/adapters, tp alone": train("d2 t4 p1", lora=64, sequence_parallel=False, recompute=Recompute.FULL),
    "generate/adapters": generate("d4 t2 p1", lora=16),
}

REALLOCATIONS: Mapping[str, tuple[str, tuple[str, str], tuple[str, str]]] = {
    "nothing moves": ("llama2-7b", ("nodes 0-1", "d4 t4 p1"), ("nodes 0-1", "d4 t4 p1")),
    "tp to dp in a node": ("llama2-7b", ("node 0", "d1 t8 p1"), ("node 0", "d8 t1 p1")),
    "pp to tp over nodes": ("llama2-70b", ("nodes 0-3", "d1 t8 p4"), ("nodes 0-3", "d8 t4 p1")),
    "to other nodes": ("llama2-7b", ("node 0", "d2 t4 p1"), ("node 3", "d4 t2 p1")),
    "experts": ("qwen3-30b-a3b", ("nodes 0-1", "d4 t4 p1 e4"), ("nodes 0-1", "d16 t1 p1 e16")),
    "uneven stages": ("llama3.1-405b", ("nodes 0-3", "d1 t8 p4"), ("nodes 0-3", "d2 t8 p2")),
}
"""Model, source and target (mesh, degrees) on four nodes."""


def figures(case: Case) -> dict[str, dict[str, float]]:
    """Seconds and bytes of a case by term."""
    cluster = load_cluster(case.gpu, gpus=case.gpus, gpus_per_node=min(8, case.gpus))
    spec = load_model(case.model)
    graph = algorithm_graph("ppo")
    models = {role: spec.with_value_head() if role in ("critic", "reward") else spec for role in graph.roles}
    models = with_lora(graph, models, Lora(case.lora) if case.lora else None)
    workload = Workload(graph=graph, models=models, dtype=case.dtype, **case.sizes)
    settings = {"shard_optimizer": True} | dict(case.settings)
    strategy = ParallelStrategy(**parse_degrees(case.degrees), **settings)
    candidates = Candidates.of([(parse_mesh(case.mesh, cluster), strategy)])
    engine: Engine = profiled_engine(TABLE) if case.engine == "table" else NamedEngine(case.engine)
    machine = engine.on(cluster, case.dtype)
    terms = call_time(machine, workload, case.call, candidates)
    memory = call_memory(machine, workload, case.call, candidates)
    held = {
        **memory.terms(),
        "host": memory.host,
        "resident": memory.resident_bytes,
        "transient": memory.transient_bytes,
        "copy": memory.copy_bytes,
        "context": [machine.context_bytes],
    }
    return {
        "seconds": {term: float(seconds[0]) for term, seconds in terms.items()},
        "bytes": {term: float(size[0]) for term, size in held.items()},
    }


def reallocation_seconds(gpu: str) -> dict[str, float]:
    """Seconds of every reallocation on four nodes of a GPU kind."""
    cluster = load_cluster(gpu, gpus=32)
    machine = MEGATRON.on(cluster, "bf16")
    found = {}
    for name, (model, *places) in REALLOCATIONS.items():
        source, target = (_layout(model, place, cluster) for place in places)
        found[name] = float(reallocation_time(machine, [(source, target)])[0])
    return found


def _layout(model: str, place: tuple[str, str], cluster: ClusterSpec) -> Layout:
    mesh, degrees = place
    return Layout.of(load_model(model), parse_mesh(mesh, cluster), ParallelStrategy(**parse_degrees(degrees)), cluster)


def ledger() -> dict[str, dict[str, dict[str, float]]]:
    """All figures: case -> unit -> term -> value."""
    found = {name: figures(case) for name, case in CASES.items()}
    moved = {f"reallocation/{gpu}": {"seconds": reallocation_seconds(gpu)} for gpu in ("a100-80gb", "h100-80gb-sxm")}
    return found | moved
