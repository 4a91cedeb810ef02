"""Layout arithmetic: which rank holds which slice of which parameter.

A model is a chain of *units*: `embedding`, the blocks `layer.0` ..., the experts of a block `layer.0.expert.0` ... and
`head`. A pipeline stage holds a run of units; of the experts each of its ranks holds those of its place in a run of ep
ranks, whole. Inside a unit each *sharded* parameter is cut by tensor parallelism along one axis; each *replicated*
parameter is held whole by every rank that holds the unit. Tensor rank r of t holds the fraction [r/t, (r+1)/t) of every
sharded parameter, block by block (gate and up are two blocks of `linear_fc1`; a query group is kept whole because
kv_heads % tp == 0), so that one fraction interval of a unit names the same data in every layout.
Names and storage order are Megatron-core's at tp = 1. The cost model counts these bytes, the runtime sends them.

With LoRA the weights of the model are *frozen*, and before each target stand the two parameters of its adapter,
`lora_a` and `lora_b`, of which one is cut as the weight is: of a column-parallel linear B, of a row-parallel one A.
What is not frozen is trained, moved between layouts and kept in checkpoints.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from plans.cluster import ClusterSpec, DeviceMesh
from plans.lora import ADAPTERS, Lora
from plans.model import Head, ModelSpec, Norm, Position
from plans.strategy import ParallelStrategy

EMBEDDING = "embedding"
HEAD = "head"


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a unit. `axis` is the sharded axis, None when replicated; `blocks` are equal parts of that
    axis that are each cut by tp (2 for gate-and-up). `frozen`: adapters are trained in its place."""

    name: str
    shape: tuple[int, ...]
    axis: int | None = None
    blocks: int = 1
    frozen: bool = False

    @property
    def size(self) -> int:
        """Elements of the whole parameter."""
        total = 1
        for extent in self.shape:
            total *= extent
        return total

    @property
    def adapter(self) -> bool:
        """Whether it belongs to an adapter."""
        return self.name.endswith(ADAPTERS)


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit of a model: its name, and its parameters under their Megatron-core names with global layer numbers."""

    name: str
    parameters: tuple[Parameter, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return sum(p.size for p in self.parameters)

    @property
    def sharded(self) -> int:
        """Elements that tp cuts."""
        return sum(p.size for p in self.parameters if p.axis is not None)

    @property
    def replicated(self) -> int:
        """Elements that every tp rank holds."""
        return sum(p.size for p in self.parameters if p.axis is None)


def _norm(spec: ModelSpec, name: str, width: int | None = None) -> list[Parameter]:
    shape = (width or spec.hidden,)
    parameters = [Parameter(f"{name}.weight", shape)]
    return [*parameters, Parameter(f"{name}.bias", shape)] if spec.norm is Norm.LAYER else parameters


def _linear(name: str, rows: int, cols: int, axis: int | None, bias: bool, blocks: int = 1) -> list[Parameter]:
    """A linear layer [rows, cols]; axis 0 is column-parallel (its bias is sharded), axis 1 row-parallel, None whole on
    every rank."""
    weight = Parameter(f"{name}.weight", (rows, cols), axis, blocks)
    if not bias:
        return [weight]
    return [weight, Parameter(f"{name}.bias", (rows,), 0 if axis == 0 else None, blocks if axis == 0 else 1)]


def _layer_parameters(spec: ModelSpec, index: int) -> tuple[Parameter, ...]:
    at = f"decoder.layers.{index}"
    attention = f"{at}.self_attention"
    heads_width = spec.heads * spec.head_dim
    parameters = [
        *(_norm(spec, f"{at}.input_layernorm") if spec.norms_before else ()),
        *(_latent_inputs if spec.kv_rank else _query_key_value)(spec, attention),
        *_linear(f"{attention}.linear_proj", spec.hidden, spec.heads * spec.value_width, 1, spec.linear_bias),
        *(_norm(spec, f"{at}.pre_mlp_layernorm") if spec.norms_before else ()),
        *(_norm(spec, f"{attention}.post_norm") if spec.norms_after else ()),
        *(_norm(spec, f"{at}.mlp.post_norm") if spec.norms_after else ()),
    ]
    if spec.qk_norm and spec.wide_qk_norm:
        parameters.append(Parameter(f"{attention}.q_layernorm.weight", (heads_width,), 0))
        parameters.append(Parameter(f"{attention}.k_layernorm.weight", (spec.kv_heads * spec.head_dim,), 0))
    elif spec.qk_norm:
        parameters += _norm(spec, f"{attention}.q_layernorm", spec.head_dim)
        parameters += _norm(spec, f"{attention}.k_layernorm", spec.head_dim)
    if spec.sinks:
        parameters.append(Parameter(f"{attention}.core_attention.softmax_offset", (spec.heads,), 0))
    if not spec.has_experts(index):
        return (*parameters, *_mlp(spec, f"{at}.mlp", spec.dense_ffn if spec.experts else spec.ffn))
    parameters += _linear(f"{at}.mlp.router", spec.experts, spec.hidden, None, spec.linear_bias)
    if spec.shared_ffn:
        parameters += _mlp(spec, f"{at}.mlp.shared_experts", spec.shared_ffn)
        if spec.shared_gate:
            parameters.append(Parameter(f"{at}.mlp.shared_experts.gate_weight", (1, spec.hidden)))
    return tuple(parameters)


def _query_key_value(spec: ModelSpec, attention: str) -> list[Parameter]:
    return _linear(f"{attention}.linear_qkv", spec.qkv_width, spec.hidden, 0, spec.qkv_bias or spec.linear_bias)


def _latent_inputs(spec: ModelSpec, attention: str) -> list[Parameter]:
    """Latent attention's way to query, key and value: what goes down is whole on every rank, what goes up is cut."""
    expanded = spec.heads * (spec.head_dim - spec.rotary_dim + spec.value_width)
    parameters = []
    if spec.q_rank:
        parameters += _linear(f"{attention}.linear_q_down_proj", spec.q_rank, spec.hidden, None, False)
        parameters += _norm(spec, f"{attention}.q_layernorm", spec.q_rank)
    up = "linear_q_up_proj" if spec.q_rank else "linear_q_proj"
    parameters += _linear(f"{attention}.{up}", spec.heads * spec.head_dim, spec.q_rank or spec.hidden, 0, False)
    parameters += _linear(f"{attention}.linear_kv_down_proj", spec.latent_width, spec.hidden, None, False)
    parameters += _norm(spec, f"{attention}.kv_layernorm", spec.kv_rank)
    return parameters + _linear(f"{attention}.linear_kv_up_proj", expanded, spec.kv_rank, 0, False)


