"""Compile with numba where it is installed and enabled; the same functions run as plain Python where it is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """`function` compiled on its first call and cached on disk where a folder can be written.

    Nothing is compiled with `NUMBA_DISABLE_JIT=1` or without numba: results are equal, only slower.
    """
    try:
        from numba import njit
    except ImportError:
        return function
    flags = {"nogil": True, "error_model": "numpy", "no_cfunc_wrapper": True}
    try:
        return njit(cache=True, **flags)(function)  # type: ignore[no-any-return]
    except RuntimeError:  # neither the package folder nor the user's cache folder can be written
        return njit(**flags)(function)  # type: ignore[no-any-return]
