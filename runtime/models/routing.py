"""Routers that balance their experts and replay what generation chose: Megatron's, with a loss per sequence that no
layout changes.

The loss of a layer and a sequence of n tokens is E x sum over the experts e of f_e x P_e (Fedus et al. 2021, equations
4 to 6, as `transformers` computes it): f_e is the number of its tokens that chose e, divided by n, and P_e the mean
probability of e before the choice. The loss of a minibatch is the mean over its sequences and layers; even routing
gives `experts_per_token`. Per sequence, because packs, micro-batches and replicas would cut any larger set of tokens
differently in every plan. The gradient goes through P alone. What is replayed counts in f, not what the router would
have chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.models.mcore import TopKRouter
from runtime.models.packed_attention import ReplayedTokens, RoutedTokens
from runtime.routes import expert_numbers


@dataclass(frozen=True)
class Balance:
    """How much the balance of experts counts. coefficient: of the loss; samples: those that count in the whole
    minibatch, over all replicas; counts: whether each sample of this replica does, empty for all."""

    coefficient: float
    samples: int
    counts: tuple[bool, ...] = ()


class Router(TopKRouter):  # type: ignore[misc]
    """Megatron's router of a layer.

    tokens, replayed: what it should know of the tokens that come next; the layer sets it, in recomputation too.
    balance: the sum of the losses of this rank's tokens since it was last read, without the coefficient.
    """

    def __init__(self, config: Any, pg_collection: Any = None) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.tokens: RoutedTokens | None = None
        self.replayed: ReplayedTokens | None = None
        self.balance: Tensor | float = 0.0
        self._tp = pg_collection.tp

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Gates and chosen experts [tokens, experts] from logits [tokens, 1, experts]."""
        self.router_replay = None if self.replayed is None else self._choice(self.replayed)
        probs, chosen = super().routing(logits, padding_mask)
        if self.tokens is None or not torch.is_grad_enabled():  # without gradients only to be recomputed
            return probs, chosen
        loss = self._loss(logits.flatten(0, 1), chosen, self.tokens)
        self.balance = self.balance + loss.detach()  # on the device: nothing waits for it
        return _Attached.apply(probs, loss * self.tokens.weight), chosen  # type: ignore[no-untyped-call]

    def _loss(self, logits: Tensor, chosen: Tensor, tokens: RoutedTokens) -> Tensor:
        """The sum over sequences of what this rank's tokens add to E x sum of f x P."""
        owners = self._own(tokens.owners)
        counts = logits.new_zeros(len(tokens.lengths), logits.shape[-1])
        counts.index_add_(0, owners, chosen.to(counts.dtype))
        if self.tp_cp_group.size() > 1:  # the tokens of a sequence lie on several ranks
            dist.all_reduce(counts, group=self.tp_cp_group)
        # The last row is the filling, whose length is infinite: it counts nothing.
        shares = counts / tokens.lengths[:, None].square()
        return logits.shape[-1] * (logits.softmax(-1, dtype=torch.float32) * shares[owners]).sum()

    def _choice(self, replayed: ReplayedTokens) -> _Choice:
        experts = replayed.experts[:, replayed.layers.index(self.layer_number)]
        return _Choice(self._own(experts), self._own(replayed.known))

    def _own(self, of_tokens: Tensor) -> Tensor:
        """The part of this rank, whose tokens sequence parallelism cuts."""
        return of_tokens.chunk(self._tp.size())[self._tp.rank()] if self.config.sequence_parallel else of_tokens


@dataclass(frozen=True, eq=False)
class _Choice:
    """What Megatron asks, in the place of its own `RouterReplay`, for the experts of tokens: those given [n, k], or
    where none are `known` [n], the best ones. The gates are then made of their scores as always: softmax before or
    behind the choice, or sigmoid, normalised and scaled."""

    experts: Tensor
    known: Tensor

    def get_replay_topk(
        self, scores: Tensor, topk: int, num_groups: Any, group_topk: Any, best: Callable[..., tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """Scores and numbers of the experts [n, topk] of tokens with scores [n, experts]."""
        own = best(scores, topk, num_groups=num_groups, group_topk=group_topk)[1]
        chosen = torch.where(self.known[:, None], expert_numbers(self.experts), own)
        return scores.gather(1, chosen), chosen


class _Attached(torch.autograd.Function):
    """The gates as they are; in the backward pass a loss gets a gradient of one."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, loss: Tensor) -> Tensor:
        return gates.view_as(gates)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.new_ones(())


def routers(modules: Iterable[Any]) -> list[Router]:
    """The routers of modules."""
    return [part for module in modules for part in module.modules() if isinstance(part, Router)]
