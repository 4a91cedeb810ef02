"""Router replay: generation tells the experts of every token, and training visits them, against transformers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from plan_cases import tiny_run
from random_plans import KINDS, plan_alone
from ranks import run_ranks
from tiny_models import MIXTURE, build, checkpoint_tensors, layout_of, save_tiny, tiny_model
from torch import Tensor
from training_cases import TOTAL, full_batch, own_rows, parts_of, reference_output, split_case, weighted_loss

from plans.algorithms import algorithm_graph
from plans.huggingface import spec_from_folder
from plans.plan import ExecutionPlan
from plans.program import compile_program
from plans.strategy import Recompute
from runtime.batches.transfer import BatchStore
from runtime.executor import Executor
from runtime.generation.generate import FlightLimits, generate
from runtime.generation.sampling import Sampling
from runtime.groups import GroupCache
from runtime.job import prepare_job
from runtime.models import installation
from runtime.models.model import Model, named_shards
from runtime.models.routing import Balance, _Choice
from runtime.passes.forward import token_logprobs
from runtime.passes.optimizer import AdamSettings
from runtime.passes.packs import Batch
from runtime.passes.training import Trainer
from runtime.reports.metrics import Metrics, iteration_metrics
from runtime.reports.records import Recorder, RecordReader
from runtime.routes import Routes, expert_numbers
from runtime.weights.hf import load_weights
from runtime.weights.hf_names import hf_names
from runtime.weights.hf_parts import join

CPU = torch.device("cpu")
LAYERS, EXPERTS, CHOSEN = 4, 8, 2
CASES: tuple[dict[str, Any], ...] = (
    {"shard_optimizer": False},
    {"dp": 2, "tp": 2, "sequence_parallel": True, "ep": 4},
    {"tp": 2, "pp": 2, "sequence_parallel": True, "ep": 2, "recompute": Recompute.FULL, "shard_optimizer": False},
    {"dp": 2, "pp": 2, "vpp": 2, "ep": 2, "shard_optimizer": False},
    {"cp": 2, "dp": 2, "ep": 2},
    {"pp": 2, "layers_per_stage": (1, 3), "recompute": Recompute.SELECTIVE, "shard_optimizer": False},
)
BALANCE = Balance(0.2, len(full_batch().sequences))


def any_routes(lengths: Sequence[int], seed: int = 5) -> Routes:
    """Experts that no router would choose."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(max(n - 1, 0), LAYERS, EXPERTS) for n in lengths]
    drawn = [torch.rand(shape, generator=generator).argsort(-1)[..., :CHOSEN] for shape in shapes]
    return Routes(tuple(row.to(torch.uint8) for row in drawn))


