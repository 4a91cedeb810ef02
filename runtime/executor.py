"""The executor: one rank's projection of the program, step after step. The order is the same everywhere, so there is
no controller to wait for and no two ranks can wait for each other."""

from __future__ import annotations

import resource
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from plans.algorithms import ACTOR, REFERENCE
from plans.batches import Share, share_of
from plans.errors import RealplanError
from plans.graph import Call, CallKind
from plans.layout import Place
from plans.lengthsfile import recorded
from plans.program import Program, Step, StepKind, compile_program
from plans.runfile import RANDOM, patience_s
from runtime.batches.rewards import Reward
from runtime.batches.transfer import BatchStore, LateError
from runtime.calls.forward_calls import PendingScores, Values, begin_reward, end_reward, generate_call, inference_call
from runtime.calls.shown import shown_samples
from runtime.calls.train_call import train_call
from runtime.groups import GroupCache
from runtime.job import Job
from runtime.models.model import Model, nonfinite_parameter
from runtime.passes.training import NonFinite, Trainer
from runtime.processes.failures import MEMORY_HINT, lost_peer, memory_words, timed_out
from runtime.reports.operations import operation_of
from runtime.reports.records import Records
from runtime.reports.stats import Stat
from runtime.weights.copies import Copies
from runtime.weights.export import export, export_s

AGREEMENT = "agreement to stop"
"""Name of the step before an iteration in which ranks learn whether it takes place."""


class StepError(RealplanError):
    """A step that failed on a rank. `secondary`: a peer went away, so another rank knows the cause; `late`: a peer did
    not come in time; `nonfinite`: the iteration whose numbers training cannot go on with."""

    def __init__(
        self,
        message: str,
        hint: str = "",
        *,
        secondary: bool = False,
        late: bool = False,
        nonfinite: int | None = None,
    ) -> None:
        super().__init__(message, hint)
        self.secondary = secondary
        self.late = late
        self.nonfinite = nonfinite


@dataclass
class RunState:
    """What a run has become on this rank, beside its weights; with them, all that another run needs to go on from here.

    iterations: how many are done; the order of the data and the samples drawn are keyed by it. trainers: role -> its
    optimizer state and step count, on the ranks of its home.
    """

    trainers: Mapping[str, Trainer]
    iterations: int = 0


