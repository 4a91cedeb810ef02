"""Megatron-core imported without noise: no warnings about optional packages, and on the CPU no compiler."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def importing_megatron() -> Iterator[None]:
    """Hold while `megatron.core` is imported: no warnings about optional packages, and on the CPU no `torch.compile`.

    `megatron.core.jit` binds its fuser to `torch.compile` at import; on the CPU that costs seconds and a C++ compiler.
    """
    compile_ = torch.compile
    if not torch.cuda.is_available():
        torch.compile = _keep_function  # type: ignore[assignment]
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.compile = compile_
        logging.disable(disabled)


def quieten() -> None:
    """Hide warnings about how megatron-core is written, which its users cannot mend."""
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    # A class of MLP that it does not know gets nothing beside what its `ModuleSpec` says, as it should.
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    for message in (
        r".*torch\.distributed\.\w+_tensor. is deprecated",
        r"The \.grad attribute of a Tensor that is not",
    ):
        warnings.filterwarnings("ignore", message=message)


def _keep_function(function: Any = None, *_: Any, **__: Any) -> Any:
    return function if callable(function) else _keep_function