class Gates:
    """Hooks on the routers of a transformers model. routes: where the tokens of one sample after the other have to go;
    None: where they like. chosen, probabilities: of each sample and layer, [tokens, experts chosen] and [tokens,
    experts]."""

    def __init__(self, model: Any, routes: Routes | None = None) -> None:
        self.routes, self.chosen, self.probabilities = routes, list[list[Tensor]](), list[list[Tensor]]()
        model.register_forward_pre_hook(lambda *_: self.chosen.append([]) or self.probabilities.append([]))
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._hook)

    def _hook(self, gate: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        logits, _, best = output
        if self.routes is not None:
            given = self.routes.rows[len(self.chosen) - 1][:, len(self.chosen[-1])]
            best = torch.cat([expert_numbers(given), best[len(given) :]])
        probabilities = logits.softmax(-1)
        gates = probabilities.gather(-1, best)
        if getattr(gate, "norm_topk_prob", True):
            gates = gates / gates.sum(-1, keepdim=True)
        self.chosen[-1].append(best)
        self.probabilities[-1].append(probabilities)
        return logits, gates, best

    def balance(self) -> Tensor:
        """The mean over samples and layers of E x sum of f x P (Fedus et al. 2021)."""
        found = []
        for chosen, probabilities in zip(self.chosen, self.probabilities, strict=True):
            for best, p in zip(chosen, probabilities, strict=True):
                shares = torch.bincount(best.flatten(), minlength=EXPERTS) / len(best)
                found.append(EXPERTS * (shares * p.mean(0)).sum())
        return torch.stack(found).mean()


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe", "qwen2-moe"])
def test_forward_and_backward_visit_the_given_experts(kind: str, tmp_path: Path) -> None:
    reference = save_tiny(kind, tmp_path)
    batch = full_batch()
    routes = any_routes(batch.sequences.lengths)
    gates = Gates(reference, routes)
    output = reference_output(reference, batch, value_head=False)
    loss, balance = weighted_loss(output, batch)[0], gates.balance()
    (loss + BALANCE.coefficient * balance).backward()
    grads = checkpoint_tensors(kind, {name: p.grad for name, p in reference.named_parameters()})
    own = reference_output(tiny_model(kind), batch, value_head=False).logprobs
    assert (own - output.logprobs).abs().max() > 0.1, "the routes do change what the model says"
    spec = spec_from_folder(tmp_path)

    def errors() -> dict[str, list[float]]:
        installation.install(CPU)
        groups, found = GroupCache(CPU), {}
        for case in CASES if kind == "mixtral" else CASES[2:3]:  # routers differ, what is cut does not
            degrees, settings, sharded = split_case(case)
            model = build(groups, layout_of(spec, **degrees), **settings)
            if model is not None:
                load_weights(model, tmp_path)
                found[str(case)] = compare(model, sharded)
        return found

    def compare(model: Model, sharded: bool) -> list[float]:
        whole = Batch(batch.sequences, {**batch.fields, "wanted": output.logprobs.detach()}, routes)
        mine = own_rows(model, whole)
        parts = parts_of(mine, 4)
        scored = token_logprobs(model, mine.sequences, micro_batches=parts, routes=mine.routes)
        worst = [float((scored - mine["wanted"]).abs().max())]
        trainer = Trainer(model, AdamSettings(lr=1e-3), shard_optimizer=sharded)
        terms = trainer.accumulate(mine, weighted_loss, parts, balance=BALANCE)
        assert terms["tokens"] == TOTAL
        worst += [abs(terms["loss"] - float(loss)), abs(terms["router_aux_loss"] - float(balance))]
        for parameter, tensor in [] if sharded else named_shards(model):
            names = hf_names(spec, parameter.name)
            want = join(spec, parameter, [grads[name] for name in names], model.layout.tp, model.place.tp)
            worst.append(float((tensor.main_grad - want).abs().max() / want.abs().max().clamp_min(1e-3)))
        return [*worst, trainer.update(1e-3)]

    norm = float(torch.nn.utils.get_total_norm([p.grad for p in reference.parameters()]))
    for rank in run_ranks(4, errors):
        for case, (*worst, found) in rank.items():
            assert max(worst) < 1e-5, (case, worst)
            assert found == pytest.approx(norm, rel=1e-4), case


PROMPTS = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [5, 6, 7, 8, 9, 10], [200, 201], [12, 13, 14], [12, 13, 14]]
LIMITS = (8, 3, 1, 8, 7, 5, 8)


