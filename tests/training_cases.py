"""A minibatch, a loss over it, and what Hugging Face says of it: what tests of training steps share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tiny_models import mixed_sequences

from plans.strategy import Recompute
from runtime.models.model import Model
from runtime.passes.forward import TokenOutput
from runtime.passes.optimizer import AdamSettings
from runtime.passes.packs import Batch

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
