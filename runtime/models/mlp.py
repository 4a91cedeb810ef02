"""MLPs whose gate keeps nothing but the product before it, and experts made of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.models.mcore import MLP, SequentialMLP, SharedExpertMLP
from runtime.models.norms import normed

Activation = Callable[[Tensor], Tensor]
_aten = torch.ops.aten
ACTIVATIONS: dict[str, Activation] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
}
"""Activation functions by the name that a `ModelSpec` gives them."""
_TANH = {"approximate": "tanh"}
_INTO: dict[Activation, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    ACTIVATIONS["silu"]: (_aten.silu.out, _aten.silu_backward.grad_input),
    ACTIVATIONS["gelu"]: (_aten.gelu.out, _aten.gelu_backward.grad_input),
    ACTIVATIONS["gelu_tanh"]: (partial(_aten.gelu.out, **_TANH), partial(_aten.gelu_backward.grad_input, **_TANH)),
    ACTIVATIONS["relu"]: (_aten.relu.out, partial(_aten.threshold_backward.grad_input, threshold=0)),
}
"""(input, out=) and (gradient of the output, input, grad_input=): values and gradients into memory that is there."""


class GatedMLP(MLP):  # type: ignore[misc]
    """Megatron's MLP with its own activation where it is gated, and a norm of what it adds to the residual where
    `post_norm` makes one."""

    def __init__(self, config: Any, *args: Any, post_norm: Any = None, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if post_norm is not None:
            self.post_norm = post_norm(config, config.hidden_size, eps=config.layernorm_epsilon)

    def forward(
        self, hidden_states: Tensor, per_token_scale: Tensor | None = None, **_: Any
    ) -> tuple[Tensor, Tensor | None]:
        inner, bias = self.linear_fc1(hidden_states)
        if bias is not None:
            inner = inner + bias
        activation = self.config.activation_func
        gated = self.config.gated_linear_unit
        inner = _Gated.apply(inner, activation) if gated else activation(inner)  # type: ignore[no-untyped-call]
        if per_token_scale is not None:  # the gates of an expert's tokens, float32
            inner = (inner * per_token_scale.unsqueeze(-1)).to(inner.dtype)
        out, bias = self.linear_fc2(inner)
        assert per_token_scale is None or bias is None, "experts have no bias"
        return normed(self, (out, bias))


class Experts(SequentialMLP):  # type: ignore[misc]
    """Megatron's experts, one after the other, as gated MLPs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for expert in self.local_experts:
            expert.__class__ = GatedMLP  # Megatron names the class itself


class SharedExpert(SharedExpertMLP, GatedMLP):  # type: ignore[misc]
    """Megatron's shared expert, whose forward pass calls that of the gated MLP."""


class _Gated(torch.autograd.Function):
    """activation(gate) x up of [..., gate and up]. Keeps its input alone, where autograd keeps the activated gate too;
    Megatron's own function even a copy of the other half, to which it adds an offset of zero."""

    @staticmethod
    def forward(ctx: Any, both: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(both)
        ctx.activation = activation
        gate, up = both.chunk(2, -1)
        return activation(gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (both,) = ctx.saved_tensors
        gate, up = both.chunk(2, -1)
        found = torch.empty_like(both)
        of_gate, of_up = found.chunk(2, -1)
        value, slope = _INTO[ctx.activation]
        value(gate, out=of_up).mul_(grad)
        torch.mul(grad, up, out=of_gate)
        slope(of_gate, gate, grad_input=of_gate)
        return found, None
