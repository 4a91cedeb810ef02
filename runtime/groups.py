"""Process groups of layouts. Communicators are made once per set of ranks and shared by all layouts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from functools import partial
from threading import Thread
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from plans.errors import RealplanError
from plans.layout import Layout, Place
from runtime.models.mcore import ProcessGroupCollection

T = TypeVar("T")


def backend_of(device: torch.device) -> str:
    """The communication library of a device: `nccl` for CUDA, `gloo` for the CPU."""
    return "nccl" if device.type == "cuda" else "gloo"


class MeetingError(RealplanError):
    """Ranks that did not all come to make a communicator. `late`: another rank may know why."""

    late = True


def meet(join: Callable[[], T], ranks: Sequence[int], timeout: timedelta) -> T:
    """What `join`, which makes a communicator of `ranks`, returns. Raises MeetingError after `timeout`.

    gloo waits for a peer that left its address and died for five times the timeout of the group to be, and for as long
    as that for one that left none.
    """
    try:
        return in_time(join, timeout)
    except TimeoutError:
        named = "ranks " + (f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 8 else ", ".join(map(str, ranks)))
        raise MeetingError(
            f"{named} did not find each other within {timeout.total_seconds():g} s",
            "what did the others say? `timeout_s` in the run file is how long they wait for each other",
        ) from None


def in_time(work: Callable[[], T], timeout: timedelta) -> T:
    """What `work` returns or raises; TimeoutError after `timeout`. Libraries that wait for peers may wait longer than
    they say: so they do it in a thread of its own, which ends with the process."""
    made: Future[T] = Future()

    def answer() -> None:
        try:
            made.set_result(work())
        except BaseException as error:  # the caller raises it
            made.set_exception(error)

    Thread(target=answer, name="in time", daemon=True).start()
    wait([made], timeout.total_seconds())
    if not made.done():
        raise TimeoutError("timed out")
    return made.result()


class GroupCache:
    """Owns the communicators of this process.

    Every method that makes groups must be called by all ranks of the world in the same order, members or not; a group
    that exists costs nothing. Operations that wait longer than `timeout` fail. `backend`: of tensors on the device,
    where it is not the device's own.
    """

    def __init__(
        self, device: torch.device, timeout: timedelta = timedelta(minutes=10), backend: str | None = None
    ) -> None:
        self.device = device
        self.timeout = timeout
        self._backend = backend or backend_of(device)
        self._groups: dict[tuple[str, tuple[int, ...]], Any] = {}
        self._collections: dict[Layout, Any] = {}

    def group(self, ranks: Iterable[int]) -> Any:
        """The communicator of `ranks` for tensors on the device; None on a rank that is not in it."""
        return self._make(self._backend, ranks)

    def host(self, ranks: Iterable[int]) -> Any:
        """The communicator of `ranks` for tensors and objects in host memory."""
        return self._make("gloo", ranks)

    def patient(self, longer: timedelta) -> Any:
        """The communicator of all ranks for tensors in host memory that waits longer than others, by so much the first
        time that it is asked for."""
        return self._make("gloo", range(dist.get_world_size()), longer)

    def _make(self, backend: str, ranks: Iterable[int], longer: timedelta | None = None) -> Any:
        key = (f"{backend} patient" if longer else backend, tuple(sorted(set(ranks))))
        if key not in self._groups:
            timeout = self.timeout + (longer or timedelta())
            me = dist.get_rank()
            alone = len(key[1]) == 1
            # A group of one is made by its only member, so that a large world does not wait for it rank by rank.
            if not alone or me in key[1]:
                make = partial(dist.new_group, list(key[1]), timeout, backend, use_local_synchronization=alone)
                made = meet(make, key[1], self.timeout)
            self._groups[key] = made if me in key[1] else None
        return self._groups[key]

    def collection(self, layout: Layout) -> Any:
        """Megatron's `ProcessGroupCollection` of a layout; None on ranks outside it. Beside Megatron's it has `joined`
        (`joined_sets`), None where no replicas share experts."""
        assert list(layout.ranks) == sorted(layout.ranks), "torch orders the ranks of a group ascending"
        if layout not in self._collections:
            self._collections[layout] = self._collect(layout)
        return self._collections[layout]

    def _collect(self, layout: Layout) -> Any:
        found: dict[str, Any] = {name: self._mine(sets) for name, sets in rank_sets(layout).items()}
        joined = self._mine(joined_sets(layout)) if layout.joined_replicas > 1 else None
        if dist.get_rank() not in layout.ranks:
            return None
        groups = ProcessGroupCollection(**found)
        groups.inter_dist_opt = None
        groups.joined = joined
        return groups

    def _mine(self, rank_sets: Sequence[tuple[int, ...]]) -> Any:
        mine = None
        for ranks in rank_sets:
            group = self.group(ranks)
            if dist.get_rank() in ranks:
                mine = group
        return mine

    def close(self) -> None:
        """Destroy the communicators this rank is in."""
        for group in self._groups.values():
            if group is not None:
                dist.destroy_process_group(group)
        self._groups.clear()
        self._collections.clear()


def _cut(layout: Layout, *axes: str) -> list[tuple[int, ...]]:
    """The rank sets in which only `axes` (of dp, tp, pp, cp) vary, each in the layout's rank order."""
    sets: dict[tuple[int, ...], list[int]] = {}
    fixed = [axis for axis in ("dp", "tp", "pp", "cp") if axis not in axes]
    for rank in layout.ranks:
        place = layout.places[rank]
        sets.setdefault(tuple(getattr(place, axis) for axis in fixed), []).append(rank)
    return [tuple(ranks) for ranks in sets.values()]


