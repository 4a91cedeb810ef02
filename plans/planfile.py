"""The shape of a plan file as pydantic models: what keys there are, of which type, with which default.

Only the shape: rules that join several values are `plans.checks`; building the domain objects is `plans.codec`.
`realplan schema` prints the JSON Schema of `PlanFile`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from plans.strategy import Recompute

FORMAT = "realplan/1"
Positive = Annotated[int, Field(ge=1)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class RopeScalingFile(_Closed):
    """Llama-3 rotary scaling."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


class ModelFile(_Closed):
    """An architecture written out, for models that are not in the library."""

    name: str
    layers: Positive
    hidden: Positive
    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    ffn: Positive
    vocab: Positive
    gated_mlp: bool = True
    activation: str = "silu"
    tied_embeddings: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norms_per_layer: int = 2
    position: Literal["rope", "learned", "alibi"] = "rope"
    max_context: Positive = 4096
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingFile | None = None
    qkv_bias: bool = False
    qk_norm: bool = False
    linear_bias: bool = False
    experts: int = 0
    experts_per_token: int = 0
    shared_ffn: int = 0


class GraphCallFile(_Closed):
    """One call of a graph of the user's own: a model's role, or without one a Python function."""

    name: str
    kind: Literal["generate", "inference", "train_step", "function"]
    model: str = ""
    inputs: list[str] = Field(default_factory=list)
    outputs: list[str] = Field(default_factory=list)
    seconds_per_sample: Annotated[float, Field(ge=0)] = 0.0


class GraphFile(_Closed):
    """A dataflow graph of the user's own; `sources` are the tensors that the data set provides. The roles `critic` and
    `reward` have one scalar per token instead of a vocabulary."""

    name: str
    calls: list[GraphCallFile]
    sources: list[str] = ["prompts"]


class WorkloadFile(_Closed):
    """What an iteration does: batch_size prompts, group_size samples each, in tokens. `graph` describes an algorithm
    that has no name in the library; staleness: iterations that generation may run ahead."""

    algorithm: str
    graph: GraphFile | None = None
    staleness: Annotated[int, Field(ge=0)] = 0
    batch_size: Positive
    group_size: Positive = 1
    prompt_tokens: Positive
    response_tokens: Annotated[int, Field(ge=0)]
    mean_response_tokens: Annotated[int, Field(ge=0)] = 0
    minibatches: Positive
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    recompute_logprobs: bool = False
    reward_seconds_per_sample: Annotated[
        float | None, Field(ge=0, description="the reward is a Python function of this cost, not a model")
    ] = None
    models: dict[str, str | ModelFile] = Field(description="role -> library name or architecture")


class GpuFile(_Closed):
    """A GPU kind written out; bandwidths in GB/s per direction."""

    name: str
    memory_gib: float
    bf16_tflops: float
    fp32_tflops: float
    hbm_gbps: float
    link_gbps: float
    pcie_gbps: float


class ClusterFile(_Closed):
    """Nodes of equal GPUs; inter_node_gbps in GB/s per GPU and direction."""

    nodes: Positive
    gpus_per_node: Positive
    gpu: str | GpuFile
    inter_node_gbps: Annotated[float, Field(gt=0)]
    host_memory_gib: Annotated[float, Field(gt=0)] = 1024.0


class CallFile(_Closed):
    """One call: its mesh (`nodes 0-3`, `node 8 gpus 0-3`) and strategy (`d4 t8 p4`), then what its kind allows."""

    call: str
    mesh: str
    strategy: str
    micro_batches: Annotated[int, Field(ge=1, description="forward passes per dp rank and minibatch")] = 1
    groups: Annotated[int, Field(ge=1, description="groups of sequences in flight in pipelined generation")] = 1
    waves: Annotated[int, Field(ge=1, description="parts that generate one after the other")] = 1
    sequence_parallel: bool = False
    recompute: Recompute = Field(default=Recompute.NONE, strict=False)
    shard_optimizer: bool = True
    offload: Annotated[
        bool, Field(description="frozen model: weights in host memory between calls; trained model: optimizer state")
    ] = False
    lag: Annotated[int, Field(ge=0, le=1, description="run this many periods later than the rest")] = 0


class EstimateFile(_Closed):
    """Predicted figures, recomputed and never trusted: `of` is the digest of the plan they belong to."""

    iteration_s: float
    latency_s: float
    calls_s: dict[str, float]
    peak_gib: float
    peak_at: str
    host_gib: float
    engine: str
    of: str


class PlanFile(_Closed):
    """A realplan plan."""

    schema_: str | None = Field(default=None, alias="$schema")
    format: Literal["realplan/1"]
    notes: str = ""
    run: str = Field(default="", description="path of the run file, relative to the plan")
    workload: WorkloadFile
    cluster: ClusterFile
    calls: list[CallFile]
    estimate: EstimateFile | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a plan file, for editors."""
    return PlanFile.model_json_schema(by_alias=True)
