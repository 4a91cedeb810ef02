"""Tensors of a batch between calls: a store of rows on each rank, and the messages that fill it.

A sender posts its rows where the program has the transfer, right after they were made; a receiver posts its buffer at
the same step of its own projection and waits only when the consumer starts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plans.algorithms import GREEDY
from plans.batches import Message, batch_transfers
from plans.plan import ExecutionPlan
from plans.workload import Workload

Rows = Mapping[str, Tensor]
"""Fields of a tensor name, each [n, ...]."""


@dataclass(frozen=True, slots=True)
class Field:
    """One tensor per sample: its type and shape."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one sample."""
        return self.dtype.itemsize * prod(self.shape)


def fields(key: str, workload: Workload) -> tuple[Field, ...]:
    """What the graph's tensor `key` is made of, widest type first.

    `sequences`: tokens [P + R], prompts padded on the left, and the numbers of real prompt and response tokens.
    `rewards`: one score. Everything else: a number per response token. Likewise for the greedy response.
    """
    kind = key.removesuffix(GREEDY)
    if kind == "sequences":
        return (
            Field("tokens", torch.int64, (workload.tokens,)),
            Field("prompt_lengths", torch.int64),
            Field("response_lengths", torch.int64),
        )
    shape = () if kind == "rewards" else (workload.response_tokens,)
    return (Field(key, torch.float32, shape),)


class LateError(RuntimeError):
    """Rows from rank `source` did not arrive."""

    def __init__(self, source: int, reason: str) -> None:
        super().__init__(reason)
        self.source = source


@dataclass(frozen=True, slots=True)
class _Arrival:
    message: Message
    work: Any
    buffer: Tensor


class BatchStore:
    """This rank's rows of the tensors of the iterations under way."""

    def __init__(self, plan: ExecutionPlan, device: torch.device) -> None:
        self._plan = plan
        self._device = device
        self._rows: dict[tuple[int, str, str], dict[int, Tensor]] = {}
        self._arrivals: dict[tuple[int, str], list[_Arrival]] = {}
        self._departures: dict[int, list[tuple[Any, Tensor]]] = {}
        self._messages: dict[str, dict[str, list[Message]]] = {}

    def put(self, iteration: int, key: str, rows: Sequence[int], values: Rows) -> None:
        """Keep rows that this rank made or received; each field is [len(rows), ...]."""
        for field in fields(key, self._plan.workload):
            value = values[field.name]
            assert value.shape == (len(rows), *field.shape), f"{key}.{field.name} has shape {tuple(value.shape)}"
            held = self._rows.setdefault((iteration, key, field.name), {})
            held.update(zip(rows, value.to(self._device, field.dtype).unbind(), strict=True))

    def get(self, iteration: int, key: str, rows: Sequence[int]) -> Rows:
        """Rows in the order asked for; `arrive` has been called for what comes from elsewhere."""
        names = [field.name for field in fields(key, self._plan.workload)]
        return {name: torch.stack([self._rows[iteration, key, name][row] for row in rows]) for name in names}

    def transfer(self, iteration: int, producer: str, consumer: str) -> None:
        """Start this rank's messages of a transfer step."""
        rank = dist.get_rank()
        for message in self._plan_messages(producer, consumer):
            if rank == message.source:
                buffer = self._pack(iteration, message)
                work = dist.isend(buffer, message.target)
                self._departures.setdefault(iteration, []).append((work, buffer))
            elif rank == message.target:
                width = sum(field.row_bytes for _, field in self._fields(message.keys))
                buffer = torch.empty(width * len(message.rows), dtype=torch.uint8, device=self._device)
                arrival = _Arrival(message, dist.irecv(buffer, message.source), buffer)
                self._arrivals.setdefault((iteration, producer), []).append(arrival)

    def _plan_messages(self, producer: str, consumer: str) -> list[Message]:
        # In one order on both sides: NCCL pairs the operations of two ranks by the order in which they are posted.
        if producer not in self._messages:
            found = batch_transfers(self._plan, producer)
            self._messages[producer] = {target: sorted(messages) for target, messages in found.items()}
        return self._messages[producer].get(consumer, [])

    def _fields(self, keys: Iterable[str]) -> list[tuple[str, Field]]:
        found = [(key, field) for key in keys for field in fields(key, self._plan.workload)]
        return sorted(found, key=lambda pair: -pair[1].dtype.itemsize)  # so that every field starts aligned

    def _pack(self, iteration: int, message: Message) -> Tensor:
        values = {key: self.get(iteration, key, message.rows) for key in message.keys}
        fields = self._fields(message.keys)
        return torch.cat([values[key][field.name].contiguous().view(-1).view(torch.uint8) for key, field in fields])

    def arrive(self, iteration: int, consumer: str) -> None:
        """Wait for what was sent of a call's inputs, be it for this call or for another one on this rank, and keep it.
        Raises LateError when a sender does not send."""
        graph = self._plan.workload.graph
        inputs = graph.call(consumer).inputs
        for producer in dict.fromkeys(graph.producers[key] for key in inputs if key in graph.producers):
            for arrival in self._arrivals.pop((iteration, producer), []):
                try:
                    arrival.work.wait()
                except RuntimeError as error:
                    raise LateError(arrival.message.source, str(error)) from error
                self._unpack(iteration, arrival)

    def _unpack(self, iteration: int, arrival: _Arrival) -> None:
        rows, start = arrival.message.rows, 0
        found: dict[str, dict[str, Tensor]] = {}
        for key, field in self._fields(arrival.message.keys):
            stop = start + field.row_bytes * len(rows)
            part = arrival.buffer[start:stop].view(field.dtype)
            found.setdefault(key, {})[field.name] = part.view(len(rows), *field.shape)
            start = stop
        for key, values in found.items():
            self.put(iteration, key, rows, values)

    def settle(self, iteration: int) -> None:
        """Wait until what this rank sent in an iteration is gone."""
        for work, _ in self._departures.pop(iteration, []):
            work.wait()

    def drop(self, iteration: int) -> None:
        """Free an iteration that this rank has finished."""
        for place in [place for place in self._rows if place[0] == iteration]:
            del self._rows[place]
