"""Megatron's optimizers, put together without its factory, which waits for ranks outside the layout.

Weights that all replicas hold reduce over dp x cp. The weights of an expert reduce over the ranks that hold the same
expert, and so need an optimizer of their own: the two are chained, and share one gradient norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import cos, pi
from typing import Any

import torch
from torch import Tensor, nn

from runtime.models.mcore import (
    ChainedOptimizer,
    DistributedOptimizer,
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    OptimizerConfig,
)
from runtime.models.model import Model


@dataclass(frozen=True, kw_only=True)
class AdamSettings:
    """AdamW with a linear warm-up, after which the learning rate stays (`constant`) or falls, linearly or as half a
    cosine, to `final_lr` x lr at the last of `total_steps`. Weight decay acts on matrices only.

    clip_norm: largest global gradient norm (infinite: no clipping).
    """

    lr: float = 1e-6
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip_norm: float = 1.0
    warmup_steps: int = 0
    schedule: str = "constant"
    final_lr: float = 0.0
    total_steps: int = 0

    def lr_at(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.lr
        # The last step has the final rate; a run that goes on beyond it keeps that.
        done = min(1.0, (step - self.warmup_steps + 1) / max(1, self.total_steps - self.warmup_steps))
        left = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + cos(pi * done))
        return self.lr * (self.final_lr + (1.0 - self.final_lr) * left)


def make_optimizer(model: Model, chunks: Sequence[Any], settings: AdamSettings, *, sharded: bool) -> Any:
    """Adam on the DDP-wrapped chunks of a model, its masters and moments sharded over replicas if `sharded`."""
    bf16 = model.config.params_dtype is torch.bfloat16
    config = OptimizerConfig(
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_norm,
        bf16=bf16,
        params_dtype=model.config.params_dtype,
        use_distributed_optimizer=sharded,
    )
    parts = []
    for experts in (False, True):
        trained = (p for chunk in chunks for p in chunk.parameters() if p.requires_grad)
        parameters = [p for p in trained if is_expert(p) is experts]
        if parameters:
            parts.append(_part(model, chunks, _adam(parameters, settings, experts), config, sharded, experts))
    return parts[0] if len(parts) == 1 else ChainedOptimizer(parts)


def is_expert(parameter: nn.Parameter) -> bool:
    """Whether Megatron counts a parameter to the experts, which expert parallelism spreads."""
    return not getattr(parameter, "allreduce", True)


def parts_of(optimizer: Any) -> Sequence[Any]:
    """The chained parts of an optimizer: that of the dense weights, then that of the experts."""
    return optimizer.chained_optimizers if isinstance(optimizer, ChainedOptimizer) else [optimizer]


def masters_of(part: Any) -> Iterator[tuple[Tensor, nn.Parameter, int]]:
    """Each tensor that Adam steps in a part of an optimizer, the parameter of the model it is a master of, and where in
    the flat parameter it begins. With float32 weights they are the weights themselves, or views of them.

    Megatron's distributed optimizer cuts its buffers over the replicas without regard to parameters, so that a rank has
    a range of some of them.
    """
    if isinstance(part, DistributedOptimizer):
        models = [*part.model_float16_groups, *part.model_fp32_groups]
        masters = [*part.shard_fp32_from_float16_groups, *part.shard_fp32_groups]
    elif isinstance(part, Float16OptimizerWithFloat16Params):
        models = [*part.float16_groups, *part.fp32_from_fp32_groups]
        masters = [*part.fp32_from_float16_groups, *part.fp32_from_fp32_groups]
    else:
        models = masters = [group["params"] for group in part.optimizer.param_groups]
    for ours, theirs in zip(models, masters, strict=True):
        for parameter, master in zip(ours, theirs, strict=True):
            whole = master.numel() == parameter.numel()
            yield master, parameter, 0 if whole else part._get_model_param_range_map(parameter)["param"].start


def _part(model: Model, chunks: Sequence[Any], adam: Any, config: Any, sharded: bool, experts: bool) -> Any:
    groups = model.groups
    replicas, instance = (groups.expt_dp, groups.tp_ep_pp) if experts else (groups.dp_cp, groups.mp)
    if sharded:
        buffers = [chunk.expert_parallel_buffers if experts else chunk.buffers for chunk in chunks]
        optimizer = DistributedOptimizer(
            adam,
            config,
            None,
            _init_moments,
            model_chunks=chunks,
            per_model_buffers=dict(enumerate(buffers)),
            data_parallel_group=replicas,
            data_parallel_group_gloo=None,
            data_parallel_group_idx=instance.rank(),
            distributed_optimizer_instance_id=0,
        )
        optimizer.grad_stats_parallel_group = groups.intra_dist_opt
    else:
        if config.bf16:
            optimizer = Float16OptimizerWithFloat16Params(adam, config, None, _init_moments)
        else:
            optimizer = FP32Optimizer(adam, config, _init_moments)
        optimizer.grad_stats_parallel_group = instance
    optimizer.tp_group = groups.expt_tp if experts else groups.tp
    return optimizer


def _adam(parameters: Sequence[nn.Parameter], settings: AdamSettings, experts: bool) -> torch.optim.AdamW:
    # Megatron matches groups by these keys when it saves and loads.
    megatron: dict[str, Any] = {"default_config": True, "lr_mult": 1.0, "is_decoupled_lr": False}
    megatron |= {"is_expert_parallel": experts, "name": "experts" if experts else "dense"}
    matrices = {"params": [p for p in parameters if p.dim() > 1], "wd_mult": 1.0, **megatron}
    vectors = {"params": [p for p in parameters if p.dim() <= 1], "wd_mult": 0.0, "weight_decay": 0.0, **megatron}
    return torch.optim.AdamW(
        [group for group in (matrices, vectors) if group["params"]],
        lr=settings.lr,
        weight_decay=settings.weight_decay,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        # CUDA's default takes 4 bytes more per parameter while it steps, of all parameters at once.
        fused=all(p.is_cuda for p in parameters) or None,
    )


def _init_moments(adam: torch.optim.AdamW, config: Any = None) -> None:
    for group in adam.param_groups:
        for parameter in group["params"]:
            state = adam.state[parameter]
            if not state:
                state["exp_avg"] = torch.zeros_like(parameter.data)
                state["exp_avg_sq"] = torch.zeros_like(parameter.data)
