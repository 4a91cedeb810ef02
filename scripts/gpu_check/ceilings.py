"""Ceilings: what the card itself reaches, which shares of the other stages are shares of."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_check.rows import Case, Row
from gpu_check.setting import Setting

MIB = 2**20


def product_flops(setting: Setting) -> float:
    """FLOP/s of a large product of random matrices, bf16 on a card and float32 on the CPU."""
    import torch

    extent = setting.pick(8192, 256)
    dtype = torch.bfloat16 if setting.kind == "cuda" else torch.float32
    a, b = (torch.randn(extent, extent, device=setting.device, dtype=dtype) for _ in range(2))
    return 2.0 * extent**3 / _seconds(setting, lambda: a @ b)


def copy_bytes_per_s(setting: Setting) -> float:
    """Bytes read and written per second of a large copy in the card's memory."""
    import torch

    size = setting.pick(4096, 16) * MIB
    source = torch.empty(size, dtype=torch.uint8, device=setting.device).random_(0, 255)
    target = torch.empty_like(source)
    return 2.0 * size / _seconds(setting, lambda: target.copy_(source))


def _seconds(setting: Setting, run: Any) -> float:
    """Median seconds; every repeat waits for the device alone, launch included, which large operations hide."""
    from profiler.timers import Timed, measure

    return measure(Timed(lambda _: run()), setting.device, setting.pick(0.5, 0.02)).seconds


def _product(setting: Setting) -> Iterator[Row]:
    note = "8192 x 8192 x 8192, bf16" if setting.kind == "cuda" else "float32, one core"
    yield Row(case="product", value=product_flops(setting) / 1e12, unit="TFLOP/s", note=note)


def _copy(setting: Setting) -> Iterator[Row]:
    note = "bytes read and written"
    yield Row(case="copy", value=copy_bytes_per_s(setting) / 1e9, unit="GB/s", note=note)


def _host(setting: Setting) -> Iterator[Row]:
    """Pinned host memory to the card, back, and both at once on two streams."""
    import torch

    size, cuda = setting.pick(1024, 8) * MIB, setting.kind == "cuda"
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=cuda) for _ in range(2)]
    device = [torch.empty(size, dtype=torch.uint8, device=setting.device) for _ in range(2)]
    there = _seconds(setting, lambda: device[0].copy_(host[0], non_blocking=True))
    back = _seconds(setting, lambda: host[1].copy_(device[1], non_blocking=True))
    yield Row(case="pinned host to device", value=size / there / 1e9, unit="GB/s")
    yield Row(case="device to pinned host", value=size / back / 1e9, unit="GB/s")
    if not cuda:
        return
    other = torch.cuda.Stream()

    def both() -> None:
        other.wait_stream(torch.cuda.current_stream())
        device[0].copy_(host[0], non_blocking=True)
        with torch.cuda.stream(other):
            host[1].copy_(device[1], non_blocking=True)
        torch.cuda.current_stream().wait_stream(other)

    yield Row(case="both directions at once", value=2 * size / _seconds(setting, both) / 1e9, unit="GB/s")


CASES = (Case("product", _product), Case("copy", _copy), Case("host", _host))
