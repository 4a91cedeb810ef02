"""The host's part of generation: blocks, captured steps, stop strings; and what a decoding step may do."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tiny_models import build, layout_of, save_tiny
from torch.utils._python_dispatch import TorchDispatchMode

from plans.huggingface import spec_from_folder
from runtime.generation.blocks import PagedBlocks, Prompt, RowBlocks, flat_places
from runtime.generation.capture import CapturedSteps
from runtime.generation.flight import Flight
from runtime.generation.generate import FlightLimits, generate
from runtime.generation.pipeline import Pipeline
from runtime.generation.sampling import Chooser, Sampling
from runtime.generation.stopping import ended_by
from runtime.groups import GroupCache
from runtime.models import installation
from runtime.weights.hf import load_weights

CPU = torch.device("cpu")
VIEWS = ("view", "select", "slice", "unsqueeze", "squeeze", "transpose", "permute", "expand", "t.default", "alias",
         "unbind", "chunk", "split", "detach", "flatten", "reshape", "as_strided", "narrow")  # fmt: skip


class Dispatches(TorchDispatchMode):
    """Names of the operations that reach a device, views apart."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if not any(f".{view}" in name for view in VIEWS):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


class Memory:
    """A KV cache of (prompt, token number) pairs, on which placements are carried out as generation does."""

    def __init__(self, blocks: RowBlocks | PagedBlocks, size: int) -> None:
        self.blocks, self.data = blocks, [None] * size

    def place(self, newcomers: Sequence[tuple[int, Prompt, int]]) -> list[int]:
        """Place samples (slot, prompt, response tokens); the slots whose prompts were computed."""
        self.blocks.begin()
        placed = [(slot, prompt, self.blocks.admit(slot, prompt, limit)) for slot, prompt, limit in newcomers]
        assert all(place is not None for _, _, place in placed)
        self._copy([p.copy for _, _, p in placed if p and p.copy and not p.late])
        computed = [(slot, prompt) for slot, prompt, p in placed if p and p.prefill]
        for slot, prompt in computed:
            for token, at in enumerate(flat_places(self.blocks.tables[slot], len(prompt) - 1, self.size)):
                self.data[at] = (prompt, token)
        self._copy([p.copy for _, _, p in placed if p and p.copy and p.late])
        return [slot for slot, _ in computed]

    @property
    def size(self) -> int:
        return self.blocks.block_tokens

    def _copy(self, copies: Sequence[Any]) -> None:
        for copy in copies:
            source, target = copy.source * self.size, copy.target * self.size
            self.data[target : target + copy.tokens] = self.data[source : source + copy.tokens]

    def decode(self, slot: int, prompt: Prompt, first: int, last: int) -> None:
        """Write keys of positions [first, last) of a sample and check all before them."""
        places = flat_places(self.blocks.tables[slot], last, self.size)
        for token in range(first, last):
            self.data[places[token]] = (prompt, slot, token)
        assert [self.data[at] for at in places[: len(prompt) - 1]] == [(prompt, t) for t in range(len(prompt) - 1)]

    def move(self, source: int, target: int) -> None:
        copy = self.blocks.move(source, target)
        if copy is not None:
            self._copy([copy])


@pytest.mark.parametrize("paged", [False, True])
def test_every_sample_finds_its_prompt_whatever_comes_and_goes(paged: bool) -> None:
    """Hundreds of random arrivals, ends and moves; prompts of one to nine tokens, often the same ones."""
    slots, limit, chance = 5, 6, random.Random(0)
    blocks = PagedBlocks(slots, 25, 4) if paged else RowBlocks(slots, 14)
    memory = Memory(blocks, 26 * 4 if paged else slots * 14)
    prompts = [tuple(range(n, n + length)) for n, length in enumerate((1, 2, 4, 5, 6, 8, 9))]
    held: dict[int, Prompt] = {}
    for _ in range(300):
        free = [slot for slot in range(slots) if slot not in held]
        come = [(slot, chance.choice(prompts), limit) for slot in free if chance.random() < 0.7]
        memory.place(come)
        held |= {slot: prompt for slot, prompt, _ in come}
        for slot, prompt in held.items():
            memory.decode(slot, prompt, len(prompt) - 1, len(prompt) - 1 + limit)
        for slot in [slot for slot in held if chance.random() < 0.4]:
            blocks.retire(slot)
            del held[slot]
        free = [slot for slot in range(slots) if slot not in held]
        if free and held and chance.random() < 0.5:
            source = chance.choice(sorted(held))
            memory.move(source, free[0])
            held[free[0]] = held.pop(source)


@pytest.mark.parametrize("paged", [False, True])
def test_samples_of_a_prompt_share_it(paged: bool) -> None:
    prompt, other = tuple(range(10)), (90, 91, 92)
    memory = Memory(PagedBlocks(4, 16, 4) if paged else RowBlocks(4, 14), 17 * 4)
    assert memory.place([(0, prompt, 4), (1, prompt, 4), (2, other, 4), (3, prompt, 4)]) == [0, 2]
    memory.blocks.retire(2)
    assert memory.place([(2, prompt, 4)]) == []
    if paged:
        assert len({table[0] for table in memory.blocks.tables}) == 1


