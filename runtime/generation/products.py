"""Products with a weight that many steps of one generation use: on the CPU the weight is laid out for them once.

A step multiplies a few rows with every weight. BLAS copies the weight into the layout of its kernels on each call,
which a few rows do not pay for; oneDNN takes a weight that is laid out already.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Product = Callable[[Tensor, Tensor | None], Tensor]
"""(x [n, in], bias [out] or None) -> x times the weight, [n, out]."""
WORTH_NUMBERS = 1 << 17
"""Numbers of a weight below which the longer call (30 us) outweighs the faster product."""
WORTH_STEPS = 48
"""Steps that a layout takes to pay for itself: laying out costs what about 15 products of 16 rows save, and samples may
end before their limit."""


def product_with(weight: Tensor, steps: float) -> Product:
    """The product with a weight [out, in], which `steps` calls will use and nobody changes meanwhile. Holds a copy of
    the weight where that is worth its time."""

    def plain(x: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    if steps < WORTH_STEPS or weight.numel() < WORTH_NUMBERS or not lays_out(weight):
        return plain
    held = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)

    def laid_out(x: Tensor, bias: Tensor | None) -> Tensor:
        if len(x) < 2:  # a product with a vector reads the weight once, whatever its layout
            return plain(x, bias)
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, held, bias, "none", [], "")
        return found

    return laid_out


def lays_out(weight: Tensor) -> bool:
    """Whether a weight can have a layout of its own: fp32 on a CPU for which torch was built with oneDNN."""
    built = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return built and weight.device.type == "cpu" and weight.dtype == torch.float32
