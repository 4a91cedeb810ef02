"""Log-probabilities of given tokens, and entropies, from hidden states and a head whose vocabulary is cut over tp.

Temporaries of the vocabulary's width are made for a few rows at a time: a float32 copy of all logits would be the
largest tensor of a step, and on the CPU its page faults cost as much as its arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

ELEMENTS = {"cpu": 2**19, "cuda": 2**25}
"""Numbers of a float32 temporary, by device: what a cache holds, and what keeps a GPU busy."""
SCORED_ELEMENTS = 2**25
"""Logits that exist at a time when nothing is differentiated, or when they are computed once more."""
KEPT_ELEMENTS = 2**29
"""Logits of a micro-batch that are kept for its backward pass; those beyond are computed once more there."""


def token_logprobs_of(
    hidden: Tensor, weight: Tensor, tokens: Tensor, group: Any, vocab: int, temperature: float = 1.0, cap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and entropy of each distribution, under softmax(hidden weight^T / temperature);
    with a cap, logits become cap x tanh(logit / cap) first.

    hidden: [n, width], equal on all ranks of the tp `group`; its gradient is this rank's part of a sum over the group.
    weight: [stored vocabulary / tp, width], this rank's rows. tokens: [n]. vocab: entries beyond it are padding and
    have probability zero. Two float32 tensors [n], equal on all ranks and differentiable; the gradient of the entropy
    needs one more number per row. One maximum and one sum are exchanged.
    """
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        logprobs, entropy = _TokenLogProbs.apply(hidden, weight, tokens, group, vocab, temperature, cap)  # type: ignore[no-untyped-call]
        return logprobs, entropy
    size = max(1, SCORED_ELEMENTS // weight.shape[0])
    parts = [
        _Head(rows @ weight.t(), group, vocab, temperature, cap).logprobs(ids)
        for rows, ids in zip(torch.split(hidden, size), torch.split(tokens, size), strict=True)
    ]
    return torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])