def _mlp(spec: ModelSpec, at: str, width: int) -> list[Parameter]:
    gates = 2 if spec.gated_mlp else 1
    first = _linear(f"{at}.linear_fc1", gates * width, spec.hidden, 0, spec.linear_bias, gates)
    return first + _linear(f"{at}.linear_fc2", spec.hidden, width, 1, spec.linear_bias)


def _expert_parameters(spec: ModelSpec, layer: int, expert: int) -> tuple[Parameter, ...]:
    """An expert is never cut: it lies whole on the ranks that hold it."""
    at = f"decoder.layers.{layer}.mlp.experts.local_experts.{expert}"
    return tuple(replace(parameter, axis=None) for parameter in _mlp(spec, at, spec.ffn))


def layer_unit(layer: int) -> str:
    """Name of a block's unit."""
    return f"layer.{layer}"


def expert_of(unit: str) -> int | None:
    """Number of the expert that a unit is; None for other units."""
    parts = unit.split(".")
    return int(parts[3]) if len(parts) == 4 else None


def expert_unit(layer: int, expert: int) -> str:
    """Name of an expert's unit."""
    return f"layer.{layer}.expert.{expert}"


def _adapted(lora: Lora, parameters: tuple[Parameter, ...]) -> tuple[Parameter, ...]:
    """The parameters of a block, frozen, and before each target those of its adapter."""
    found = []
    for parameter in parameters:
        at, _, kind = parameter.name.rpartition(".")
        if kind == "weight" and at.endswith(lora.targets):
            (rows, cols), axis = parameter.shape, parameter.axis
            found.append(Parameter(f"{at}.lora_a", (lora.rank, cols), 1 if axis == 1 else None))
            found.append(Parameter(f"{at}.lora_b", (rows, lora.rank), 0 if axis == 0 else None, parameter.blocks))
        found.append(replace(parameter, frozen=True))
    return tuple(found)


@lru_cache(maxsize=64)
def trained_units(spec: ModelSpec) -> tuple[Unit, ...]:
    """The units of a model that have parameters to train, with those alone: what training changes, what a reallocation
    moves and a checkpoint keeps. Without LoRA they are `model_units`."""
    if spec.lora is None:
        return model_units(spec)
    kept = (Unit(unit.name, tuple(p for p in unit.parameters if not p.frozen)) for unit in model_units(spec))
    return tuple(unit for unit in kept if unit.parameters)


