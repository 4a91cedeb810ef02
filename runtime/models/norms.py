"""Norms that stand in the place of Transformer Engine's, and where a block has one of what it adds to the residual."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.models.mcore import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
    set_tensor_model_parallel_attributes,
)


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32 and rounded once. Keeps its input and one number per token for the
    backward pass. Its weight is marked for Megatron's sequence-parallel reduction."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        mark(self.weight, config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda or not (torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)):
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)  # one kernel on CUDA, forward and backward
        normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]
        return normed


class _RMSNorm(torch.autograd.Function):
    """What CUDA has a kernel for, elsewhere. With r = 1 / rms(x) and n = x r, the gradient in x of sum(g w n) is
    r (g w - n mean(g w n))."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps))
        ctx.save_for_backward(x, weight, root)
        return (wide * root).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, root = ctx.saved_tensors
        grad, normed = grad.float(), x.float() * root
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype)
        of_normed = grad * weight
        share = (of_normed * normed).mean(-1, keepdim=True)
        return of_normed.addcmul_(normed, share, value=-1).mul_(root).to(x.dtype), of_weight, None


class OffsetNorm(RMSNorm):
    """Gemma's: what is normed is multiplied by 1 + weight, in float32."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], None, self.eps)
        return (normed * (1.0 + self.weight.float())).to(x.dtype)


class WideNorm(nn.Module):
    """Root-mean-square norm of [tokens, ..., dim] over all heads together (OLMo 2), whose squares are summed over tp. A
    rank has the heads, and their weights, that stand last of its dimensions."""

    def __init__(self, config: Any, hidden_size: int, heads: int, group: Any, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps, self.group, self.width = eps, group, heads * hidden_size
        own = self.width // group.size()
        self.weight = nn.Parameter(torch.ones(own, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float().reshape(len(x), -1, len(self.weight))
        squares = wide.square().sum(-1, keepdim=True)
        if self.group.size() > 1:  # every rank reads the sum, so its gradient is a sum over ranks as well
            squares = reduce_from_tensor_model_parallel_region(squares, group=self.group)
            squares = copy_to_tensor_model_parallel_region(squares, group=self.group)
        normed = wide * torch.rsqrt(squares / self.width + self.eps)
        return (self.weight * normed.to(x.dtype)).view_as(x)


class LayerNorm(nn.Module):
    """Layer norm with a weight and a bias, both marked for Megatron's sequence-parallel reduction."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros_like(self.weight))
        for parameter in self.parameters():
            mark(parameter, config.sequence_parallel)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def mark(parameter: nn.Parameter, sequence_parallel: bool) -> None:
    """Tell Megatron whether the gradient of a parameter that all tp ranks hold is to be summed over them."""
    setattr(parameter, "sequence_parallel", sequence_parallel)  # noqa: B010 - an attribute that torch does not know


def normed(module: Any, output: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """An output and the bias that is still to be added to it, behind the module's `post_norm` where it has one."""
    norm = getattr(module, "post_norm", None)
    if norm is None:
        return output
    out, bias = output
    return norm(out if bias is None else out + bias), None