def test_newcomers_wait_for_free_blocks() -> None:
    blocks = PagedBlocks(3, 4, 4)
    assert blocks.admit(0, (1, 2, 3), 6) and blocks.admit(1, (7,), 4)
    assert blocks.admit(2, (8,), 8) is None
    blocks.retire(0)
    assert blocks.admit(2, (8,), 8) is not None


def test_a_shape_that_comes_again_is_captured_and_replayed() -> None:
    """With a stand-in for the graph: the first step of a shape runs as it is, the second records, others replay."""
    log: list[str] = []

    class Recorded:
        def __init__(self, step: Callable[[], None]) -> None:
            log.append("record")
            self._step = step

        def replay(self) -> None:
            log.append("replay")
            self._step()

    captured = CapturedSteps(Recorded)
    for shape in ("a", "b", "a", "a", "b"):
        run = captured.of(shape, lambda shape=shape: log.append(shape))  # type: ignore[misc]
        run()
        run()
    replayed = {shape: ["replay", shape] for shape in "ab"}
    first = {shape: [shape, "record", *replayed[shape]] for shape in "ab"}
    assert log == [*first["a"], *first["b"], *2 * replayed["a"], *2 * replayed["a"], *2 * replayed["b"]]
    alone = CapturedSteps(None)
    assert all(alone.of("a", log.clear) == log.clear for _ in range(3))


def test_replayed_steps_give_the_same_tokens(tmp_path: Path) -> None:
    """Steps read and write static buffers alone: a stand-in that runs the recorded step changes nothing. Of two flights
    of one shape one runs dry before the other."""
    save_tiny("llama", tmp_path)

    class Recorded:
        def __init__(self, step: Callable[[], None]) -> None:
            self.replay = step

    init = Pipeline.__init__

    def made(model: Any, record: Any) -> list[int]:
        def create(self: Pipeline, stage: Any, _: CapturedSteps) -> None:
            init(self, stage, CapturedSteps(record))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Pipeline, "__init__", create)
            patch.setattr(Flight, "shape", property(lambda flight: (flight.count, 0)))
            found = [
                generate(
                    model, [[3, 4, 5], [6], [7, 8]], range(3), response_tokens=[9, 30, 20], sampling=Sampling(),
                    seed=0, iteration=0, limits=FlightLimits(slots=3, groups=groups, burst=4),
                )
                for groups in (1, 3)
            ]  # fmt: skip
        return [token for one in found for token in one.sequences.tokens.tolist()]

    def work() -> Any:
        model = _model(tmp_path)
        return made(model, None), made(model, Recorded)

    plain, replayed = run_ranks(1, work)[0]
    assert plain == replayed


def _model(folder: Path, **degrees: int) -> Any:
    installation.install(CPU)
    model = build(GroupCache(CPU), layout_of(spec_from_folder(folder), **degrees))
    load_weights(model, folder)
    return model


def _operations(model: Any) -> tuple[list[str], int]:
    """Operations of a burst of one step, which no prompt joins, and how many of them choose the tokens."""
    burst, call = Pipeline.burst, Chooser.__call__
    seen, choice = Dispatches(), Dispatches()

    def watched(self: Pipeline, flights: Any, steps: int, prompts: Any) -> None:
        assert not any(prompts)
        with seen:
            burst(self, flights, steps)

    def chosen(self: Chooser, *args: Any) -> Any:
        with choice:
            return call(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Pipeline, "burst", watched)
        patch.setattr(Chooser, "__call__", chosen)
        sampling = Sampling(temperature=0.9)
        generate(model, [[1], [3]], range(2), response_tokens=1, sampling=sampling, seed=0, iteration=0)
    return seen.names, len(choice.names)


@pytest.mark.parametrize(("kind", "tp"), [("llama", 1), ("llama", 2), ("qwen3", 2)])
def test_a_step_is_few_operations_and_waits_for_nothing(kind: str, tp: int, tmp_path: Path) -> None:
    """At most 24 operations per layer and 30 for sampling, and nothing in a burst that the host must wait for."""
    layers = (2, 4)
    for count in layers:
        save_tiny(kind, tmp_path / str(count), num_hidden_layers=count)

    def work() -> list[tuple[list[str], int]]:
        return [_operations(_model(tmp_path / str(count), tp=tp)) for count in layers]

    for (few, _), (many, sampled) in run_ranks(tp, work):
        assert (len(many) - len(few)) / (layers[1] - layers[0]) <= 24
        assert 0 < sampled <= 30
        waits = ("_local_scalar_dense", "nonzero", "_to_copy", ".item", "is_nonzero", "masked_select")
        assert not [name for name in many if any(word in name for word in waits)]


@pytest.mark.parametrize("old", range(8))
def test_stop_strings_end_a_response_at_their_last_token(old: int) -> None:
    words = ["the ", "an", "sw", "er", " is", " x", "y", "z"]
    ended = ended_by(["answer", "xyz"], lambda ids: "".join(words[i] for i in ids))
    tokens = [0, 4, 1, 2, 3, 4, 5, 6, 7]
    assert ended(tokens, min(old, 4)) == 5
    assert ended(tokens[:4], min(old, 3)) is None
    assert ended(tokens[4:], min(old, 4)) == 5
    assert ended([5, 6], 1) is None
