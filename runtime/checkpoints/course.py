"""The course of a run on a rank: where it begins, its iterations with the checkpoints between them, where it stops."""

from __future__ import annotations

from pathlib import Path

from plans.checkpoint_files import open_checkpoint
from plans.runfile import RunFile
from runtime.checkpoints.read import restore
from runtime.checkpoints.stopping import StopAgreement
from runtime.checkpoints.write import Saver
from runtime.executor import Executor
from runtime.reports.records import Recorder


def take_up(executor: Executor, folder: str) -> None:
    """Put a run into the state of a checkpoint; nothing where there is none."""
    if folder:
        checkpoint = open_checkpoint(Path(folder))
        restore(checkpoint, executor.state.trainers)
        executor.state.iterations = checkpoint.index.iteration


def run_iterations(executor: Executor, run: RunFile, recorder: Recorder, stop: StopAgreement) -> int:
    """Run what is left of a run; how many iterations are done then, fewer than its own where all ranks stopped.

    A plan with lag is drained before a checkpoint, so that the state is that after a whole iteration; what a call reads
    does not depend on when it runs.
    """
    every, done = run.checkpoint.every, executor.state.iterations
    if not every:
        return executor.run(run.iterations, done)
    saver = Saver(run.checkpoint_folder, executor.state.trainers)
    while done < run.iterations:
        target = min(run.iterations, (done // every + 1) * every)
        reached = executor.run(target, done, stop.before)
        recorder.say("checkpoint", reached)
        if reached > done:
            saver.save(reached)
        done = reached
        if reached < target:
            break
    stop.close()
    saver.wait()
    return done
