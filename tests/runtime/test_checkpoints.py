"""Training state through a checkpoint: the same bits under the same layout, the same numbers under another."""

from __future__ import annotations

import errno
import mmap
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_models import build, layout_of, part_shape, save_tiny

from plans.checkpoint import missing
from plans.checkpoint_files import MASTER, Checkpoint, RankIndex, joined
from plans.flat_tensors import header_bytes
from plans.huggingface import spec_from_folder
from plans.layout import Parameter
from plans.model import ModelSpec
from runtime.checkpoints.direct import open_direct, write_block
from runtime.checkpoints.folder import partial_folder, rank_word
from runtime.checkpoints.held import write_held
from runtime.checkpoints.needed import bytes_read
from runtime.checkpoints.read import restore
from runtime.checkpoints.write import Saver, write_tensors
from runtime.groups import GroupCache
from runtime.models import installation
from runtime.models.model import named_shards
from runtime.models.shards import shard, unshard
from runtime.passes.optimizer import AdamSettings
from runtime.passes.training import Trainer
from runtime.weights.hf import load_weights

CPU = torch.device("cpu")
SETTINGS = AdamSettings(lr=1e-2, clip_norm=1e9, warmup_steps=3, weight_decay=0.1)
Case = dict[str, Any]
MOVES: dict[str, tuple[str, torch.dtype, Case, tuple[Case, ...]]] = {
    "tied": ("llama-tied", torch.float32, {"dp": 2}, ({"dp": 2}, {"tp": 2, "pp": 2}, {}, {"dp": 2, "tp": 2, "pp": 1})),
    "cut": (
        "qwen2",
        torch.float32,
        {"tp": 2, "pp": 2, "shard_optimizer": False},
        ({"tp": 2, "pp": 2, "shard_optimizer": False}, {"dp": 4}, {"pp": 2, "vpp": 2}),
    ),
    "masters": (
        "llama",
        torch.bfloat16,
        {"dp": 2, "tp": 2},
        ({"dp": 2, "tp": 2}, {"dp": 4, "shard_optimizer": False}, {"dp": 2, "pp": 2}),
    ),
    "experts": (
        "qwen2-moe",
        torch.float32,
        {"dp": 4, "ep": 2},
        ({"dp": 4, "ep": 2}, {"dp": 2, "tp": 2, "ep": 4}, {"dp": 2, "ep": 2, "pp": 2}, {}),
    ),
}


def trainer_of(groups: GroupCache, spec: ModelSpec, case: Case, dtype: torch.dtype, weights: Path) -> Trainer | None:
    degrees = {name: value for name, value in case.items() if name != "shard_optimizer"}
    model = build(groups, layout_of(spec, **degrees), dtype=dtype)
    if model is None:
        return None
    load_weights(model, weights)
    return Trainer(model, SETTINGS, shard_optimizer=case.get("shard_optimizer", True))


def train(trainer: Trainer | None, steps: int) -> None:
    """Optimizer steps on gradients that depend on the step and the parameter alone, so that every layout makes the
    same steps to the last bit."""
    for _ in range(steps if trainer else 0):
        assert trainer is not None
        for parameter, held in named_shards(trainer.model):
            generator = torch.Generator().manual_seed(crc32(f"{trainer.steps}/{parameter.name}".encode()))
            gradient = torch.randn(parameter.shape, generator=generator)
            held.main_grad.copy_(shard(parameter, gradient, trainer.model.layout.tp, trainer.model.place.tp))
        trainer.update(SETTINGS.lr_at(trainer.steps))


def whole(checkpoint: Checkpoint, parameter: Parameter, kind: str) -> torch.Tensor:
    """A parameter put together out of the files, by nothing but their own names."""
    found: dict[int, list[tuple[int, torch.Tensor]]] = {}
    for stored in (e for e in checkpoint.index.entries if e.parameter == parameter.name):
        tensor = load_file(checkpoint.folder / stored.file)[stored.tensor(kind)]
        found.setdefault(stored.part, []).append((stored.start, tensor))
    parts = [torch.cat([tensor for _, tensor in sorted(found[part])]) for part in range(len(found))]
    return unshard(parameter, [flat.view(part_shape(parameter, len(parts))) for flat in parts])


def read_words(folder: Path, spec: ModelSpec, iteration: int) -> Checkpoint:
    partial = partial_folder(folder, iteration)
    words = [RankIndex.model_validate_json((partial / rank_word(rank)).read_text()) for rank in range(4)]
    plan: Any = SimpleNamespace(workload=SimpleNamespace(models={"actor": spec}))
    return Checkpoint(partial, joined(words), plan)


