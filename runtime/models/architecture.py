"""A ModelSpec in Megatron's terms: its TransformerConfig, layer modules and pipeline chunks."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from plans.layout import Layout
from plans.model import Head, ModelSpec, Norm
from plans.strategy import Recompute
from runtime.models.lora import LoraColumnLinear, LoraRowLinear, freeze
from runtime.models.mcore import (
    AttnMaskType,
    ColumnParallelLinear,
    GPTModel,
    IdentityOp,
    MLPSubmodules,
    ModuleSpec,
    MoELayer,
    MoESubmodules,
    RowParallelLinear,
    SelfAttentionSubmodules,
    TransformerBlockSubmodules,
    TransformerConfig,
    TransformerLayerSubmodules,
    build_module,
    get_bias_dropout_add,
)
from runtime.models.mlp import ACTIVATIONS, Experts, GatedMLP, SharedExpert
from runtime.models.modules import Attention, NumberedLayer, PackedSelfAttention, Rotary, ValueHead
from runtime.models.norms import LayerNorm, OffsetNorm, RMSNorm, WideNorm
from runtime.models.routing import Router

_FUSIONS = (
    "bias_activation_fusion",
    "bias_dropout_fusion",
    "masked_softmax_fusion",
    "persist_layer_norm",
    "apply_rope_fusion",
    "gradient_accumulation_fusion",
)


def embedding_scale(spec: ModelSpec, dtype: torch.dtype) -> float:
    """What embeddings are multiplied by, rounded to the type of the model as `transformers` rounds it."""
    return float(torch.tensor(spec.embedding_scale, dtype=dtype))


def _keep(weight: Tensor) -> Tensor:
    return weight


def transformer_config(layout: Layout, dtype: torch.dtype, sequence_parallel: bool, recompute: Recompute) -> Any:
    """Megatron's configuration of a model under a layout."""
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
        activation_func=ACTIVATIONS[spec.activation],
        add_bias_linear=spec.linear_bias,
        add_qkv_bias=spec.qkv_bias,
        qk_layernorm=spec.qk_norm and not spec.wide_qk_norm,  # else Megatron sums the gradients of norms over tp
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
        cuda_graph_scope=[],
        # Losses arrive normalised by global token counts: gradients are summed, never averaged.
        calculate_per_token_loss=True,
        **_degrees(layout),
        **_experts(spec),
        **dict.fromkeys(_FUSIONS, False),
    )


def _degrees(layout: Layout) -> dict[str, Any]:
    """Megatron's settings of what a layout cuts, and of the exchange between stages."""
    interleaved = layout.vpp > 1
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": 1,
        "virtual_pipeline_model_parallel_size": layout.vpp if interleaved else None,
        # With two stages the batched exchange of the interleaved schedule confuses activations with gradients.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "batch_p2p_sync": False,
        "deallocate_pipeline_outputs": not interleaved,  # the interleaved schedule may still be sending them
    }


def _experts(spec: ModelSpec) -> dict[str, Any]:
    """Megatron's settings of a mixture of experts: no token is ever dropped, gates are computed in float32."""
    if not spec.experts:
        return {}
    return {
        "num_moe_experts": spec.experts,
        "moe_router_topk": spec.experts_per_token,
        "moe_router_pre_softmax": not spec.normalize_gates,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_ffn_hidden_size": spec.ffn,
        "moe_shared_expert_intermediate_size": spec.shared_ffn or None,
        "moe_shared_expert_gate": bool(spec.shared_ffn),
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": False,
    }


def _norm(spec: ModelSpec) -> Any:
    if spec.norm is Norm.LAYER:
        return LayerNorm
    return OffsetNorm if spec.norm_offset else RMSNorm


def _head_norm(spec: ModelSpec, heads: int, groups: Any) -> Any:
    """The norm of queries or of keys."""
    if not spec.qk_norm:
        return IdentityOp
    if spec.wide_qk_norm:
        return ModuleSpec(module=WideNorm, params={"heads": heads, "group": groups.tp})
    return _norm(spec)


def _linear(spec: ModelSpec, name: str, own: Any, adapted: Any) -> Any:
    """The class of a linear layer: Megatron's own, or the one with an adapter."""
    if spec.lora is None or name not in spec.lora.targets:
        return own
    return ModuleSpec(module=adapted, params={"lora": spec.lora})


def _mlp(spec: ModelSpec, groups: Any) -> Any:
    linear = MLPSubmodules(
        linear_fc1=_linear(spec, "linear_fc1", ColumnParallelLinear, LoraColumnLinear),
        linear_fc2=_linear(spec, "linear_fc2", RowParallelLinear, LoraRowLinear),
    )
    if not spec.experts:
        own = {"tp_group": groups.tp}  # Megatron gives it to its own class alone
        if spec.norms_after:
            own["post_norm"] = _norm(spec)
        return ModuleSpec(module=GatedMLP, params=own, submodules=linear)
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(
            router=Router,
            experts=ModuleSpec(module=Experts, submodules=linear),
            shared_experts=ModuleSpec(module=SharedExpert, submodules=linear),
        ),
    )


def _layer(spec: ModelSpec, first: int, groups: Any) -> Any:
    before = _norm(spec) if spec.norms_before else IdentityOp
    after = _norm(spec) if spec.norms_after else None
    attention = SelfAttentionSubmodules(
        # Megatron calls this one; the others it builds itself.
        linear_qkv=partial(build_module, _linear(spec, "linear_qkv", ColumnParallelLinear, LoraColumnLinear)),
        core_attention=partial(Attention, spec=spec),
        linear_proj=_linear(spec, "linear_proj", RowParallelLinear, LoraRowLinear),
        q_layernorm=_head_norm(spec, spec.heads, groups),
        k_layernorm=_head_norm(spec, spec.kv_heads, groups),
    )
    return ModuleSpec(
        module=NumberedLayer,
        params={"first": first},
        submodules=TransformerLayerSubmodules(
            input_layernorm=before,
            self_attention=ModuleSpec(
                module=PackedSelfAttention,
                params={"attn_mask_type": AttnMaskType.causal, "spec": spec, "post_norm": after},
                submodules=attention,
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=before,
            mlp=_mlp(spec, groups),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def build_chunk(layout: Layout, config: Any, groups: Any, index: int) -> Any:
    """The `index`-th model chunk of this rank's stage, weights unset. Collective when embeddings are tied."""
    spec, stage = layout.spec, groups.pp.rank()
    vp_stage = index if layout.vpp > 1 else None
    last = stage == layout.pp - 1 and index == layout.vpp - 1
    layers = layout.chunk_layers(stage, index)
    chunk = GPTModel(
        config,
        TransformerBlockSubmodules([_layer(spec, layers.start, groups)] * len(layers), layer_norm=_norm(spec)),
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
    if chunk.pre_process and spec.embedding_scale != 1.0:
        scale = embedding_scale(spec, config.params_dtype)
        chunk.embedding.register_forward_hook(lambda module, given, embedded: embedded * scale)
    if last and spec.head is Head.VALUE:
        chunk.output_layer = ValueHead(config, groups.tp)
    for name, parameter in chunk.named_parameters():
        if "local_experts" in name:
            # Megatron counts them to the dense weights when ep is 1; but tp ranks do not cut them, and with sequence
            # parallelism each sees other tokens, so that their gradients must be summed over tp as well.
            parameter.allreduce = False
    if spec.lora is not None:
        freeze(chunk)
    return chunk
