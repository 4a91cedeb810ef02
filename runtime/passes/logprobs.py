"""Log-probabilities of given tokens, and entropies, from logits whose vocabulary is cut over tensor-parallel ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def token_logprobs_of(
    logits: Tensor, tokens: Tensor, group: Any, vocab: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each token, and entropy of each distribution, under softmax(logits / temperature).

    logits: [..., stored vocabulary / tp], this rank's columns. tokens: [...]. vocab: columns beyond it are padding and
    have probability zero. Returns two float32 tensors [...], equal on all ranks of the tp `group`. Differentiable in
    logits. One maximum and one sum are exchanged per call.
    """
    logprobs, entropy = _TokenLogProbs.apply(logits, tokens, group, vocab, temperature)  # type: ignore[no-untyped-call]
    return logprobs, entropy


class _TokenLogProbs(torch.autograd.Function):
    """d logprob / d x = onehot - p; d entropy / d x = -p (log p + entropy), for x = logits / temperature."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, group: Any, vocab: int, temperature: float
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        columns = logits.shape[-1]
        start = group.rank() * columns
        padding = slice(max(0, vocab - start), columns)
        scaled = logits.to(torch.float32, copy=True)
        if temperature != 1:
            scaled /= temperature
        scaled[..., padding] = -torch.inf
        peak = scaled.amax(-1)
        if group.size() > 1:
            dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        scaled -= peak.unsqueeze(-1)
        here = (tokens >= start) & (tokens < start + columns)
        local = (tokens - start).where(here, 0).unsqueeze(-1)
        chosen = scaled.gather(-1, local).squeeze(-1).where(here, 0.0)
        weights = scaled.exp()
        scaled[..., padding] = 0  # its weight is 0 already; 0 x -inf would make the mean NaN
        mean = _dot(weights, scaled)
        sums = torch.stack([chosen, weights.sum(-1), mean])
        if group.size() > 1:
            dist.all_reduce(sums, group=group)
        chosen, total, mean = sums
        entropy = total.log() - mean / total
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(weights.div_(total.unsqueeze(-1)), here, local, entropy)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return chosen - total.log(), entropy

    @staticmethod
    def backward(
        ctx: Any, of_logprobs: Tensor | None, of_entropy: Tensor | None
    ) -> tuple[Tensor, None, None, None, None]:
        probabilities, here, local, entropy = ctx.saved_tensors
        of_logprobs = torch.zeros_like(entropy) if of_logprobs is None else of_logprobs / ctx.temperature
        grad = probabilities * -of_logprobs.unsqueeze(-1)
        grad.scatter_add_(-1, local, (of_logprobs * here).unsqueeze(-1))
        if of_entropy is not None:
            logs = torch.special.xlogy(probabilities, probabilities)
            grad -= (logs + probabilities * entropy.unsqueeze(-1)) * (of_entropy / ctx.temperature).unsqueeze(-1)
        return grad.to(ctx.dtype), None, None, None, None


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Sums over the last dimension of a x b, without their product in memory."""
    return (a.unsqueeze(-2) @ b.unsqueeze(-1)).flatten(-3)
