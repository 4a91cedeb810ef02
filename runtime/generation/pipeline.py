"""Bursts and prefills through the stages of a pipeline: tensor and pipeline parallel, CPU and CUDA alike.

Stages take the flights in turn, so that a stage works on one while the next stage works on the one before. Hidden
states go from stage to stage, and the last stage broadcasts the chosen tokens to its pipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.generation.capture import CapturedSteps
from runtime.generation.flight import Flight, Prompts
from runtime.generation.lean import LeanStage


class Pipeline:
    """This rank's stage and its exchange with the other stages."""

    def __init__(self, stage: LeanStage, captured: CapturedSteps) -> None:
        self._stage, self._captured = stage, captured
        self._group = stage.model.groups.pp
        self._ranks: list[int] = dist.get_process_group_ranks(self._group)
        self._sent: dict[int, tuple[Any, Tensor]] = {}

    def burst(self, flights: Sequence[Flight], steps: int, prompts: Sequence[Prompts | None] | None = None) -> None:
        """`steps` tokens for every slot of flights that have begun a burst. Nothing here waits for the device, but
        collectives on the CPU. prompts: for each flight those to compute in its first step (`Flight.step`)."""
        # By the flight itself: one that has run dry is not among them, and the next one would get its number.
        alone = len(self._ranks) == 1
        runs = [
            self._captured.of((id(flight), *flight.shape), flight.step_and_land if alone else flight.step)
            for flight in flights
        ]
        if alone:
            for step in range(steps):
                for index, run in enumerate(runs):
                    new = prompts[index] if prompts and not step else None
                    if new is None:
                        run()
                    else:
                        flights[index].step_and_land(new)
            return
        assert not any(prompts or ()), "prompts join steps where one stage is all there is"
        coming: list[Any] = [None] * len(flights)
        for step in range(steps):
            for index, (flight, run) in enumerate(zip(flights, runs, strict=True)):
                if step:
                    self._land(flight, coming[index])
                coming[index] = self._visit(index, flight, run)
        for flight, work in zip(flights, coming, strict=True):
            self._land(flight, work)
        self.settle()

    def _visit(self, index: int, flight: Flight, run: Any) -> Any:
        """One step of a flight on this stage; the broadcast of its tokens, which may still be on its way."""
        model, count = self._stage.model, flight.count
        if not model.first_stage:
            dist.recv(flight.inbox[:count], src=self._ranks[model.place.pp - 1], group=self._group)
        self._wait(index)
        run()
        if not model.last_stage:
            self._send(index, flight.outbox[:count])
        return dist.broadcast(flight.values[:count], src=self._ranks[-1], group=self._group, async_op=True)

    @staticmethod
    def _land(flight: Flight, work: Any) -> None:
        work.wait()
        flight.land()

    def prefill(self, flight: Flight, prompts: Prompts, rows: int) -> None:
        """Compute keys and values of prompts in one pass. `rows`: the most tokens of such a pass, this one or those of
        other replicas at the same time."""
        model, stage = self._stage.model, self._stage
        if model.first_stage:
            hidden = stage.embed(prompts.tokens)
        else:
            shape = (len(prompts.tokens), model.spec.hidden)
            hidden = torch.empty(shape, dtype=model.config.params_dtype, device=model.device)
            dist.recv(hidden, src=self._ranks[model.place.pp - 1], group=self._group)
        note = None if flight.pool.routes is None else partial(flight.pool.note, prompts.places)
        rotation = flight.rotation.index_select(0, prompts.positions)
        keep = 0 if model.last_stage else None
        hidden = stage.layers(hidden, rotation, prompts.attention(stage, flight.pool), note, rows, keep)
        if not model.last_stage:
            self._wait(-1)
            self._send(-1, hidden)

    def _send(self, key: int, hidden: Tensor) -> None:
        """Send to the next stage without waiting for it; at most one message per flight is on its way."""
        work = dist.isend(hidden, dst=self._ranks[self._stage.model.place.pp + 1], group=self._group)
        self._sent[key] = (work, hidden)

    def _wait(self, key: int) -> None:
        if key in self._sent:
            self._sent.pop(key)[0].wait()

    def settle(self) -> None:
        """Wait until everything sent has been taken."""
        for key in list(self._sent):
            self._wait(key)
