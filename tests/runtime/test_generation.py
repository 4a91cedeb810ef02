"""Generation in every layout, with any number of slots, against transformers, and against itself in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_models import build, layout_of, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from plans.errors import RealplanError
from plans.huggingface import spec_from_folder
from plans.layout import Layout
from runtime.batches.files import read_data_rows
from runtime.batches.tokenizer import Tokenizer
from runtime.generation import experts, products
from runtime.generation.generate import FlightLimits, Generated, generate
from runtime.generation.products import product_with
from runtime.generation.sampling import Sampling
from runtime.groups import GroupCache
from runtime.models import installation
from runtime.models.model import Model
from runtime.passes.optimizer import AdamSettings
from runtime.passes.training import Trainer
from runtime.weights.hf import load_weights

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = FIXTURES / "tiny-llama"
SAMPLES, PROMPT, RESPONSE, EOS = 24, 8, 14, 1
GREEDY = Sampling(temperature=0)
SAMPLINGS = (
    Sampling(),
    Sampling(temperature=0.7, top_k=50, top_p=0.9, min_p=0.01),
    Sampling(repetition_penalty=1.3),
)

# World size, degrees of the layout, limits of the generation.
LAYOUTS: tuple[tuple[int, dict[str, int], dict[str, int]], ...] = (
    (1, {}, {"slots": 5}),
    (1, {}, {"slots": 7, "burst": 3, "prefill": 10, "block": 4}),
    (2, {"tp": 2}, {"slots": 9}),
    (2, {"pp": 2}, {}),
    (2, {"pp": 2}, {"groups": 2, "slots": 8}),
    (2, {"pp": 2}, {"groups": 5, "burst": 1}),
    (4, {"tp": 2, "pp": 2}, {}),
    (4, {"tp": 2, "pp": 2}, {"groups": 2, "slots": 10, "block": 8}),
    (4, {"pp": 4}, {"groups": 4}),
    (3, {"pp": 3}, {"groups": 2}),
    (4, {"dp": 2, "tp": 2}, {"slots": 3}),
    (4, {"dp": 2, "pp": 2}, {"groups": 3, "slots": 6}),
)


def _prompts() -> list[list[int]]:
    """Prompts of mixed lengths, each of the first third three times."""
    texts = [row.text("prompt") for row in read_data_rows(FIXTURES / "prompts.jsonl")][::8]
    ids = Tokenizer.of_folder(FOLDER).encode_batch(texts)
    fitting = [row for row in ids if 0 < len(row) <= PROMPT]
    return [row for i, row in enumerate(fitting) for _ in range(3 if i < 4 else 1)][:SAMPLES]


def _generate(model: Model, sampling: Sampling, limits: dict[str, int] | None = None, **changes: Any) -> Generated:
    """All prompts, or the share of a data-parallel replica."""
    share = torch.arange(SAMPLES).chunk(model.layout.dp)[model.place.dp].tolist()
    settings: dict[str, Any] = {"seed": 1, "iteration": 2, "stop_ids": [EOS], "response_tokens": RESPONSE} | changes
    prompts = _prompts()
    return generate(
        model,
        [prompts[i] for i in share],
        share,
        sampling=sampling,
        limits=FlightLimits(**(limits or {})),
        **settings,
    )


def _on_model(
    world: int, degrees: dict[str, int], work: Callable[[Model], Any], folder: Path = FOLDER, **settings: Any
) -> list[Any]:
    """Results of `work(model)` on each rank of a world."""

    def run() -> Any:
        installation.install(CPU)
        model = build(GroupCache(CPU), layout_of(spec_from_folder(folder), **degrees), **settings)
        assert model is not None
        load_weights(model, folder)
        return work(model)

    return run_ranks(world, run)


Plain = dict[str, Any]


def _plain(generated: Generated) -> Plain:
    """Prompts, responses and log-probabilities, row by row."""
    texts, lengths = generated.sequences.texts(), generated.sequences.responses
    return {
        "prompts": [prompt for prompt, _ in texts],
        "responses": [response for _, response in texts],
        "logprobs": [part.tolist() for part in generated.logprobs.split(list(lengths))],
    }


def _whole(results: list[Plain], layout: Layout) -> list[Plain]:
    """The result of the whole batch as each rank of the first replica sees it; replicas are put together by rows."""
    replicas = [[results[rank] for rank in layout.ranks if layout.places[rank].dp == dp] for dp in range(layout.dp)]
    return [
        {name: [row for part in parts for row in part[name]] for name in parts[0]}
        for parts in zip(*replicas, strict=True)
    ]


def _check_same(found: Plain, expected: Plain) -> None:
    assert found["responses"] == expected["responses"]
    for ours, theirs in zip(found["logprobs"], expected["logprobs"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def one_process() -> list[Plain]:
    """Greedy, then each of SAMPLINGS."""
    return list(_on_model(1, {}, lambda model: [_plain(_generate(model, s)) for s in (GREEDY, *SAMPLINGS)])[0])


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def _continued(reference: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> list[list[int]]:
    """Greedy responses of transformers, prompt by prompt, with the stop token."""
    responses = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        kept = {"max_new_tokens": RESPONSE, "do_sample": False, "eos_token_id": EOS, "pad_token_id": 0} | settings
        made = reference.generate(ids, attention_mask=torch.ones_like(ids), **kept)
        responses.append(made[0, len(prompt) :].tolist())
    return responses


def _reference_logprobs(reference: Any, result: Plain, temperature: float) -> list[Tensor]:
    """Log-probabilities of a forward without a cache, row by row."""
    found = []
    for prompt, response in zip(result["prompts"], result["responses"], strict=True):
        ids = torch.tensor([prompt + response])
        with torch.no_grad():
            logits = reference(ids).logits[0, len(prompt) - 1 : -1].float() / temperature
        found.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1))
    return found


def test_greedy_equals_transformers(one_process: list[Plain], reference: Any) -> None:
    assert one_process[0]["responses"] == _continued(reference, _prompts())


def test_products_with_laid_out_weights(
    one_process: list[Plain], reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of the tiny model are too small to gain by it: a bound of none makes it lay out them all."""
    x, weight, bias = torch.randn(7, 400), torch.randn(500, 400), torch.randn(500)
    fitted, plain = product_with(weight, 1000), product_with(weight, 1)
    for rows, added in ((1, None), (7, None), (7, bias)):
        wanted = x[:rows].double() @ weight.double().t() + (0 if added is None else added.double())
        for product in (fitted, plain):
            torch.testing.assert_close(product(x[:rows], added).double(), wanted, atol=1e-4, rtol=1e-5)
    weight.zero_()
    assert fitted(x, None).any() and not plain(x, None).any(), "only the first has a copy"
    monkeypatch.setattr(products, "WORTH_NUMBERS", 1)
    monkeypatch.setattr(products, "WORTH_STEPS", 1)
    [found] = _on_model(1, {}, lambda model: _plain(_generate(model, GREEDY)))
    assert found["responses"] == _continued(reference, _prompts())
    _check_same(found, one_process[0])


