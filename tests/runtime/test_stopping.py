"""Ranks that reach iterations at different times stop before the same one, and begin none after a request."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from threading import Thread

import pytest
import torch.distributed as dist
from plan_cases import tiny_plan

from plans.program import compile_program
from runtime.checkpoints.folder import stop_request
from runtime.checkpoints.stopping import ASKED, Part, StopAgreement, part_of
from runtime.groups import in_time
from runtime.processes.failures import lost_peer
from runtime.processes.lifetime import STOP_SIGNALS

MINUTE = timedelta(minutes=1)
APART = {
    "actor_generate": ("node 0 gpu 0", "d1 t1 p1"),
    "ref_infer": ("node 0 gpu 2", "d1 t1 p1"),
    "critic_infer": ("node 0 gpu 1", "d1 t1 p1"),
    "actor_train": ("node 0 gpu 1", "d1 t1 p1"),
    "critic_train": ("node 0 gpu 1", "d1 t1 p1"),
}


def test_who_begins_an_iteration() -> None:
    """Weights come from the actor's rank, rows from the one that generates; the fourth rank has nothing to do."""
    parts = [part_of(compile_program(tiny_plan(4, APART)), rank) for rank in range(4)]
    assert parts == [Part.FOLLOWS, Part.BEGINS, Part.FOLLOWS, Part.IDLE]
    lagged = {**APART, "critic_train": ("node 0 gpu 3", "d1 t1 p1", {"lag": 1}), "critic_infer": APART["ref_infer"]}
    order = ("actor_generate", "critic_train", "ref_infer", "critic_infer", "actor_train")
    program = compile_program(tiny_plan(4, lagged, order=order))
    assert [part_of(program, rank) for rank in range(4)] == [Part.BEGINS] * 4
    colocated = compile_program(tiny_plan(2, "d2 t1 p1"))
    assert [part_of(colocated, rank) for rank in range(2)] == [Part.BEGINS] * 2


@pytest.mark.parametrize("seed", range(20))
def test_all_stop_before_the_next_iteration_that_nobody_has_begun(seed: int, tmp_path: Path) -> None:
    """Ranks of any order, any distance apart; a request at any moment."""
    rng, store, ranks = random.Random(seed), dist.HashStore(), range(4)
    agreements = [StopAgreement(tmp_path, store, MINUTE) for _ in ranks]
    at, stopped, moment, wanted = [0] * 4, dict[int, int](), rng.randrange(40), 0
    for turn in range(1000):
        if turn == moment:
            stop_request(tmp_path).touch()
            wanted = max(at)  # those before it have begun
        rank = rng.choice(ranks)
        if rank not in stopped:
            if agreements[rank].before(at[rank], Part.BEGINS):
                stopped[rank] = at[rank]
            at[rank] += 1
    assert stopped == dict.fromkeys(ranks, wanted)


def test_a_rank_that_follows_waits_for_one_that_begins(tmp_path: Path) -> None:
    store = dist.HashStore()
    one, other = (StopAgreement(tmp_path, store, MINUTE) for _ in range(2))
    found: list[bool] = []
    waits = Thread(target=lambda: found.append(other.before(0, Part.FOLLOWS)))
    waits.start()
    time.sleep(0.05)
    assert not found and not one.before(0, Part.BEGINS)
    waits.join(10)
    assert found == [False]
    stop_request(tmp_path).touch()
    assert one.before(1, Part.BEGINS) and other.before(1, Part.IDLE)
    with pytest.raises(TimeoutError):
        StopAgreement(tmp_path, store, timedelta(seconds=0.05)).before(2, Part.FOLLOWS)


@contextmanager
def handlers() -> Iterator[None]:
    """Puts back what this process does with signals."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_to_one_rank_is_known_to_all(number: signal.Signals, tmp_path: Path) -> None:
    store = dist.HashStore()
    one, other = (StopAgreement(tmp_path / name, store, MINUTE) for name in ("one", "other"))
    with handlers():
        one.listen(*STOP_SIGNALS)
        assert not other.before(0, Part.BEGINS)
        signal.raise_signal(number)
        in_time(lambda: store.wait([ASKED]), timedelta(seconds=10))
    assert other.before(1, Part.BEGINS) and one.before(1, Part.BEGINS)
    one.close()


def test_a_store_that_does_not_answer_or_is_gone() -> None:
    """As that of a first rank that was stopped, or killed."""
    with pytest.raises(TimeoutError, match="timed out"):
        in_time(lambda: time.sleep(1), timedelta(seconds=0.05))
    assert lost_peer("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server crash?")
