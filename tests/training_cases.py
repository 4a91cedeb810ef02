"""A minibatch, a loss over it, and what Hugging Face says of it: what tests of training steps share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_models import build, layout_of, mixed_sequences
from torch import Tensor

from plans.layout import Parameter
from plans.model import ModelSpec
from plans.strategy import Recompute
from runtime.groups import GroupCache
from runtime.models import installation
from runtime.models.model import Model, named_shards
from runtime.models.routing import Balance
from runtime.passes.forward import LossFunction, TokenOutput
from runtime.passes.optimizer import AdamSettings
from runtime.passes.packs import Batch
from runtime.passes.training import Trainer

SAMPLES = 8
CONTEXT_CASES: tuple[dict[str, Any], ...] = (
    {"cp": 2, "tp": 2, "sequence_parallel": True, "shard_optimizer": False},
    {"cp": 2, "pp": 2, "recompute": Recompute.FULL},
    {"cp": 2, "pp": 2, "vpp": 2},
    {"cp": 2, "dp": 2},
    {"cp": 2, "tp": 2},
    {"cp": 4, "recompute": Recompute.SELECTIVE},
)
SETTINGS = AdamSettings(lr=1e-3, clip_norm=0.1, warmup_steps=2, weight_decay=0.1)


def split_case(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], bool]:
    degrees = {k: v for k, v in case.items() if k in ("dp", "tp", "pp", "cp", "vpp", "ep", "layers_per_stage")}
    settings = {k: v for k, v in case.items() if k in ("sequence_parallel", "recompute")}
    return degrees, settings, case.get("shard_optimizer", True)


def full_batch() -> Batch:
    sequences = mixed_sequences(SAMPLES, prompt=8, response=8)
    return Batch(sequences, {"weight": torch.linspace(-1, 2, sum(sequences.responses))})


TOTAL = sum(full_batch().sequences.responses)


def weighted_loss(out: TokenOutput, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """A policy gradient over the global token count, and some entropy."""
    loss = -(out.logprobs * batch["weight"] + 0.3 * out.entropy * batch["weight"].abs()).sum() / TOTAL
    return loss, {"loss": loss, "entropy": out.entropy.sum(), "tokens": torch.tensor(len(batch["weight"]))}


def reference_output(model: Any, batch: Batch, value_head: bool) -> TokenOutput:
    """The same numbers from Hugging Face, sample by sample."""
    nothing = torch.empty(0)
    logprobs, entropy, values, scores = [], [], [], []
    for prompt, response in batch.sequences.texts():
        real, first = torch.tensor([prompt + response]), len(prompt) - 1
        if value_head:
            found = model.score(model.model(real).last_hidden_state)[0, :, 0]
            values.append(found[first:-1])
            scores.append(found[-1:])
            continue
        logits = model(real).logits[0, first:-1]
        logprobs.append(logits.log_softmax(-1).gather(-1, real[0, first + 1 :, None])[:, 0])
        entropy.append(-(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1))
    if value_head:
        return TokenOutput(nothing, nothing, torch.cat(values), torch.cat(scores))
    return TokenOutput(torch.cat(logprobs), torch.cat(entropy), nothing, nothing)


def own_rows(model: Model, batch: Batch) -> Batch:
    """Three samples on the first of two dp ranks, five on the other; of four, one, two, two and three."""
    starts = {1: (0, 8), 2: (0, 3, 8), 4: (0, 1, 3, 5, 8)}[model.layout.dp]
    return batch.take(range(starts[model.place.dp], starts[model.place.dp + 1]))


def parts_of(batch: Batch, count: int) -> list[list[int]]:
    """Micro-batches of a batch, dealt in turn; those beyond its samples are empty."""
    return [list(range(len(batch.sequences)))[i::count] for i in range(count)]


@dataclass
class Steps:
    """What one process found: losses, gradient norms and balances of experts of its steps, the first gradients, and the
    tensors before and after."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    balances: list[float] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    initial: dict[str, Tensor] = field(default_factory=dict)
    final: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Against:
    """A training to compare with `steps`: fill gives a model its weights; part is this rank's part of a parameter out
    of the tensors of `steps`; without_gradient: endings of names whose steps are of rounding alone."""

    steps: Steps
    fill: Callable[[Model], None]
    part: Callable[[Model, Parameter, Mapping[str, Tensor]], Tensor]
    loss_of: LossFunction = weighted_loss
    balance: Balance | None = None
    without_gradient: tuple[str, ...] = ()

    def errors(self, model: Model, sharded: bool) -> dict[str, float]:
        """How far first gradients, losses, norms and what the steps change are off at most on this rank."""
        trainer = Trainer(model, SETTINGS, shard_optimizer=sharded)
        trained = [(parameter, held) for parameter, held in named_shards(model) if not parameter.frozen]
        assert {slot.parameter for slot in trainer.slots()} <= {parameter.name for parameter, _ in trained}
        frozen = [(held, held.data.clone()) for parameter, held in named_shards(model) if parameter.frozen]
        worst = {"loss": 0.0, "norm": 0.0, "grad": self._gradients(trainer, model, trained, sharded), "update": 0.0}
        batch = own_rows(model, full_batch())
        parts = parts_of(batch, 4 if model.layout.pp > 1 else 2)  # so many that stages work on several at a time
        for step, (loss, norm) in enumerate(zip(self.steps.losses, self.steps.norms, strict=True)):
            stats = trainer.step(batch, self.loss_of, parts, balance=self.balance)
            if self.balance:
                assert stats.terms["router_aux_loss"] == pytest.approx(self.steps.balances[step], rel=1e-5)
            assert stats.terms["tokens"] == TOTAL
            worst["loss"] = max(worst["loss"], abs(stats.terms["loss"] - loss))
            worst["norm"] = max(worst["norm"], abs(stats.grad_norm - norm) / norm)
        for parameter, held in trained:
            if not parameter.name.endswith(self.without_gradient):
                want, start = (self.part(model, parameter, t) for t in (self.steps.final, self.steps.initial))
                worst["update"] = max(worst["update"], float((held.data - want).norm() / (want - start).norm()))
        assert all(torch.equal(held.data, before) for held, before in frozen)
        return worst

    def _gradients(self, trainer: Trainer, model: Model, trained: Sequence[tuple[Any, Any]], sharded: bool) -> float:
        """Of gradients before a step, on a rank that holds their whole sum."""
        batch, worst = own_rows(model, full_batch()), 0.0
        trainer.accumulate(batch, self.loss_of, parts_of(batch, 2), balance=self.balance)
        experts = model.groups.expt_dp.size() if model.spec.experts else 1
        if sharded and not experts == model.groups.dp_cp.size() == 1:
            return 0.0
        for parameter, held in trained:
            want = self.part(model, parameter, self.steps.grads)
            error = (held.main_grad - want).abs().max() / want.abs().max().clamp_min(1e-3)
            worst = max(worst, float(error))
        return worst


def check_layouts(spec: ModelSpec, cases: Sequence[dict[str, Any]], against: Against, update: float = 1e-3) -> None:
    """Train on four ranks in every layout; `update`: the share by which what the steps change may be off."""

    def errors() -> dict[str, dict[str, float]]:
        installation.install(torch.device("cpu"))
        groups, found = GroupCache(torch.device("cpu")), {}
        for case in cases:
            degrees, settings, sharded = split_case(case)
            model = build(groups, layout_of(spec, **degrees), **settings)
            if model is not None:
                against.fill(model)
                found[str(case)] = against.errors(model, sharded)
        return found

    bounds = {"grad": 1e-5, "loss": 2e-5, "norm": 1e-4, "update": update}
    for found in run_ranks(4, errors):
        for case, worst in found.items():
            assert all(worst[name] < bound for name, bound in bounds.items()), (case, worst)