def test_repetition_penalty_equals_transformers(reference: Any) -> None:
    sampling = Sampling(temperature=0, repetition_penalty=1.7)
    expected = _continued(reference, _prompts(), repetition_penalty=1.7)
    for found in _on_model(2, {"tp": 2}, lambda model: _plain(_generate(model, sampling, {"slots": 4}))):
        assert found["responses"] == expected


@pytest.mark.parametrize("case", range(1 + len(SAMPLINGS)))
def test_logprobs_equal_a_forward_of_transformers(case: int, one_process: list[Plain], reference: Any) -> None:
    temperature = ((GREEDY, *SAMPLINGS)[case]).temperature or 1.0
    expected = _reference_logprobs(reference, one_process[case], temperature)
    for ours, theirs in zip(one_process[case]["logprobs"], expected, strict=True):
        torch.testing.assert_close(torch.tensor(ours), theirs, atol=1e-5, rtol=0)


def test_rows_end_with_the_stop_token(one_process: list[Plain]) -> None:
    for result in one_process:
        lengths = [len(row) for row in result["responses"]]
        assert len(set(lengths)) > 3, "the test needs rows that finish at different times"
        for row, logprobs in zip(result["responses"], result["logprobs"], strict=True):
            assert EOS not in row[:-1] and (len(row) == RESPONSE or row[-1] == EOS)
            assert len(logprobs) == len(row) and max(logprobs) < 0
    assert one_process[0]["prompts"] == _prompts()


@pytest.mark.parametrize(("world", "degrees", "limits"), LAYOUTS)
def test_every_layout_gives_the_same_tokens(
    world: int, degrees: dict[str, int], limits: dict[str, int], one_process: list[Plain]
) -> None:
    """Of the two settings that do most with the scores of the whole vocabulary."""
    results = _on_model(world, degrees, lambda model: [_plain(_generate(model, s, limits)) for s in SAMPLINGS[1:]])
    layout = layout_of(spec_from_folder(FOLDER), **degrees)
    for case, expected in enumerate(one_process[2:]):
        for result in _whole([rank[case] for rank in results], layout):
            _check_same(result, expected)


