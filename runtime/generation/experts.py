"""A mixture of experts in generation: the tokens stay where they are, and every rank runs its own experts on them.

All tp ranks of a replica have the same tokens, and a run of ep ranks holds every expert once. A rank adds up what its
experts and its part of the shared expert say; the sum over tp, which a dense block needs too, makes the block complete.
So there is no number of tokens per expert that the host would wait for: a decoding step on CUDA sorts its tokens by
expert on the device, and one product for all experts (`F.grouped_mm`) reads there where the tokens of each end; so does
a pass over prompts. Where a run spans several replicas, each gets the tokens of all of them
(`runtime.generation.joined`), and what its experts say goes back to the replica of the token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.generation.joined import Joined
from runtime.models.experts import evenly_spaced
from runtime.models.model import Model

Note = Callable[[Tensor], None]
"""Takes the experts that were chosen for each row, [n, k]."""


WIDTH_BYTES = 16
"""The rows of what a grouped product reads begin at multiples of this."""


GROUPED_ROWS = 1024
"""Rows of a grouped product: each stands there once for every expert that it chose."""


def grouped_kernel(x: Tensor) -> bool:
    """Whether torch has a product of many experts with such rows that asks the host nothing: bf16 from compute
    capability 9.0 on, since torch 2.10. Elsewhere its fallback waits for the device, which no CUDA graph can hold."""
    if x.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm"):
        return False
    return torch.cuda.get_device_capability(x.device) >= (9, 0)


class LeanExperts:
    """The experts of one block: normed hidden states [n, hidden] -> this rank's part of the block's output, the same.
    `note` gets what every row chose, on every rank. `rows`: the most of them that a replica has, where replicas share
    experts and have different numbers (0: as many as this one).

    Where the ranks that have the same tokens are more than ep, their runs of ep ranks share the tokens out: run i of r
    has the rows i, i + r, ...
    """

    def __init__(self, model: Model, layer: Any) -> None:
        spec, layout = model.spec, model.layout
        self._joined = joined = Joined(model)
        self._chosen, self._scaled = spec.experts_per_token, spec.normalize_gates
        self._experts = [(e.linear_fc1.weight, e.linear_fc2.weight) for e in layer.experts.local_experts]
        self._together = _together(self._experts)
        self._first = model.groups.ep.rank() * len(self._experts)
        self._run = (joined.place * layout.tp + model.place.tp) // layout.ep
        self._runs = joined.count * layout.tp // layout.ep
        self._router, self._shared = layer.router.weight, layer.shared_experts
        self._activation, self._gated = model.config.activation_func, model.config.gated_linear_unit

    def __call__(self, x: Tensor, note: Note | None = None, rows: int = 0) -> Tensor:
        every = self._joined.gather(x, rows or len(x))
        chosen, gates = self._gates(every)
        first = self._joined.place * (rows or len(x))
        if note is not None:
            note(chosen[first : first + len(x)])
        if rows and self._joined.count > 1:  # experts have no biases: the rows of zeros behind a replica's stay zeros
            chosen = chosen.masked_fill(~every.any(-1, keepdim=True), -1)
        total, mine = torch.zeros_like(every), slice(self._run, None, self._runs)
        if len(every[mine]):
            self.way(x, rows)(every[mine], chosen[mine], gates[mine], total[mine])
        out = self._joined.scatter(total)[: len(x)]
        if self._shared is not None and len(x):
            part = self._mlp(x, self._shared.linear_fc1.weight, self._shared.linear_fc2.weight)
            out += part * torch.sigmoid(F.linear(x, self._shared.gate_weight))
        return out

    def way(self, x: Tensor, rows: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
        """How the experts run on tokens: (x [n, hidden], chosen [n, k], gates [n, k], out [n, hidden]), adds to out."""
        if x.is_cuda and self._together is not None and grouped_kernel(x):
            return self.grouped
        return self._all if x.is_cuda and not rows else self._needed  # prompts alone give `rows`, and may wait

    def _gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen experts of each row and their gates, [n, k] each: softmax over all experts, in float32."""
        logits = F.linear(x.float(), self._router.float())
        if self._scaled:  # scaling the chosen gates to a sum of 1 is a softmax over them alone
            best, chosen = logits.topk(self._chosen, -1)
            return chosen, best.softmax(-1)
        best, chosen = logits.softmax(-1).topk(self._chosen, -1)
        return chosen, best

    def _needed(self, x: Tensor, chosen: Tensor, gates: Tensor, out: Tensor) -> None:
        """Each expert on the rows that chose it."""
        for index, (first, second) in enumerate(self._experts):
            rows, place = (chosen == self._first + index).nonzero(as_tuple=True)
            if len(rows):
                part = self._mlp(x[rows], first, second)
                out.index_add_(0, rows, part * gates[rows, place, None].to(x.dtype))

    def grouped(self, x: Tensor, chosen: Tensor, gates: Tensor, out: Tensor) -> None:
        """Each expert on the rows that chose it, in one product: no shape depends on a value, and nothing waits. Rows
        that chose experts of other ranks come last; they are not computed, and what stands there is anything."""
        for part in zip(*(torch.split(tensor, GROUPED_ROWS) for tensor in (x, chosen, gates, out)), strict=True):
            self._grouped(*part)

    def _grouped(self, x: Tensor, chosen: Tensor, gates: Tensor, out: Tensor) -> None:
        assert self._together is not None
        first, second, backwards = self._together
        count, numbers = len(first), torch.arange(len(first), device=x.device)
        place = chosen.flatten() - self._first
        foreign = (place < 0) | (place >= count)
        place = (count - 1 - place if backwards else place).masked_fill_(foreign, count)
        order = place.argsort(stable=True)
        ends = torch.searchsorted(place[order], numbers, right=True).to(torch.int32)
        inner = F.grouped_mm(x[order // chosen.shape[1]], first.mT, offs=ends)
        said = F.grouped_mm(self._activated(inner), second.mT, offs=ends)
        # Back to the order of the rows: a sum over the k experts of a row, always in the same order.
        parts = torch.empty_like(said).index_copy_(0, order, said).mul_(gates.reshape(-1, 1).to(x.dtype))
        out += parts.masked_fill_(foreign[:, None], 0).view(*chosen.shape, -1).sum(1)

    def _all(self, x: Tensor, chosen: Tensor, gates: Tensor, out: Tensor) -> None:
        """Each expert on every row, with a gate of zero where it is not chosen: shapes that do not depend on values. A
        decoding step reads the weights of nearly all experts anyhow."""
        experts = torch.arange(self._first, self._first + len(self._experts), device=x.device)
        weights = (gates[..., None] * (chosen[..., None] == experts)).sum(1).to(x.dtype)
        for index, (first, second) in enumerate(self._experts):
            out += self._mlp(x, first, second) * weights[:, index, None]

    def _mlp(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        return F.linear(self._activated(F.linear(x, first)), second)

    def _activated(self, inner: Tensor) -> Tensor:
        gate, up = inner.chunk(2, -1) if self._gated else (inner, None)
        out: Tensor = self._activation(gate)
        return out if up is None else out * up


def _together(experts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor, bool] | None:
    """The weights of experts as one tensor each, [experts, out, in], and whether they stand there backwards; None where
    they lie in no such order or a grouped product cannot read them."""
    for backwards in (False, True):
        first, second = (evenly_spaced(kind[::-1] if backwards else kind) for kind in zip(*experts, strict=True))
        if first is not None and second is not None:
            wide = all(n * first.element_size() % WIDTH_BYTES == 0 for n in (*first.shape[1:], *second.shape[1:]))
            return (first, second, backwards) if wide else None
    return None


def expert_block(model: Model, layer: Any, total: Callable[[Tensor], None]) -> Callable[..., Tensor]:
    """(residual, normed, note, rows) -> residual + the experts' output; `total` sums over tp in place."""
    experts = LeanExperts(model, layer)

    def block(residual: Tensor, x: Tensor, note: Note | None = None, rows: int = 0) -> Tensor:
        out = experts(x, note, rows)
        if len(x):
            total(out)
        return out.add_(residual)

    return block