def adapter_elements(spec: ModelSpec) -> tuple[int, int]:
    """Elements of the adapters of one block: cut by tp, and whole on every rank; zero without LoRA."""
    if spec.lora is None:
        return 0, 0
    block = trained_units(spec)[0]
    return block.sharded, block.replicated


@lru_cache(maxsize=64)
def model_units(spec: ModelSpec) -> tuple[Unit, ...]:
    """Embedding, blocks (each followed by its experts) and head in pipeline order, with the padded vocabulary.

    The head is the final norm with the vocabulary projection or the value head. A tied projection is not a parameter
    of the head: the stage of the head then holds the embedding unit as well (`Layout.units`).
    """
    embedding = [Parameter("embedding.word_embeddings.weight", (spec.padded_vocab, spec.hidden), 0)]
    if spec.position is Position.LEARNED:
        embedding.append(Parameter("embedding.position_embeddings.weight", (spec.max_context, spec.hidden)))
    head = _norm(spec, "decoder.final_layernorm")
    if spec.head is Head.VALUE:
        head.append(Parameter("output_layer.weight", (1, spec.hidden)))
    elif not spec.tied_embeddings:
        head.append(Parameter("output_layer.weight", (spec.padded_vocab, spec.hidden), 0))
    blocks = []
    for i in range(spec.layers):
        blocks.append(Unit(layer_unit(i), _layer_parameters(spec, i)))
        experts = range(spec.experts if spec.has_experts(i) else 0)
        blocks += [Unit(expert_unit(i, e), _expert_parameters(spec, i, e)) for e in experts]
    units = (Unit(EMBEDDING, tuple(embedding)), *blocks, Unit(HEAD, tuple(head)))
    if spec.lora is None:
        return units
    return tuple(Unit(unit.name, _adapted(spec.lora, unit.parameters)) for unit in units)


@lru_cache(maxsize=1024)
def default_split(layers: int, pp: int) -> tuple[int, ...]:
    """Layers of each pipeline stage. What does not divide goes to the middle stages, one layer each, because the first
    stage also has the embedding and the last one the head; of two stages the first takes it: the head weighs more."""
    base, rest = divmod(layers, pp)
    first = (pp - rest) // 2
    return tuple(base + (first <= stage < first + rest) for stage in range(pp))


@dataclass(frozen=True, slots=True)
class Place:
    """Coordinates of a rank in a layout."""

    dp: int
    tp: int
    pp: int
    cp: int = 0


