"""LoRA in Megatron's linear layers (`plans.lora`): adapters that are trained beside weights that are not.

What tensor parallelism cuts of an adapter is what it cuts of the weight (`plans.layout`); whatever passes between ranks
for adapters alone is `rank` numbers per token, or a gradient of `rank` columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from plans.lora import ADAPTERS, Lora
from runtime.models.mcore import (
    ColumnParallelLinear,
    RowParallelLinear,
    gather_from_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)


class LoraColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Megatron's column-parallel linear with an adapter: A whole on every tp rank, B cut like the weight's rows."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, lora: Lora, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.scale = lora.scale
        self.lora_a = _parameter(config, lora.rank, input_size)
        self.lora_b = _parameter(config, self.output_size_per_partition, lora.rank, cut=0)

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, bias = super().forward(input_, *args, **kwargs)
        thin = F.linear(input_, self.lora_a) * self.scale
        # Each rank's B sees all tokens; the gradient of `thin` is a sum over them, whose part for this rank's tokens is
        # that of A. Megatron then sums A over the ranks, which have different tokens.
        if self.sequence_parallel:
            thin = gather_from_sequence_parallel_region(thin, tensor_parallel_output_grad=True, group=self.tp_group)
        else:
            thin = _summed_gradient(thin, self.tp_group)
        return _added(out, thin, self.lora_b), bias


class LoraRowLinear(RowParallelLinear):  # type: ignore[misc]
    """Megatron's row-parallel linear with an adapter: A cut like the weight's columns, B whole on every tp rank. The
    adapter's part is added before the sum over tp, which so sums both."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, lora: Lora, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.scale = lora.scale
        self.lora_a = _parameter(config, lora.rank, self.input_size_per_partition, cut=1)
        self.lora_b = _parameter(config, output_size, lora.rank)

    def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Megatron's product of this rank, before the sum."""
        out = super()._forward_impl(input, weight, *args, **kwargs)
        # A rank's B sees this rank's part of the thin product alone, so that its gradient is a sum over tp: Megatron
        # makes it with sequence parallelism, once per step, and autograd without.
        b = self.lora_b if self.sequence_parallel else _summed_gradient(self.lora_b, self.tp_group)
        return _added(out, F.linear(input, self.lora_a) * self.scale, b)


def _parameter(config: Any, rows: int, cols: int, cut: int | None = None) -> nn.Parameter:
    """A part of an adapter, its values not yet set, with the marks by which Megatron knows what tp cuts."""
    parameter = nn.Parameter(torch.empty(rows, cols, dtype=config.params_dtype))
    if cut is None:
        setattr(parameter, "sequence_parallel", config.sequence_parallel)  # noqa: B010 - unknown to torch
    else:
        set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=cut, stride=1)
    return parameter


def _added(out: Tensor, thin: Tensor, b: Tensor) -> Tensor:
    """out + thin b^T in one product."""
    return torch.addmm(out.flatten(0, -2), thin.flatten(0, -2), b.t()).view(out.shape)


class _SummedGradient(torch.autograd.Function):
    """The input itself; its gradient is summed over a group. (Megatron's own function leaves the gradient of a
    transposed tensor as it was: it reduces a copy.)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _summed_gradient(x: Tensor, group: Any) -> Tensor:
    if group.size() == 1 or not torch.is_grad_enabled():
        return x
    summed: Tensor = _SummedGradient.apply(x, group)  # type: ignore[no-untyped-call]
    return summed


def freeze(chunk: Any) -> None:
    """Leave adapters alone to be trained. The embedding's output then asks for a gradient of its own: a recomputed
    block passes gradients to its parameters only where its input has one."""
    for name, parameter in chunk.named_parameters():
        parameter.requires_grad_(name.endswith(ADAPTERS))
    if chunk.pre_process and chunk.config.recompute_granularity == "full":
        chunk.embedding.register_forward_hook(
            lambda module, given, embedded: embedded.requires_grad_() if torch.is_grad_enabled() else None
        )


def adapter_of(linear: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """(out, x) -> out + this rank's part of the product of a linear's adapter with x [n, in], in place; without an
    adapter out itself. It sees the adapter as it stands when the function is made."""
    if not hasattr(linear, "lora_a"):
        return lambda out, x: out
    a, b, scale = linear.lora_a, linear.lora_b.t(), linear.scale
    return lambda out, x: out.addmm_(F.linear(x, a), b, alpha=scale)