@pytest.mark.parametrize(
    ("kind", "degrees"),
    [
        *((kind, {"tp": 2, "pp": 2}) for kind in ("llama", "llama3", "qwen2", "qwen3", "phi3")),
        ("mixtral", {"tp": 2, "pp": 2, "ep": 2}),
        ("qwen2-moe", {"tp": 2, "pp": 2}),  # two tp ranks with all experts share the tokens out
        ("qwen3-moe", {"tp": 2, "dp": 2, "ep": 2}),
        ("qwen3-moe-raw-gates", {"pp": 2}),
    ],
)
def test_every_architecture(kind: str, degrees: dict[str, int], tmp_path: Path) -> None:
    reference = save_tiny(kind, tmp_path)
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14], [5, 6, 7, 8, 9, 10], [200, 201]]
    expected = _continued(reference, prompts, eos_token_id=None, max_new_tokens=8)

    def work(model: Model) -> Any:
        assert model.spec.padded_vocab > model.spec.vocab
        common: dict[str, Any] = {"seed": 0, "iteration": 0, "response_tokens": 8, "sample_ids": range(5)}
        limits = FlightLimits(slots=2, groups=2)
        hot = generate(model, prompts, sampling=Sampling(temperature=50.0), **common)
        greedy = generate(model, prompts, sampling=GREEDY, limits=limits, **common)
        return [row for _, row in greedy.sequences.texts()], int(hot.sequences.tokens.max())

    for responses, largest in _on_model(prod(degrees.values()) // degrees.get("ep", 1), degrees, work, tmp_path):
        assert responses == expected
        assert largest < 250


@pytest.mark.parametrize(
    ("kind", "degrees"),
    [
        ("mixtral", {}),
        ("qwen2-moe", {"tp": 2}),  # two tp ranks with all experts share the tokens out
        ("qwen3-moe", {"tp": 2, "ep": 2}),
        ("qwen3-moe-raw-gates", {"dp": 2, "ep": 2}),  # replicas that share experts, one of them with fewer prompts
    ],
)
def test_one_product_for_all_experts(
    kind: str, degrees: dict[str, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoding of half precision on CUDA, before and after a trainer has moved the weights; the product is torch's
    for CPUs here."""
    reference = save_tiny(kind, tmp_path)
    prompts = [[5, 6, 7, 8, 9, 10], [11], [12, 13, 14]]
    expected = _continued(reference, prompts, eos_token_id=None, max_new_tokens=8)
    monkeypatch.setattr(experts.LeanExperts, "way", lambda block, x, rows: block.grouped)
    monkeypatch.setattr(experts, "GROUPED_ROWS", 5)

    def work(model: Model) -> Any:
        share = [i for i in range(3) if i % model.layout.dp == model.place.dp]
        common: dict[str, Any] = {"seed": 0, "iteration": 0, "response_tokens": 8, "sampling": GREEDY}
        found = []
        for _ in range(2):
            made = generate(model, [prompts[i] for i in share], sample_ids=share, **common)
            found.append(dict(zip(share, (row for _, row in made.sequences.texts()), strict=True)))
            Trainer(model, AdamSettings())
        return found

    world = prod(degrees.values()) // (degrees.get("ep", 1))
    for before, after in _on_model(world, degrees, work, tmp_path):
        assert before == after == {i: expected[i] for i in before}


def test_slots_refill_while_the_queue_lasts(one_process: list[Plain]) -> None:
    lengths = [len(row) for row in one_process[0]["responses"]]
    slots, burst = 4, 2

    def work(model: Model) -> int:
        return _generate(model, GREEDY, {"slots": slots, "burst": burst}).rows_computed

    computed = _on_model(1, {}, work)[0]
    assert sum(lengths) <= computed
    # A sample may run to the end of its burst, and the last samples leave slots empty, which then cost nothing.
    assert computed <= sum(-(-length // burst) * burst for length in lengths)


def test_a_prompt_is_computed_once_for_its_samples() -> None:
    prompt, tokens = list(range(2, 34)), []

    def work(model: Model) -> list[int]:
        from runtime.generation.lean import LeanStage

        embed = LeanStage.embed
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(LeanStage, "embed", lambda self, ids: tokens.append(len(ids)) or embed(self, ids))
            for block in (0, 8):
                generate(
                    model, [prompt] * 8, range(8), response_tokens=1, sampling=GREEDY, seed=0, iteration=0,
                    limits=FlightLimits(block=block),
                )  # fmt: skip
        return tokens

    assert _on_model(1, {}, work)[0] == [31, 8, 31, 8]


def test_prompts_of_newcomers_join_the_steps_of_others() -> None:
    """Of two slots one is free after two steps. The last block gives a row for each slot alone."""
    prompts, rows = [[2, 3, 4, 5, 6], [7, 8, 9], [10, 11, 12, 13]], list[tuple[int, int]]()

    def work(model: Model) -> Any:
        from runtime.generation.lean import LeanStage

        layers = LeanStage.layers

        def watched(self: Any, hidden: Any, *args: Any, **words: Any) -> Any:
            found = layers(self, hidden, *args, **words)
            rows.append((len(hidden), len(found)))
            return found

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(LeanStage, "layers", watched)
            generate(
                model, prompts, range(3), response_tokens=[2, 4, 2], sampling=GREEDY, seed=0, iteration=0,
                limits=FlightLimits(slots=2),
            )  # fmt: skip
        return rows

    assert _on_model(1, {}, work)[0] == [(2 + 4 + 2, 2), (2, 2), (2 + 3, 2), (2, 2)]


def test_responses_of_given_lengths_and_by_their_text() -> None:
    """A response ends where a function says, at the first such token, whatever the burst."""
    wanted = [1 + i % RESPONSE for i in range(SAMPLES)]

    def ended(tokens: Sequence[int], old: int) -> int | None:
        return next((n for n in range(old + 1, len(tokens) + 1) if sum(tokens[:n]) % 3 == 0), None)

    def work(model: Model) -> list[Plain]:
        plain = _generate(model, Sampling(), stop_ids=())
        given = _generate(model, Sampling(), {"slots": 6}, stop_ids=(), response_tokens=wanted)
        cut = [_generate(model, Sampling(), {"burst": burst}, stop_ids=(), ended=ended) for burst in (1, 5, 8)]
        return [_plain(x) for x in (plain, given, *cut)]

    plain, given, *cut = _on_model(1, {}, work)[0]
    assert given["responses"] == [row[:n] for row, n in zip(plain["responses"], wanted, strict=True)]
    for row, *found in zip(plain["responses"], *(x["responses"] for x in cut), strict=True):
        assert all(x == row[: ended(row, 0)] for x in found)


def test_bfloat16() -> None:
    reference = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16)
    work = lambda model: _plain(_generate(model, Sampling(), {"groups": 2}))  # noqa: E731
    for result in _on_model(2, {"pp": 2}, work, dtype=torch.bfloat16):
        for ours, theirs in zip(result["logprobs"], _reference_logprobs(reference, result, 1.0), strict=True):
            torch.testing.assert_close(torch.tensor(ours), theirs, atol=0.15, rtol=0)


def test_seed_iteration_and_stop_ids() -> None:
    def work(model: Model) -> list[list[list[int]]]:
        changes = [{}, {}, {"seed": 9}, {"iteration": 3}, {"stop_ids": []}, {"stop_ids": range(1, 2048)}]
        return [_plain(_generate(model, Sampling(), **change))["responses"] for change in changes]

    base, same, seed, iteration, endless, short = _on_model(1, {}, work)[0]
    assert base == same != seed
    assert base != iteration
    assert {len(row) for row in endless} == {RESPONSE} and {len(row) for row in short} == {1}
    for row, whole in zip(base, endless, strict=True):
        assert whole[: len(row)] == row


def test_result_can_enter_a_loss_and_the_model_stays_in_training() -> None:
    def work(model: Model) -> bool:
        generated = _generate(model, Sampling())
        ratio = torch.zeros_like(generated.logprobs, requires_grad=True)
        (generated.logprobs * ratio).sum().backward()
        return bool(model.chunks[0].training) and not generated.sequences.tokens.is_inference()

    assert _on_model(1, {}, work) == [True]


def test_no_rows_and_bad_input() -> None:
    def work(model: Model) -> list[str]:
        common: dict[str, Any] = {"sampling": GREEDY, "seed": 0, "iteration": 0}
        assert len(generate(model, [], [], response_tokens=RESPONSE, **common).sequences) == 0
        words = []
        for prompts, tokens, limits in (([[]], 4, {}), ([[3]], 0, {}), ([[3]], 4, {"slots": -1}), ([[3]], 10**13, {})):
            with pytest.raises(RealplanError) as error:
                generate(model, prompts, [0], response_tokens=tokens, limits=FlightLimits(**limits), **common)
            words.append(error.value.message)
        return words

    empty, zero, slots, large = _on_model(2, {"pp": 2}, work)[0]
    assert "prompt 0 has no tokens" in empty and "0 response tokens" in zero and "slots is -1" in slots
    assert "10000000000001 tokens" in large and "positions" in large