def _ends(layout: Layout, stages: Sequence[int]) -> list[tuple[int, ...]]:
    """For each pipeline, its ranks on the given stages."""
    first = [rank for rank in layout.ranks if layout.places[rank].pp == 0]
    sets = []
    for rank in first:
        at = layout.places[rank]
        sets.append(tuple(layout.rank(Place(dp=at.dp, tp=at.tp, pp=stage, cp=at.cp)) for stage in stages))
    return sets


def rank_sets(layout: Layout) -> dict[str, list[tuple[int, ...]]]:
    """Field of `ProcessGroupCollection` -> the rank sets of its groups, in one order for all ranks."""
    dp_cp, tp, mp = _cut(layout, "dp", "cp"), _cut(layout, "tp"), _cut(layout, "tp", "pp")
    alone: list[tuple[int, ...]] = [(rank,) for rank in layout.ranks]
    ep, expert_dp = _expert_runs(layout)
    return {
        "tp": tp,
        "pp": _cut(layout, "pp"),
        "dp": _cut(layout, "dp"),
        "cp": _cut(layout, "cp"),
        "mp": mp,
        "tp_cp": _cut(layout, "tp", "cp"),
        "dp_cp": dp_cp,
        "intra_dp_cp": dp_cp,
        "tp_dp_cp": _cut(layout, "tp", "dp", "cp"),
        "embd": _ends(layout, sorted({0, layout.pp - 1})),
        "pos_embd": _ends(layout, [0]),
        "intra_dist_opt": [layout.ranks],
        # Experts are never cut by tp, so that their replicas are the ranks with the same place in their run.
        "ep": ep,
        "expt_tp": alone,
        "tp_ep": ep,
        "tp_ep_pp": _over_stages(layout, ep),
        "expt_dp": expert_dp,
        "intra_expt_dp": expert_dp,
    }


def _expert_runs(layout: Layout) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """The runs of ep ranks that hold every expert once, and the ranks that hold the same experts, stage by stage."""
    size, ep = len(layout.ranks) // layout.pp, layout.ep
    stages = [layout.ranks[i : i + size] for i in range(0, len(layout.ranks), size)]
    runs = [stage[i : i + ep] for stage in stages for i in range(0, size, ep)]
    return runs, [stage[i::ep] for stage in stages for i in range(ep)]


def joined_sets(layout: Layout) -> list[tuple[int, ...]]:
    """The ranks at the same place of replicas that share experts (`Layout.joined_replicas`), in the order of dp."""
    joined = layout.joined_replicas
    return [ranks[i : i + joined] for ranks in _cut(layout, "dp") for i in range(0, layout.dp, joined)]


def _over_stages(layout: Layout, runs: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The same run of every stage as one set."""
    each = len(runs) // layout.pp
    return [tuple(rank for run in runs[i::each] for rank in run) for i in range(each)]
