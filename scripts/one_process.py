"""One process that is a whole run of SmolLM2 on the CPU, which benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from runtime.models.installation import install
from runtime.weights.smollm import prepare_smollm2

CPU = torch.device("cpu")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The option that says where the model is."""
    parser.add_argument("--weights", type=Path, default=Path("runs/weights/smollm2-135m-instruct"))


@contextmanager
def one_process(weights: Path) -> Iterator[Path]:
    """The folder of the model, put there if it is new, and a group of one rank on one thread."""
    torch.set_num_threads(1)
    folder = prepare_smollm2(weights).resolve()
    install(CPU)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield folder
    finally:
        dist.destroy_process_group()
