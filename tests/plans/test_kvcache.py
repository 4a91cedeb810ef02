"""Blocks of the KV cache against counting them, token by token."""

from __future__ import annotations

import pytest

from plans.kvcache import BLOCK_TOKENS, cache_blocks, own_blocks, shared_blocks, slots_per_replica


@pytest.mark.parametrize(
    ("prompt", "response", "block"), [(1, 1, 4), (4, 4, 4), (5, 4, 4), (9, 8, 4), (300, 1000, 256)]
)
def test_blocks_hold_what_samples_share_and_what_is_their_own(prompt: int, response: int, block: int) -> None:
    """A sample reads all its tokens but the last; it writes from the last token of its prompt on."""
    read = {token // block for token in range(prompt + response - 1)}
    written = {token // block for token in range(prompt - 1, prompt + response - 1)}
    assert own_blocks(prompt, response, block) == len(written)
    assert shared_blocks(prompt, block) == len(read - written)
    assert cache_blocks(6, prompt, response, 1, block) == 6 * len(read)
    assert cache_blocks(6, prompt, response, 3, block) == 6 * len(written) + 4 * len(read - written)


def test_blocks_of_groups_that_do_not_fill_and_of_blocks_on_gpus() -> None:
    """Seven slots of groups of three: three prompts begun, three more that samples still hold. A block has 256."""
    assert BLOCK_TOKENS == 256
    assert cache_blocks(7, 9, 8, 3, 4) == 7 * 2 + 6 * 2
    assert cache_blocks(7, 513, 256) == 7 * (2 + 1) and own_blocks(513, 256) == 1 and shared_blocks(513) == 2
    assert shared_blocks(512) == 1 and shared_blocks(257) == 1 and shared_blocks(256) == 0


@pytest.mark.parametrize(
    ("samples", "slots", "waves", "expected"), [(32, 0, 1, 32), (32, 8, 1, 8), (32, 64, 1, 32), (32, 0, 3, 11)]
)
def test_slots_are_those_of_the_plan_or_a_wave(samples: int, slots: int, waves: int, expected: int) -> None:
    assert slots_per_replica(samples, slots, waves) == expected
