"""Training against one process of Hugging Face and torch: losses, gradients, norms and updated weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_models import build, checkpoint_tensors, layout_of, save_tiny, tiny_model
from training_cases import (
    CONTEXT_CASES,
    SAMPLES,
    SETTINGS,
    TOTAL,
    Against,
    Steps,
    check_layouts,
    full_batch,
    own_rows,
    parts_of,
    reference_output,
    weighted_loss,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from plans.huggingface import spec_from_folder
from plans.model import ModelSpec
from plans.strategy import Recompute
from runtime.groups import GroupCache
from runtime.models import installation
from runtime.models.model import Model, named_shards
from runtime.models.routing import Balance
from runtime.passes import logprobs as logprobs_module
from runtime.passes.forward import TokenOutput, token_logprobs
from runtime.passes.logprobs import token_logprobs_of
from runtime.passes.optimizer import AdamSettings
from runtime.passes.packs import Batch, pack
from runtime.passes.training import Trainer
from runtime.sequences import Sequences
from runtime.weights.hf import load_weights
from runtime.weights.hf_names import hf_names, hf_shape
from runtime.weights.hf_parts import join

CPU = torch.device("cpu")
CASES: tuple[dict[str, Any], ...] = (
    {},
    {"tp": 2},
    {"tp": 2, "sequence_parallel": True},
    {"pp": 2},
    {"dp": 2},
    {"dp": 2, "tp": 2, "sequence_parallel": True, "shard_optimizer": False},
    {"tp": 2, "pp": 2, "recompute": Recompute.FULL},
    {"tp": 2, "recompute": Recompute.SELECTIVE},
    {"pp": 2, "vpp": 2},
    {"dp": 2, "pp": 2, "vpp": 2},
)
FAMILY_CASES: tuple[dict[str, Any], ...] = (
    {},
    {"tp": 2, "pp": 2, "sequence_parallel": True, "recompute": Recompute.SELECTIVE},
    {"cp": 2, "tp": 2, "shard_optimizer": False},
)
FAMILIES = ("qwen3", "phi3", "gemma", "gemma2", "gemma3", "olmo2", "glm4")
# A value head is whole on every tp rank, on the last stage.
HEAD_CASES = (*(CASES[i] for i in (0, 2, 3, 4, 9)), *CONTEXT_CASES[:2])
# Stages of a model with five layers, which no degree but 1 and 5 divides.
UNEVEN: tuple[dict[str, Any], ...] = ({"pp": 2}, {"pp": 3})
EXPERT_CASES: tuple[dict[str, Any], ...] = (
    {},
    {"dp": 2, "ep": 2, "shard_optimizer": False},
    {"dp": 4, "ep": 2},
    {"tp": 2, "sequence_parallel": True},  # tp ranks hold the same experts and see other tokens
    {"dp": 2, "tp": 2, "sequence_parallel": True, "ep": 4},
    {"tp": 2, "pp": 2, "sequence_parallel": True, "ep": 2, "recompute": Recompute.FULL},
    {"dp": 2, "pp": 2, "vpp": 2, "ep": 2, "shard_optimizer": False},
    {"cp": 2, "tp": 2, "sequence_parallel": True, "ep": 4},
    {"cp": 2, "dp": 2, "ep": 2},
)
# Routers and shared experts differ, what is cut does not: one kind takes every case, the others each kind of cut.
ROUTER_CASES = tuple(EXPERT_CASES[i] for i in (0, 5, 8))
BALANCE = Balance(0.2, SAMPLES)
"""A coefficient that the gradients show."""
BALANCED = ("mixtral", "qwen3-moe-raw-gates")
DEEP = ("llama", "llama-tied", "reward", "mixtral")
"""Kinds whose layouts are played on two layers, and on four where they need these."""
LAYERS = {"five": 5, "gemma3": 4}  # of gemma3, one in three layers sees all tokens


def squared_errors(out: TokenOutput, batch: Batch) -> tuple[torch.Tensor, Mapping[str, torch.Tensor]]:
    """Errors of values and scores over the global token count."""
    loss = ((out.values - batch["weight"]) ** 2).sum() / TOTAL + ((out.scores - 1) ** 2).sum() / TOTAL
    return loss, {"loss": loss, "tokens": torch.tensor(len(batch["weight"]))}


LOSSES = {"reward": squared_errors}


def reference_balance(model: Any, batch: Batch) -> torch.Tensor:
    """The balancing loss of transformers, for each sequence and layer alone, and the mean of these."""
    spec, found = model.config, []
    experts = getattr(spec, "num_local_experts", None) or spec.num_experts
    for prompt, response in batch.sequences.texts():
        for gates in model(torch.tensor([prompt + response]), output_router_logits=True).router_logits:
            found.append(load_balancing_loss_func((gates,), experts, spec.num_experts_per_tok))
    return torch.stack(found).mean()


def reference_steps(kind: str, steps: int, layers: int = 4) -> Steps:
    """Some steps of torch's AdamW, in the names of the checkpoint."""
    model, found = tiny_model(kind, num_hidden_layers=layers), Steps()
    batch = full_batch()
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": SETTINGS.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, betas=(SETTINGS.beta1, SETTINGS.beta2), eps=SETTINGS.eps)
    found.initial = weights_of(kind, model)
    for step in range(steps):
        adam.zero_grad()
        loss, _ = LOSSES.get(kind, weighted_loss)(reference_output(model, batch, kind == "reward"), batch)
        if kind in BALANCED:
            balance = reference_balance(model, batch)
            found.balances.append(float(balance.detach()))
            (loss + BALANCE.coefficient * balance).backward()
        else:
            loss.backward()
        found.grads = found.grads or checkpoint_tensors(kind, {n: p.grad.clone() for n, p in model.named_parameters()})
        found.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), SETTINGS.clip_norm)))
        found.losses.append(float(loss.detach()))
        for group in adam.param_groups:
            group["lr"] = SETTINGS.lr_at(step)
        adam.step()
    found.final = weights_of(kind, model)
    return found


