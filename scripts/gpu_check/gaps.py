"""Time outside kernels: what a device idles while the host prepares the next kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


def outside_kernels(run: Callable[[], Any], device: Any) -> float:
    """Share of an operation's span in which no kernel or copy runs, by torch's profiler.

    On the CPU, as a stand-in, the share outside torch's own operators.
    """
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    cuda = device.type == "cuda"
    run()
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    kind = DeviceType.CUDA if cuda else DeviceType.CPU
    events = [e for e in found.events() if e.device_type == kind and not getattr(e, "is_user_annotation", False)]
    spans = [(e.time_range.start, e.time_range.end) for e in events]
    return idle_share(spans)


def idle_share(spans: Iterable[tuple[float, float]]) -> float:
    """Share of [first start, last end] that no span covers; 0 of no spans."""
    ordered = sorted(spans)
    if not ordered:
        return 0.0
    covered, end = 0.0, ordered[0][0]
    for start, stop in ordered:
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    whole = end - ordered[0][0]
    return 1.0 - covered / whole if whole else 0.0