@pytest.mark.parametrize(
    ("kind", "degrees", "limits", "experts"),
    [
        ("qwen3-moe", {}, {"slots": 3, "burst": 5}, EXPERTS),
        ("mixtral", {}, {"slots": 2, "burst": 3, "block": 4, "prefill": 3}, EXPERTS),
        ("qwen2-moe", {"tp": 2}, {}, EXPERTS),  # both ranks have all experts and share the tokens out
        ("mixtral", {"tp": 2, "pp": 2, "ep": 2}, {"slots": 4, "groups": 2}, EXPERTS),
        ("qwen3-moe", {"pp": 2, "layers_per_stage": (1, 3)}, {"slots": 3, "groups": 2, "block": 8}, EXPERTS),
        ("qwen3-moe", {}, {"slots": 3, "block": 8}, 260),
    ],
)
def test_generation_tells_the_experts_of_every_token(
    kind: str,
    degrees: dict[str, Any],
    limits: dict[str, int],
    experts: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Slots refill, samples share the keys of a prompt, and end in the midst of a burst, two of them by their text."""
    if experts != EXPERTS:
        monkeypatch.setattr("tiny_models.MIXTURE", MIXTURE | {"num_experts": experts, "moe_intermediate_size": 4})
    layers = LAYERS if experts == EXPERTS else 1
    reference = save_tiny(kind, tmp_path, num_hidden_layers=layers)
    spec = spec_from_folder(tmp_path)

    def ended(tokens: Sequence[int], old: int) -> int | None:
        return 4 if len(tokens) >= 4 and tokens[0] % 3 == 0 else None

    def work() -> list[tuple[list[int], Tensor]]:
        installation.install(CPU)
        model = build(GroupCache(CPU), layout_of(spec, **degrees))
        assert model is not None
        load_weights(model, tmp_path)
        found = generate(
            model, PROMPTS, range(7), response_tokens=LIMITS, sampling=Sampling(), seed=3, iteration=0, ended=ended,
            limits=FlightLimits(**limits), keep_routes=True,
        )  # fmt: skip
        assert found.routes is not None
        texts = [prompt + response for prompt, response in found.sequences.texts()]
        return list(zip(texts, found.routes.rows, strict=True))

    world = prod(n for axis, n in degrees.items() if axis in ("dp", "tp", "pp"))
    gates = Gates(reference)
    with torch.no_grad():
        (first, *others) = run_ranks(world, work)
        assert len({len(tokens) for tokens, _ in first}) > 3
        for number, (tokens, routes) in enumerate(first):
            assert routes.element_size() == (1 if experts <= 256 else 2) and routes.shape == (
                len(tokens) - 1,
                layers,
                CHOSEN,
            )
            reference(torch.tensor([tokens]))
            wanted = torch.stack(gates.chosen[number], 1)[:-1]
            assert expert_numbers(routes).sort(-1)[0].equal(wanted.sort(-1)[0]), number
    most = max(int(expert_numbers(routes).max()) for _, routes in first)
    assert most < experts and (experts == EXPERTS or most >= 256)
    for other in others:
        for (tokens, routes), (same, alike) in zip(first, other, strict=True):
            assert tokens == same and routes.equal(alike)


def played(plan: ExecutionPlan, folder: Path) -> tuple[Metrics, list[Tensor]]:
    """Metrics of the first iteration of a run on one process; how many tokens visited each expert in generation, in
    replays, and would have done so there by the router's own choice."""
    counts = [torch.zeros(EXPERTS), torch.zeros(EXPERTS), torch.zeros(EXPERTS)]
    folder.mkdir()
    run = tiny_run(folder, iterations=2, weights="random", data={"source": ""}, actor={"lr": 3e-2})

    def count(number: int, experts: Tensor) -> None:
        counts[number] += torch.bincount(expert_numbers(experts).flatten(), minlength=EXPERTS)

    def watch(monkeypatch: pytest.MonkeyPatch) -> None:
        put, choose = BatchStore.put, _Choice.get_replay_topk

        def keep(store: BatchStore, iteration: int, key: str, rows: Sequence[int], values: Any) -> None:
            put(store, iteration, key, rows, values)
            if isinstance(values, Routes):
                count(0, torch.cat(values.rows))

        def look(choice: _Choice, scores: Tensor, topk: int, *given: Any) -> tuple[Tensor, Tensor]:
            found = choose(choice, scores, topk, *given)
            count(1, found[1][choice.known])
            count(2, scores.topk(topk, -1)[1][choice.known])
            return found

        monkeypatch.setattr(BatchStore, "put", keep)
        monkeypatch.setattr(_Choice, "get_replay_topk", look)

    def rank() -> list[Tensor]:
        installation.install(CPU)
        with pytest.MonkeyPatch.context() as monkeypatch:
            watch(monkeypatch)
            recorder = Recorder(folder, 0, time.time())
            Executor(prepare_job(plan, run), GroupCache(CPU), CPU, recorder).run(run.iterations)
        return counts

    (found,) = run_ranks(1, rank)
    (first, _) = RecordReader(folder, (0,)).poll()
    return iteration_metrics(compile_program(plan), first), found


def test_a_run_trains_on_the_experts_of_its_generation(tmp_path: Path) -> None:
    """With the weights that generated, a replay changes nothing. With those of the second minibatch and of generation
    that runs ahead it does, and the experts are still those of the generation: for each token twice, in scoring and in
    training."""
    (kind,) = (kind for kind in KINDS if kind.replay and kind.staleness)
    plan = plan_alone(kind)
    graph = algorithm_graph(kind.algorithm, recompute_logprobs=True, staleness=kind.staleness)
    plain, _ = played(replace(plan, workload=replace(plan.workload, graph=graph)), tmp_path / "plain")
    replays, (made, replayed, own) = played(plan, tmp_path / "replayed")
    assert made.sum() > 0 and replayed.equal(2 * made) and not replayed.equal(own)
    for name in ("critic/values/mean", "critic/returns/mean", "critic/advantages/max"):
        assert replays[name] == pytest.approx(plain[name], abs=1e-6), name
    assert replays["actor/ppo_kl"] != pytest.approx(plain["actor/ppo_kl"], rel=1e-4)
