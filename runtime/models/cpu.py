"""Torch as megatron-core sees it on the CPU.

Every `megatron.core` module gets, under the name `torch`, a proxy that maps CUDA devices to the CPU and stands in for
`torch.cuda`; global torch stays as it is, but for `Tensor.cuda`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any

import torch

CPU = torch.device("cpu")
_FACTORIES = (
    "zeros", "ones", "empty", "tensor", "full", "arange", "rand", "randn", "as_tensor", "randint", "empty_like",
    "zeros_like",
)  # fmt: skip

_NORM_PIECE = 1 << 15


def put_on_cpu() -> None:
    """Make megatron-core run on the CPU; a second call is free."""
    layers = importlib.import_module("megatron.core.tensor_parallel.layers")
    if isinstance(layers.torch, _Proxy):
        return
    _patch_torch()
    _patch_random()
    _patch_type_names()
    _patch_moe()
    _patch_norm()
    torch.Tensor.cuda = _keep_tensor  # type: ignore[method-assign, assignment]


def _keep_tensor(tensor: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return tensor


def _nothing(*_: Any, **__: Any) -> None:
    return None


class _Proxy(types.ModuleType):
    """A module that answers for another one, with some names replaced. Assignments go to the other one."""

    def __init__(self, target: types.ModuleType, **replaced: Any) -> None:
        super().__init__(target.__name__)
        self.__dict__.update(replaced, _target=target)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_target"], name)
        self.__dict__[name] = value
        return value

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.__dict__["_target"], name, value)


class _Event:
    """A CUDA event where everything has already happened."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    record = wait = synchronize = _nothing

    def elapsed_time(self, _: _Event) -> float:
        return 0.0


class _Stream:
    """A CUDA stream where everything runs at once."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    wait_stream = wait_event = synchronize = _nothing

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()

    def query(self) -> bool:
        return True

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def create(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if isinstance(device, int) or str(device).startswith("cuda"):
            kwargs["device"] = CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return create


def _cpu_torch() -> _Proxy:
    """`torch` as megatron sees it on the CPU."""
    cuda = _Proxy(
        torch.cuda,
        current_device=lambda: CPU,
        synchronize=_nothing,
        empty_cache=_nothing,
        Stream=_Stream,
        Event=_Event,
        current_stream=lambda *_: _Stream(),
        default_stream=lambda *_: _Stream(),
        stream=lambda *_: contextlib.nullcontext(),
        manual_seed=torch.manual_seed,
        get_rng_state=lambda *_: torch.get_rng_state(),
        set_rng_state=lambda state, *_: torch.set_rng_state(state),
        is_current_stream_capturing=lambda: False,
        nvtx=types.SimpleNamespace(range_push=_nothing, range_pop=_nothing, range=contextlib.nullcontext),
    )
    return _Proxy(torch, cuda=cuda, **{name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})


class _Finder:
    """Gives the proxy to megatron modules that are imported later, inside functions."""

    def __init__(self, proxy: _Proxy) -> None:
        self.proxy = proxy

    def find_spec(self, name: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if not name.startswith("megatron.core"):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((s for s in (finder.find_spec(name, path, target) for finder in others) if s), None)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                run(module)
                _give(module, self.proxy)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _give(module: types.ModuleType | None, proxy: _Proxy) -> None:
    if module is not None and module.__dict__.get("torch") is torch:
        module.__dict__["torch"] = proxy


def _patch_torch() -> None:
    proxy = _cpu_torch()
    sys.meta_path.insert(0, _Finder(proxy))
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core"):
            _give(module, proxy)


def _patch_random() -> None:
    """Recomputation saves and restores the generator of the device: here the CPU's."""
    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)

    @contextlib.contextmanager
    def fork(tracker: Any, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        outer = torch.get_rng_state()
        torch.set_rng_state(tracker.states_.get(name, outer))
        try:
            yield
        finally:
            tracker.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outer)

    random.CudaRNGStatesTracker.fork = fork


def _patch_type_names() -> None:
    """The optimizers compare `Tensor.type()` with 'torch.cuda.FloatTensor': rewrite these constants.

    Fewer than six of them means that megatron-core is not the version this was written for.
    """
    changed = 0
    for name in ("distrib_optimizer", "optimizer", "clip_grads"):
        module = importlib.import_module(f"megatron.core.optimizer.{name}")
        for owner in [module, *(c for c in vars(module).values() if inspect.isclass(c))]:
            if inspect.isclass(owner) and owner.__module__ != module.__name__:
                continue
            for member in vars(owner).values():
                function = getattr(member, "__func__", member)
                if inspect.isfunction(function) and function.__module__ == module.__name__:
                    changed += _rewrite_constants(function)
    assert changed >= 6, f"megatron-core changed: {changed} of 6 'torch.cuda.*Tensor' constants found"


def _rewrite_constants(function: types.FunctionType) -> int:
    changed = 0

    def rewrite(constant: Any) -> Any:
        nonlocal changed
        if isinstance(constant, str) and constant.startswith("torch.cuda.") and constant.endswith("Tensor"):
            changed += 1
            return constant.replace("torch.cuda.", "torch.")
        if isinstance(constant, tuple | frozenset):
            return type(constant)(rewrite(item) for item in constant)
        return constant

    constants = tuple(rewrite(constant) for constant in function.__code__.co_consts)
    function.__code__ = function.__code__.replace(co_consts=constants)
    return changed


def _patch_norm() -> None:
    """The norm of gradients, piece by piece: in float32 the CPU adds up one square after the other, and loses a hundred
    thousandth of the norm of a million numbers, 7 in ten thousand of that of 16 million."""
    clip_grads: Any = importlib.import_module("megatron.core.optimizer.clip_grads")

    def norm(_: int, __: Any, lists: Any, ___: bool) -> tuple[torch.Tensor, None]:
        pieces = [piece for tensors in lists for tensor in tensors for piece in tensor.flatten().split(_NORM_PIECE)]
        norms = torch.stack([torch.linalg.vector_norm(piece) for piece in pieces])
        return torch.linalg.vector_norm(norms.double()).float()[None], None

    clip_grads.l2_norm_impl = norm


def _patch_moe() -> None:
    """The token dispatcher needs numpy splits, which megatron makes of CUDA tensors only."""
    dispatcher: Any = importlib.import_module("megatron.core.transformer.moe.token_dispatcher")

    def to_cpu(value: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return value.numpy() if as_numpy and torch.is_tensor(value) else value

    dispatcher.maybe_move_tensor_to_cpu = to_cpu