def weights_of(kind: str, model: Any) -> dict[str, torch.Tensor]:
    """A copy of the weights, in the names of the checkpoint."""
    return checkpoint_tensors(kind, {name: p.detach().clone() for name, p in model.named_parameters()})


def cases_of(kind: str, spec: ModelSpec) -> Sequence[dict[str, Any]]:
    """The layouts of a kind of model: all of them once, and for others those that differ. Chunks of stages that take
    turns need four layers; what two layers can show is shown by two."""
    named = {"five": UNEVEN, "mixtral": EXPERT_CASES, "llama-tied": CONTEXT_CASES, "reward": HEAD_CASES}
    own = named.get(kind) or (FAMILY_CASES if kind in FAMILIES else ROUTER_CASES if spec.experts else CASES)
    return [case for case in own if ("vpp" in case) == (kind in DEEP and spec.layers == 4)]


def part(model: Model, parameter: Any, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """This rank's part of a parameter out of Hugging Face tensors."""
    parts = [tensors[name] for name in hf_names(model.spec, parameter.name)]
    assert all(tuple(t.shape) == hf_shape(model.spec, parameter, i) for i, t in enumerate(parts))
    return join(model.spec, parameter, parts, model.layout.tp, model.place.tp)


@pytest.mark.parametrize(
    ("kind", "layers"),
    [
        *((kind, layers) for kind in DEEP for layers in (2, 4)),
        *((kind, LAYERS.get(kind, 2)) for kind in ("five", "qwen2-moe", "qwen3-moe", "qwen3-moe-raw-gates", *FAMILIES)),
    ],
)
def test_steps_equal_one_process(kind: str, layers: int, tmp_path: Path):
    """Two steps: the second has moments of the first, and another learning rate."""
    save_tiny(kind, tmp_path, num_hidden_layers=layers)
    spec = spec_from_folder(tmp_path)
    spec = spec.with_value_head() if kind == "reward" else spec
    against = Against(
        reference_steps(kind, 2, layers),
        lambda model: load_weights(model, tmp_path),
        part,
        LOSSES.get(kind, weighted_loss),
        BALANCE if kind in BALANCED else None,
        # Adam makes steps of rounding: what keys add where nothing is rotated has no gradient.
        ("qkv.bias",) if kind == "glm4" else (),
    )
    # A gate of a shared expert has 64 tiny gradients.
    check_layouts(spec, cases_of(kind, spec), against, update=2e-3 if spec.shared_ffn else 1e-3)


@pytest.mark.parametrize("sharded", [True, False])
def test_bfloat16_has_float32_masters(sharded: bool, tmp_path: Path):
    """Adam moves every weight by about the learning rate: below a bf16 rounding unit only the masters show it."""
    save_tiny("llama", tmp_path)
    norms = reference_steps("llama", steps=1).norms
    spec = spec_from_folder(tmp_path)
    settings = AdamSettings(lr=1e-6, clip_norm=0.1)

    def run() -> tuple[float, float, float]:
        installation.install(CPU)
        model = build(GroupCache(CPU), layout_of(spec, dp=2), dtype=torch.bfloat16)
        assert model is not None
        load_weights(model, tmp_path)
        trainer = Trainer(model, settings, shard_optimizer=sharded)
        weights = [tensor.data.clone() for _, tensor in named_shards(model)]
        before = {slot.parameter: slot.master.clone() for slot in trainer.slots()}
        batch = own_rows(model, full_batch())
        stats = trainer.step(batch, weighted_loss, parts_of(batch, 2))
        moved = [(slot.master.data - before[slot.parameter]).abs() for slot in trainer.slots()]
        assert all(move.dtype is torch.float32 for move in moved)
        changed = [(tensor.data != old).float() for (_, tensor), old in zip(named_shards(model), weights, strict=True)]
        return (
            stats.grad_norm,
            float(torch.cat([move.flatten() for move in moved]).median()),
            float(torch.cat([change.flatten() for change in changed]).mean()),
        )

    for norm, move, changed in run_ranks(2, run):
        assert norm == pytest.approx(norms[0], rel=0.02)
        assert move == pytest.approx(settings.lr, rel=0.05)
        assert changed < 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_restored_state_continues_the_run(dtype: torch.dtype, tmp_path: Path):
    save_tiny("llama", tmp_path)
    spec = spec_from_folder(tmp_path)

    def run() -> bool:
        installation.install(CPU)
        groups = GroupCache(CPU)

        def start() -> tuple[Model, Trainer]:
            model = build(groups, layout_of(spec, dp=2), dtype=dtype)
            assert model is not None
            load_weights(model, tmp_path)
            return model, Trainer(model, SETTINGS)

        model, trainer = start()
        batch = own_rows(model, full_batch())
        trainer.step(batch, weighted_loss)
        trainer.offload()
        trainer.load()
        saved = {
            (slot.parameter, name): tensor.data.clone().flatten()
            for slot in trainer.slots()
            for name, tensor in {"master": slot.master, **slot.moments}.items()
        }
        weights = [tensor.data.clone() for _, tensor in named_shards(model)]
        other, again = start()
        for (_, tensor), value in zip(named_shards(other), weights, strict=True):
            tensor.data.copy_(value)
        again.restore(trainer.steps, trainer.adam_steps, lambda slot, name: saved[slot.parameter, name])
        one, two = trainer.step(batch, weighted_loss), again.step(batch, weighted_loss)
        equal = [torch.equal(a, b) for (_, a), (_, b) in zip(named_shards(model), named_shards(other), strict=True)]
        return one == two and all(equal)

    assert run_ranks(2, run) == [True, True]


def test_training_and_scoring_alternate(tmp_path: Path):
    """Log-probabilities after a step come from the updated weights, and scoring leaves gradients alone."""
    save_tiny("llama", tmp_path)
    spec = spec_from_folder(tmp_path)

    def run() -> list[torch.Tensor]:
        installation.install(CPU)
        model = build(GroupCache(CPU), layout_of(spec, pp=2, vpp=2))
        assert model is not None
        load_weights(model, tmp_path)
        trainer = Trainer(model, SETTINGS)
        batch = full_batch()
        found = []
        for _ in range(2):
            found.append(token_logprobs(model, batch.sequences, micro_batches=parts_of(batch, 4)))
            trainer.step(batch, weighted_loss, parts_of(batch, 4))
        return found

    first, second = run_ranks(2, run)[0]
    assert float((first - second).abs().max()) > 1e-3


@pytest.mark.parametrize(("elements", "kept"), [(10**6, 10**6), (200, 10**6), (200, 250), (200, 10)])
def test_logprobs_and_entropy_equal_torch(elements: int, kept: int, monkeypatch: pytest.MonkeyPatch):
    """Values and gradients of a vocabulary in four parts, the last two beyond the real entries or nearly so; with all
    logits kept, some, and none."""
    monkeypatch.setattr(logprobs_module, "KEPT_ELEMENTS", kept)
    monkeypatch.setitem(logprobs_module.ELEMENTS, "cpu", elements)
    monkeypatch.setattr(logprobs_module, "SCORED_ELEMENTS", elements)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 8, generator=generator)
    weight = torch.randn(256, 8, generator=generator)
    tokens = torch.randint(0, 130, (10,), generator=generator)
    weights = torch.randn(10, generator=generator)
    want_hidden, want_weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    logs = ((want_hidden @ want_weight.t())[:, :130] / 0.8).log_softmax(-1)
    want = logs.gather(-1, tokens[:, None])[:, 0]
    entropy = -(logs.exp() * logs).sum(-1)
    (want * weights + entropy * weights.flip(0)).sum().backward()
    entropy = entropy.detach()

    def run() -> tuple[torch.Tensor, ...]:
        group = torch.distributed.group.WORLD
        part = weight.chunk(4)[group.rank()].clone().requires_grad_()
        own = hidden.clone().requires_grad_()
        found = token_logprobs_of(own, part, tokens, group, 130, 0.8)
        (found[0] * weights + found[1] * weights.flip(0)).sum().backward()
        with torch.no_grad():
            scored = token_logprobs_of(own, part, tokens, group, 130, 0.8)
        assert part.grad is not None and own.grad is not None
        return found[0].detach(), found[1].detach(), *scored, own.grad, part.grad

    results = run_ranks(4, run)
    for logprobs, spread, scored, scored_spread, _, _ in results:
        for one in (logprobs, scored):
            torch.testing.assert_close(one, want.detach())
        for one in (spread, scored_spread):
            torch.testing.assert_close(one, entropy)
    assert want_hidden.grad is not None and want_weight.grad is not None
    torch.testing.assert_close(sum(result[4] for result in results), want_hidden.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([result[5] for result in results]), want_weight.grad, rtol=1e-5, atol=1e-5)


