"""Blocks of the KV cache against counting them, token by token."""

from __future__ import annotations

import pytest

from plans.kvcache import cache_blocks, own_blocks, shared_blocks, token_bytes
from plans.library import load_model


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


def test_bytes_of_a_token() -> None:
    """Llama-2 70B: 80 layers of 8 key-value heads of 128 numbers, in bf16: 320 KiB."""
    assert token_bytes(load_model("llama2-70b"), 80, 1, 2) == 320 * 1024
    assert token_bytes(load_model("llama2-70b"), 20, 8, 2) == 10 * 1024
