"""How many blocks the KV cache of generation takes: what the runtime allocates and a cost model prices.

A replica's sequences live in slots; the keys and values of a slot lie in blocks of tokens. Whole blocks of a prompt are
held once for all samples of it in flight; the block where a prompt ends, and those of the response, are a slot's own.
The last token of a response is never read again and takes no room. All functions take arrays as well as numbers.
"""

from __future__ import annotations

import re

BLOCK_TOKENS = 256
"""Tokens of a block on GPUs: what the paged variable-length attention kernels can address."""
LEAST_TORCH = (2, 11)
"""The first torch whose variable-length attention takes a scale: half precision on GPUs needs it, packed as it runs."""
PAGED_TORCH = (2, 12)
"""The first torch whose variable-length attention reads keys and values in blocks."""
PREFILL_TOKENS = 8192
"""Most prompt tokens that are computed in one pass, unless a single prompt has more."""
BURST_STEPS = 8
"""Decoding steps between two looks at which sequences have ended."""
BURST_ALONE = 2
"""The same on a CPU whose stage is the whole model: a look there waits for nothing."""


def slots_per_replica(samples: int, slots: int = 0, waves: int = 1) -> int:
    """Slots of a replica with so many samples: what the plan says (0: nothing), or the rows of one of `waves`; never
    more than there are samples."""
    return min(samples, slots or -(-samples // waves))


def shared_blocks(prompt_tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Blocks of a prompt that its samples share: the token that a sample begins with is its own."""
    return (prompt_tokens - 1) // block_tokens


def own_blocks(prompt_tokens: int, response_tokens: int, block_tokens: int = BLOCK_TOKENS) -> int:
    """Blocks that a slot has to itself."""
    whole = -(-(prompt_tokens + response_tokens - 1) // block_tokens)
    return whole - shared_blocks(prompt_tokens, block_tokens)


def cache_blocks(
    slots: int, prompt_tokens: int, response_tokens: int, group_size: int = 1, block_tokens: int = BLOCK_TOKENS
) -> int:
    """Blocks of a replica's cache for the longest prompts and responses.

    A full house of groups of samples has slots / group_size prompts; as many again are still held by samples that take
    long. Newcomers wait where more would be held.
    """
    groups = -(-slots // group_size)
    prompts = slots if group_size == 1 else 2 * groups
    own = own_blocks(prompt_tokens, response_tokens, block_tokens)
    return slots * own + prompts * shared_blocks(prompt_tokens, block_tokens)


def cached_tokens(
    slots: int,
    groups: int,
    prompt_tokens: int,
    response_tokens: int,
    group_size: int = 1,
    block_tokens: int = BLOCK_TOKENS,
) -> int:
    """Tokens that the cache of a replica has room for.

    Its slots are cut into `groups` in flight, each with blocks of its own and one more that slots without a sample
    write to; with block_tokens 0 every slot is a row at its longest.
    """
    if not block_tokens:
        return slots * (prompt_tokens + response_tokens)
    blocks = cache_blocks(-(-slots // groups), prompt_tokens, response_tokens, group_size, block_tokens)
    return groups * (blocks + 1) * block_tokens


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version such as 2.11.0+cu130."""
    match = re.match(r"(\d+)\.(\d+)", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
