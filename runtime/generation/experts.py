"""A mixture of experts in generation: the tokens stay where they are, and every rank runs its own experts on them.

All tp ranks of a replica have the same tokens, and a run of ep ranks (ep divides tp) holds every expert once. A rank
adds up what its experts and its part of the shared expert say; the sum over tp, which a dense block needs too, makes
the block complete. So there is no exchange of tokens, and no number of tokens per expert that the host would wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.models.model import Model

Note = Callable[[Tensor], None]
"""Takes the experts that were chosen for each row, [n, k]."""


class LeanExperts:
    """The experts of one block: normed hidden states [n, hidden] -> this rank's part of the block's output, the same.
    `note` gets what every row chose, on every rank.

    Where tp is more than ep, the runs of ep ranks share the tokens out: run i of r has the rows i, i + r, ...
    """

    def __init__(self, model: Model, layer: Any) -> None:
        spec, layout = model.spec, model.layout
        assert layout.tp % layout.ep == 0, "replicas finish at different times"
        self._chosen, self._scaled = spec.experts_per_token, spec.normalize_gates
        self._experts = [(e.linear_fc1.weight, e.linear_fc2.weight) for e in layer.experts.local_experts]
        self._first = model.groups.ep.rank() * len(self._experts)
        self._run, self._runs = model.place.tp // layout.ep, layout.tp // layout.ep
        self._router, self._shared = layer.router.weight, layer.shared_experts
        self._activation, self._gated = model.config.activation_func, model.config.gated_linear_unit

    def __call__(self, x: Tensor, note: Note | None = None) -> Tensor:
        out = torch.zeros_like(x)
        chosen, gates = self._gates(x)
        if note is not None:
            note(chosen)
        mine = slice(self._run, None, self._runs)
        if len(x[mine]):
            (self._all if x.is_cuda else self._needed)(x[mine], chosen[mine], gates[mine], out[mine])
        if self._shared is not None:
            part = self._mlp(x, self._shared.linear_fc1.weight, self._shared.linear_fc2.weight)
            out += part * torch.sigmoid(F.linear(x, self._shared.gate_weight))
        return out

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

    def _all(self, x: Tensor, chosen: Tensor, gates: Tensor, out: Tensor) -> None:
        """Each expert on every row, with a gate of zero where it is not chosen: shapes that do not depend on values. A
        decoding step reads the weights of nearly all experts anyhow."""
        experts = torch.arange(self._first, self._first + len(self._experts), device=x.device)
        weights = (gates[..., None] * (chosen[..., None] == experts)).sum(1).to(x.dtype)
        for index, (first, second) in enumerate(self._experts):
            out += self._mlp(x, first, second) * weights[:, index, None]

    def _mlp(self, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
        inner = F.linear(x, first)
        if self._gated:
            gate, up = inner.chunk(2, -1)
            return F.linear(self._activation(gate) * up, second)
        return F.linear(self._activation(inner), second)


def expert_block(model: Model, layer: Any, total: Callable[[Tensor], None]) -> Callable[..., Tensor]:
    """(residual, normed, note) -> residual + the experts' output; `total` sums over tp in place."""
    experts = LeanExperts(model, layer)

    def block(residual: Tensor, x: Tensor, note: Note | None = None) -> Tensor:
        out = experts(x, note)
        total(out)
        return out.add_(residual)

    return block
