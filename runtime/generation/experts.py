"""A mixture of experts in generation: the tokens stay where they are, and every rank runs its own experts on them.

All tp ranks of a replica have the same tokens, and a run of ep ranks holds every expert once. A rank adds up what its
experts and its part of the shared expert say; the sum over tp, which a dense block needs too, makes the block complete.
So there is no number of tokens per expert that the host would wait for. Where a run spans several replicas, each gets
the tokens of all of them (`runtime.generation.joined`), and what its experts say goes back to the replica of the token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.generation.joined import Joined
from runtime.models.model import Model

Note = Callable[[Tensor], None]
"""Takes the experts that were chosen for each row, [n, k]."""


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
            # Prompts alone give `rows`, and their passes may wait for the device.
            (self._all if x.is_cuda and not rows else self._needed)(every[mine], chosen[mine], gates[mine], total[mine])
        out = self._joined.scatter(total)[: len(x)]
        if self._shared is not None and len(x):
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
    """(residual, normed, note, rows) -> residual + the experts' output; `total` sums over tp in place."""
    experts = LeanExperts(model, layer)

    def block(residual: Tensor, x: Tensor, note: Note | None = None, rows: int = 0) -> Tensor:
        out = experts(x, note, rows)
        if len(x):
            total(out)
        return out.add_(residual)

    return block