class Executor:
    """Runs a job on this rank. Making it and running it is collective over all ranks of the cluster.

    main: another executor of the same plan, whose program and weights this one uses too.
    """

    def __init__(
        self, job: Job, groups: GroupCache, device: torch.device, recorder: Records, *, main: Executor | None = None
    ) -> None:
        self.program: Program = compile_program(job.plan) if main is None else main.program
        self._job = job
        self._rank = dist.get_rank()
        self._device, self._groups = device, groups
        self._recorder = recorder
        self._store = BatchStore(job.plan, device, self._given_lengths)
        self._scores: dict[tuple[int, str], PendingScores] = {}
        self._first = 0
        self._resident = _resident_bytes()
        if main is None:
            scores = self._start_rewards()
            self.copies = Copies(job, self.program, groups, device)
            if scores is not None:
                scores.ready()
        else:
            self.copies = main.copies
        self.state = RunState(self.copies.trainers)

    def run(self, iterations: int, first: int = 0, stops: Callable[[int], bool] | None = None) -> int:
        """Run iterations [first, iterations); how many are done then. Raises StepError with rank, iteration and step.

        stops: asked at the start of every iteration, on every rank, whether all stop before it.
        """
        self._store.begin(first)
        self._first = first
        left = Counter(dict.fromkeys(range(first, iterations), len(self.program.projection(self._rank))))
        begun = first - 1
        for step, iteration in self.program.unrolled(iterations, first):
            if stops is not None and begun < iteration + step.lag < iterations:
                begun = iteration + step.lag
                if self._agreed(stops, begun):
                    iterations = begun
            if iteration >= iterations:
                continue
            for function in self._due(step, iteration):
                self._take_scores(function, iteration)
            if self._rank not in step.ranks:
                continue
            self._recorder.say(step.name, iteration)
            try:
                self._step(step, iteration)
                left[iteration] -= 1
                if not left[iteration]:
                    self._finish(iteration)
            except Exception as error:
                raise self._explain(error, step.name, step.ranks, iteration) from error
        for iteration in range(first, iterations):
            self._store.settle(iteration)
        return iterations

    def _agreed(self, stops: Callable[[int], bool], iteration: int) -> bool:
        """Whether all ranks stop before an iteration. It may wait for others to begin it."""
        if self.program.projection(self._rank):
            self._recorder.say(AGREEMENT, iteration)
        try:
            return stops(iteration)
        except (RuntimeError, TimeoutError) as error:
            everyone = tuple(range(dist.get_world_size()))
            raise self._explain(error, AGREEMENT, everyone, iteration) from error

    def update_reference(self, iteration: int) -> None:
        """Have the frozen reference follow the actor as the run file says. Collective over all ranks, between
        iterations."""
        home = self.program.homes[ACTOR]
        ranks = sorted(
            {*home.layout.ranks, *(r for c in self.program.copies if c.role == REFERENCE for r in c.layout.ranks)}
        )
        self._recorder.say(f"update {REFERENCE}", iteration)
        try:
            self.copies.blend(ACTOR, REFERENCE, self._job.run.reference.mix)
        except Exception as error:
            raise self._explain(error, f"update {REFERENCE}", tuple(ranks), iteration) from error

    def export(self, role: str, folder: Path, *, keeps: bool = True) -> None:
        """Write a trained role as a Hugging Face folder, which rank 0 sees; what was there stays aside, or goes
        (`keeps`). Collective over all ranks."""
        home, iteration, dtype = self.program.homes[role], self.state.iterations, self._job.dtype
        step, model = f"export {role}", None
        self._recorder.say(step, iteration)
        if self._rank in home.layout.ranks:
            model = self.copies.model(home.calls[0])
            check_finite(model, f"rank {self._rank}: the weights of `{role}`, which were to be exported")
        weights = self._job.run.weights_of(role)
        source = None if weights == RANDOM else Path(weights)
        try:
            group = self._groups.patient(timedelta(seconds=export_s(home.layout, dtype)))
            export(home.layout, model, folder, source, dtype=dtype, group=group, keeps=keeps)
        except Exception as error:
            raise self._explain(error, step, tuple(range(dist.get_world_size())), iteration) from error

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

    def _start_rewards(self) -> Reward | None:
        """Start the processes of the reward where its function runs, the first rank of each replica: they load it while
        this one loads weights. None on other ranks."""
        plan = self._job.plan
        hosts = [plan.layout(plan.workload.graph.host(step.subject)) for step in self.program.steps
                 if step.kind is StepKind.FUNCTION]  # fmt: skip
        places = [layout.places[self._rank] for layout in hosts if self._rank in layout.ranks]
        if self._job.reward is None or not any(place.tp == 0 and place.pp == 0 for place in places):
            return None
        self._job.reward.start()
        return self._job.reward

    def _due(self, step: Step, iteration: int) -> list[str]:
        """Functions under way on this rank whose scores a step reads or sends. Every rank of the replica takes them at
        this place of the total order, whether it has a part in the step or not, since taking them is collective."""
        return [name for begun, name in self._scores if begun == iteration and self._needs(step, name)]

    def _needs(self, step: Step, function: str) -> bool:
        if step.kind is StepKind.TRANSFER:
            return step.subject == function
        graph = self._job.plan.workload.graph
        reads = graph.call(step.subject).inputs if step.kind in (StepKind.CALL, StepKind.FUNCTION) else ()
        return any(key in reads for key in graph.call(function).outputs)

    def _take_scores(self, name: str, iteration: int) -> None:
        self._recorder.say(name, iteration)
        pending = self._scores.pop((iteration, name))
        try:
            made, at_s = end_reward(pending)
        except Exception as error:
            ranks = tuple(self._job.plan.ranks(self._job.plan.workload.graph.host(name)))
            raise self._explain(error, name, ranks, iteration) from error
        if iteration < self.state.iterations:  # this rank has no more use for them
            return
        for key, values in made.items():
            self._store.put(iteration, key, pending.rows, values)
        self._recorder.add_span(name, StepKind.FUNCTION, iteration, pending.begun_s, at_s)

    def _move(self, step: Step) -> None:
        copy = next(copy for copy in self.program.copies if copy.name == step.copy)
        match step.kind:
            case StepKind.REALLOCATE:
                self._store.post(step.ranks)
                self.copies.reallocate(copy)
            case StepKind.RELEASE:
                self.copies.release(copy)
            case StepKind.LOAD:
                self.copies.load(copy)
            case _:
                self.copies.offload(copy)

    def _given_lengths(self, iteration: int) -> list[tuple[int, int]]:
        assert self._job.examples is not None
        found = self._job.examples.sequences(self._job.batch(iteration), range(self._job.plan.workload.samples))
        return list(zip(found.prompts, found.responses, strict=True))

    def _call(self, name: str, iteration: int) -> None:
        graph = self._job.plan.workload.graph
        call = graph.call(name)
        share = self._share(name, iteration)
        rows = share.samples
        inputs: dict[str, Values] = {
            key: self._store.get(iteration, key, rows) for key in call.inputs if key not in graph.sources
        }
        if self._job.examples is not None:
            examples = self._job.examples.sequences(self._job.batch(iteration), rows).to(self._device)
            inputs |= {key: examples for key in call.inputs if key in graph.sources}
        made = self._compute(call, share, inputs, iteration)
        for key, values in made.items():
            self._store.put(iteration, key, rows, values)

    def _share(self, name: str, iteration: int) -> Share:
        """This rank's share of a call. Generation and functions on it have theirs before the lengths are known."""
        plan = self._job.plan
        host = plan.workload.graph.host(name)
        if plan.workload.graph.call(host).kind is CallKind.GENERATE:
            return share_of(plan, host, self._rank, [0] * plan.workload.samples)
        return share_of(plan, host, self._rank, self._store.tokens(iteration, host))

    def _compute(self, call: Call, share: Share, inputs: Mapping[str, Values], iteration: int) -> Mapping[str, Values]:
        job, planned = self._job, self._job.plan.planned(self._job.plan.workload.graph.host(call.name))
        model = self.copies.model(planned.call)
        if call.kind is CallKind.GENERATE:
            return generate_call(job, call, planned, model, share.samples, iteration)
        if call.kind in (CallKind.INFERENCE, CallKind.TRAIN_STEP) and model.place == Place(dp=0, tp=0, pp=0):
            self._recorder.add(iteration, {f"plan/{call.name}/imbalance": Stat.one(share.imbalance)})
        if call.kind is CallKind.INFERENCE:
            return inference_call(job, call, share, model, inputs)
        if call.kind is CallKind.FUNCTION:
            self._scores[iteration, call.name] = begin_reward(job, call, model, inputs, share.samples, iteration)
            return {}
        lengths = self._store.lengths(iteration, call.name)
        responses = [response for _, response in lengths]
        if model.place == Place(dp=0, tp=0, pp=0):
            figures = recorded(lengths)
            if age := job.plan.workload.graph.staleness:
                figures[f"{call.model}/staleness"] = float(min(iteration - self._first, age))
            self._recorder.add(iteration, {name: Stat.one(value) for name, value in figures.items()})
        with self.copies.training(call.model, offload=planned.strategy.offload) as trainer:
            self._recorder.add(iteration, train_call(job, call, share, trainer, inputs, responses, iteration))
        place = model.place
        if place.tp == place.pp == place.cp == 0 and call.model == next(iter(job.plan.workload.graph.trainers)):
            self._recorder.show(iteration, shown_samples(job, inputs, share.samples, iteration))
        check_finite(model, f"the weights of `{call.model}` after this training")
        return {}

    def _finish(self, iteration: int) -> None:
        """This rank has done all of an iteration. What it sent in the one before is taken by now, or soon."""
        self._recorder.add(iteration, self._memory())
        if skipped := self._job.run.skip_batches:
            self._recorder.add(iteration, {"data/skipped_batches": Stat.one(float(skipped))})
        self._recorder.finish(iteration)
        self.state.iterations = iteration + 1
        self._store.drop(iteration)
        self._store.settle(iteration - 1)

    def _memory(self) -> dict[str, Stat]:
        device = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        peak = device if self._device.type == "cuda" else max(0, host - self._resident)
        found = {"memory/device_gb": device, "memory/host_gb": host, "memory/peak_gib": peak}
        return {name: Stat.one(value / 2**30) for name, value in found.items()}

    def _synchronize(self) -> None:
        """Wait for this rank's own stream; messages on their way go on."""
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()

    def _explain(self, error: Exception, step: str, ranks: tuple[int, ...], iteration: int) -> StepError:
        where = f"rank {self._rank}, iteration {iteration}, step `{step}`"
        if isinstance(error, RealplanError):
            nonfinite = iteration if isinstance(error, NonFinite) else None
            return StepError(f"{where}: {error.message}", error.hint, nonfinite=nonfinite)
        text = str(error).strip()
        if isinstance(error, torch.OutOfMemoryError):
            return StepError(f"{where}: out of memory. {memory_words(text)}", MEMORY_HINT)
        peers = (error.source,) if isinstance(error, LateError) else ranks
        if lost_peer(text):
            return StepError(f"{where}: {_shown(peers)} went away", secondary=True)
        if timed_out(text):
            limit = f"timeout_s = {patience_s(self._job.plan, self._job.run):g} s"
            inside = f" in `{operation}`" if (operation := operation_of(error)) else ""
            message = f"{where}: waited{inside} for {_shown(peers)} for longer than {limit}"
            return StepError(message, "a rank hangs or is slower than that: raise timeout_s in the run file", late=True)
        return StepError(f"{where}: {type(error).__name__}: {text}")


def check_finite(model: Model, what: str) -> None:
    """Raise NonFinite when this rank holds a weight that is not finite. Local: peers see that this rank is gone."""
    if name := nonfinite_parameter(model):
        raise NonFinite(f"{what} are not finite: {name}", "a smaller learning rate")


def _resident_bytes() -> int:
    """Memory of this process that is in use now: of a rank before it has a model, that of its libraries."""
    try:
        pages = int(Path("/proc/self/statm").read_text("utf-8").split()[1])
    except OSError:  # not Linux: all of the process counts
        return 0
    return pages * resource.getpagesize()


def _shown(ranks: tuple[int, ...]) -> str:
    """Ranks as a person writes them."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    run = ranks == tuple(range(ranks[0], ranks[-1] + 1))
    return f"ranks {ranks[0]}-{ranks[-1]}" if run else "ranks " + ", ".join(map(str, ranks))
