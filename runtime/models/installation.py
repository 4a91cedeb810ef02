"""Megatron-core 0.16.1 made ready on a device. Only this module and `cpu` touch its internals.

`parallel_state` is never initialised, so that code which falls back on global process groups fails.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from plans.errors import RealplanError
from runtime.models.cpu import put_on_cpu
from runtime.models.quiet import quieten

VERSION = "0.16.1"


def install(device: torch.device) -> None:
    """Make megatron-core run on `device`. Call once per process before models are built; a second call is free."""
    from runtime.models import mcore

    if mcore.__version__ != VERSION:
        raise RealplanError(
            f"megatron-core is {mcore.__version__}; this runtime patches {VERSION}",
            f"pip install megatron-core=={VERSION}",
        )
    quieten()
    state = importlib.import_module("megatron.core.parallel_state")
    if state._GLOBAL_MEMORY_BUFFER is None:  # scratch memory for sequence parallel, not a process group
        state._set_global_memory_buffer()
    importlib.import_module("megatron.core.transformer.moe.moe_utils").__dict__.setdefault("te_general_gemm", None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("highest")  # fp32 plans reproduce one another; TF32 would not
        _norm_at_once()
        return
    put_on_cpu()


def _norm_at_once() -> None:
    """The norm of all gradients in a few kernels. What Megatron has without Apex waits for the device once for each of
    them."""
    clip_grads: Any = importlib.import_module("megatron.core.optimizer.clip_grads")

    def norm(_: int, __: Any, lists: Any, ___: bool) -> tuple[torch.Tensor, None]:
        return torch.nn.utils.get_total_norm(lists[0])[None], None

    clip_grads.l2_norm_impl = norm
