"""The shape of a plan file as pydantic models: what keys there are, of which type, with which default.

Only the shape: rules that join several values are `plans.checks`; building the domain objects is `plans.codec`.
`realplan schema` prints the JSON Schema of `PlanFile`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model

from plans.cluster import FASTEST, MOST_GPUS
from plans.config_keys import Size
from plans.graph import MOST_STALENESS
from plans.lora import MOST_ALPHA, MOST_RANK
from plans.strategy import KEYS, SETTINGS, Setting
from plans.workload import MOST_SAMPLES, MOST_TOKENS

FORMAT = "realplan/1"
MOST_CALLS = 200
SampleCount = Annotated[int, Field(ge=1, le=MOST_SAMPLES)]
PercentilesFile = Annotated[
    dict[str, Annotated[int, Field(ge=0, le=MOST_TOKENS)]],
    Field(description='percentile -> tokens, such as {"p50": 700, "p99": 6000}; empty: all reach the maximum'),
]
Amount = Annotated[float, Field(gt=0, le=FASTEST, allow_inf_nan=False)]
Name = Annotated[str, Field(pattern=r"^[\w.+-]+$", max_length=60)]
Figure = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Closed(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)


class RopeScalingFile(_Closed):
    """Scaling of rotary positions; each kind has some of the keys (`plans.rope`)."""

    kind: Literal["linear", "dynamic", "llama3", "yarn", "longrope"] = "llama3"
    factor: Amount | None = None
    original_max_position: Size | None = None
    low_freq_factor: Amount | None = None
    high_freq_factor: Amount | None = None
    attention_factor: Amount | None = None
    beta_fast: Amount | None = None
    beta_slow: Amount | None = None
    truncate: bool | None = None
    short_factor: Annotated[list[Amount], Field(max_length=4096)] | None = None
    long_factor: Annotated[list[Amount], Field(max_length=4096)] | None = None


Family = Literal[
    "", "phi3", "gemma", "gemma2", "gemma3_text", "glm", "glm4", "olmo2", "gpt_oss", "llama4_text", "deepseek_v2",
    "deepseek_v3",
]  # fmt: skip


class ModelFile(_Closed):
    """An architecture written out, for models that are not in the library."""

    name: str
    layers: Annotated[int, Field(ge=1, le=10**4)]
    hidden: Size
    heads: Size
    kv_heads: Size
    head_dim: Size
    ffn: Size
    vocab: Size
    gated_mlp: bool = True
    activation: str = "silu"
    tied_embeddings: bool = False
    norm: Literal["rms", "layer"] = "rms"
    norm_eps: float = 1e-5
    norms_per_layer: Annotated[int, Field(ge=1, le=4)] = 2
    post_norms: bool = False
    norm_offset: bool = False
    position: Literal["rope", "learned", "alibi"] = "rope"
    max_context: Size = 4096
    window: Annotated[int, Field(ge=0, le=10**8, description="tokens that attention sees; 0: all")] = 0
    full_first: Annotated[int, Field(ge=0, le=10**4, description="first layers without the window")] = 0
    full_every: Annotated[int, Field(ge=0, le=10**4, description="every so many-th layer has no window")] = 0
    local_rope_theta: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)] = 0.0
    rope_theta: float = 10000.0
    rope_scaling: RopeScalingFile | None = None
    rotary_dim: Annotated[int, Field(ge=0, le=10**8, description="rotated dimensions of a head; 0: all")] = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    wide_qk_norm: bool = False
    query_scalar: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.0
    attention_cap: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.0
    logit_cap: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.0
    embedding_scale: Annotated[float, Field(gt=0, le=1e6, allow_inf_nan=False)] = 1.0
    linear_bias: bool = False
    experts: Annotated[int, Field(ge=0, le=10**5)] = 0
    experts_per_token: Annotated[int, Field(ge=0, le=10**5)] = 0
    normalize_gates: bool = True
    shared_ffn: Annotated[int, Field(ge=0, le=10**8)] = 0
    shared_gate: bool = True
    dense_first: Annotated[int, Field(ge=0, le=10**4, description="first layers without experts")] = 0
    dense_ffn: Annotated[int, Field(ge=0, le=10**8, description="MLP width of layers without experts")] = 0
    experts_every: Annotated[int, Field(ge=1, le=10**4, description="every so many-th layer has experts")] = 1
    q_rank: Annotated[int, Field(ge=0, le=10**6)] = 0
    kv_rank: Annotated[int, Field(ge=0, le=10**6, description="above 0: latent attention")] = 0
    value_dim: Annotated[int, Field(ge=0, le=10**6, description="numbers of a head's value; 0: head_dim")] = 0
    sinks: bool = False
    family: Family = ""


class GraphCallFile(_Closed):
    """One call of a graph of the user's own: a model's role, or without one a Python function."""

    name: Name
    kind: Literal["generate", "inference", "train_step", "function"]
    model: Annotated[str, Field(pattern=r"^[\w.+-]*$", max_length=60)] = ""
    inputs: Annotated[list[Name], Field(max_length=MOST_CALLS)] = Field(default_factory=list)
    outputs: Annotated[list[Name], Field(max_length=MOST_CALLS)] = Field(default_factory=list)
    seconds_per_sample: Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)] = 0.0
    loss: Annotated[
        str, Field(max_length=500, description="of a train_step: the name of an algorithm, or file.py:function")
    ] = ""


class GraphFile(_Closed):
    """A dataflow graph of the user's own; `sources` are the tensors that the data set provides. The roles `critic` and
    `reward` have one scalar per token instead of a vocabulary."""

    name: Name
    calls: Annotated[list[GraphCallFile], Field(min_length=1, max_length=MOST_CALLS)]
    sources: Annotated[list[Name], Field(max_length=MOST_CALLS)] = ["prompts"]


Target = Literal["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


class LoraFile(_Closed):
    """Adapters that are trained in the place of the actor's weights. alpha: they count alpha / rank; default twice the
    rank. targets: linear_qkv is q_proj, k_proj and v_proj, linear_proj o_proj, linear_fc1 gate_proj and up_proj,
    linear_fc2 down_proj."""

    rank: Annotated[int, Field(ge=1, le=MOST_RANK)]
    alpha: Annotated[float, Field(gt=0, le=MOST_ALPHA, allow_inf_nan=False)] | None = None
    targets: Annotated[list[Target], Field(min_length=1)] = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"]


class WorkloadFile(_Closed):
    """What an iteration does: batch_size prompts, group_size samples each, in tokens. `graph` describes an algorithm
    that has no name in the library; staleness: iterations that generation runs ahead, exactly."""

    algorithm: str
    graph: GraphFile | None = None
    staleness: Annotated[int, Field(ge=0, le=MOST_STALENESS)] = 0
    batch_size: SampleCount
    group_size: SampleCount = 1
    prompt_tokens: Annotated[int, Field(ge=1, le=MOST_TOKENS)]
    response_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS)]
    mean_prompt_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS, description="0: see prompt_lengths")] = 0
    mean_response_tokens: Annotated[int, Field(ge=0, le=MOST_TOKENS, description="0: see response_lengths")] = 0
    prompt_lengths: PercentilesFile = {}
    response_lengths: PercentilesFile = {}
    minibatches: SampleCount
    dtype: Literal["bf16", "fp16", "fp32"] = "bf16"
    allow_long: Annotated[bool, Field(description="samples may be longer than a model's context")] = False
    recompute_logprobs: bool = False
    router_replay: Annotated[
        bool, Field(description="the actor's forward passes use the experts that generation chose")
    ] = False
    reward_seconds_per_sample: Annotated[
        float | None,
        Field(ge=0, le=1e6, allow_inf_nan=False, description="the reward is a Python function of this cost, no model"),
    ] = None
    lora: LoraFile | None = None
    models: dict[str, str | ModelFile] = Field(description="role -> library name or architecture")


class GpuFile(_Closed):
    """A GPU kind written out; bandwidths in GB/s per direction."""

    name: str
    memory_gib: Amount
    bf16_tflops: Amount
    fp32_tflops: Amount
    hbm_gbps: Amount
    link_gbps: Amount
    pcie_gbps: Amount


class ClusterFile(_Closed):
    """Nodes of equal GPUs; inter_node_gbps in GB/s per GPU and direction."""

    nodes: Annotated[int, Field(ge=1, le=MOST_GPUS)]
    gpus_per_node: Annotated[int, Field(ge=1, le=MOST_GPUS)]
    gpu: str | GpuFile
    inter_node_gbps: Amount
    host_memory_gib: Amount = 1024.0


class _PlaceFile(_Closed):
    call: str
    mesh: str
    strategy: str


def _key(setting: Setting) -> tuple[Any, Any]:
    """The key of a setting as pydantic takes it: its type and its field."""
    if setting.type is int:
        return int, Field(default=setting.default, ge=1, le=setting.most, description=setting.meaning)
    if setting.type is tuple:
        number = Annotated[int, Field(ge=1, le=setting.most)]
        return list[number], Field(default=[], description=setting.meaning)
    strict = setting.type is bool  # words such as `full` are members of an enumeration only when read loosely
    return setting.type, Field(default=setting.default, strict=strict, description=setting.meaning)


_SettingsFile: Any = create_model(
    "_SettingsFile",
    __base__=_PlaceFile,
    **{name: _key(SETTINGS[name]) for name in KEYS},  # type: ignore[call-overload]
)


class CallFile(_SettingsFile):  # type: ignore[misc]
    """One call: its mesh (`nodes 0-3`, `node 8 gpus 0-3`) and strategy (`d4 t8 p4`), then what its kind allows."""

    lag: Annotated[int, Field(ge=0, le=MOST_STALENESS + 1, description="run this many periods later than the rest")] = 0


class EstimateFile(_Closed):
    """Predicted figures, recomputed and never trusted: `of` is the digest of the plan they belong to."""

    iteration_s: Figure
    latency_s: Figure
    calls_s: dict[str, Figure]
    peak_gib: Figure
    peak_at: str
    host_gib: Figure
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
    calls: Annotated[list[CallFile], Field(max_length=MOST_CALLS)]
    estimate: EstimateFile | None = None
    provenance: dict[str, Any] = Field(default_factory=dict)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a plan file, for editors."""
    return PlanFile.model_json_schema(by_alias=True)
