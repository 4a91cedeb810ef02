"""What one machine does for a run when the first one asks: it starts and ends its ranks, tells what they say and how
they end, and keeps its part of the checkpoints."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from plans.checkpoint_files import step_folder
from plans.errors import RealplanError
from plans.runfile import RunFile
from runtime.checkpoints.folder import prepare_folder
from runtime.checkpoints.held import resumed_folder
from runtime.checkpoints.room import check_disks, check_memory
from runtime.launching.ranks import HeldRanks, Starter, start_ranks
from runtime.launching.replan import devices_left
from runtime.machines.inputs import Inputs
from runtime.machines.mirror import Mirror
from runtime.machines.named import renamed
from runtime.machines.storage import Storage, planned_from, taken_in
from runtime.machines.weights import WeightFolders
from runtime.machines.wire import Message
from runtime.processes.member import Address

Say = Callable[[Message], None]


class Station:
    """A machine of a run. say: how it speaks to the first one. scratch: where its ranks leave word, on the first
    machine itself; None elsewhere, where they do so in a folder of their own and all of it is told. starter: has its
    ranks begin."""

    def __init__(
        self, run: RunFile, host: str, say: Say, scratch: Path | None = None, node: int = 0,
        starter: Starter = start_ranks,
    ) -> None:  # fmt: skip
        self._run, self._say, self._scratch, self._starter = run, say, scratch, starter
        self.storage = Storage(run, host)
        self.weights = WeightFolders(run, self.storage.files, node)
        self.inputs = Inputs(run, self.storage.files, node)
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._own: tempfile.TemporaryDirectory[str] | None = None
        self._ranks: HeldRanks | None = None
        self._mirror: Mirror | None = None
        self._keeps: Sequence[int] = ()
        self._told: set[int] = set()
        self._fetching: dict[int, Future[Any]] = {}
        storage = self.storage
        self._does: Mapping[str, Callable[..., Message | Future[Any]]] = {
            "start": self._start, "end": self._end, "prepare": self._prepare, "devices": self._devices,
            "probe": storage.probe, "sees": storage.sees, "unprobe": storage.unprobe, "inventory": storage.inventory,
            "take_needed": storage.take_needed, "take_masters": storage.take_masters,
            "fetch_part": storage.fetch_part, "fetch_step": storage.fetch_step, "finish": storage.finish,
            "forget": storage.forget, "set_aside": storage.set_aside,
            "weights": self._weights, "fetch_weights": self._fetch_weights,
            "inputs": self._inputs, "fetch_inputs": self._fetch_inputs,
        }  # fmt: skip

    def __enter__(self) -> Station:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        self.storage.close()
        self._loader.shutdown(wait=False, cancel_futures=True)
        self.weights.close()
        self.inputs.close()

    def placed(self) -> RunFile:
        """The run file with weights, data and tokenizer as they lie on this machine."""
        return renamed(self._run, self.weights.placed, self.inputs.placed)

    def handle(self, message: Message) -> None:
        """Do what the first machine asks, and answer; what takes long is answered by a later `poll`."""
        number, kind = int(message.pop("id")), str(message.pop("kind"))
        try:
            if kind not in self._does:
                raise RealplanError(f"`{kind}` is nothing that a machine does", "the same version on every machine")
            found = self._does[kind](**message)
        except (RealplanError, OSError) as error:
            self._answer(number, {"error": str(error)})
            return
        if isinstance(found, Future):
            self._fetching[number] = found
        else:
            self._answer(number, found)

    def poll(self, timeout_s: float) -> None:
        """Tell what is new on this machine; waits for a rank to end, for so long."""
        if self._ranks is not None:
            self._ranks.wait(timeout_s)
        self._tell_ranks()
        for number, fetched in list(self._fetching.items()):
            if fetched.done():
                del self._fetching[number]
                error = fetched.exception()
                self._answer(number, fetched.result() or {} if error is None else {"error": str(error)})
        self._tell_parts()

    def _tell_parts(self) -> None:
        for part in self.storage.parts(self._keeps) if self._keeps else ():
            self._say({"kind": "part", **part})

    def _answer(self, number: int, found: Message) -> None:
        self._say({"kind": "answer", "id": number, **found})

    def _tell_ranks(self) -> None:
        """What ranks have left word of goes before how they ended."""
        codes = dict(self._ranks.codes) if self._ranks is not None else {}
        for change in self._mirror.changes() if self._mirror is not None else ():
            self._say({"kind": "said", **change})
        if new := {rank: code for rank, code in codes.items() if rank not in self._told}:
            self._told |= set(new)
            self._say({"kind": "ended", "codes": sorted(new.items())})

    def _prepare(self, plan: str, resume_from: str, ranks: Sequence[int], keeps: Sequence[int] | None) -> Message:
        """Make room for an attempt, which goes on from a checkpoint or from none. ranks: those of this machine; keeps:
        those whose parts of checkpoints come to lie here; None where another machine acts for the folder."""
        planned, run = planned_from(plan), self._run.model_copy(update={"resume_from": resume_from})
        if keeps is not None:
            prepare_folder(run)
            check_disks(planned, run, keeps, exports=False)
        check_memory(planned, run, ranks)
        return {}

    def _weights(self) -> Future[Message]:
        """Which folders of weights are on this machine."""
        return self._loader.submit(self.weights.describe)

    def _fetch_weights(
        self, plan: str, ranks: Sequence[int] | None, folders: Message, resumed: bool
    ) -> Future[Message]:
        """Have what some ranks of a plan read of folders of weights that are not on this machine."""
        return self._loader.submit(partial(self.weights.fetch, planned_from(plan), ranks, folders, resumed=resumed))

    def _inputs(self) -> Future[Message]:
        """Which data are on this machine, and whether the tokenizer is."""
        return self._loader.submit(self.inputs.describe)

    def _fetch_inputs(self, inputs: Message) -> Future[Message]:
        """Have data and tokenizer that are not on this machine."""
        return self._loader.submit(self.inputs.fetch, inputs)

    def _devices(self, plan: str) -> Message:
        """How many devices of a node of the plan this machine can still use."""
        planned = planned_from(plan)
        return {"devices": min(devices_left(planned), planned.cluster.gpus_per_node)}

    def _start(
        self, plan: str, begins: Message, ranks: Sequence[int], meeting: Sequence[Any], keeps: Sequence[int]
    ) -> Message:
        """Start ranks of a plan.

        begins: the checkpoint that they take up (`own`: the one of that name in this machine's folder; `aside`: of
        which it has only what they read), batches of the data that are left out, and whether they export. meeting: host
        and port where they meet, and the number of the attempt. keeps: the ranks whose parts of checkpoints lie in the
        folder of this machine."""
        self._end()
        self._keeps = [int(rank) for rank in keeps]
        self.storage.begin()
        if not ranks:
            return {}
        planned, host, port, attempt = planned_from(plan), str(meeting[0]), int(meeting[1]), int(meeting[2])
        address = Address(host, port, attempt=attempt, kept=True)
        scratch = self._scratch
        if scratch is None:
            self._own = tempfile.TemporaryDirectory(prefix="realplan-", ignore_cleanup_errors=True)
            scratch = Path(self._own.name)
            self._mirror = Mirror(scratch)
        checkpoint, traces = str(begins["checkpoint"]), [self.weights.place, self.inputs.place]
        if begins["own"] or begins["aside"]:
            folder = taken_in(self._run, other=not begins["own"]).resolve()
            iteration = int(Path(checkpoint).name.rpartition("_")[2])
            checkpoint = str(step_folder(folder, iteration))
            if begins["aside"]:
                traces.append(resumed_folder(folder, iteration))
                checkpoint = str(traces[-1])
        update = {"resume_from": checkpoint, "skip_batches": int(begins["skip"]), "export": bool(begins["export"])}
        run = self.placed().model_copy(update=update)
        self._ranks = self._starter(planned, run, [int(rank) for rank in ranks], scratch, address, traces)
        return {}

    def _end(self) -> Message:
        """End the ranks that run; when this is answered none is left."""
        if self._ranks is not None:
            self._ranks.end()
        self._tell_parts()
        if self._own is not None:
            self._own.cleanup()
        self._own = None
        self._ranks, self._mirror, self._keeps, self._told = None, None, (), set()
        return {}
