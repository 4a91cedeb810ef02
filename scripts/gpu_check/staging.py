"""Point-to-point messages of CUDA tensors over gloo, which knows only host memory: through a copy there.

NCCL refuses two ranks on one card, so two ranks there talk over gloo. Its collectives take CUDA tensors; its sends and
receives would read device pointers as the host's. The replacements stand in `torch.distributed` under the same names,
because Megatron's pipeline and the runtime look them up there.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d


class _Sent:
    """A send on its way; it keeps the host's copy alive."""

    def __init__(self, work: Any, host: Tensor) -> None:
        self._work, self._host = work, host

    def wait(self, *_: Any) -> bool:
        self._work.wait()
        return True


class _Received:
    """A receive on its way; `wait` brings it to the device."""

    def __init__(self, work: Any, host: Tensor, target: Tensor) -> None:
        self._work, self._host, self._target = work, host, target

    def wait(self, *_: Any) -> bool:
        self._work.wait()
        with torch.no_grad():  # Megatron receives into leaves that require a gradient
            self._target.copy_(self._host)
        return True


def stage_messages() -> None:
    """Send and receive through host memory from now on, in this process. Also on the CPU, where it only copies."""
    isend, irecv = distributed_c10d.isend, distributed_c10d.irecv

    def staged_isend(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        host = tensor.detach().to("cpu", copy=True)
        return _Sent(isend(host, *args, **kwargs), host)

    def staged_irecv(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
        return _Received(irecv(host, *args, **kwargs), host, tensor)

    def staged_send(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        staged_isend(tensor, *args, **kwargs).wait()

    def staged_recv(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        staged_irecv(tensor, *args, **kwargs).wait()

    replaced = {"isend": staged_isend, "irecv": staged_irecv, "send": staged_send, "recv": staged_recv}
    for name, function in replaced.items():
        setattr(distributed_c10d, name, function)
        setattr(dist, name, function)
