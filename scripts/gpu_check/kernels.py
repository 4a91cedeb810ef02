"""Where the time goes: kernels and host operations of a training step and of a generation, and their traces."""

from __future__ import annotations

import gzip
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_check.decode import generation, seconds_of
from gpu_check.rows import Case, Row, Skip
from gpu_check.setting import Setting
from gpu_check.shapes import layers_of, model_alone
from gpu_check.training import training_step

LAYERS, MOST = 4, 8
"""Layers of a model, and kernels that are named."""


def _training(shape: str, tp: int) -> Case:
    def run(setting: Setting) -> Iterator[Row]:
        if setting.tiny and tp == 1:
            raise Skip("a rehearsal measures one shape")
        spec = layers_of(setting, shape, tp, LAYERS, small_vocabulary=True)
        with model_alone(setting, spec) as model:
            step = training_step(setting, model, [[setting.pick(4096, 32)]])
            yield from _profiled(setting, f"{shape} tp {tp} training", step)

    return Case(f"{shape} tp {tp} training", run, needs_s=8.0)


def _generating(shape: str, tp: int) -> Case:
    def run(setting: Setting) -> Iterator[Row]:
        spec = layers_of(setting, shape, tp, LAYERS, small_vocabulary=False)
        rows, context, steps = setting.pick((64, 512, 24), (2, 8, 4))
        with model_alone(setting, spec) as model:
            yield from _profiled(setting, f"{shape} tp {tp} generation", generation(model, rows, context, steps))

    return Case(f"{shape} tp {tp} generation", run, needs_s=8.0)


def _profiled(setting: Setting, case: str, work: Callable[[], Any]) -> Iterator[Row]:
    """Seconds without a profiler; then operations of the host, and what the device did, by torch's."""
    from torch.profiler import ProfilerActivity, profile

    work()
    seconds = seconds_of(setting, work)
    cuda = setting.kind == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]) as found:
        seconds_of(setting, work)
    events = found.key_averages()
    count = sum(e.count for e in events if e.key.startswith("aten::"))
    yield Row(case=f"{case}: seconds", value=seconds, unit="s", note=f"{count} operations of torch on the host")
    waits = sum(e.count for e in events if e.key in ("cudaStreamSynchronize", "cudaDeviceSynchronize"))
    yield Row(case=f"{case}: waits of the host", value=waits)
    if cuda:
        kernels = sorted((e for e in events if e.self_device_time_total), key=lambda e: -e.self_device_time_total)
        total = sum(e.self_device_time_total for e in kernels)
        yield Row(case=f"{case}: kernels", value=total / 1e6, unit="s")
        for one in kernels[:MOST]:
            note = f"{one.count} x {one.self_device_time_total / one.count:.1f} us"
            yield Row(case=f"{case}: {one.key[:60]}", value=one.self_device_time_total / total, note=note)
    _keep(found, setting.output / "kernels" / f"{case.replace(' ', '-')}.json.gz")


def _keep(found: Any, path: Path) -> None:
    """The trace, for chrome://tracing or Perfetto."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder) / "trace.json"
        found.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(path, "wb", 5) as target:
            shutil.copyfileobj(source, target)


CASES = (_training("7B", 8), _training("7B", 1), _generating("70B", 8))
