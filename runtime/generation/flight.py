"""A group of slots in flight: its samples on the host, its static buffers on the device, its decoding step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from runtime.generation.attention import (
    Pool,
    gathered_attention,
    joined_attention,
    paged_attention,
    prefill_attention,
    row_attention,
    row_places,
    table_places,
)
from runtime.generation.blocks import Blocks, PagedBlocks, Prompt, flat_places
from runtime.generation.lean import Attend, LeanStage
from runtime.generation.sampling import Chooser, mark_seen, step_seeds


@dataclass
class Live:
    """A sample in a slot: its number in the batch, its prompt, how many tokens it may have, and what it has.
    routes: once it has ended, where they are asked for, those of this stage's layers (`runtime.routes`)."""

    sample: int
    prompt: Prompt
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    routes: Tensor | None = None

    @property
    def left(self) -> int:
        """Tokens that it may still get."""
        return self.limit - len(self.tokens)

    @property
    def position(self) -> int:
        """Position of the newest token, whose keys the next step computes."""
        return len(self.prompt) - 1 + len(self.tokens)


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts end to end, without their last tokens, which are the first to decode: what a pass computes keys and
    values of. lengths: tokens of each. tokens, positions, and places in the flattened pool: int64 [n]."""

    lengths: tuple[int, ...]
    tokens: Tensor
    positions: Tensor
    places: Tensor

    @classmethod
    def of(cls, newcomers: Sequence[tuple[int, Live]], blocks: Blocks, device: torch.device) -> Prompts:
        """Those of samples, each with its slot."""
        prompts = [(blocks.tables[slot], live.prompt[:-1]) for slot, live in newcomers]
        tokens = [token for _, prompt in prompts for token in prompt]
        positions = [position for _, prompt in prompts for position in range(len(prompt))]
        places = [at for table, prompt in prompts for at in flat_places(table, len(prompt), blocks.block_tokens)]
        rows = torch.tensor([tokens, positions, places], device=device)
        return cls(tuple(len(prompt) for _, prompt in prompts), *rows)

    def attention(self, stage: LeanStage, pool: Pool) -> Attend:
        """Attention inside the prompts, whose keys and values are stored in `pool`."""
        return prefill_attention(stage, pool, self.places, self.lengths)


class Flight:
    """Slots of a replica that go through the pipeline together. The samples in them stand in the first slots, so that a
    step computes `count` rows; a slot without a sample computes on what it finds.

    Static buffers, of which a step reads and writes the first rows: tokens, positions, bounds (the last position with
    room), tables; hidden states from and for the neighbouring stages; values, the tokens chosen with their
    log-probabilities, float32 [slots, 2]. Those of a whole burst, of which `_turn` counts the steps, so that recorded
    steps differ: seeds [burst, 2, slots], and the values that have landed [burst, slots, 2].
    """

    def __init__(
        self,
        stage: LeanStage,
        blocks: Blocks,
        pool: Pool,
        rotation: Tensor,
        chooser: Chooser | None,
        burst: int,
    ) -> None:
        slots, model = len(blocks.tables), stage.model
        self.lives: list[Live | None] = [None] * slots
        self.blocks, self.pool, self._stage, self._chooser, self.rotation = blocks, pool, stage, chooser, rotation

        def buffer(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.device)

        self.tokens, self.positions, self._bounds = buffer(slots), buffer(slots), buffer(slots)
        self._turn, self._seeds = buffer(1), buffer(burst, 2, slots, dtype=torch.int32)
        self._landed = buffer(burst, slots, 2, dtype=torch.float32)
        self._tables = buffer(slots, 1)
        self.values = buffer(slots, 2, dtype=torch.float32)
        self.inbox, self.outbox = (
            buffer(slots, model.spec.hidden, dtype=model.config.params_dtype)
            if there
            else buffer(0, dtype=model.config.params_dtype)
            for there in (not model.first_stage, not model.last_stage)
        )
        penalised = chooser is not None and chooser.sampling.penalised
        width = model.spec.padded_vocab // model.layout.tp
        self._seen = buffer(slots, width, dtype=torch.uint8) if penalised else None
        self.count = self._columns = self._steps = 0

    def begin(self, keys: Tensor, steps: int, rows: int) -> None:
        """Bring the state of the slots to the device for a burst of steps that compute `rows`, of which the last may be
        without a sample; `keys` [samples, at least one] are those of all samples."""
        lives = [live for live in self.lives if live is not None]
        assert all(live is not None for live in self.lives[: len(lives)]), "samples stand in the first slots"
        assert len(lives) <= rows <= len(self.lives)
        self.count, idle = rows, rows - len(lives)
        newest = [(live.tokens or live.prompt)[-1] for live in lives]
        positions = [live.position for live in lives]
        bounds = [len(live.prompt) + live.limit - 2 for live in lives]
        samples = [live.sample for live in lives]
        state = torch.tensor([part + [0] * idle for part in (newest, positions, bounds, samples)])
        state = state.to(self.tokens.device)
        for target, values in zip((self.tokens, self.positions, self._bounds), state, strict=False):
            target[: self.count].copy_(values)
        first = torch.tensor([len(live.tokens) for live in lives] + [0] * idle, device=state.device)
        ahead = torch.arange(steps, device=state.device)[:, None] + first
        seeds = step_seeds(keys[state[3]].expand(steps, -1), ahead).transpose(0, 1)
        self._seeds[:steps, :, : self.count].copy_(seeds)
        self._turn.zero_()
        self._steps = steps
        self._columns = self._longest(positions, bounds, steps)
        if isinstance(self.blocks, PagedBlocks):
            self._bring_tables(self.blocks)

    def _longest(self, positions: Sequence[int], bounds: Sequence[int], steps: int) -> int:
        """Tokens that attention may see during a burst. A recorded step has one number for good."""
        if self.tokens.is_cuda:
            return self.pool.block_tokens
        return 1 + max((min(p + steps - 1, b) for p, b in zip(positions, bounds, strict=True)), default=0)

    def _bring_tables(self, blocks: PagedBlocks) -> None:
        whole = len(self.rotation)
        width = -(-(whole if self.tokens.is_cuda else self._columns) // blocks.block_tokens)
        if self._tables.shape[1] != width:
            self._tables = torch.zeros(len(self.lives), width, dtype=torch.int64, device=self.tokens.device)
        rows = [(table + [blocks.spare] * width)[:width] for table in blocks.tables[: self.count]]
        self._tables[: self.count].copy_(torch.tensor(rows))

    @property
    def shape(self) -> tuple[int, int]:
        """What tells the steps of one burst from those of another: rows, and tokens that attention may see."""
        return self.count, self._columns

    def step(self, prompts: Prompts | None = None) -> None:
        """One token of every slot through the stage: reads static buffers, fills `outbox` or `values`.

        prompts: those of samples that are new in their slots, computed in the same products, which a few rows of
        decoding would not fill. Their samples take their first step at once: in every layer keys are stored before
        they are looked at. Only where one stage is all there is.
        """
        n, stage = self.count, self._stage
        last = torch.minimum(self.positions[:n], self._bounds[:n])
        hidden = stage.embed(self.tokens[:n]) if stage.model.first_stage else self.inbox[:n]
        attend, at, noted = self._attend(last), last, self._noted(last)
        if prompts is not None:
            hidden, at = torch.cat([hidden, stage.embed(prompts.tokens)]), torch.cat([last, prompts.positions])
            attend = joined_attention(n, attend, prompts.attention(stage, self.pool))
            noted = None if noted is None else torch.cat([noted, prompts.places])
        note = None if noted is None else partial(self.pool.note, noted)
        hidden = stage.layers(hidden, self.rotation.index_select(0, at), attend, note, keep=n)[:n]
        if self._chooser is None:
            self.outbox[:n].copy_(hidden)
            return
        seen = None if self._seen is None else self._seen[:n]
        seeds = self._seeds.index_select(0, self._turn)[0, :, :n]
        tokens, logprobs = self._chooser(stage.logits(hidden), seeds, seen)
        if seen is not None:
            mark_seen(seen, tokens, self._chooser.first)
        torch.stack([tokens, logprobs], 1, out=self.values[:n])

    def _attend(self, last: Tensor) -> Attend:
        if not isinstance(self.blocks, PagedBlocks):
            return row_attention(self._stage, self.pool, self.count, self._columns, last)
        plain = all(not sight.window and not sight.cap and not sight.scale for sight in self._stage.sights)
        kernel = paged_attention if self.tokens.is_cuda and plain else gathered_attention
        return kernel(self._stage, self.pool, self._tables[: self.count], last)

    def _noted(self, last: Tensor) -> Tensor | None:
        """Places where the step keeps the experts of its tokens. A sample that has its tokens before the burst ends
        goes on to compute at the last position, whose experts are those of the token that came first."""
        if self.pool.routes is None:
            return None
        if isinstance(self.blocks, PagedBlocks):
            places = table_places(self._tables[: self.count], last, self.pool.block_tokens)
        else:
            places = row_places(self.pool, last)
        return places.masked_fill(self.positions[: self.count] > last, self.pool.nowhere)

    def routes_of(self, slot: int) -> Tensor | None:
        """The routes of the sample in a slot, where they are kept: [tokens - 1, layers of the stage, k]."""
        live = self.lives[slot]
        if self.pool.routes is None or live is None:
            return None
        read = flat_places(self.blocks.tables[slot], live.position, self.pool.block_tokens)
        return self.pool.routes_at(torch.tensor(read, dtype=torch.int64, device=self.tokens.device))

    def land(self) -> None:
        """Take what a step has chosen: it is the input of the next one."""
        self._landed.index_copy_(0, self._turn, self.values[None])
        self.tokens[: self.count].copy_(self.values[: self.count, 0])
        self.positions[: self.count].add_(1)
        self._turn.add_(1)

    def step_and_land(self, prompts: Prompts | None = None) -> None:
        """A step of a pipeline of one stage, which knows at once what it has chosen."""
        self.step(prompts)
        self.land()

    @property
    def found(self) -> Tensor:
        """The tokens of the burst's steps with their log-probabilities, float32 [steps, rows, 2]."""
        return self._landed[: self._steps, : self.count]

    def move(self, source: int, target: int) -> None:
        """Move a sample to a free slot."""
        live, copy = self.lives[source], self.blocks.move(source, target)
        assert live is not None and self.lives[target] is None
        if copy is not None:
            self.pool.copy([replace(copy, tokens=live.position)])
        if self._seen is not None:
            self._seen[target].copy_(self._seen[source])
        self.lives[target], self.lives[source] = live, None

    def forget(self, slot: int, prompt: Prompt) -> None:
        """A slot has a new sample: of its tokens only the prompt's have been seen."""
        if self._seen is not None and self._chooser is not None:
            local = torch.tensor(prompt, device=self._seen.device) - self._chooser.first
            inside = (local >= 0) & (local < self._seen.shape[1])
            self._seen[slot].zero_().index_fill_(0, local[inside], 1)
