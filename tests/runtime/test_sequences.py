"""Ragged samples against lists of lists."""

from __future__ import annotations

import pytest
import torch

from runtime.passes.packs import width_multiple
from runtime.sequences import Sequences, padded, ranges, run_sums, take_runs, unpadded

PROMPTS = [[1, 2, 3], [4], [5, 6]]
RESPONSES = [[7], [], [8, 9]]


def test_places_of_tokens() -> None:
    s = Sequences.of(PROMPTS, RESPONSES)
    assert s.tokens.tolist() == [1, 2, 3, 7, 4, 5, 6, 8, 9]
    assert (s.lengths, s.starts, len(s)) == ((4, 1, 4), (0, 4, 5, 9), 3)
    assert s.tokens[s.of_response].tolist() == [7, 8, 9]
    assert s.tokens[s.mask].tolist() == [7, 8, 9]
    assert s.tokens[s.of_response - 1].tolist() == [3, 6, 8]
    assert s.tokens[s.last].tolist() == [7, 4, 9]
    assert s.positions.tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 3]
    assert s.texts() == list(zip(PROMPTS, RESPONSES, strict=True))


def test_samples_are_taken_in_the_order_given() -> None:
    s = Sequences.of(PROMPTS, RESPONSES)
    assert s.take([2, 0]).texts() == [(PROMPTS[2], RESPONSES[2]), (PROMPTS[0], RESPONSES[0])]
    assert take_runs(s.tokens, s.lengths, [1, 0]).tolist() == [4, 1, 2, 3, 7]
    empty = s.take([])
    assert len(empty) == 0 and empty.texts() == [] and not empty.of_response.numel() and not empty.last.numel()


def test_rows_are_filled_up_with_zeros() -> None:
    values = torch.tensor([1.0, 2.0, 3.0])
    rows = padded(values, [1, 0, 2])
    assert rows.tolist() == [[1, 0], [0, 0], [2, 3]]
    assert torch.equal(unpadded(rows, [1, 0, 2]), values)
    assert run_sums(values, [1, 0, 2]).tolist() == [1, 0, 5]
    assert padded(values[:0], [0]).tolist() == [[0]] and ranges([], []).tolist() == []


@pytest.mark.parametrize(
    ("tokens", "prompts", "responses", "words"),
    [
        (3, (2,), (2,), "not 4"),
        (2, (2, 0), (0, 0), "no token"),
        (2, (2,), (1, 0), "1 prompts, 2 responses"),
        (1, (2,), (-1,), "-1 tokens"),
    ],
)
def test_lengths_that_do_not_fit(tokens: int, prompts: tuple[int, ...], responses: tuple[int, ...], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        Sequences(torch.zeros(tokens, dtype=torch.int64), prompts, responses)


@pytest.mark.parametrize("cp", [1, 2, 3, 4])
@pytest.mark.parametrize("tp", [1, 2, 3, 4, 8])
def test_widths_are_the_least_that_cp_and_tp_can_cut(tp: int, cp: int) -> None:
    """A pack into 2 cp equal chunks, and the two chunks of a rank into tp equal parts."""
    legal = [width for width in range(1, 100) if not width % (2 * cp if cp > 1 else 1) and not width % (cp * tp)]
    assert width_multiple(tp, cp) == legal[0]