@dataclass(frozen=True)
class Layout:
    """A model on a mesh under a strategy. Rank order is Megatron's: tp fastest, then cp, dp, pp slowest.

    ep counts the ranks over which a block's experts are spread. It cuts the dp x cp x tp ranks of a stage, in their
    order, into runs of ep, so that a run lies inside a node where it can; each run holds every expert once.
    layers_per_stage: a split of one's own, empty for `default_split`.
    """

    spec: ModelSpec
    ranks: tuple[int, ...]
    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    vpp: int = 1
    layers_per_stage: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        need = self.dp * self.tp * self.pp * self.cp
        assert need == len(self.ranks), f"layout needs {need} ranks, got {len(self.ranks)}"
        stage = need // self.pp
        assert stage % self.ep == 0, f"ep {self.ep} does not divide the {stage} ranks of a stage"
        split = self.stage_layers
        assert len(split) == self.pp and sum(split) == self.spec.layers, f"{split} splits {self.spec.layers} layers"

    @classmethod
    def of(cls, spec: ModelSpec, mesh: DeviceMesh, strategy: ParallelStrategy, cluster: ClusterSpec) -> Layout:
        """The layout of a call."""
        s = strategy
        return cls(
            spec,
            tuple(mesh.ranks(cluster)),
            dp=s.dp,
            tp=s.tp,
            pp=s.pp,
            cp=s.cp,
            ep=s.ep,
            vpp=s.vpp,
            layers_per_stage=s.layers_per_stage,
        )

    @property
    def stage_layers(self) -> tuple[int, ...]:
        """Layers of each pipeline stage."""
        return self.layers_per_stage or default_split(self.spec.layers, self.pp)

    def chunk_layers(self, stage: int, chunk: int = 0) -> range:
        """Numbers of the layers of a stage's `chunk`-th model chunk; with one chunk, of the stage."""
        if self.vpp > 1:
            count = self.spec.layers // (self.pp * self.vpp)
            first = (chunk * self.pp + stage) * count
        else:
            count, first = self.stage_layers[stage], sum(self.stage_layers[:stage])
        return range(first, first + count)

    @cached_property
    def places(self) -> dict[int, Place]:
        """Coordinates of every rank."""
        found = {}
        for i, rank in enumerate(self.ranks):
            tp, rest = i % self.tp, i // self.tp
            cp, rest = rest % self.cp, rest // self.cp
            found[rank] = Place(dp=rest % self.dp, tp=tp, pp=rest // self.dp, cp=cp)
        return found

    @cached_property
    def replica_of(self) -> dict[int, int]:
        """The dp replica of every rank."""
        run = self.tp * self.cp
        return {rank: i // run % self.dp for i, rank in enumerate(self.ranks)}

    def rank(self, place: Place) -> int:
        """The rank at a place."""
        return self.ranks[((place.pp * self.dp + place.dp) * self.cp + place.cp) * self.tp + place.tp]

    @property
    def joined_replicas(self) -> int:
        """Replicas that share experts: neighbours that together are the least number of whole runs of ep ranks. 1 where
        a replica's stage consists of whole runs."""
        own = self.tp * self.cp
        return math.lcm(own, self.ep) // own

    def expert_rank(self, rank: int) -> int:
        """Position of a rank in its run of ep ranks."""
        return self.ranks.index(rank) % self.ep

    def experts_of(self, rank: int) -> range:
        """Numbers of the experts of every block that a rank holds."""
        each = self.spec.experts // self.ep
        first = self.expert_rank(rank) * each
        return range(first, first + each)

    def rank_units(self, rank: int) -> tuple[str, ...]:
        """Names of the units that a rank holds a part of, in the order of `stage_units`."""
        return self._units(self.places[rank].pp, self.experts_of(rank))

    def stage_units(self, stage: int) -> tuple[str, ...]:
        """Names of the units that a pipeline stage holds, in order; with vpp > 1 the chunks of the stage in turn."""
        return self._units(stage, range(self.spec.experts))

    def _units(self, stage: int, experts: range) -> tuple[str, ...]:
        names = [EMBEDDING] if stage == 0 else []
        for chunk in range(self.vpp):
            for i in self.chunk_layers(stage, chunk):
                names.append(layer_unit(i))
                names += [expert_unit(i, expert) for expert in experts if self.spec.has_experts(i)]
        if stage == self.pp - 1:
            if self.spec.tied_embeddings and stage > 0:
                names.append(EMBEDDING)
            names.append(HEAD)
        return tuple(names)

    @cached_property
    def holders(self) -> dict[str, tuple[int, ...]]:
        """Unit -> the ranks that hold a part of it, ascending."""
        found: dict[str, list[int]] = {}
        for rank in self.ranks:
            for unit in self.rank_units(rank):
                found.setdefault(unit, []).append(rank)
        return {unit: tuple(sorted(ranks)) for unit, ranks in found.items()}

    def same_weights(self, other: Layout) -> bool:
        """Whether every rank holds the same slices in both, so that one copy serves both.

        Experts are cut by ep, dense weights by tp and pp; dp and cp only replicate, in a rank order that the
        places compare.
        """
        return self == other or (
            self.ranks == other.ranks
            and self.spec == other.spec
            and held_slices(self.spec, self) == held_slices(other.spec, other)
        )

    def same_base(self, other: Layout) -> bool:
        """Whether every rank holds the same slices of the same model in both, adapters aside."""
        return replace(self, spec=self.spec.base).same_weights(replace(other, spec=other.spec.base))


def held_slices(spec: ModelSpec, cut: ParallelStrategy | Layout) -> tuple[int, int, int, int, tuple[int, ...]]:
    """What says which slices of a model's weights each rank of a mesh holds: equal for strategies of which one copy
    serves both."""
    return cut.tp, cut.pp, cut.vpp, cut.ep, cut.layers_per_stage or default_split(spec.layers, cut.pp)


def fraction(layout: Layout, rank: int, grid: int) -> tuple[int, int]:
    """The interval of every sharded parameter that a rank holds, in units of 1/grid (grid a multiple of tp)."""
    step = grid // layout.tp
    tp = layout.places[rank].tp
    return tp * step, (tp + 1) * step
