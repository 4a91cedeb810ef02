"""Generation in every layout against transformers, and against itself in one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_models import build, layout_of, save_tiny
from torch import Tensor
from transformers import AutoModelForCausalLM

from plans.huggingface import spec_from_folder
from plans.layout import Layout
from runtime.batches.data import left_padded, read_prompts
from runtime.batches.tokenizer import Tokenizer
from runtime.groups import GroupCache
from runtime.models import installation
from runtime.models.model import Model
from runtime.passes.generation import Generated, generate
from runtime.passes.sampling import Sampling
from runtime.weights.hf import load_weights

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parents[1] / "fixtures"
FOLDER = FIXTURES / "tiny-llama"
SAMPLES, PROMPT, RESPONSE, EOS = 24, 8, 14, 1
GREEDY = Sampling(temperature=0)
SAMPLINGS = (Sampling(), Sampling(temperature=0.7, top_k=50, top_p=0.9))

# World size, degrees of the layout, groups in flight.
LAYOUTS = (
    (2, {"tp": 2}, 1),
    (2, {"pp": 2}, 1),
    (2, {"pp": 2}, 2),
    (2, {"pp": 2}, 5),
    (4, {"tp": 2, "pp": 2}, 1),
    (4, {"tp": 2, "pp": 2}, 2),
    (4, {"pp": 4}, 4),
    (4, {"dp": 2, "tp": 2}, 1),
    (4, {"dp": 2, "pp": 2}, 3),
)


def _prompts() -> tuple[Tensor, Tensor]:
    prompts = read_prompts(FIXTURES / "prompts.jsonl")[::8][:SAMPLES]
    return left_padded(prompts, Tokenizer.of_folder(FOLDER), PROMPT)


def _generate(model: Model, sampling: Sampling, groups: int = 1, **changes: Any) -> Generated:
    """All prompts, or the share of a data-parallel replica."""
    prompts, lengths = _prompts()
    share = torch.arange(SAMPLES).chunk(model.layout.dp)[model.place.dp]
    settings: dict[str, Any] = {"seed": 1, "iteration": 2, "stop_ids": [EOS], "pad_id": 0}
    return generate(
        model,
        prompts[share],
        lengths[share],
        share,
        response_tokens=RESPONSE,
        groups=groups,
        sampling=sampling,
        **(settings | changes),
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


def _plain(generated: Generated) -> dict[str, Any]:
    return {name: getattr(generated, name).numpy() for name in ("tokens", "mask", "logprobs", "lengths")}


def _whole(results: list[dict[str, Any]], layout: Layout) -> list[dict[str, Any]]:
    """The result of the whole batch as each rank of the first replica sees it; replicas are put together by rows."""
    replicas = [[results[rank] for rank in layout.ranks if layout.places[rank].dp == dp] for dp in range(layout.dp)]
    return [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*replicas, strict=True)
    ]


@pytest.fixture(scope="module")
def one_process() -> list[dict[str, Any]]:
    """Greedy, then each of SAMPLINGS."""
    return _on_model(1, {}, lambda model: [_plain(_generate(model, s)) for s in (GREEDY, *SAMPLINGS)])[0]


@pytest.fixture(scope="module")
def reference() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)


def _reference_logprobs(reference: Any, tokens: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """Log-probabilities [n, RESPONSE] of a forward without a cache, 0 outside the mask."""
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = reference(tokens, attention_mask=mask.long(), position_ids=positions).logits[:, :-1]
    found = (logits.float() / temperature).log_softmax(-1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return (found * mask[:, 1:])[:, -RESPONSE:]


def test_greedy_equals_transformers(one_process: list[dict[str, Any]], reference: Any) -> None:
    prompts, lengths = _prompts()
    mask = torch.arange(PROMPT) >= PROMPT - lengths[:, None]
    expected = reference.generate(prompts, attention_mask=mask.long(), max_new_tokens=RESPONSE, do_sample=False)
    padded = torch.nn.functional.pad(expected, (0, PROMPT + RESPONSE - expected.shape[1]))
    assert (one_process[0]["tokens"] == padded.numpy()).all()


@pytest.mark.parametrize("case", range(1 + len(SAMPLINGS)))
def test_logprobs_equal_a_forward_of_transformers(case: int, one_process: list[dict[str, Any]], reference: Any) -> None:
    got = {name: torch.as_tensor(value) for name, value in one_process[case].items()}
    temperature = ((GREEDY, *SAMPLINGS)[case]).temperature or 1.0
    expected = _reference_logprobs(reference, got["tokens"], got["mask"], temperature)
    torch.testing.assert_close(got["logprobs"], expected, atol=1e-5, rtol=0)


def test_rows_end_with_the_stop_token(one_process: list[dict[str, Any]]) -> None:
    for result in one_process:
        responses, lengths = result["tokens"][:, PROMPT:], result["lengths"]
        assert len(set(lengths.tolist())) > 3, "the test needs rows that finish at different times"
        for row, length, mask, logprobs in zip(
            responses, lengths, result["mask"][:, PROMPT:], result["logprobs"], strict=True
        ):
            assert EOS not in row[: length - 1] and (length == RESPONSE or row[length - 1] == EOS)
            assert (row[length:] == 0).all() and (logprobs[length:] == 0).all() and (logprobs[:length] < 0).all()
            assert mask[:length].all() and not mask[length:].any()
    assert (one_process[0]["mask"][:, :PROMPT].sum(1) == _prompts()[1].numpy()).all()


@pytest.mark.parametrize(("world", "degrees", "groups"), LAYOUTS)
def test_every_layout_gives_the_same_tokens(
    world: int, degrees: dict[str, int], groups: int, one_process: list[dict[str, Any]]
) -> None:
    results = _on_model(
        world, degrees, lambda model: [_plain(_generate(model, s, groups)) for s in (GREEDY, *SAMPLINGS)]
    )
    layout = layout_of(spec_from_folder(FOLDER), **degrees)
    for case, expected in enumerate(one_process):
        for result in _whole([rank[case] for rank in results], layout):
            for name in ("tokens", "mask", "lengths"):
                assert (result[name] == expected[name]).all(), name
            assert abs(result["logprobs"] - expected["logprobs"]).max() < 1e-5


def test_finished_rows_leave_the_batch() -> None:
    def work(model: Model) -> tuple[list[int], list[int]]:
        batches: list[int] = []
        model.chunks[0].embedding.register_forward_hook(lambda module, given, out: batches.append(out.shape[1]))
        lengths = _generate(model, GREEDY).lengths.tolist()
        return batches, lengths

    batches, lengths = _on_model(1, {}, work)[0]
    assert len(batches) == max(lengths)
    for position, batch in enumerate(batches):
        live = sum(length > position for length in lengths)
        assert live <= batch <= live * 8 / 7 + 1


def test_bfloat16() -> None:
    reference = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16)
    work = lambda model: _plain(_generate(model, Sampling(), groups=2))  # noqa: E731
    for result in _on_model(2, {"pp": 2}, work, dtype=torch.bfloat16):
        tokens, mask = torch.as_tensor(result["tokens"]), torch.as_tensor(result["mask"])
        expected = _reference_logprobs(reference, tokens, mask, temperature=1.0)
        torch.testing.assert_close(torch.as_tensor(result["logprobs"]), expected.float(), atol=0.15, rtol=0)


def test_seed_iteration_and_stop_ids() -> None:
    def work(model: Model) -> list[dict[str, Any]]:
        changes = [{}, {}, {"seed": 9}, {"iteration": 3}, {"stop_ids": []}, {"stop_ids": range(1, 2048)}]
        return [_plain(_generate(model, Sampling(), **change)) for change in changes]

    base, same, seed, iteration, endless, short = _on_model(1, {}, work)[0]
    assert (base["tokens"] == same["tokens"]).all()
    assert (base["tokens"] != seed["tokens"]).any() and (base["tokens"] != iteration["tokens"]).any()
    assert (endless["lengths"] == RESPONSE).all() and (short["lengths"] == 1).all()
    for row, length in enumerate(base["lengths"]):
        assert (endless["tokens"][row, : PROMPT + length] == base["tokens"][row, : PROMPT + length]).all()


def test_untied_model_with_a_padded_vocabulary(tmp_path: Path) -> None:
    reference = save_tiny("llama", tmp_path)
    prompts, lengths = torch.arange(1, 25).view(4, 6), torch.full((4,), 6)
    expected = reference.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=8, do_sample=False, eos_token_id=None
    )

    def work(model: Model) -> Any:
        assert model.spec.padded_vocab > model.spec.vocab
        common: dict[str, Any] = {"seed": 0, "iteration": 0, "stop_ids": (), "pad_id": 0, "response_tokens": 8}
        ids = torch.arange(4)
        hot = generate(model, prompts, lengths, ids, sampling=Sampling(temperature=50.0), **common)
        greedy = generate(model, prompts, lengths, ids, sampling=GREEDY, groups=2, **common)
        return greedy.tokens.numpy(), int(hot.tokens.max())

    for tokens, largest in _on_model(4, {"tp": 2, "pp": 2}, work, tmp_path):
        assert (tokens == expected.numpy()).all()
        assert largest < 250


def test_result_can_enter_a_loss_and_the_model_stays_in_training() -> None:
    def work(model: Model) -> bool:
        generated = _generate(model, Sampling())
        ratio = torch.zeros_like(generated.logprobs, requires_grad=True)
        (generated.logprobs * ratio).sum().backward()
        return bool(model.chunks[0].training) and not generated.tokens.is_inference()

    assert _on_model(1, {}, work) == [True]


def test_no_rows() -> None:
    def work(model: Model) -> tuple[int, ...]:
        none = torch.zeros(0, dtype=torch.long)
        generated = generate(
            model, none.view(0, PROMPT), none, none,
            response_tokens=RESPONSE, sampling=GREEDY, seed=0, iteration=0, stop_ids=(), pad_id=0,
        )  # fmt: skip
        return tuple(generated.tokens.shape)

    assert _on_model(2, {"pp": 2}, work) == [(0, PROMPT + RESPONSE)] * 2
