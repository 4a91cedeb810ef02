"""A rank's part of a checkpoint on its way to the disk, in a thread of its own.

torch.distributed.checkpoint does not serve here: its metadata are pickles, and its tensors are rectangles, not ranges.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch.distributed as dist
from torch import Tensor

from plans.checkpoint_files import RankIndex
from plans.errors import RealplanError
from plans.seals import CHUNK_BYTES, Seal, Sealer
from runtime.checkpoints.direct import large_pages, open_direct, write_block
from runtime.checkpoints.folder import partial_folder, rank_file, rank_word
from runtime.checkpoints.snapshot import NONE, FrozenWeights, Snapshot, Snapshots
from runtime.passes.training import Trainer

_ALIGNMENT = 8


class Saver:
    """Writes this rank's part of checkpoints: copies at once, files while training goes on. The process that keeps the
    files of the run completes them (`runtime.checkpoints.complete`)."""

    def __init__(
        self, folder: Path, trainers: Mapping[str, Trainer], frozen: Mapping[str, FrozenWeights] = NONE
    ) -> None:
        self._folder = folder
        self._snapshots = Snapshots(trainers, frozen)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = self._pool.submit(self._snapshots.prepare)

    def save(self, iteration: int) -> None:
        """Begin to write the state after `iteration` iterations; waits for the checkpoint before. Raises RealplanError
        when that could not be written."""
        self.wait()
        snapshot = self._snapshots.take(iteration)
        self._writing = self._pool.submit(write_part, self._folder, snapshot, dist.get_rank())

    def wait(self) -> None:
        """Wait until this rank's part of the last checkpoint is on the disk."""
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()


def write_part(folder: Path, snapshot: Snapshot, rank: int) -> None:
    """Write a rank's tensors, and when they are on the disk its word."""
    partial = partial_folder(folder, snapshot.iteration)
    word = partial / rank_word(rank)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        files = {}
        if snapshot.tensors:
            files[rank_file(rank)] = write_tensors(partial / rank_file(rank), snapshot.tensors)
        index = RankIndex(
            iteration=snapshot.iteration,
            rank=rank,
            roles=dict(snapshot.roles),
            entries=list(snapshot.entries),
            files=files,
        )
        beside = word.with_suffix(".partial")
        beside.write_text(index.model_dump_json(), encoding="utf-8")
        beside.rename(word)
    except OSError as error:
        raise RealplanError(
            f"rank {rank} cannot write checkpoint `{partial}`: {error.strerror}",
            "checkpoint.folder=FOLDER on a disk with room, checkpoint.keep=1, or checkpoint.every=0 for none",
        ) from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Seal:
    """A safetensors file of flat float32 tensors, on the disk when this returns. Raises OSError.

    The library's own `save_file` copies every tensor and holds the interpreter while it does, and training with it.
    """
    sealer = Sealer()
    with open_direct(path) as file, ThreadPoolExecutor(1) as beside:
        writing = beside.submit(write_block, file, memoryview(b""))
        for block in _blocks(tensors):
            writing.result()  # the block before: while it went to the disk, this one was filled
            writing = beside.submit(write_block, file, block)
            sealer.update(block)
        writing.result()
        os.fsync(file.fileno())
    return sealer.seal


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of the file in blocks as large as its chunks, in two buffers by turns, which begin with a page."""
    buffers = np.split(np.frombuffer(large_pages(2 * CHUNK_BYTES), np.uint8), 2)
    turn = filled = 0
    for part in (_header(tensors), *(tensor.numpy().view(np.uint8) for tensor in tensors.values())):
        at = 0
        while at < len(part):
            count = min(len(part) - at, CHUNK_BYTES - filled)
            np.copyto(buffers[turn][filled : filled + count], part[at : at + count])  # other threads run meanwhile
            at, filled = at + count, filled + count
            if filled == CHUNK_BYTES:
                yield buffers[turn].data
                turn, filled = 1 - turn, 0
    if filled:
        yield buffers[turn][:filled].data


def _header(tensors: Mapping[str, Tensor]) -> npt.NDArray[np.uint8]:
    header, at = {}, 0
    for name, tensor in tensors.items():
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [at, at + tensor.nbytes]}
        at += tensor.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return np.frombuffer(struct.pack("<Q", len(text)) + text, np.uint8)