class _Head:
    """Logits [n, stored vocabulary / tp] of this rank and the softmax over the whole vocabulary."""

    def __init__(self, logits: Tensor, group: Any, vocab: int, temperature: float, cap: float) -> None:
        self._cap = cap
        self._group = group
        self._temperature = temperature
        self._start = group.rank() * logits.shape[1]
        self._vocab = max(0, min(vocab - self._start, logits.shape[1]))
        self.take(logits)

    def take(self, logits: Tensor) -> None:
        """Have logits, for the first time or, the same ones, once more."""
        self.logits = capped_(logits, self._cap) if self._cap else logits
        self._real = self.logits[:, : self._vocab]
        rows = max(1, ELEMENTS[logits.device.type] // logits.shape[1])
        self._rows = [slice(at, at + rows) for at in range(0, len(logits), rows)]
        self._buffers = torch.empty(2, min(rows, len(logits)), self._vocab, device=logits.device)

    def drop(self) -> None:
        """Keep a few numbers per row and no logits."""
        del self.logits, self._real, self._buffers

    def logprobs(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies; keeps what `gradient` needs."""
        local, self._here = (
            tokens - self._start,
            (tokens >= self._start) & (tokens < self._start + self.logits.shape[1]),
        )
        self._local = local.where(self._here, 0)
        peak = self._peak()
        sums = torch.empty(3, len(tokens), device=self.logits.device)
        chosen = self._chosen().float() / self._temperature
        sums[0] = (chosen - peak).where(self._here, 0.0)
        for part in self._rows:
            shifted, weights = (buffer[: len(peak[part])] for buffer in self._buffers)
            self._shift(part, peak, shifted)
            torch.exp(shifted, out=weights)
            torch.sum(weights, 1, out=sums[1, part])
            sums[2, part] = _dot(weights, shifted)
        if self._group.size() > 1:
            dist.all_reduce(sums, group=self._group)
        total = sums[1].log()
        self._log_sum, self._entropy = peak + total, total - sums[2] / sums[1]
        return sums[0] - total, self._entropy

    def _chosen(self) -> Tensor:
        """Logits of the tokens, those of this rank."""
        return self.logits.gather(1, self._local[:, None]).squeeze(1)

    def _peak(self) -> Tensor:
        peak = torch.full((len(self.logits),), -torch.inf, device=self.logits.device)
        if self._real.shape[1]:
            peak = self._real.amax(1).float() / self._temperature
        if self._group.size() > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=self._group)
        return peak

    def _shift(self, part: slice, by: Tensor, out: Tensor) -> None:
        """Logits of some rows over the temperature, less a number per row."""
        if self._temperature == 1:
            torch.sub(self._real[part], by[part, None], out=out)
            return
        torch.div(self._real[part], self._temperature, out=out)
        out -= by[part, None]

    def gradient(self, of_logprobs: Tensor, of_entropy: Tensor | None) -> Tensor:
        """The gradient in the logits, in their own storage: (onehot - p) / temperature for each row, and
        -p (log p + entropy) / temperature where the entropy H = -sum p log p has one."""
        scale = of_logprobs / self._temperature
        of_chosen = scale * self._here
        if self._cap:
            of_chosen = of_chosen * (1 - (self._chosen().float() / self._cap).square())
        for part in self._rows:
            grad = self._buffers[0, : len(scale[part])]
            self._shift(part, self._log_sum, grad)  # log p
            by = -scale[part, None]
            if of_entropy is not None:
                spread = torch.add(grad, self._entropy[part, None], out=self._buffers[1, : len(grad)])
                by = spread.mul_(of_entropy[part, None] / -self._temperature).add_(by)
            grad.exp_().mul_(by)
            if self._cap:  # the slope of cap x tanh(x / cap), from its value
                grad.mul_(1 - (self._real[part].float() / self._cap).square())
            self._real[part] = grad
        self.logits[:, self._real.shape[1] :] = 0
        self.logits.scatter_add_(1, self._local[:, None], of_chosen.to(self.logits.dtype)[:, None])
        return self.logits


class _TokenLogProbs(torch.autograd.Function):
    """Keeps logits, up to `KEPT_ELEMENTS`, in the type of the model and turns them into their gradient in place."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, tokens: Tensor, group: Any, vocab: int, temperature: float, cap: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight)
        ctx.parts, found = [], []
        for rows, kept in _parts(len(hidden), weight.shape[0]):
            head = _Head(hidden[rows] @ weight.t(), group, vocab, temperature, cap)
            found.append(head.logprobs(tokens[rows]))
            if not kept:
                head.drop()
            ctx.parts.append((rows, kept, head))
        logprobs, entropy = (torch.cat(values) for values in zip(*found, strict=True))
        ctx.set_materialize_grads(False)
        return logprobs, entropy

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        if of_logprobs is None:
            of_logprobs = torch.zeros(len(hidden), device=hidden.device)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight: Tensor | None = None
        while ctx.parts:
            rows, kept, head = ctx.parts.pop()
            if not kept:
                head.take(hidden[rows] @ weight.t())
            grad = head.gradient(of_logprobs[rows], None if of_entropy is None else of_entropy[rows])
            del head
            if of_hidden is not None:
                torch.matmul(grad, weight, out=of_hidden[rows])
            if ctx.needs_input_grad[1]:
                of_weight = grad.t() @ hidden[rows] if of_weight is None else of_weight.addmm_(grad.t(), hidden[rows])
        return of_hidden, of_weight, None, None, None, None, None


def capped_(logits: Tensor, cap: float) -> Tensor:
    """cap x tanh(logit / cap), in place."""
    return logits.div_(cap).tanh_().mul_(cap)


def _parts(count: int, width: int) -> list[tuple[slice, bool]]:
    """Rows of logits that are made at a time, and whether they are kept. At least one part, which may be empty."""
    first = min(count, KEPT_ELEMENTS // width)
    size = max(1, SCORED_ELEMENTS // width)
    rest = [(slice(at, min(at + size, count)), False) for at in range(first, count, size)]
    return [(slice(0, first), True), *rest] if first or not rest else rest


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums over the last dimension of a x b, without their product in memory."""
    return (a.unsqueeze(-2) @ b.unsqueeze(-1)).flatten(-3)
