"""Sampled tokens follow the distribution they should, and depend on nothing but the key."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from scipy.stats import chi2_contingency, chisquare
from torch import Tensor
from transformers import MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TopKLogitsWarper, TopPLogitsWarper

from plans.errors import RealplanError
from runtime.generation.sampling import Chooser, Sampling, mark_seen, sample_keys, step_seeds

VOCAB, PADDED = 41, 48
DRAWS = 40_000


class Alone:
    """A tensor-parallel group of one."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def _logits() -> Tensor:
    logits = torch.randn(PADDED, generator=torch.Generator().manual_seed(0)) * 1.5
    logits[VOCAB:] = 20.0
    return logits


def _seeds(ids: Tensor, seed: int = 3, position: int = 0) -> Tensor:
    return step_seeds(sample_keys(seed, 7, ids), torch.full_like(ids, position))


def _draw(
    sampling: Sampling, position: int = 0, ids: Tensor | None = None, seed: int = 3, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    ids = torch.arange(DRAWS) if ids is None else ids
    chooser = Chooser(sampling, VOCAB, PADDED, Alone(), torch.device("cpu"))
    return chooser(_logits().repeat(len(ids), 1), _seeds(ids, seed, position), seen)


def _counts(tokens: Tensor) -> Any:
    return np.bincount(tokens.numpy(), minlength=PADDED)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.6),
        Sampling(top_k=7),
        Sampling(top_p=0.7),
        Sampling(temperature=1.3, top_k=20, top_p=0.8),
        Sampling(min_p=0.1),
        Sampling(temperature=1.2, top_k=30, top_p=0.9, min_p=0.08),
    ],
)
def test_frequencies_are_those_of_transformers_warpers(sampling: Sampling) -> None:
    scores = (_logits()[None, :VOCAB] / sampling.temperature).double()
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(torch.zeros(1, 1), scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(torch.zeros(1, 1), scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(torch.zeros(1, 1), scores)
    expected = scores.softmax(-1)[0].numpy()
    counts = _counts(_draw(sampling)[0])
    assert counts[VOCAB:].sum() == 0 and counts[: len(expected)][expected == 0].sum() == 0
    support = expected > 0
    assert chisquare(counts[:VOCAB][support], expected[support] * DRAWS).pvalue > 1e-3


def test_positions_samples_and_seeds_are_independent() -> None:
    first = _draw(Sampling())[0]
    others = [_draw(Sampling(), position=1)[0], _draw(Sampling(), seed=4)[0], first.roll(1)]
    for other in others:
        table = np.zeros((PADDED, PADDED))
        np.add.at(table, (first.numpy(), other.numpy()), 1)
        common = _counts(first) > 1500
        assert chi2_contingency(table[common][:, common]).pvalue > 1e-3


def test_a_row_does_not_depend_on_its_batch() -> None:
    tokens, logprobs = _draw(Sampling())
    some = torch.tensor([17, 3, 39_999])
    again, again_logprobs = _draw(Sampling(), ids=some)
    assert torch.equal(again, tokens[some])
    assert torch.allclose(again_logprobs, logprobs[some])


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=0.5, top_k=3, top_p=0.9), Sampling(temperature=0)]
)
def test_logprobs_are_those_of_the_whole_softmax(sampling: Sampling) -> None:
    tokens, logprobs = _draw(sampling, ids=torch.arange(50))
    whole = (_logits()[:VOCAB].double() / (sampling.temperature or 1.0)).log_softmax(-1)
    assert torch.allclose(logprobs.double(), whole[tokens], atol=1e-5)
    if sampling.greedy:
        assert (tokens == whole.argmax()).all()


def test_repetition_penalty_is_that_of_transformers() -> None:
    """Of the choice; the log-probability stays that of the model."""
    sampling, seen = Sampling(temperature=0.9, repetition_penalty=1.8), torch.zeros(DRAWS, PADDED, dtype=torch.uint8)
    marked = torch.tensor([1, 7, 12, 30])
    for token in marked:
        mark_seen(seen, token.expand(DRAWS), 0)
    mark_seen(seen, torch.full((DRAWS,), 99), 0)  # another rank's token
    assert seen.sum(1).eq(len(marked)).all()
    tokens, logprobs = _draw(sampling, seen=seen)
    scores = RepetitionPenaltyLogitsProcessor(1.8)(marked[None], _logits()[None, :VOCAB].clone()) / 0.9
    expected = scores.double().softmax(-1)[0].numpy()
    assert chisquare(_counts(tokens)[:VOCAB], expected / expected.sum() * DRAWS).pvalue > 1e-3
    whole = (_logits()[:VOCAB].double() / 0.9).log_softmax(-1)
    assert torch.allclose(logprobs.double(), whole[tokens], atol=1e-5)


@pytest.mark.parametrize("ranks", [4, 6])
def test_parts_of_the_vocabulary_choose_as_the_whole(ranks: int) -> None:
    """Six parts of the padded vocabulary: the last one is padding."""
    cases = [Sampling(), Sampling(temperature=0), Sampling(temperature=0.8, top_k=5, top_p=0.9, min_p=0.05)]
    whole = [_draw(sampling, position=2, ids=torch.arange(200)) for sampling in cases]

    def part() -> list[tuple[Any, Any]]:
        size, seeds = PADDED // ranks, _seeds(torch.arange(200), position=2)
        own = _logits().repeat(200, 1).split(size, dim=1)[dist.get_rank()]
        made = [Chooser(sampling, VOCAB, size, dist.group.WORLD, torch.device("cpu")) for sampling in cases]
        chosen = [chooser(own.clone(), seeds) for chooser in made]
        return [(tokens.numpy(), logprobs.numpy()) for tokens, logprobs in chosen]

    for rank in run_ranks(ranks, part):
        for (tokens, logprobs), (expected, expected_logprobs) in zip(rank, whole, strict=True):
            assert (tokens == expected.numpy()).all()
            assert np.allclose(logprobs, expected_logprobs.numpy(), atol=1e-5)


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
    ],
)
def test_illegal_values(values: dict[str, Any], word: str) -> None:
    with pytest.raises(RealplanError, match=word):
        Sampling(**values)