def test_packs_are_filled_up():
    sequences = Sequences.of([[1, 2], [3]], [[4], [5, 6]])
    found = pack(sequences, 8)
    assert found.tokens.tolist() == [1, 2, 4, 3, 5, 6, 0, 0]
    assert found.positions.tolist() == [0, 1, 2, 0, 1, 2, 0, 0]
    assert (found.runs.lengths, found.runs.bounds.tolist()) == ((3, 3, 2), [0, 3, 6, 8])
    assert found.before.tolist() == [1, 3, 4]


def test_warm_up_is_linear():
    settings = AdamSettings(lr=1.0, warmup_steps=4)
    assert [settings.lr_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert AdamSettings(lr=1.0).lr_at(0) == 1.0


def test_rates_fall_to_the_last_step():
    linear = AdamSettings(lr=2.0, warmup_steps=2, schedule="linear", final_lr=0.1, total_steps=6)
    assert [linear.lr_at(step) for step in range(8)] == pytest.approx([1.0, 2.0, 1.55, 1.1, 0.65, 0.2, 0.2, 0.2])
    cosine = AdamSettings(lr=1.0, schedule="cosine", total_steps=4)
    torch_cosine = torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD([torch.zeros(1)], lr=1.0), 4)
    wanted = []
    for _ in range(4):
        torch_cosine.optimizer.step()
        torch_cosine.step()
        wanted.append(torch_cosine.get_last_lr()[0])
    assert [cosine.lr_at(step) for step in range(4)] == pytest.approx(wanted)
