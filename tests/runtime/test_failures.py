"""Which of several errors is the cause."""

from __future__ import annotations

import os
import time
from pathlib import Path

from plans.errors import RealplanError
from runtime.executor import StepError
from runtime.processes.failures import find_cause, memory_words, write_failure
from runtime.reports.records import Recorder, crash_path


def test_the_first_error_that_is_not_a_lost_peer(tmp_path: Path) -> None:
    write_failure(tmp_path, 2, StepError("rank 2, iteration 0, step `x`: rank 1 went away", secondary=True))
    write_failure(tmp_path, 3, RuntimeError("gloo: Connection closed by peer [127.0.0.1]:1234"))
    write_failure(tmp_path, 1, RealplanError("rank 1: the reward failed", "mend it"))
    write_failure(tmp_path, 0, RealplanError("rank 0: the reward failed", "mend it"))
    cause = find_cause(tmp_path, {2: 1})
    assert cause.message == "rank 1: the reward failed" and cause.hint == "mend it"
    assert "RealplanError: rank 1: the reward failed" in cause.details


def test_a_killed_rank_comes_before_those_that_lost_it(tmp_path: Path) -> None:
    write_failure(tmp_path, 0, StepError("rank 0: rank 1 went away", secondary=True))
    Recorder(tmp_path, 1, time.time()).say("critic_train", 7)
    cause = find_cause(tmp_path, {0: 1, 1: -9})
    assert cause.message == "rank 1 was killed by SIGKILL in iteration 7, step `critic_train`"
    assert "memory" in cause.hint


def test_a_rank_that_never_started(tmp_path: Path) -> None:
    assert find_cause(tmp_path, {3: 127}).message == "rank 3 ended (exit code 127) while it started, before it was done"


def test_waiting_too_long_says_where_everybody_was(tmp_path: Path) -> None:
    for rank, step in enumerate(("actor_train", "ref_infer")):
        Recorder(tmp_path, rank, time.time()).say(step, 4)
    write_failure(tmp_path, 0, StepError("rank 0: waited for rank 1 for longer than timeout_s = 5 s", late=True))
    assert "rank 1: in iteration 4, step `ref_infer`" in find_cause(tmp_path, {0: 1}).message


def test_only_lost_peers(tmp_path: Path) -> None:
    write_failure(tmp_path, 0, StepError("rank 0: rank 1 went away", secondary=True))
    assert find_cause(tmp_path, {0: 1}).message == "rank 0: rank 1 went away"
    assert find_cause(tmp_path / "empty", {}).hint == "run again with --debug"
    assert os.listdir(tmp_path) == ["error-0.json"]


def test_a_full_gpu_is_told_in_one_line() -> None:
    text = (
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which 1.06 GiB is "
        "free. Including non-PyTorch memory, this process has 78.1 GiB memory in use.\nOf the allocated memory "
        "70.2 GiB is allocated by PyTorch, and 7.3 GiB is reserved by PyTorch but unallocated."
    )
    words = memory_words(text)
    assert words == "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB of which 1.06 GiB is free."
    assert memory_words("out of memory\nat line 3") == "out of memory"


def test_a_rank_that_ends_without_being_done_has_failed(tmp_path: Path) -> None:
    Recorder(tmp_path, 0, time.time()).say("export", 3, done=True)
    Recorder(tmp_path, 1, time.time()).say("reward", 0)
    cause = find_cause(tmp_path, {0: 0, 1: 0})
    assert cause.message == "rank 1 ended (exit code 0) in iteration 0, step `reward`, before it was done"


def test_stacks_of_a_crash_go_to_a_file(tmp_path: Path) -> None:
    crash_path(tmp_path, 1).write_text("Fatal Python error: Segmentation fault\n")
    cause = find_cause(tmp_path, {1: -11}, tmp_path / "out")
    assert cause.message == "rank 1 was killed by SIGSEGV while it started"
    assert cause.hint == f"its stacks are in {tmp_path / 'out' / 'crash-rank-1.txt'}"
    assert "Segmentation fault" in (tmp_path / "out" / "crash-rank-1.txt").read_text()
