"""Megatron models from a ModelSpec and a Layout, and their parameters under the names of `plans.layout`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plans.errors import SpecError
from plans.layout import EMBEDDING, Layout, Parameter, Place, model_units
from plans.model import Head, ModelSpec, Norm, Position
from plans.strategy import Recompute
from runtime.mcore import (
    MLP,
    AttnMaskType,
    ColumnParallelLinear,
    GPTModel,
    IdentityOp,
    MLPSubmodules,
    ModuleSpec,
    RowParallelLinear,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayer,
    TransformerLayerSubmodules,
    get_bias_dropout_add,
    get_cuda_rng_tracker,
    get_num_layers_to_build,
    get_transformer_layer_offset,
    model_parallel_cuda_manual_seed,
)
from runtime.modules import Attention, KVSelfAttention, LayerNorm, RMSNorm, Rotary, ValueHead

WORD_EMBEDDINGS = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


@dataclass(frozen=True, eq=False)
class Model:
    """This rank's part of a model.

    chunks: Megatron modules of this pipeline stage, more than one when interleaved. config: Megatron's, shared by the
    chunks. groups: the process groups of the layout.
    """

    layout: Layout
    config: Any
    groups: Any
    chunks: tuple[Any, ...]
    device: torch.device

    @property
    def spec(self) -> ModelSpec:
        """Architecture."""
        return self.layout.spec

    @cached_property
    def place(self) -> Place:
        """Coordinates of this rank."""
        return self.layout.places[torch.distributed.get_rank()]

    @property
    def first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.place.pp == 0

    @property
    def last_stage(self) -> bool:
        """Whether this rank has the head."""
        return self.place.pp == self.layout.pp - 1


def check_runnable(layout: Layout) -> None:
    """Raise unless this runtime can run the architecture under the layout."""
    spec = layout.spec
    reasons = {
        f"position encoding `{spec.position}`; only rotary positions run": spec.position is not Position.ROPE,
        f"activation `{spec.activation}`; one of {', '.join(_ACTIVATIONS)} runs": spec.activation not in _ACTIVATIONS,
        f"{spec.norms_per_layer} norms per layer; 2 run": spec.norms_per_layer != 2,
        f"{spec.experts} experts; only dense models run": spec.experts > 0,
        f"context parallel degree {layout.cp}; only 1 runs": layout.cp > 1,
        f"kv_heads {spec.kv_heads}, not a multiple of tp {layout.tp}": spec.kv_heads % layout.tp != 0,
        f"{spec.layers} layers, not a multiple of pp x vpp {layout.pp * layout.vpp}": bool(
            spec.layers % (layout.pp * layout.vpp)
        ),
        f"vpp {layout.vpp} without a pipeline": layout.vpp > 1 and layout.pp == 1,
    }
    for reason, broken in reasons.items():
        if broken:
            raise SpecError(f"model `{spec.name}` has {reason}")


def build_model(
    layout: Layout,
    groups: Any,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    sequence_parallel: bool = False,
    recompute: Recompute = Recompute.NONE,
) -> Model:
    """Build this rank's part, with weights not yet set (`runtime.hf` sets them). Collective over the layout's ranks.

    Generation needs `sequence_parallel=False`. `groups` is `GroupCache.collection(layout)`.
    """
    check_runnable(layout)
    if not get_cuda_rng_tracker().states_:  # unused without dropout, but megatron asks for it
        model_parallel_cuda_manual_seed(1, tp_rank=0, ep_rank=0, etp_rank=0)
    config = _config(layout, dtype, sequence_parallel and layout.tp > 1, recompute)
    with device:
        chunks = tuple(_chunk(layout, config, groups, index) for index in range(layout.vpp))
    return Model(layout, config, groups, chunks, device)


def _keep(weight: Tensor) -> Tensor:
    return weight


def _config(layout: Layout, dtype: torch.dtype, sequence_parallel: bool, recompute: Recompute) -> Any:
    spec = layout.spec
    full = recompute is Recompute.FULL
    return TransformerConfig(
        num_layers=spec.layers,
        hidden_size=spec.hidden,
        ffn_hidden_size=spec.ffn,
        num_attention_heads=spec.heads,
        num_query_groups=spec.kv_heads,
        kv_channels=spec.head_dim,
        layernorm_epsilon=spec.norm_eps,
        normalization="RMSNorm" if spec.norm is Norm.RMS else "LayerNorm",
        gated_linear_unit=spec.gated_mlp,
        activation_func=_ACTIVATIONS[spec.activation],
        add_bias_linear=spec.linear_bias,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        sequence_parallel=sequence_parallel,
        recompute_granularity=None if recompute is Recompute.NONE else recompute.value,
        recompute_method="uniform" if full else None,
        recompute_num_layers=1 if full else None,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # The initialisation must run, because it marks parameters as sharded, and need not do anything.
        perform_initialization=True,
        use_cpu_initialization=False,
        init_method=_keep,
        output_layer_init_method=_keep,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # With two stages the batched exchange of the interleaved schedule confuses activations with gradients.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        batch_p2p_sync=False,
        cuda_graph_scope=[],
        # Losses arrive normalised by global token counts: gradients are summed, never averaged.
        calculate_per_token_loss=True,
        **dict.fromkeys(_FUSIONS, False),
    )


_FUSIONS = (
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
    "apply_rope_fusion",
    "gradient_accumulation_fusion",
)


def _layer(spec: ModelSpec) -> Any:
    norm = RMSNorm if spec.norm is Norm.RMS else LayerNorm
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=Attention,
        linear_proj=RowParallelLinear,
        q_layernorm=norm if spec.qk_norm else IdentityOp,
        k_layernorm=norm if spec.qk_norm else IdentityOp,
    )
    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=KVSelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=norm,
            mlp=ModuleSpec(module=MLP, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _chunk(layout: Layout, config: Any, groups: Any, index: int) -> Any:
    spec, stage = layout.spec, groups.pp.rank()
    vp_stage = index if layout.vpp > 1 else None
    last = stage == layout.pp - 1 and index == layout.vpp - 1
    norm = RMSNorm if spec.norm is Norm.RMS else LayerNorm
    layers = get_num_layers_to_build(config, vp_stage=vp_stage, pp_rank=stage)
    chunk = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=[_layer(spec)] * layers, layer_norm=norm),
        vocab_size=spec.padded_vocab,
        max_sequence_length=spec.max_context,
        pre_process=stage == 0 and index == 0,
        post_process=last,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=spec.tied_embeddings,
        pg_collection=groups,
        vp_stage=vp_stage,
    )
    chunk.rotary_pos_emb = Rotary(spec, config, groups)
    if last and spec.head is Head.VALUE:
        chunk.output_layer = ValueHead(config, groups.tp)
    return chunk


def named_shards(model: Model) -> Iterator[tuple[Parameter, nn.Parameter]]:
    """Each parameter as `plans.layout` knows it, with this rank's part, in the order of `Layout.stage_units`.

    The projection of a tied last stage is its copy of the embedding and comes under the embedding's name.
    """
    held = dict(_named_parameters(model))
    units = {unit.name: unit for unit in model_units(model.spec)}
    for name in model.layout.stage_units(model.place.pp):
        for parameter in units[name].parameters:
            yield parameter, held.pop(parameter.name)
    assert not held, f"parameters unknown to the layout: {sorted(held)}"


def _named_parameters(model: Model) -> Iterator[tuple[str, nn.Parameter]]:
    copy = model.spec.tied_embeddings and not model.first_stage
    for index, chunk in enumerate(model.chunks):
        vp_stage = index if len(model.chunks) > 1 else None
        offset = get_transformer_layer_offset(model.config, vp_stage=vp_stage, pp_rank=model.place.pp)
        for name, parameter in chunk.named_parameters():
            yield WORD_EMBEDDINGS if copy and name == OUTPUT else _global_name(name, offset), parameter


def _global_name(name: str, offset: int) -> str:
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"]:
        parts[2] = str(int(parts[2]) + offset)
    return ".".join(parts)


def holds_embedding_copy(model: Model) -> bool:
    """Whether this stage has the embedding only as the weight of a tied projection."""
    return model.last_stage and not model.first_stage and EMBEDDING in model.layout.stage_units(model.place.pp)


def alias_parameters(source: Model, view: Model) -> None:
    """Let `view` use the storage of `source`: one copy of the weights, two configurations (training with sequence
    parallel, generation without). Call after the source's Trainer is made, which moves the weights into its buffers."""
    assert source.layout.same_weights(view.layout)
    for ours, theirs in zip(source.chunks, view.chunks, strict=True):
        weights = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            parameter.data = weights[name].data
            parameter.requires_grad_(False)
