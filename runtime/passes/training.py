"""Training steps: Megatron's DDP and optimizers with explicit groups, and losses normalised by the caller."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plans.errors import RealplanError
from runtime.models.mcore import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from runtime.models.model import Model, moved, named_shards
from runtime.models.routing import Balance, routers
from runtime.passes.forward import LossFunction, MicroBatches, run_schedule, token_output
from runtime.passes.optimizer import AdamSettings, make_optimizer, masters_of, parts_of
from runtime.passes.packs import Batch, balanced, packs_of, replayed

_TERMS_BYTES = 2048


class NonFinite(RealplanError):
    """A number that training cannot go on with."""


class BadStep(NonFinite):
    """Such a number before it has changed a weight. Raised on every rank of a model alike, since losses and gradient
    norms are sums over all of them."""

    def __init__(self, what: str) -> None:
        hint = (
            "a smaller learning rate or KL coefficient; on_nonfinite=skip leaves out such optimizer steps, "
            "on_nonfinite=rollback goes back to the newest checkpoint and past the batch"
        )
        super().__init__(f"{what}; nothing was changed by this optimizer step", hint)
        self.what = what


@dataclass(frozen=True)
class StepStats:
    """One optimizer step, equal on all ranks: the loss terms summed over the minibatch, the global gradient norm before
    clipping, the learning rate used. skipped: why the step was left out, empty for one that was made."""

    terms: Mapping[str, float]
    grad_norm: float
    lr: float
    skipped: str = ""


@dataclass(frozen=True)
class Slot:
    """The optimizer state of elements [start, stop) of this rank's slice of a parameter, flat: the float32 master, and
    Adam's `exp_avg`, `exp_avg_sq` (of the master's shape) and `step`, none of them before the first step."""

    parameter: str
    start: int
    stop: int
    master: Tensor
    moments: dict[str, Tensor]


class Trainer:
    """Owns the gradient buffers and the optimizer state of a model, whose weights move into its buffers.

    shard_optimizer: masters and Adam's moments are sharded over dp (Megatron's distributed optimizer). bf16 models have
    float32 masters and gradients. Collective over the layout's ranks.

    steps: minibatches so far. kl_coefficient: of the role's next iteration where it adapts (`runtime.algorithms`),
    None before it has.
    """

    def __init__(self, model: Model, settings: AdamSettings, *, shard_optimizer: bool = True) -> None:
        self.model = model
        self.settings = settings
        self.sharded = shard_optimizer
        self.steps = 0
        self.kl_coefficient: float | None = None
        replicas = model.layout.dp * model.layout.cp
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, overlap_grad_reduce=replicas > 1, use_distributed_optimizer=shard_optimizer
        )
        self._chunks = [
            DistributedDataParallel(model.config, ddp, chunk, pg_collection=model.groups, disable_bucketing=i > 0)
            for i, chunk in enumerate(model.chunks)
        ]
        model.config.finalize_model_grads_func = _finalize
        if replicas > 1:  # gradients are reduced during the backward pass of the last micro-batch
            no_sync = [chunk.no_sync for chunk in self._chunks]
            model.config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
        self._optimizer = make_optimizer(model, self._chunks, settings, sharded=shard_optimizer)

    def step(
        self,
        batch: Batch,
        loss: LossFunction,
        micro_batches: MicroBatches | None = None,
        temperature: float = 1.0,
        *,
        skip_nonfinite: bool = False,
        balance: Balance | None = None,
    ) -> StepStats:
        """One optimizer step on this replica's part of a minibatch; without `micro_batches`, in one.

        The gradient is the sum over all micro-batches and replicas, so `loss` divides by global counts. A loss or
        gradient norm that is not finite raises BadStep, or with skip_nonfinite leaves weights and optimizer as they
        were. `balance`: that of experts is a part of the loss.
        """
        lr = self.settings.lr_at(self.steps)
        try:
            terms = self.accumulate(batch, loss, micro_batches, temperature, balance)
            for name, value in terms.items():
                if not math.isfinite(value):
                    raise BadStep(f"{name} is {value}")
            return StepStats(terms, self.update(lr), lr)
        except BadStep as error:
            if not skip_nonfinite:
                raise
            return StepStats({}, 0.0, lr, skipped=error.what)

    @torch.no_grad()
    def update(self, lr: float) -> float:
        """Clip the accumulated gradients and apply Adam; the global gradient norm before clipping. Raises BadStep
        before anything is applied. These are the parts of Megatron's own `step`, which applies whatever it finds."""
        optimizer = self._optimizer
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.prepare_grads()
        grad_norm = float(optimizer.get_grad_norm())
        if not math.isfinite(grad_norm):
            raise BadStep(f"the gradient norm is {grad_norm}")
        coefficient = self.settings.clip_norm / (grad_norm + 1e-6)  # Megatron's
        gradients = [p.grad for part in parts_of(optimizer) for p in part.get_parameters() if p.grad is not None]
        if coefficient < 1 and gradients:
            torch._foreach_mul_(gradients, coefficient)
        optimizer.step_with_ready_grads()
        self.steps += 1
        return grad_norm

    def accumulate(
        self,
        batch: Batch,
        loss: LossFunction,
        micro_batches: MicroBatches | None = None,
        temperature: float = 1.0,
        balance: Balance | None = None,
    ) -> dict[str, float]:
        """Gradients of a minibatch, reduced over replicas, in `main_grad` of the parameters; the summed loss terms."""
        for chunk in self._chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self._optimizer.zero_grad()
        parts = micro_batches or [range(len(batch.sequences))]
        batches = [batch.take(part) for part in parts]
        packs = packs_of(self.model, [part.sequences for part in batches])
        packs = [
            pack if part.routes is None else replayed(pack, part.routes, self.model)
            for pack, part in zip(packs, batches, strict=True)
        ]
        if balance is not None:
            layers = self.model.spec.layers
            packs = [balanced(pack, part, balance, layers) for pack, part in zip(packs, parts, strict=True)]

        def finish(hidden: Tensor, index: int) -> tuple[Tensor, Mapping[str, Tensor]]:
            value, terms = loss(token_output(self.model, hidden, packs[index], temperature), batches[index])
            return value, {name: term.detach().float() for name, term in terms.items()}

        terms = self._sum(run_schedule(self.model, self._chunks, packs, finish, forward_only=False))
        return terms if balance is None else {**terms, "router_aux_loss": self._balance(balance)}

    def _balance(self, balance: Balance) -> float:
        """The mean loss of a sequence and layer, without the coefficient, on every rank; each has its own tokens'."""
        total = torch.zeros(1, device=self.model.device)
        for router in routers(self.model.chunks):
            total += router.balance
            router.balance = 0.0
        for group in (self.model.groups.tp_dp_cp, self.model.groups.pp):
            dist.all_reduce(total, group=group)
        return float(total) / (balance.samples * self.model.spec.layers)

    def _sum(self, terms: list[Mapping[str, Tensor]]) -> dict[str, float]:
        """Loss terms over micro-batches and replicas, on every stage."""
        groups, pp = self.model.groups, self.model.layout.pp
        summed: dict[str, float] = {}
        if self.model.last_stage:
            names = sorted(terms[0])
            total = torch.stack([torch.stack([micro[name] for name in names]) for micro in terms]).sum(0)
            dist.all_reduce(total, group=groups.dp)
            summed = dict(zip(names, total.tolist(), strict=True))
        if pp > 1:
            summed = _broadcast_terms(summed, dist.get_global_rank(groups.pp, pp - 1), groups.pp, self.model.device)
        return summed

    def offload(self) -> None:
        """Move masters and moments to host memory and free the gradient buffers; the weights stay."""
        self._move_state(torch.device("cpu"))
        for chunk in self._chunks:
            chunk.offload_grad_buffers()

    def load(self) -> None:
        """Undo `offload`; gradients come back as zero."""
        self._move_state(self.model.device)
        for chunk in self._chunks:
            chunk.restore_grad_buffers()

    def _move_state(self, device: torch.device) -> None:
        for slot in self.slots():
            if self._own_masters:
                slot.master.data = moved(slot.master.data, device)
            for name in ("exp_avg", "exp_avg_sq"):
                if name in slot.moments:
                    slot.moments[name] = moved(slot.moments[name], device)

    def slots(self) -> Iterator[Slot]:
        """This rank's optimizer state, slice by slice; the tensors themselves, wherever they are."""
        names = {held: parameter.name for parameter, held in named_shards(self.model)}
        for part in parts_of(self._optimizer):
            for master, parameter, start in masters_of(part):
                state = part.optimizer.state[master]
                yield Slot(names[parameter], start, start + master.numel(), master, state)

    @torch.no_grad()
    def restore(self, steps: int, adam_steps: int, read: Callable[[Slot, str], Tensor]) -> None:
        """Take up optimizer state after the weights have been set. `read` gives the master or a moment of a slot, flat
        float32 on the CPU; without Adam steps there are no moments."""
        self.steps = steps
        fused = any(part.optimizer.defaults.get("fused") for part in parts_of(self._optimizer))
        for slot in self.slots():
            if self._own_masters:
                slot.master.data.copy_(read(slot, "master").view_as(slot.master))
            slot.moments.clear()
            for name in ("exp_avg", "exp_avg_sq") if adam_steps else ():
                slot.moments[name] = read(slot, name).to(slot.master.device).view_as(slot.master)
            if adam_steps:  # torch keeps the count in host memory where Adam is not fused
                device = self.model.device if fused else torch.device("cpu")
                slot.moments["step"] = torch.tensor(float(adam_steps), device=device)

    @property
    def adam_steps(self) -> int:
        """Steps that Adam has made; 0 before it has moments."""
        return max((int(slot.moments["step"]) for slot in self.slots() if "step" in slot.moments), default=0)

    @property
    def _own_masters(self) -> bool:
        return self.model.config.params_dtype is not torch.float32  # float32 masters are the weights themselves


def _broadcast_terms(terms: dict[str, float], source: int, group: Any, device: torch.device) -> dict[str, float]:
    """Loss terms of the last stage on every stage. As text: torch's broadcast of objects unpickles what peers send."""
    content = torch.zeros(_TERMS_BYTES, dtype=torch.uint8)
    if dist.get_rank() == source:
        text = json.dumps(terms).encode()
        assert len(text) <= _TERMS_BYTES, f"loss terms of {len(text)} bytes"
        content[: len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    sent = content.to(device)
    dist.broadcast(sent, src=source, group=group)
    found: dict[str, float] = json.loads(bytes(sent.tolist()).rstrip(b"\0"))
    return found


def _finalize(chunks: list[Any], num_tokens: Any, **groups: Any) -> None:
    """Reduce gradients over replicas, norms over sequence-parallel ranks, tied embeddings; no division by tokens."""
    finalize_model_grads(chunks, None, **groups)
