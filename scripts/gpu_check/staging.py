"""Messages and collectives of CUDA tensors over gloo, through a copy in host memory.

NCCL refuses two ranks on one card, so two ranks there talk over gloo. Its sends and receives would read device pointers
as the host's, and the first collective of two ranks on an H100 ended the process. The replacements stand where the
functions did: in `torch.distributed`, and in the modules of Megatron that took them from there when they were imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.distributed import distributed_c10d

COLLECTIVES = (
    "all_reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_single",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "reduce_scatter_single",
    "all_to_all_single",
)
"""Those whose first argument, a tensor or a list of them, is what they fill; a torch need not have all of them."""


class _Done:
    """Work that is over, or that `settle` ends."""

    def __init__(self, settle: Callable[[], None] | None = None) -> None:
        self._settle = settle

    def wait(self, *_: Any) -> bool:
        if self._settle is not None:
            self._settle()
        return True


def stage_messages() -> None:
    """Send, receive and combine through host memory from now on, in this process. Also on the CPU, where it only
    copies."""
    isend, irecv = distributed_c10d.isend, distributed_c10d.irecv

    def staged_isend(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        host = tensor.detach().to("cpu", copy=True)
        work: Any = isend(host, *args, **kwargs)

        def settle() -> None:
            work.wait()
            host.numel()  # keeps the copy alive until it is sent

        return _Done(settle)

    def staged_irecv(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        host = torch.empty(tensor.shape, dtype=tensor.dtype)
        work: Any = irecv(host, *args, **kwargs)

        def settle() -> None:
            work.wait()
            _bring([host], [tensor])

        return _Done(settle)

    def staged_send(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        staged_isend(tensor, *args, **kwargs).wait()

    def staged_recv(tensor: Tensor, *args: Any, **kwargs: Any) -> None:
        staged_irecv(tensor, *args, **kwargs).wait()

    replaced: dict[str, Any] = {"isend": staged_isend, "irecv": staged_irecv, "send": staged_send, "recv": staged_recv}
    replaced |= {
        name: _staged(getattr(distributed_c10d, name)) for name in COLLECTIVES if hasattr(distributed_c10d, name)
    }
    _put({getattr(distributed_c10d, name): new for name, new in replaced.items()})
    _put({distributed_c10d._coalescing_manager: _one_by_one})


def _put(replaced: dict[Any, Any]) -> None:
    """Put functions in the place of others, in every module that has imported these."""
    for module in list(sys.modules.values()):
        for name, value in list(vars(module).items()) if module is not None else ():
            if callable(value) and isinstance(value, type(_put)) and value in replaced:
                setattr(module, name, replaced[value])


def _staged(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective on host copies of its tensors, over when it returns."""

    @wraps(collective)
    def staged(filled: Any, *args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        targets = filled if isinstance(filled, list) else [filled]
        hosts = [target.detach().to("cpu", copy=True) for target in targets]
        given = [_hosted(value) for value in args]
        named = {name: _hosted(value) for name, value in kwargs.items()}
        collective(hosts if isinstance(filled, list) else hosts[0], *given, **named)
        _bring(hosts, targets)
        return _Done() if async_op else None

    return staged


def _hosted(value: Any) -> Any:
    if isinstance(value, list):
        return [_hosted(item) for item in value]
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _bring(hosts: list[Tensor], targets: list[Tensor]) -> None:
    with torch.no_grad():  # Megatron receives into leaves that require a gradient
        for host, target in zip(hosts, targets, strict=True):
            target.copy_(host)


@contextmanager
def _one_by_one(*_: Any, **__: Any) -> Iterator[_Done]:
    """In the place of torch's manager that joins collectives to one: here they run as they come."""
    yield _Done()
