"""Tensors of a batch between calls: a store of ragged rows on each rank, and the messages that fill it.

Who holds and who needs which sample follows from the lengths of an iteration, and so do the sizes of messages. The
lengths go from the generation to every rank that deals by them, in messages of fixed size of their own. A transfer step
takes place as soon as a rank knows them: on a sender right after the rows were made, on a receiver at the latest when
the consumer starts, so that a rank goes on with other work while the generation runs elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plans.algorithms import tensor_kind
from plans.batches import Message, batch_transfers, lengths_from, lengths_routes
from plans.graph import CallKind
from plans.model import ModelSpec
from plans.plan import ExecutionPlan
from plans.routes import routed_tokens, routes_per_token
from runtime.routes import Routes, route_type
from runtime.sequences import Sequences

SampleLengths = Sequence[tuple[int, int]]
"""Tokens of prompt and response of every sample of an iteration."""
LENGTHS_TAG = 1
"""Messages of lengths are matched apart from those of rows: generate call i has the tag LENGTHS_TAG + i."""


class LateError(RuntimeError):
    """What rank `source` sends did not arrive."""

    def __init__(self, source: int, reason: str) -> None:
        super().__init__(reason)
        self.source = source


@dataclass(frozen=True, slots=True)
class _Arrival:
    message: Message
    work: Any
    buffer: Tensor


@dataclass(frozen=True, slots=True)
class _Step:
    """A transfer step of an iteration that waits for lengths; `peers` are the other ranks that take part."""

    iteration: int
    producer: str
    consumer: str
    peers: frozenset[int]


def _kind(key: str) -> str:
    return tensor_kind(key)


class BatchStore:
    """This rank's rows of the tensors of the iterations under way.

    given: the lengths of an iteration where the data set gives the responses.
    """

    def __init__(
        self, plan: ExecutionPlan, device: torch.device, given: Callable[[int], SampleLengths] | None = None
    ) -> None:
        self._plan = plan
        self._device = device
        self._given = given
        self._rows: dict[tuple[int, str], dict[int, Tensor]] = {}
        self._lengths: dict[tuple[int, str], SampleLengths] = {}
        self._expected: dict[str, dict[int, tuple[Any, Tensor]]] = {}
        self._next: dict[str, int] = {}
        self._first = 0
        self._steps: list[_Step] = []
        self._messages: dict[tuple[int, str], dict[str, list[Message]]] = {}
        self._arrivals: dict[tuple[int, str], list[_Arrival]] = {}
        self._departures: dict[int, list[tuple[Any, Tensor]]] = {}
        graph = plan.workload.graph
        self._generates = [call.name for call in graph.calls if call.kind is CallKind.GENERATE]
        self._routes = {name: lengths_routes(plan, name) for name in self._generates}

    def begin(self, first: int) -> None:
        """Expect iterations from `first` on, in order; nothing is under way."""
        self._first = first
        self._next.clear()

    # Lengths

    def _know(self, iteration: int, generate: str, lengths: Tensor) -> None:
        found = lengths.to(device="cpu", dtype=torch.int32)
        self._lengths[iteration, generate] = [(p, r) for p, r in found.tolist()]
        for target, source in self._routes[generate].items():
            if source == dist.get_rank():
                work = dist.isend(found, target, tag=self._tag(generate))
                self._departures.setdefault(iteration, []).append((work, found))

    def lengths(self, iteration: int, call: str) -> SampleLengths:
        """The lengths by which a call's samples are dealt; waits for them. Raises LateError when they do not come."""
        generate = lengths_from(self._plan, call)
        if (iteration, generate) not in self._lengths and not self._receive(iteration, generate, wait=True):
            raise AssertionError(f"{call} of iteration {iteration} runs before {generate}")
        return self._lengths[iteration, generate]

    def tokens(self, iteration: int, call: str) -> list[int]:
        """Tokens of every sample by the lengths of a call."""
        return [prompt + response for prompt, response in self.lengths(iteration, call)]

    def _tag(self, generate: str) -> int:
        return LENGTHS_TAG + self._generates.index(generate)

    def _receive(self, iteration: int, generate: str, *, wait: bool) -> bool:
        """Whether the lengths are here now, after a wait if asked for."""
        if (iteration, generate) in self._lengths:
            return True
        if not generate:
            assert self._given is not None
            self._lengths[iteration, generate] = self._given(iteration)
            return True
        source = self._routes[generate].get(dist.get_rank())
        if source is None:
            return False
        expected = self._expected.setdefault(generate, {})
        for ahead in range(self._next.get(generate, self._first), iteration + 1):  # a sender keeps to this order
            buffer = torch.empty(self._plan.workload.samples, 2, dtype=torch.int32)
            expected[ahead] = (dist.irecv(buffer, source, tag=self._tag(generate)), buffer)
            self._next[generate] = ahead + 1
        work, buffer = expected[iteration]
        if not wait and not work.is_completed():
            return False
        _wait(work, source)
        del expected[iteration]
        self._lengths[iteration, generate] = [(p, r) for p, r in buffer.tolist()]
        return True

    # Rows

    def _of_key(self, iteration: int, key: str) -> SampleLengths:
        return self.lengths(iteration, self._plan.workload.graph.producers[key])

    def _sizes(self, iteration: int, key: str, rows: Sequence[int]) -> list[int]:
        """Numbers of a tensor for each row: all tokens of `sequences`, one reward, the experts of every token with a
        route, else one per response token."""
        lengths = self._of_key(iteration, key)
        match _kind(key):
            case "sequences":
                return [sum(lengths[row]) for row in rows]
            case "rewards":
                return [1] * len(rows)
            case "routes":
                each = routes_per_token(self._maker(key))
                return [routed_tokens(sum(lengths[row])) * each for row in rows]
        return [lengths[row][1] for row in rows]

    def _maker(self, key: str) -> ModelSpec:
        """The model that makes a tensor."""
        return self._plan.workload.spec(self._plan.workload.graph.producers[key])

    def _dtype(self, key: str) -> torch.dtype:
        match _kind(key):
            case "sequences":
                return torch.int64
            case "routes":
                return route_type(self._maker(key))
        return torch.float32

    def put(self, iteration: int, key: str, rows: Sequence[int], values: Sequences | Routes | Tensor) -> None:
        """Keep rows that this rank made or received: `Sequences`, `Routes`, or numbers per response token or sample,
        end to end. Lengths are [all samples, 2]; they go on at once to the ranks that deal by them, and rows need
        them."""
        if _kind(key) == "lengths":
            assert isinstance(values, Tensor)
            self._know(iteration, self._plan.workload.graph.producers[key], values)
            return
        parts: Iterable[Tensor]
        if isinstance(values, Routes):
            parts = [row.flatten() for row in values.rows]
        else:
            flat = values.tokens if isinstance(values, Sequences) else values
            parts = torch.split(flat.to(self._device, self._dtype(key)), self._sizes(iteration, key, rows))
        self._rows.setdefault((iteration, key), {}).update(zip(rows, parts, strict=True))

    def get(self, iteration: int, key: str, rows: Sequence[int]) -> Sequences | Routes | Tensor:
        """Rows in the order asked for; `arrive` has been called for what comes from elsewhere."""
        if _kind(key) == "routes":
            held, spec = self._rows[iteration, key], self._maker(key)
            shape = (spec.expert_layers, spec.experts_per_token)
            return Routes(tuple(held[row].view(-1, *shape) for row in rows))
        flat = self._flat(iteration, key, rows)
        if _kind(key) != "sequences":
            return flat
        lengths = [self._of_key(iteration, key)[row] for row in rows]
        return Sequences(flat, tuple(p for p, _ in lengths), tuple(r for _, r in lengths))

    def _flat(self, iteration: int, key: str, rows: Sequence[int]) -> Tensor:
        held = self._rows[iteration, key]
        return torch.cat([torch.empty(0, dtype=self._dtype(key), device=self._device), *(held[row] for row in rows)])

    # Transfers

    def transfer(self, iteration: int, producer: str, consumer: str) -> None:
        """A transfer step: start this rank's messages, the ones it receives when it knows their sizes."""
        graph, me = self._plan.workload.graph, dist.get_rank()
        senders, receivers = (frozenset(self._plan.ranks(graph.host(call))) for call in (producer, consumer))
        step = _Step(iteration, producer, consumer, (senders | receivers) - {me})
        self._steps.append(step)
        if me in senders:
            self._start(step)
        for other in list(self._steps):
            if other in self._steps and self._free(other) and self._ready(other):
                self._start(other)

    def post(self, ranks: Collection[int]) -> None:
        """Start the steps that wait and have one of these ranks in common, before other messages are sent to them."""
        for step in list(self._steps):
            if step in self._steps and not step.peers.isdisjoint(ranks):
                self._start(step)

    def _free(self, step: _Step) -> bool:
        """Whether no earlier step waits that has a rank in common with this one."""
        earlier = self._steps[: self._steps.index(step)]
        return not any(step.peers & other.peers for other in earlier)

    def _ready(self, step: _Step) -> bool:
        return self._receive(step.iteration, lengths_from(self._plan, step.producer), wait=False)

    def _start(self, step: _Step) -> None:
        """Post the messages of a step, after those of earlier steps with the same ranks: both sides of a pair must post
        in one order. What this waits for stands earlier in the program, so nobody waits for ever."""
        for other in self._steps[: self._steps.index(step)]:
            if other in self._steps and step.peers & other.peers:
                self._start(other)
        self._steps.remove(step)
        me, iteration = dist.get_rank(), step.iteration
        for message in self._plan_messages(iteration, step.producer).get(step.consumer, []):
            if me == message.source:
                buffer = self._pack(iteration, message)
                work = dist.isend(buffer, message.target)
                self._departures.setdefault(iteration, []).append((work, buffer))
            elif me == message.target:
                counts = self._counts(iteration, message)
                size = sum(self._dtype(key).itemsize * count for key, count in counts.items())
                buffer = torch.empty(size, dtype=torch.uint8, device=self._device)
                arrival = _Arrival(message, dist.irecv(buffer, message.source), buffer)
                self._arrivals.setdefault((iteration, step.producer), []).append(arrival)

    def _plan_messages(self, iteration: int, producer: str) -> dict[str, list[Message]]:
        # In one order on both sides: NCCL pairs the operations of two ranks by the order in which they are posted.
        if (iteration, producer) not in self._messages:
            found = batch_transfers(self._plan, producer, self.tokens(iteration, producer))
            self._messages[iteration, producer] = {target: sorted(messages) for target, messages in found.items()}
        return self._messages[iteration, producer]

    def _counts(self, iteration: int, message: Message) -> dict[str, int]:
        """Numbers of each tensor in a message, the widest type first, so that every tensor starts aligned."""
        keys = sorted(message.keys, key=lambda key: -self._dtype(key).itemsize)
        return {key: sum(self._sizes(iteration, key, message.rows)) for key in keys}

    def _pack(self, iteration: int, message: Message) -> Tensor:
        parts = [self._flat(iteration, key, message.rows) for key in self._counts(iteration, message)]
        return torch.cat([part.view(torch.uint8) for part in parts])

    def arrive(self, iteration: int, consumer: str) -> None:
        """Wait for what was sent of a call's inputs, be it for this call or for another one on this rank, and keep it.
        Raises LateError when a sender does not send."""
        graph = self._plan.workload.graph
        inputs = graph.call(consumer).inputs
        for producer in dict.fromkeys(graph.producers[key] for key in inputs if key in graph.producers):
            for step in list(self._steps):
                if step in self._steps and (step.iteration, step.producer) == (iteration, producer):
                    self._start(step)
            for arrival in self._arrivals.pop((iteration, producer), []):
                _wait(arrival.work, arrival.message.source)
                self._unpack(iteration, arrival)

    def _unpack(self, iteration: int, arrival: _Arrival) -> None:
        start = 0
        for key, count in self._counts(iteration, arrival.message).items():
            stop = start + self._dtype(key).itemsize * count
            self.put(iteration, key, arrival.message.rows, arrival.buffer[start:stop].view(self._dtype(key)))
            start = stop

    def settle(self, iteration: int) -> None:
        """Wait until what this rank sent in an iteration is gone."""
        for work, _ in self._departures.pop(iteration, []):
            work.wait()

    def drop(self, iteration: int) -> None:
        """Free an iteration that this rank has finished."""
        for kept in (self._rows, self._lengths, self._messages):
            for place in [place for place in kept if place[0] == iteration]:
                del kept[place]


def _wait(work: Any, source: int) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise LateError(source, str(error)) from error
