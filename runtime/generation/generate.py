"""Generation on a data-parallel replica: a queue of samples, slots that take the next one when theirs has ended.

Decoding runs in bursts. Between bursts every rank reads the tokens, which it has anyway, decides alike which samples
have ended, gives their slots to the next ones of the queue and computes the prompts of these, packed. A sample starts
with the last token of its prompt as the first to decode, so that samples of one prompt share all that was computed.
Random numbers are keyed by sample and position: slots, bursts and layouts do not change a token. Replicas that share
experts (`runtime.generation.joined`) go through the same rounds, each with a queue of its own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, zip_longest

import torch
from torch import Tensor

from plans.errors import RealplanError
from plans.kvcache import BURST_ALONE, BURST_STEPS, PREFILL_TOKENS, cache_blocks
from runtime.generation.attention import Pool, suited_block
from runtime.generation.blocks import Admission, BlockCopy, Blocks, PagedBlocks, RowBlocks
from runtime.generation.capture import CapturedSteps, cuda_recorder
from runtime.generation.flight import Flight, Live, Prompts
from runtime.generation.joined import Joined
from runtime.generation.lean import LeanStage
from runtime.generation.pipeline import Pipeline
from runtime.generation.routes import whole_routes
from runtime.generation.sampling import Chooser, Sampling, sample_keys
from runtime.generation.stopping import Ended
from runtime.models.model import Model
from runtime.routes import Routes
from runtime.sequences import Sequences


@dataclass(frozen=True)
class Generated:
    """Sequences of a replica, the same on all its ranks.

    logprobs: float32 [all response tokens] at the sampling temperature. steps: rows that decoding computed, those of
    ended and empty slots included. routes: of all samples and layers, where they were asked for.
    """

    sequences: Sequences
    logprobs: Tensor
    rows_computed: int
    routes: Routes | None = None


@dataclass(frozen=True, kw_only=True)
class FlightLimits:
    """Sizes of a generation. slots: samples in flight on the replica, 0 for all; groups: parts of the slots that go
    through a pipeline in turn; burst: steps between two looks at what has ended; prefill: most prompt tokens of one
    pass; block: tokens of a KV block (burst and block: 0 for what suits the device); capture: record steps as CUDA
    graphs where there is CUDA; allow_long: samples may outgrow the model's context."""

    slots: int = 0
    groups: int = 1
    burst: int = 0
    prefill: int = PREFILL_TOKENS
    block: int = 0
    capture: bool = True
    allow_long: bool = False

    def __post_init__(self) -> None:
        for name, least in (("slots", 0), ("groups", 1), ("burst", 0), ("prefill", 1), ("block", 0)):
            if getattr(self, name) < least:
                raise RealplanError(f"generation: {name} is {getattr(self, name)}; it must be {least} or more")


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    sample_ids: Sequence[int],
    *,
    response_tokens: int | Sequence[int],
    sampling: Sampling,
    seed: int,
    iteration: int,
    stop_ids: Sequence[int] = (),
    ended: Ended | None = None,
    limits: FlightLimits | None = None,
    keep_routes: bool = False,
) -> Generated:
    """Continue each prompt (token ids, at least one) by up to `response_tokens` tokens, for all or for each.

    Collective over the ranks of a replica, which all give the same arguments, and over replicas that share experts,
    which give other samples, if need be none. `sample_ids` are the global numbers of the samples: with `seed` and
    `iteration` they fix the tokens. Equal prompts that are in flight together are computed
    once. A response ends with the first of `stop_ids`, or where `ended` says. `keep_routes`: tell which experts every
    token has visited. Raises RealplanError for empty prompts or responses, positions beyond the model's context, and
    slots that do not fit.
    """
    most = [response_tokens] * len(prompts) if isinstance(response_tokens, int) else list(response_tokens)
    limits = limits or FlightLimits()
    _check(model, prompts, most, limits.allow_long)
    lives = [Live(i, tuple(p), limit) for i, (p, limit) in enumerate(zip(prompts, most, strict=True))]
    joined, computed = Joined(model), 0
    (slots,) = joined.most([min(limits.slots or len(lives), len(lives))])
    if slots:
        with torch.inference_mode():
            keys = sample_keys(seed, iteration, torch.tensor(list(sample_ids) or [0])).to(model.device)
            run = _Run(model, lives, sampling, replace(limits, slots=slots), keys, joined, keep_routes=keep_routes)
            computed = run.all(frozenset(stop_ids), ended)
    sequences = Sequences.of(prompts, [live.tokens for live in lives])
    found = torch.tensor([value for live in lives for value in live.logprobs], dtype=torch.float32)
    routes = whole_routes(model, [live.routes for live in lives if live.routes is not None]) if keep_routes else None
    return Generated(sequences.to(model.device), found.to(model.device), computed, routes)


