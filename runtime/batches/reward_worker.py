"""The process of a reward function: loads it once, then answers lists of texts with scores, a JSON line each way.

It holds no memory, device or connection of the rank, so whatever the function does ends here.
"""

from __future__ import annotations

import inspect
import json
import os
import resource
import signal
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from runtime.batches.reward_errors import RewardError
from runtime.batches.reward_functions import RewardFunction, bind, call, load_function, scores_of
from runtime.processes.lifetime import STOP_SIGNALS, die_with, hear


@dataclass(frozen=True)
class Reward:
    """A reward function that is loaded, the weight of its scores, and the parameters that it is called with."""

    name: str
    weight: float
    function: RewardFunction
    parameters: Sequence[inspect.Parameter]

    @classmethod
    def load(cls, name: str, weight: float, columns: Sequence[str]) -> Self:
        """Find it and bind its parameters. Whatever its file raises passes through."""
        function = load_function(name)
        return cls(name, weight, function, bind(name, function, columns))

    def scores(self, values: dict[str, list[Any]]) -> list[float]:
        """Of the samples of lists of texts and columns."""
        return scores_of(self.name, call(self.function, self.parameters, values), len(values["responses"]))


def main(
    requests: int, replies: int, parent: int, memory_bytes: int, weights: Mapping[str, float], columns: Sequence[str]
) -> None:
    """Serve rewards, a score being the weighted sum of theirs, until `requests`, a descriptor, is closed. The process
    leads a session of its own."""

    def end() -> None:
        os.killpg(0, signal.SIGKILL)

    try:
        die_with(parent, end)
    except ProcessLookupError:
        return
    # slurm sends a signal to all processes of a job: the rank then writes a checkpoint, and needs scores until it has.
    # What the function starts has the signals as usual: handlers, unlike SIG_IGN, are not inherited.
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: None)
    hear()
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(requests, encoding="utf-8") as read, open(replies, "w", encoding="utf-8") as write:

        def reply(answer: dict[str, Any]) -> None:
            try:
                write.write(json.dumps(answer) + "\n")
                write.flush()
            except BrokenPipeError:  # the rank is gone, and nobody wants to hear of it
                end()

        rewards = []
        for name, weight in weights.items():
            try:
                rewards.append(Reward.load(name, weight, columns))
            except BaseException as error:
                reply(_described(name, error, memory_bytes))
                return
        reply({"ready": True})
        for line in read:
            reply(_answer(rewards, json.loads(line), memory_bytes))


def _answer(rewards: Sequence[Reward], values: dict[str, Any], memory_bytes: int) -> dict[str, Any]:
    """The weighted sum of the rewards of every sample, or the error of the first that fails."""
    values["completions"] = values["responses"]
    scores = [0.0] * len(values["responses"])
    for reward in rewards:
        try:
            found = reward.scores(values)
        except BaseException as error:
            return _described(reward.name, error, memory_bytes)
        scores = [score + reward.weight * more for score, more in zip(scores, found, strict=True)]
    return {"scores": scores}


def _described(name: str, error: BaseException, memory_bytes: int) -> dict[str, Any]:
    """An error as the rank reports it; `fault` tells whether the function raised it."""
    if isinstance(error, RewardError):
        return {"message": error.message, "hint": error.hint, "sample": error.sample}
    if isinstance(error, SystemExit):
        return {"message": f"reward `{name}` called exit({error.code!r:.40})", "hint": _place(error)}
    if isinstance(error, MemoryError):
        limit = f"reward_limits.memory_gib = {memory_bytes / 2**30:g}"
        return {"message": f"reward `{name}` ran out of memory", "hint": f"{limit} in the run file; {_place(error)}"}
    return {"message": f"reward `{name}` raised {type(error).__name__}: {error}", "hint": _place(error)}


def _place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith("<")] or list(frames)
    return f"{own[-1].filename}:{own[-1].lineno}" if own else ""
