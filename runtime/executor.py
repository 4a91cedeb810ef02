"""The executor: one rank's projection of the program, step after step. The order is the same everywhere, so there is
no controller to wait for and no two ranks can wait for each other."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from plans.batches import rank_rows
from plans.errors import RealplanError
from plans.graph import Call, CallKind
from plans.plan import PlannedCall
from plans.program import Step, StepKind, compile_program
from plans.runfile import RANDOM
from runtime.batches.transfer import BatchStore, LateError, Rows
from runtime.calls import generate_call, inference_call, reward_call
from runtime.groups import GroupCache
from runtime.job import Job
from runtime.launching.failures import MEMORY_HINT, lost_peer, memory_words, timed_out
from runtime.reports.records import Recorder
from runtime.reports.stats import Stat
from runtime.train_call import train_call
from runtime.weights.copies import Copies
from runtime.weights.export import export


class StepError(RealplanError):
    """A step that failed on a rank. `secondary`: a peer went away, so another rank knows the cause; `late`: a peer did
    not come in time."""

    def __init__(self, message: str, hint: str = "", *, secondary: bool = False, late: bool = False) -> None:
        super().__init__(message, hint)
        self.secondary = secondary
        self.late = late


class Executor:
    """Runs a job on this rank. Making it and running it is collective over all ranks of the cluster."""

    def __init__(self, job: Job, groups: GroupCache, device: torch.device, recorder: Recorder) -> None:
        self.program = compile_program(job.plan)
        self._job = job
        self._rank = dist.get_rank()
        self._device = device
        self._recorder = recorder
        self._rows: dict[str, tuple[int, ...]] = {}
        self._store = BatchStore(job.plan, device)
        self._copies = Copies(job, self.program, groups, device)

    def run(self, iterations: int, first: int = 0) -> None:
        """Run iterations [first, iterations). Raises StepError with rank, iteration and step."""
        left = Counter(dict.fromkeys(range(first, iterations), len(self.program.projection(self._rank))))
        for step, iteration in self.program.unrolled(iterations, first):
            if self._rank not in step.ranks:
                continue
            self._recorder.say(step.name, iteration)
            try:
                self._step(step, iteration)
                left[iteration] -= 1
                if not left[iteration]:
                    self._finish(iteration)
            except Exception as error:
                raise self._explain(error, step, iteration) from error
        for iteration in range(first, iterations):
            self._store.settle(iteration)

    def export(self, role: str, folder: Path) -> None:
        """Write a trained role as a Hugging Face folder. Collective over the ranks of its home."""
        home = self.program.homes[role]
        if self._rank in home.layout.ranks:
            weights = self._job.run.weights_of(role)
            export(self._copies.model(home.calls[0]), folder, None if weights == RANDOM else Path(weights))

    def _step(self, step: Step, iteration: int) -> None:
        calls = step.kind in (StepKind.CALL, StepKind.FUNCTION)
        if calls:
            self._store.arrive(iteration, step.subject)
            self._synchronize()
        with self._recorder.span(step, iteration):
            if calls:
                self._call(step.subject, iteration)
            elif step.kind is StepKind.TRANSFER:
                self._store.transfer(iteration, step.subject, step.consumer)
            else:
                self._move(step)
            if step.kind is not StepKind.TRANSFER:
                self._synchronize()

    def _move(self, step: Step) -> None:
        copy = next(copy for copy in self.program.copies if copy.name == step.copy)
        match step.kind:
            case StepKind.REALLOCATE:
                self._copies.reallocate(copy)
            case StepKind.RELEASE:
                self._copies.release(copy)
            case StepKind.LOAD:
                self._copies.load(copy)
            case _:
                self._copies.offload(copy)

    def _call(self, name: str, iteration: int) -> None:
        graph = self._job.plan.workload.graph
        call, host = graph.call(name), graph.host(name)
        if name not in self._rows:
            self._rows[name] = rank_rows(self._job.plan, name)[self._rank]
        rows = self._rows[name]
        inputs = {key: self._store.get(iteration, key, rows) for key in call.inputs if key not in graph.sources}
        if self._job.examples is not None:
            examples = self._job.examples.sequences(iteration, rows)
            on_device = {name: values.to(self._device) for name, values in examples.items()}
            inputs |= {key: on_device for key in call.inputs if key in graph.sources}
        made = self._compute(call, self._job.plan.planned(host), inputs, iteration)
        for key, values in made.items():
            self._store.put(iteration, key, rows, values)

    def _compute(
        self, call: Call, planned: PlannedCall, inputs: Mapping[str, Rows], iteration: int
    ) -> Mapping[str, Rows]:
        job, model, rows = self._job, self._copies.model(planned.call), self._rows[call.name]
        if call.kind is CallKind.GENERATE:
            return generate_call(job, call, planned, model, rows, iteration)
        if call.kind is CallKind.INFERENCE:
            return inference_call(job, call, planned, model, inputs)
        if call.kind is CallKind.FUNCTION:
            return reward_call(job, call, model, inputs)
        with self._copies.training(call.model, offload=planned.strategy.offload) as trainer:
            self._recorder.add(iteration, train_call(job, call, planned, trainer, inputs, rows, iteration))
        return {}

    def _finish(self, iteration: int) -> None:
        """This rank has done all of an iteration. What it sent in the one before is taken by now, or soon."""
        self._recorder.add(iteration, self._memory())
        self._recorder.finish(iteration)
        self._store.drop(iteration)
        self._store.settle(iteration - 1)

    def _memory(self) -> dict[str, Stat]:
        device = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"memory/device_gb": Stat.one(device / 2**30), "memory/host_gb": Stat.one(host / 2**30)}

    def _synchronize(self) -> None:
        """Wait for this rank's own stream; messages on their way go on."""
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _explain(self, error: Exception, step: Step, iteration: int) -> StepError:
        where = f"rank {self._rank}, iteration {iteration}, step `{step.name}`"
        if isinstance(error, RealplanError):
            return StepError(f"{where}: {error.message}", error.hint)
        text = str(error).strip()
        if isinstance(error, torch.OutOfMemoryError):
            return StepError(f"{where}: out of memory. {memory_words(text)}", MEMORY_HINT)
        peers = (error.source,) if isinstance(error, LateError) else step.ranks
        if lost_peer(text):
            return StepError(f"{where}: {_shown(peers)} went away", secondary=True)
        if timed_out(text):
            limit = f"timeout_s = {self._job.run.timeout_s:g} s"
            message = f"{where}: waited for {_shown(peers)} for longer than {limit}"
            return StepError(message, "a rank hangs or is slower than that: raise timeout_s in the run file", late=True)
        return StepError(f"{where}: {type(error).__name__}: {text}")


def _shown(ranks: tuple[int, ...]) -> str:
    """Ranks as a person writes them."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    run = ranks == tuple(range(ranks[0], ranks[-1] + 1))
    return f"ranks {ranks[0]}-{ranks[-1]}" if run else "ranks " + ", ".join(map(str, ranks))
