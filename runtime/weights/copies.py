"""The weights on this rank: one set per copy of the program, and the models that compute with them.

A home copy lives for the whole run. Another copy has storage only between its reallocation and its release; where the
model has adapters, that of the adapters alone, while the frozen base stays in every copy, and copies that hold the same
slices of the same base share it (`Program.base_owner`). Calls that
share a copy but not how they cut tokens (training with sequence or context parallelism, generation without) see it
through models of their own whose parameters alias the copy's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from plans.errors import RealplanError
from plans.layout import Layout
from plans.program import Copy, Program
from plans.runfile import RANDOM
from runtime.groups import GroupCache
from runtime.job import Job
from runtime.models.model import (
    Model,
    alias_parameters,
    build_model,
    moved,
    named_shards,
    nonfinite_parameter,
    share_base,
)
from runtime.passes.training import Trainer
from runtime.weights.hf import load_weights, random_weights
from runtime.weights.needed import filled
from runtime.weights.reallocate import Moved, Reallocator


class Copies:
    """Owns the models, trainers and weights of this rank. Making it is collective over all ranks. Where the run goes on
    from a checkpoint, what is trained has no weights before it is read from there."""

    def __init__(self, job: Job, program: Program, groups: GroupCache, device: torch.device) -> None:
        self._job = job
        self._program = program
        self._groups = groups
        self._device = device
        self._base: dict[str, Model] = {}
        self._models: dict[str, Model] = {}
        self.trainers: dict[str, Trainer] = {}
        self._host: dict[str, list[Tensor]] = {}
        self._sizes: dict[str, list[int]] = {}
        self._reallocator = Reallocator(job.plan.cluster.gpus_per_node)
        for planned in job.plan.calls:
            groups.collection(job.plan.layout(planned.call))
        for copy in program.copies:
            if dist.get_rank() in copy.layout.ranks:
                self._make(copy)

    def model(self, call: str) -> Model:
        """The model that a call runs."""
        return self._models[call]

    def _make(self, copy: Copy) -> None:
        base = self._build(copy.calls[0])
        self._base[copy.name] = base
        if filled(self._job.plan, copy, resumed=bool(self._job.run.resume_from)):
            self._fill(base, copy.role)
        owner = self._program.base_owner.get(copy.name, copy.name)
        if owner != copy.name and self._same_weights(owner, copy):
            share_base(self._base[owner], base)
        training = self._job.plan.workload.graph.trainers.get(copy.role)
        if copy.home and training is not None:
            strategy = self._job.plan.planned(training).strategy
            trainer = Trainer(base, self._job.adam(copy.role), shard_optimizer=strategy.shard_optimizer)
            self.trainers[copy.role] = trainer
            if strategy.offload:
                trainer.offload()
        for call in copy.calls:
            self._models[call] = self._view(copy, call)
        if not copy.home:
            self.release(copy)
        elif copy.offload:
            self.offload(copy)

    def _build(self, call: str) -> Model:
        strategy, layout = self._job.plan.planned(call).strategy, self._job.plan.layout(call)
        return build_model(
            layout,
            self._groups.collection(layout),
            dtype=self._job.dtype,
            device=self._device,
            sequence_parallel=strategy.sequence_parallel,
            recompute=strategy.recompute,
        )

    def _fill(self, model: Model, role: str) -> None:
        weights = self._job.run.weights_of(role)
        if weights == RANDOM:
            random_weights(model, self._job.run.seed)
        else:
            trained = role in self._job.plan.workload.graph.trainers
            load_weights(model, Path(weights), trained=trained, seed=self._job.run.seed)
        if name := nonfinite_parameter(model):
            raise RealplanError(f"weights `{weights}` of `{role}` hold a number that is not finite: {name}")

    def _same_weights(self, owner: str, copy: Copy) -> bool:
        """Whether a copy begins with the weights of the copy that its base may lie in."""
        role = next(other.role for other in self._program.copies if other.name == owner)
        return self._job.run.weights_of(role) == self._job.run.weights_of(copy.role)

    def _view(self, copy: Copy, call: str) -> Model:
        base = self._base[copy.name]
        first, ours = (self._job.plan.planned(name).strategy for name in (copy.calls[0], call))
        if (first.sequence_parallel, first.cp) == (ours.sequence_parallel, ours.cp):
            return base
        view = self._build(call)
        alias_parameters(base, view)
        return view

    def reallocate(self, copy: Copy) -> Moved:
        """Give a copy storage and the newest weights of its role. Collective over both layouts."""
        home = self._program.homes[copy.role]
        have = self._shards(home) if home.name in self._base else {}
        want = {}
        if copy.name in self._base:
            self._allocate(copy)
            want = self._shards(copy)
        return self._reallocator.run(home.layout, copy.layout, have, want)

    def release(self, copy: Copy) -> None:
        """Free the storage of a copy, the frozen base of a model with adapters apart; its models stay."""
        storages = self._storages(copy)
        self._sizes[copy.name] = [storage.nbytes() for storage in storages]
        for storage in storages:
            storage.resize_(0)

    def _allocate(self, copy: Copy) -> None:
        for storage, size in zip(self._storages(copy), self._sizes[copy.name], strict=True):
            storage.resize_(size)

    @torch.no_grad()
    def blend(self, source: str, target: str, mix: float) -> None:
        """Give a frozen role mix x the weights of a trained one of its architecture + (1 - mix) x its own, in float32.
        Collective over the layouts of both."""
        home, rank = self._program.homes[source], dist.get_rank()
        have = self._shards(home) if home.name in self._base else {}
        for copy in self._of_role(target):
            if rank not in home.layout.ranks and rank not in copy.layout.ranks:
                continue
            held = {}
            if copy.name in self._base:
                if copy.offload:
                    self.load(copy)
                held = self._shards(copy)
            self._reallocator.mix(home.layout, copy.layout, have, held, mix)
            if held and copy.offload:
                self._host.pop(copy.name, None)
                self.offload(copy)

    def _of_role(self, role: str) -> list[Copy]:
        return [copy for copy in self._program.copies if copy.role == role]

    def frozen(self, role: str) -> list[tuple[Layout, dict[str, Tensor]]]:
        """The layouts and the slices of a frozen role's copies on this rank, on the device or in host memory: to be
        read."""
        return [(copy.layout, self._kept(copy)) for copy in self._of_role(role) if copy.name in self._base]

    def _kept(self, copy: Copy) -> dict[str, Tensor]:
        if copy.name not in self._host:
            return self._shards(copy)
        names = [parameter.name for parameter, _ in named_shards(self._base[copy.name])]
        return dict(zip(names, self._host[copy.name], strict=True))

    def set_frozen(self, role: str, read: Callable[[Layout, str, Tensor], Tensor]) -> None:
        """Give a frozen role other weights: `read` has them for a layout, a parameter's name and its slice."""
        for copy in self._of_role(role):
            if copy.name in self._base:
                for name, kept in self._kept(copy).items():
                    kept.copy_(read(copy.layout, name, kept).view_as(kept))

    def offload(self, copy: Copy) -> None:
        """Keep frozen weights in host memory. On the CPU they are there already."""
        if self._device.type == "cpu":
            return
        if copy.name not in self._host:  # frozen: the host's copy stays valid
            self._host[copy.name] = [moved(p.data, torch.device("cpu")) for p in self._parameters(copy)]
        self.release(copy)

    def load(self, copy: Copy) -> None:
        """Undo `offload`."""
        if self._device.type == "cpu":
            return
        self._allocate(copy)
        for parameter, kept in zip(self._parameters(copy), self._host[copy.name], strict=True):
            parameter.data.copy_(kept, non_blocking=True)

    @contextmanager
    def training(self, role: str, *, offload: bool) -> Iterator[Trainer]:
        """The trainer of a role while it trains; with `offload` its optimizer state is on the device only here."""
        trainer = self.trainers[role]
        if not offload:
            yield trainer
            return
        trainer.load()
        yield trainer
        trainer.offload()

    def _parameters(self, copy: Copy) -> Iterable[Tensor]:
        return [held for parameter, held in named_shards(self._base[copy.name]) if not parameter.frozen]

    def _storages(self, copy: Copy) -> list[torch.UntypedStorage]:
        """Each once: the experts of a block share one."""
        held = [parameter.untyped_storage() for parameter in self._parameters(copy)]
        return list({storage._cdata: storage for storage in held}.values())

    def _shards(self, copy: Copy) -> dict[str, Tensor]:
        shards = named_shards(self._base[copy.name])
        return {parameter.name: held.data for parameter, held in shards if not parameter.frozen}
