"""Room is asked for before a run starts: what a machine writes, keeps and exports, by hand."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
from plan_cases import tiny_plan, tiny_run

from plans.checkpoint import parameters_of
from plans.errors import RealplanError
from plans.host_memory import HostMemory
from runtime.checkpoints import room
from runtime.checkpoints.room import check_disks, check_memory, checkpoint_bytes, export_bytes
from runtime.machines.keeper import lying

APART = {
    "actor_generate": ("nodes 0-1", "d4 t1 p1"),
    "ref_infer": ("node 0 gpu 0", "d1 t1 p1"),
    "critic_infer": ("node 1 gpu 0", "d1 t1 p1"),
    "actor_train": ("node 0", "d2 t1 p1"),
    "critic_train": ("node 1 gpu 0", "d1 t1 p1"),
}
PLAN = tiny_plan(4, APART, nodes=2)
ACTOR, CRITIC = (
    sum(p.size for p in parameters_of(PLAN.workload.models[role]).values()) for role in ("actor", "critic")
)
Usage = namedtuple("Usage", "total used free")


def with_free(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10 * free, 9 * free, free))


def test_a_checkpoint_is_counted_where_it_is_written(tmp_path: Path) -> None:
    """Masters and two moments of four bytes: those of the actor on node 0, those of the critic on node 1's first."""
    run = tiny_run(tmp_path)
    assert [checkpoint_bytes(PLAN, run, ranks) for ranks in ((0, 1), (2, 3), (2,), (3,), ())] == [
        12 * ACTOR, 12 * CRITIC, 12 * CRITIC, 0, 0,
    ]  # fmt: skip
    assert checkpoint_bytes(PLAN, run) == 12 * (ACTOR + CRITIC)


@pytest.mark.parametrize(
    ("storages", "found"),
    [
        ({0: [0, 1]}, {0: [0, 1]}),
        ({0: [0], 1: [1], 2: [2]}, {0: [0, 2], 1: [1, 0], 2: [2, 1]}),
        ({0: [0, 1], 1: []}, {0: [0, 1], 1: [0, 1]}),
        ({0: [0], 1: [1], 2: []}, {0: [0, 1], 1: [1, 0], 2: []}),
    ],
)
def test_every_part_lies_on_two_storages(storages: dict[int, list[int]], found: dict[int, list[int]]) -> None:
    assert {node: sorted(ranks) for node, ranks in lying(storages).items()} == {n: sorted(r) for n, r in found.items()}


@pytest.mark.parametrize(
    ("keys", "keeps", "exports", "needed"),
    [
        ({"checkpoint": {"every": 1, "keep": 2}, "export": False}, None, True, 3 * 12 * (ACTOR + CRITIC)),
        ({"checkpoint": {"every": 1, "keep": 1}, "export": False}, [2, 3], True, 2 * 12 * CRITIC),
        ({"checkpoint": {"every": 0}, "export": True}, None, True, 4 * ACTOR),
        ({"checkpoint": {"every": 1, "keep": 1}, "export": True}, [0, 1], True, (4 + 2 * 12) * ACTOR),
        # Node 1 keeps half of the actor in a second copy; the other half's masters come for the export.
        ({"checkpoint": {"every": 1, "keep": 1}, "export": True}, [1, 2], True,
         4 * ACTOR + 12 * ACTOR + 2 * 12 * CRITIC + 2 * ACTOR),
        ({"checkpoint": {"every": 1, "keep": 1}, "export": True}, [0, 1], False, 2 * 12 * ACTOR),
        (
            {"checkpoint": {"every": 0}, "evaluation": {"every": 1, "held_out": 2, "keep_best": True}, "export": True},
            None, True, 3 * 4 * ACTOR,
        ),
    ],
)  # fmt: skip
def test_disks_hold_checkpoints_and_exported_weights(
    keys: dict[str, Any], keeps: list[int] | None, exports: bool, needed: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Float32 weights of the actor once, the best ones twice; one checkpoint more than is kept."""
    assert export_bytes(PLAN, "actor") == 4 * ACTOR
    run = tiny_run(tmp_path / "out", **keys)
    with_free(monkeypatch, needed)
    check_disks(PLAN, run, keeps, exports=exports)
    with_free(monkeypatch, needed - 1)
    with pytest.raises(RealplanError, match=r"need \d+.\d MiB in `.*out.*`, where \d+.\d MiB are free"):
        check_disks(PLAN, run, keeps, exports=exports)


def test_host_memory_holds_the_copies_of_the_ranks_of_a_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path, checkpoint={"every": 1})
    monkeypatch.setattr(room, "host_memory", lambda: HostMemory(2**40, 12 * ACTOR))
    check_memory(PLAN, run, [0, 1])
    with pytest.raises(RealplanError, match="of host memory"):
        check_memory(PLAN, run)
    check_memory(PLAN, tiny_run(tmp_path, checkpoint={"every": 0}))
