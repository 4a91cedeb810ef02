"""The course of a run on a rank: where it begins, its iterations with the checkpoints between them, where it stops."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch.distributed as dist

from plans.algorithms import REFERENCE
from plans.checkpoint_files import open_checkpoint
from plans.runfile import RunFile
from runtime.checkpoints.read import restore, restore_frozen
from runtime.checkpoints.stopping import StopAgreement, part_of
from runtime.checkpoints.write import Saver
from runtime.evaluation import Evaluations
from runtime.executor import Executor
from runtime.reports.records import Recorder


def take_up(executor: Executor, folder: str) -> None:
    """Put a run into the state of a checkpoint; nothing where there is none."""
    if folder:
        checkpoint = open_checkpoint(Path(folder))
        restore(checkpoint, executor.state.trainers)
        restore_frozen(checkpoint, executor.copies)
        executor.state.iterations = checkpoint.index.iteration


def run_iterations(
    executor: Executor, run: RunFile, recorder: Recorder, stop: StopAgreement, evaluations: Evaluations | None = None
) -> int:
    """Run what is left of a run; how many iterations are done then, fewer than its own where all ranks stopped.

    A plan with lag is drained before a checkpoint, an evaluation or an update of the reference, so that the state is
    that after a whole iteration; what a call reads does not depend on when it runs. A checkpoint has the reference as
    the next iteration reads it.
    """
    every, done = run.checkpoint.every, executor.state.iterations
    if not every and evaluations is None and not run.reference.every:
        return executor.run(run.iterations, done)
    frozen = {REFERENCE: partial(executor.copies.frozen, REFERENCE)} if run.reference.every else {}
    saver = Saver(run.checkpoint_folder, executor.state.trainers, frozen) if every else None
    if evaluations is not None and evaluations.due(done):
        evaluations.evaluate(done)
    stops = partial(stop.before, part=part_of(executor.program, dist.get_rank())) if every else None
    while done < run.iterations:
        target = next_pause(run, done)
        reached = executor.run(target, done, stops)
        if reached == target and run.reference.every and reached % run.reference.every == 0:
            executor.update_reference(reached)
        if saver is not None and reached > done and (reached < target or checkpoint_due(run, reached)):
            recorder.say("checkpoint", reached)
            saver.save(reached)
        done = reached
        if reached < target:
            break
        if evaluations is not None and evaluations.due(done):
            evaluations.evaluate(done)
    stop.close()
    if saver is not None:
        saver.wait()
    return done


def checkpoint_due(run: RunFile, iteration: int) -> bool:
    """Whether the state after so many iterations is kept."""
    return bool(run.checkpoint.every) and (iteration % run.checkpoint.every == 0 or iteration == run.iterations)


def next_pause(run: RunFile, done: int) -> int:
    """How many iterations are done at the next checkpoint, evaluation or update of the reference, or at the end."""
    steps = [every for every in (run.checkpoint.every, run.evaluation.every, run.reference.every) if every]
    return min([run.iterations, *((done // every + 1) * every for every in steps)])
