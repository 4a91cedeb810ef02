"""Gradients of the runtime's own modules, against finite differences and against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from runtime.models.mlp import ACTIVATIONS, _Gated
from runtime.models.modules import _Rotate
from runtime.models.norms import _RMSNorm


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_gradient_of_a_gate(name: str) -> None:
    both = torch.randn(5, 14, dtype=torch.float64, requires_grad=True)
    activation = ACTIVATIONS[name]
    assert torch.autograd.gradcheck(lambda x: _Gated.apply(x, activation), (both,))
    gate, up = both.chunk(2, -1)
    assert torch.equal(_Gated.apply(both, activation), activation(gate) * up)


@pytest.mark.parametrize("rotated", [8, 4])
def test_the_gradient_of_a_rotation(rotated: int) -> None:
    angles = torch.randn(3, 1, 1, rotated // 2, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    rotation = torch.stack([torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)])
    x = torch.randn(3, 1, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _Rotate.apply(x, rotation), (x,))
    half = rotated // 2
    first, second = x[..., :half], x[..., half:rotated]
    turned = torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., rotated:]], -1)
    torch.testing.assert_close(_Rotate.apply(x, rotation), turned)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_root_mean_square_norm_is_torchs(dtype: torch.dtype) -> None:
    x, weight, grad = torch.randn(5, 3, 16), torch.randn(16), torch.randn(5, 3, 16)
    found = []
    for norm in (lambda x, w: _RMSNorm.apply(x, w, 1e-5), lambda x, w: F.rms_norm(x, (16,), w, 1e-5)):
        leaves = [value.to(dtype).requires_grad_() for value in (x, weight)]
        out = norm(*leaves)
        out.backward(grad.to(dtype))
        found.append((out, *(leaf.grad for leaf in leaves)))
    limit = 1e-5 if dtype is torch.float32 else 2e-2
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, atol=limit, rtol=limit)
