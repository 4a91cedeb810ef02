"""The process of a reward function: loads it once, then answers lists of texts with scores, a JSON line each way.

It holds no memory, device or connection of the rank, so whatever the function does ends here.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from runtime.batches.reward_errors import RewardError
from runtime.batches.reward_functions import bind, call, load_function, scores_of
from runtime.processes.lifetime import die_with


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
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with open(requests, encoding="utf-8") as read, open(replies, "w", encoding="utf-8") as write:

        def reply(answer: dict[str, Any]) -> None:
            try:
                write.write(json.dumps(answer) + "\n")
                write.flush()
            except BrokenPipeError:  # the rank is gone, and nobody wants to hear of it
                end()

        functions = []
        for name, weight in weights.items():
            try:
                function = load_function(name)
                functions.append((name, weight, function, bind(name, function, columns)))
            except BaseException as error:
                reply(_described(name, error, memory_bytes))
                return
        reply({"ready": True})
        for line in read:
            values = json.loads(line)
            values["completions"] = values["responses"]
            scores = [0.0] * len(values["responses"])
            for name, weight, function, parameters in functions:
                try:
                    found = scores_of(name, call(function, parameters, values), len(scores))
                except BaseException as error:
                    reply(_described(name, error, memory_bytes))
                    break
                scores = [score + weight * more for score, more in zip(scores, found, strict=True)]
            else:
                reply({"scores": scores})


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