def _check(model: Model, prompts: Sequence[Sequence[int]], most: Sequence[int], allow_long: bool) -> None:
    for row, (prompt, limit) in enumerate(zip(prompts, most, strict=True)):
        if not prompt:
            raise RealplanError(f"prompt {row} has no tokens", "remove it, or begin it with a token of the tokenizer")
        if limit < 1:
            raise RealplanError(f"sample {row} may have {limit} response tokens", "response_tokens of at least 1")
        if len(prompt) + limit > model.spec.max_context and not allow_long:
            raise RealplanError(
                f"sample {row} may grow to {len(prompt) + limit} tokens, and model `{model.spec.name}` has"
                f" {model.spec.max_context} positions",
                f"response_tokens {max(1, model.spec.max_context - len(prompt))} or less",
            )


Pack = list[tuple[int, Live]]
"""Newcomers whose prompts are computed in one pass, each with its slot."""


class _Run:
    """One generation: the queue, the flights and the pipeline. `limits` say how many slots; the replicas in `joined`
    have as many, and agree before every round on what is in it."""

    def __init__(
        self,
        model: Model,
        lives: Sequence[Live],
        sampling: Sampling,
        limits: FlightLimits,
        keys: Tensor,
        joined: Joined,
        *,
        keep_routes: bool,
    ) -> None:
        self._limits, self._keys, self._joined, self._device = limits, keys, joined, model.device
        self._queue, slots = deque(lives), limits.slots
        self._stage = stage = LeanStage(model, sum(live.limit for live in lives) / slots)
        longest = max((len(live.prompt) + live.limit - 1 for live in lives), default=1)
        rotation = stage.rotation(longest)
        chooser = None
        if model.last_stage:
            part = model.spec.padded_vocab // model.layout.tp
            chooser = Chooser(sampling, model.spec.vocab, part, model.groups.tp, model.device)
        each = -(-slots // limits.groups)
        # On a CPU a look at what has ended costs next to nothing, and prompts can join the steps of others. In a
        # pipeline a burst begins and ends with idle stages, and joined replicas have to agree before each.
        self._alone = self._device.type == "cpu" and model.layout.pp == 1 and joined.count == 1
        self._burst = limits.burst or (BURST_ALONE if self._alone else BURST_STEPS)
        self._flights = []
        for first in range(0, slots, each):
            blocks = self._blocks(stage, lives, min(each, slots - first), longest)
            count = blocks.spare + 1 if isinstance(blocks, PagedBlocks) else len(blocks.tables)
            pool = Pool(stage, count, blocks.block_tokens, routes=keep_routes)
            self._flights.append(Flight(stage, blocks, pool, rotation, chooser, self._burst))
        captures = limits.capture and self._device.type == "cuda"
        self._pipeline = Pipeline(stage, CapturedSteps(cuda_recorder() if captures else None))

    def _blocks(self, stage: LeanStage, lives: Sequence[Live], slots: int, longest: int) -> Blocks:
        size = self._limits.block or suited_block(self._device, stage.model.config.params_dtype)
        if not size:
            return RowBlocks(slots, longest)
        prompt = max((len(live.prompt) for live in lives), default=1)
        group = max(1, len(lives) // max(1, len({live.prompt for live in lives})))
        return PagedBlocks(slots, cache_blocks(slots, prompt, longest + 1 - prompt, group, size), size)

    def all(self, stops: frozenset[int], ended: Ended | None) -> int:
        """Run until no sample is left; the rows that were computed."""
        computed = 0
        while True:
            admitted = [self._admit(flight) for flight in self._flights]
            left, counts, widths = self._agree([packs for packs, _ in admitted])
            waiting: list[Prompts | None] = []
            for flight, (packs, late), most in zip(self._flights, admitted, widths, strict=True):
                # Prompts that others of the same round copy have to be there before these decode.
                last = packs.pop() if self._alone and packs and not late else None
                self._prefill(flight, packs, most)
                flight.pool.copy(late)
                self._close_up(flight)
                waiting.append(None if last is None else Prompts.of(last, flight.blocks, self._device))
            if not left:
                assert not self._queue, "the KV cache holds no sample"
                return computed
            busy, joining, steps = [], [], min(self._burst, left)
            for flight, count, prompts in zip(self._flights, counts, waiting, strict=True):
                if count:
                    flight.begin(self._keys, steps, min(len(flight.lives), self._bucket(count)))
                    computed += steps * flight.count
                    busy.append(flight)
                    joining.append(prompts)
            self._pipeline.burst(busy, steps, joining)
            for flight in busy:
                _retire(flight, stops, ended)

    def _agree(self, packs: Sequence[Sequence[Pack]]) -> tuple[int, list[int], list[list[int]]]:
        """Of this replica and those joined to it the most: tokens that a sample may still get (0: none is left),
        samples of each flight, tokens of each pack of each flight."""
        lives = [[live for live in flight.lives if live is not None] for flight in self._flights]
        left = max((live.left for held in lives for live in held), default=0)
        left, *most = self._joined.most([left, *map(len, lives), *map(len, packs)])
        counts, numbers = most[: len(lives)], most[len(lives) :]
        own = [[_tokens(pack) for pack in mine] for mine in packs]
        if not any(numbers):
            return left, counts, own
        flat = [n for mine, number in zip(own, numbers, strict=True) for n in [*mine, *[0] * (number - len(mine))]]
        widths = iter(self._joined.most(flat))
        return left, counts, [list(islice(widths, number)) for number in numbers]

    def _bucket(self, count: int) -> int:
        """Rows that a step computes for so many samples: few different numbers where each is a graph."""
        if self._device.type != "cuda":
            return count
        return 1 << (count - 1).bit_length() if count <= 8 else -(-count // 8) * 8

    def _admit(self, flight: Flight) -> tuple[list[Pack], list[BlockCopy]]:
        """Give free slots to the next samples of the queue; the prompts to compute for them, and what is to be copied
        when that is done."""
        flight.blocks.begin()
        placed: list[tuple[int, Live, Admission]] = []
        for slot, held in enumerate(flight.lives):
            if held is not None or not self._queue:
                continue
            live = self._queue[0]
            place = flight.blocks.admit(slot, live.prompt, live.limit)
            if place is None:
                break
            flight.lives[slot] = self._queue.popleft()
            flight.forget(slot, live.prompt)
            placed.append((slot, live, place))
        flight.pool.copy([place.copy for _, _, place in placed if place.copy and not place.late])
        # Experts see the packs of all joined replicas at once.
        most = max(1, self._limits.prefill // self._joined.count)
        packs = _packs([(slot, live) for slot, live, place in placed if place.prefill], most)
        return list(packs), [place.copy for _, _, place in placed if place.copy and place.late]

    def _prefill(self, flight: Flight, packs: Sequence[Pack], widths: Sequence[int]) -> None:
        """Compute the prompts of newcomers. `widths`: the most tokens of each pack of any joined replica, of which some
        have more packs than others."""
        for pack, width in zip_longest(packs, widths):
            if pack is None:
                self._stage.lend(width)
                continue
            self._pipeline.prefill(flight, Prompts.of(pack, flight.blocks, self._device), width)

    @staticmethod
    def _close_up(flight: Flight) -> None:
        """Move samples so that they stand in the first slots."""
        target, source = 0, len(flight.lives) - 1
        while True:
            while target < source and flight.lives[target] is not None:
                target += 1
            while target < source and flight.lives[source] is None:
                source -= 1
            if target >= source:
                return
            flight.move(source, target)


def _tokens(pack: Pack) -> int:
    """Prompt tokens of a pack that are computed: the last one of a prompt is the first to decode."""
    return sum(len(live.prompt) - 1 for _, live in pack)


def _packs(newcomers: Sequence[tuple[int, Live]], most: int) -> Iterator[Pack]:
    """Newcomers in packs of at most `most` tokens, or of one."""
    pack: Pack = []
    tokens = 0
    for slot, live in newcomers:
        if pack and tokens + len(live.prompt) - 1 > most:
            yield pack
            pack, tokens = [], 0
        pack.append((slot, live))
        tokens += len(live.prompt) - 1
    if pack:
        yield pack


def _retire(flight: Flight, stops: frozenset[int], ended: Ended | None) -> None:
    """Read the tokens of a burst; samples that have ended leave their slots."""
    found = flight.found.cpu()
    tokens, logprobs = found[..., 0].long().t().tolist(), found[..., 1].t().tolist()
    for slot, live in enumerate(flight.lives):
        if live is None:
            continue
        old = len(live.tokens)
        new = tokens[slot][: live.left]
        end = next((place + 1 for place, token in enumerate(new) if token in stops), None)
        live.tokens += new[:end]
        if ended is not None:
            cut = ended(live.tokens, old)
            if cut is not None:
                del live.tokens[cut:]
                end = cut - old
        live.logprobs += logprobs[slot][: len(live.tokens) - old]
        if end is not None or not live.left:
            live.routes = flight.routes_of(slot)
            flight.blocks.retire(slot)
            flight.lives[slot] = None