@pytest.mark.parametrize("name", MOVES)
def test_a_checkpoint_moves_between_layouts(name: str, tmp_path: Path):
    """Weights are the stored masters, and two more steps, which the moments decide, end at the same bits."""
    kind, dtype, source, targets = MOVES[name]
    save_tiny(kind, tmp_path / "weights")
    spec = spec_from_folder(tmp_path / "weights")

    def run() -> None:
        installation.install(CPU)
        groups = GroupCache(CPU)
        first = trainer_of(groups, spec, source, dtype, tmp_path / "weights")
        saver = Saver(tmp_path, {} if first is None else {"actor": first})
        train(first, 2)
        saver.save(2)
        train(first, 2)  # training goes on while the copies are written
        saver.save(4)
        saver.wait()
        dist.barrier()
        early, late = (read_words(tmp_path, spec, iteration) for iteration in (2, 4))
        assert missing(spec, [stored.entry for stored in early.index.entries]) == ""
        for case in targets:
            trainer = trainer_of(groups, spec, case, dtype, tmp_path / "weights")
            if trainer is None:
                continue
            restore(holed(early, trainer, tmp_path, as_written=case == source), {"actor": trainer})
            compare(trainer, early)
            train(trainer, 2)
            compare(trainer, late)
            assert (trainer.steps, trainer.adam_steps) == (4, 4)

    run_ranks(4, run, timeout=120)


def holed(checkpoint: Checkpoint, trainer: Trainer, place: Path, *, as_written: bool) -> Checkpoint:
    """A checkpoint of which only what a rank should read is there; the rest is no number, and word is left of it."""
    layout, rank = trainer.model.layout, dist.get_rank()
    alike = as_written and trainer.sharded
    found: dict[str, set[tuple[int, int]]] = {}
    for file, start, stop in bytes_read(checkpoint, "actor", layout, rank, trained=True, as_written=alike):
        found.setdefault(file, set()).add((start, stop))
    folder = place / f"holed-{rank}"
    folder.mkdir(exist_ok=True)
    for file in {entry.file for entry in checkpoint.index.entries}:
        content = (checkpoint.folder / file).read_bytes()
        first = 8 + header_bytes(checkpoint.folder / file)
        poisoned = bytearray(content[:first] + bytes([255]) * (len(content) - first))
        for start, stop in found.get(file, ()):
            poisoned[start:stop] = content[start:stop]
        (folder / file).write_bytes(poisoned)
    write_held(folder, found)
    if alike and layout.tp == layout.pp == 1:
        slices = sum(held.numel() for _, held in named_shards(trainer.model))
        own = sum(slot.stop - slot.start for slot in trainer.slots())
        assert sum(stop - start for runs in found.values() for start, stop in runs) == 4 * slices + 8 * own
    return replace(checkpoint, folder=folder)


def compare(trainer: Trainer, checkpoint: Checkpoint) -> None:
    model = trainer.model
    for parameter, held in named_shards(model):
        right = whole(checkpoint, parameter, MASTER).to(held.dtype)
        assert torch.equal(held.data, shard(parameter, right, model.layout.tp, model.place.tp)), parameter


def test_a_model_without_a_step_has_no_moments(tmp_path: Path):
    save_tiny("llama", tmp_path / "weights")
    spec = spec_from_folder(tmp_path / "weights")

    def run() -> None:
        installation.install(CPU)
        groups = GroupCache(CPU)
        first, second = (trainer_of(groups, spec, {"dp": 4}, torch.float32, tmp_path / "weights") for _ in range(2))
        assert first is not None and second is not None
        saver = Saver(tmp_path, {"actor": first})
        saver.save(1)
        saver.wait()
        dist.barrier()
        train(second, 1)
        restore(read_words(tmp_path, spec, 1), {"actor": second})
        assert (second.steps, second.adam_steps) == (0, 0)
        train(first, 1), train(second, 1)
        pairs = zip(named_shards(first.model), named_shards(second.model), strict=True)
        assert all(torch.equal(one.data, two.data) for (_, one), (_, two) in pairs)

    run_ranks(4, run)


def test_files_are_safetensors(tmp_path: Path):
    tensors = {"a": torch.randn(5), "b/c": torch.randn(3_000_000), "none": torch.empty(0)}
    seal = write_tensors(tmp_path / "x.safetensors", tensors)
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    assert seal.bytes == (tmp_path / "x.safetensors").stat().st_size


@pytest.mark.parametrize("refused", ["nothing", "direct files", "direct writes"])
def test_blocks_come_to_the_disk_whatever_it_takes(refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Some file systems open no file past the cache, others open it and write only what suits them."""
    opened = os.open

    def picky(path: Any, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECT and refused == "direct files":
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "open", picky)
    block = np.frombuffer(mmap.mmap(-1, 5 * mmap.PAGESIZE), np.uint8)
    block[:] = np.random.default_rng(1).integers(0, 256, block.size)
    first = int(refused == "direct writes")  # such memory begins within a page
    parts = block[first : first + 4 * mmap.PAGESIZE], block[: mmap.PAGESIZE + 7]
    (tmp_path / "file").write_bytes(bytes(2**20))
    with open_direct(tmp_path / "file") as file:
        for part in parts:
            write_block(file, part.data)
    assert (tmp_path / "file").read_bytes() == b"".join(part.tobytes() for part in parts)
