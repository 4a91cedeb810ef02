"""Which block of the KV cache holds which tokens of which slot. Host arithmetic, alike on every rank of a replica."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from plans.kvcache import own_blocks, shared_blocks

Prompt = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """The first `tokens` tokens of a block go to another one."""

    source: int
    target: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Admission:
    """What must be done for a newcomer: compute its prompt's keys (`prefill`), or copy those of another slot; `late`:
    the other slot's keys are computed for newcomers of the same round, so the copy comes after that."""

    prefill: bool = False
    copy: BlockCopy | None = None
    late: bool = False


class Blocks(Protocol):
    """Blocks of a number of slots. A round: `begin`, then `admit` and `move`; `retire` at any time."""

    block_tokens: int
    tables: list[list[int]]

    def begin(self) -> None: ...
    def admit(self, slot: int, prompt: Prompt, response_tokens: int) -> Admission | None: ...
    def retire(self, slot: int) -> None: ...
    def move(self, source: int, target: int) -> BlockCopy | None: ...


class RowBlocks:
    """One block for each slot, which holds a whole sequence: attention reads the cache as one strided tensor, which no
    kernel for scattered blocks is needed for. A prompt's keys are copied to every slot that continues it."""

    def __init__(self, slots: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.tables = [[slot] for slot in range(slots)]
        self._prompts: list[Prompt | None] = [None] * slots
        self._fresh: set[int] = set()

    def begin(self) -> None:
        """A new round: the keys of all slots are there."""
        self._fresh.clear()

    def admit(self, slot: int, prompt: Prompt, response_tokens: int) -> Admission:
        """Give a free slot to a sample. Keys of a sample that has ended serve as well while its slot is free."""
        tokens = len(prompt) - 1
        if not tokens or self._prompts[slot] == prompt:
            self._prompts[slot] = prompt
            return Admission()
        source = next((other for other, held in enumerate(self._prompts) if held == prompt), None)
        self._prompts[slot] = prompt
        late = source in self._fresh
        if source is None or late:
            self._fresh.add(slot)
        else:
            self._fresh.discard(slot)
        return Admission(prefill=True) if source is None else Admission(copy=BlockCopy(source, slot, tokens), late=late)

    def retire(self, slot: int) -> None:
        """A sample has ended; its keys stay until the slot is given away."""

    def move(self, source: int, target: int) -> BlockCopy:
        """Move a sample to a free slot."""
        self._prompts[target], self._prompts[source] = self._prompts[source], None
        return BlockCopy(source, target, self.block_tokens)


@dataclass
class _Held:
    shared: list[int]
    slots: set[int] = field(default_factory=set)


class PagedBlocks:
    """Blocks of a fixed number of tokens from one pool, found through a table per slot. Samples of a prompt share its
    whole blocks; the block in which it ends is copied. The block after the last one, `spare`, is for slots without a
    sample to write to."""

    def __init__(self, slots: int, blocks: int, block_tokens: int) -> None:
        self.block_tokens, self.spare = block_tokens, blocks
        self.tables: list[list[int]] = [[] for _ in range(slots)]
        self._free = deque(range(blocks))
        self._held: dict[Prompt, _Held] = {}
        self._prompts: list[Prompt | None] = [None] * slots
        self._fresh: set[Prompt] = set()

    def begin(self) -> None:
        """A new round: the keys of all prompts are there."""
        self._fresh.clear()

    def admit(self, slot: int, prompt: Prompt, response_tokens: int) -> Admission | None:
        """Give a free slot to a sample; None while there are too few free blocks."""
        size, held = self.block_tokens, self._held.get(prompt)
        shared = shared_blocks(len(prompt), size)
        own = own_blocks(len(prompt), response_tokens, size)
        if own + (0 if held else shared) > len(self._free):
            return None
        known = held is not None
        if held is None:
            held = self._held[prompt] = _Held(self._take(shared))
            self._fresh.add(prompt)
        mine = self._take(own)
        tail = len(prompt) - 1 - shared * size
        copy = None
        if known and tail:
            copy = BlockCopy(self.tables[min(held.slots)][shared], mine[0], tail)
        held.slots.add(slot)
        self._prompts[slot] = prompt
        self.tables[slot] = [*held.shared, *mine]
        return Admission(prefill=not known and len(prompt) > 1, copy=copy, late=prompt in self._fresh)

    def _take(self, count: int) -> list[int]:
        return [self._free.popleft() for _ in range(count)]

    def retire(self, slot: int) -> None:
        """A sample has ended: free its blocks, and those of its prompt if it was the last of it."""
        prompt = self._prompts[slot]
        assert prompt is not None
        held = self._held[prompt]
        held.slots.discard(slot)
        self._free.extend(self.tables[slot][len(held.shared) :])
        if not held.slots:
            self._free.extend(held.shared)
            del self._held[prompt]
        self._prompts[slot], self.tables[slot] = None, []

    def move(self, source: int, target: int) -> None:
        """Move a sample to a free slot: only the table changes."""
        prompt = self._prompts[source]
        assert prompt is not None
        self.tables[target], self.tables[source] = self.tables[source], []
        self._prompts[target], self._prompts[source] = prompt, None
        held = self._held[prompt].slots
        held.discard(source)
        held.add(target)


def flat_places(table: Sequence[int], tokens: int, block_tokens: int) -> list[int]:
    """Where the first `tokens` tokens of a slot lie in the pool seen as [blocks x block_tokens]."""
    return [table[i // block_tokens] * block_tokens + i % block_tokens for i in range(tokens)]
