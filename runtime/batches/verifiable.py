"""Rewards that check an answer: exactly, as mathematics, by form, or by running code."""

from __future__ import annotations

import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

from runtime.batches.reward_errors import RewardError
from runtime.processes.lifetime import STOP_SIGNALS

CODE_SECONDS, CODE_BYTES = 10, 2**30
_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_THOUGHT = re.compile(r"\s*<think>(?:(?!</?think>).)+</think>(?:(?!</?think>).)*\S\s*", re.DOTALL)


def exact(response: str, answer: str) -> float:
    """1 where the final answer of a response is the answer, letter by letter, else 0. Both are what stands in the last
    `\\boxed{}`, or after the last `####` (as in GSM8K), else the whole text, without spaces around it."""
    return float(final_answer(response) == final_answer(str(answer)))


def math_answer(response: str, answer: str) -> float:
    """1 where response and answer hold the same mathematics (`math-verify`: 0.5, 1/2 and `\\frac{1}{2}` are equal)."""
    try:
        from math_verify import parse, verify
    except ImportError:
        raise RewardError("reward `math` needs a package", "pip install 'realplan[math]'") from None
    # Its own time limits are signals, which only a main thread may set; the reward's process has a limit anyway.
    found = parse(_marked(response), parsing_timeout=None)
    return float(bool(verify(parse(_marked(str(answer)), parsing_timeout=None), found, timeout_seconds=None)))


def reasoning_format(response: str) -> float:
    """1 for thoughts in `<think>` and `</think>` with an answer after them, as DeepSeek-R1 has them, else 0."""
    return float(_THOUGHT.fullmatch(response) is not None)


def code(response: str, tests: str) -> float:
    """1 where the last block of Python in a response (the whole of one without a block) passes `tests`, which follow
    it: a process of its own with 10 s, 1 GiB, an empty folder and no environment ends with exit code 0. Its user and
    network are those of the run: what must not reach these needs a container around the run."""
    blocks = _BLOCK.findall(response)
    program = (blocks[-1] if blocks else response) + "\n\n" + str(tests) + "\n"
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", program], cwd=folder, env={"PATH": os.defpath}, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, preexec_fn=_confine, start_new_session=True,
        )  # fmt: skip
        try:
            return float(process.wait(CODE_SECONDS) == 0)
        except subprocess.TimeoutExpired:
            return 0.0
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def final_answer(text: str) -> str:
    """What stands in the last `\\boxed{}`, or after the last `####` on its line, else the whole text; stripped."""
    if (boxed := _last_boxed(text)) is not None:
        return boxed.strip()
    _, mark, rest = text.rpartition("####")
    return (rest.strip().split("\n")[0] if mark else text).strip()


def _marked(text: str) -> str:
    """The final answer where the text marks one."""
    return final_answer(text) if "####" in text and _last_boxed(text) is None else text


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, first = 0, start + len("\\boxed")
    for at in range(first, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if not depth:
            return text[first + 1 : at]
    return None


def _confine() -> None:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # a signal to the whole job changes no score
    resource.setrlimit(resource.RLIMIT_CPU, (CODE_SECONDS, CODE_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (CODE_BYTES, CODE_BYTES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
