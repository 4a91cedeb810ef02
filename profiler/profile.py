"""Profile a model on this machine: time its operations case by case and keep them in a cost table."""

from __future__ import annotations

import gc
import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from cost_models.tables.shards import call_spec, shard_spec
from cost_models.tables.table_schema import CALL_VOCAB, STEP_PROMPT, TableError
from cost_models.tables.tables import CostTable
from plans.errors import RealplanError
from plans.model import ModelSpec
from profiler.alone import alone
from profiler.cases import CALLS, CPU, GPU, Axes, Cases, grids
from profiler.collectives import CPU_BYTES, GPU_BYTES, device_count, measure_collectives
from profiler.decoding import step_spans
from profiler.devices import clocks_mhz, device_name, hardware_kind, versions
from profiler.layers import Shard
from profiler.results import Coordinates, Results
from profiler.timers import Timing, measure, peak_bytes
from runtime.groups import GroupCache
from runtime.models.model import TORCH_DTYPES

Advance = Callable[[str], None]
ATTEMPTS = 5
CPU_PEAKS = ("embedding_forward", "block_forward", "head_forward")
PEAKS = (*CPU_PEAKS, "block_inference", "block_prefill", "inference_call", "train_call")
"""Operations whose peak memory grows with their sizes: a backward pass frees what it reads, a difference of two
generations has no peak of its own, and a recorded graph allocates nothing."""


@dataclass(frozen=True, kw_only=True)
class ProfileRequest:
    """What to profile: a model in a precision on a device, for some tensor-parallel degrees, at the device's usual or
    other cases."""

    spec: ModelSpec
    device: torch.device
    dtype: str
    degrees: tuple[int, ...]
    cases: Cases | None = None
    collectives: bool = True

    @property
    def sizes(self) -> Cases:
        """The cases."""
        return self.cases or (GPU if self.device.type == "cuda" else CPU)


def profile(request: ProfileRequest, output: Path) -> CostTable:
    """Time every case that the table at `output` does not have yet, writing it after each group; the finished table.

    One process and one device; collectives use one process per device. Progress goes to stderr.
    """
    torch.manual_seed(0)
    if request.device.type == "cpu":
        torch.set_num_threads(1)
    for tp in request.degrees:
        shard_spec(request.spec, tp)
    results = Results.resume(_head(request), output)
    groups = 1 + len(request.degrees) * (len(grids(request.sizes)) + 1)
    with _progress(groups) as advance, alone(request.device) as communicators:
        for tp in request.degrees:
            _shard(request, tp, results, communicators, advance)
        advance("collectives")
        if request.collectives:
            _collectives(request, results)
    return results.save()


def _head(request: ProfileRequest) -> CostTable:
    device = request.device
    return CostTable(
        hardware=hardware_kind(device),
        device=device_name(device),
        model=request.spec.name,
        precision=request.dtype,
        clocks_mhz=clocks_mhz(device),
        versions=versions(device),
        date=datetime.now(UTC).date().isoformat(),
        source="realplan profile",
    )


@contextmanager
def _progress(groups: int) -> Iterator[Advance]:
    columns = (TextColumn("{task.description:36}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=groups)

        def advance(what: str) -> None:
            bar.update(task, advance=1, description=what)

        yield advance


def _shard(request: ProfileRequest, tp: int, results: Results, communicators: GroupCache, advance: Advance) -> None:
    """All operations of one shard."""
    spec = shard_spec(request.spec, tp)
    device, dtype = request.device, TORCH_DTYPES[request.dtype]
    axes = grids(request.sizes)
    for some, of in ((tuple(n for n in axes if n not in CALLS), spec), (CALLS, call_spec(spec, CALL_VOCAB))):
        wanted = {name: axes[name] for name in some if _missing(results, name, tp, axes[name])}
        update = some is not CALLS and not _has_update(results, spec)
        shard = Shard(of, communicators, device, dtype) if wanted or update else None
        for name in some:
            advance(f"tp {tp}: {name}")
            if shard is not None and name in wanted:
                _group(request, shard, tp, name, axes[name], results)
        if shard is not None and update:
            advance(f"tp {tp}: optimizer_step")
            _update(request, shard, results)
        del shard
        _release(device)


def _missing(results: Results, name: str, tp: int, axes: Axes) -> bool:
    return any(not results.has(name, (tp, *sizes)) for sizes in itertools.product(*axes.values()))


def _has_update(results: Results, spec: ModelSpec) -> bool:
    """Whether the optimizer was timed on as many parameters as a shard has (padding of the vocabulary included)."""
    count = spec.layer_params + spec.norm_params + spec.padded_vocab * spec.hidden * (2 - spec.tied_embeddings)
    return any(point[0] == count for point in results.points.get("optimizer_step", {}))


def _update(request: ProfileRequest, shard: Shard, results: Results) -> None:
    timed, point = shard.optimizer_step(), (shard.parameters,)
    results.add("optimizer_step", point, measure(timed, request.device, request.sizes.budget_s))
    results.save()


def _group(request: ProfileRequest, shard: Shard, tp: int, name: str, axes: Axes, results: Results) -> None:
    """Time one operation at all sizes."""

    def fill(again: bool) -> None:
        for sizes in itertools.product(*axes.values()):
            if again or not results.has(name, (tp, *sizes)):
                _point(request, shard, name, (tp, *sizes), dict(zip(axes, sizes, strict=True)), results)

    _consistent(results, name, fill)


def _consistent(results: Results, name: str, fill: Callable[[bool], None]) -> None:
    """Measure and save. Where time falls though work grows, something disturbed the points: they are measured again."""
    for attempt in range(ATTEMPTS):
        fill(attempt > 0)
        try:
            results.save()
            return
        except TableError as error:
            if attempt == ATTEMPTS - 1:
                raise RealplanError(
                    f"measurements of `{name}` contradict each other: {error.message}",
                    "profile again when the machine is idle; what was measured before is kept",
                ) from None


def _point(
    request: ProfileRequest, shard: Shard, name: str, point: Coordinates, sizes: dict[str, int], results: Results
) -> None:
    device = request.device
    try:
        timing = _timing(request, shard, name, point, sizes, results)
        results.add(name, point, timing)
        if name in (PEAKS if device.type == "cuda" else CPU_PEAKS):
            peak = peak_bytes(shard.operation(name, sizes), device)
            results.add(f"{name}_peak", point, Timing(max(peak, 1.0), 0.0))
    except torch.OutOfMemoryError:
        print(f"{name} {sizes}: out of memory, left out with its row", file=sys.stderr)
    _release(device, always=False)


def _timing(
    request: ProfileRequest, shard: Shard, name: str, point: Coordinates, sizes: dict[str, int], results: Results
) -> Timing:
    device, budget = request.device, request.sizes.budget_s
    if name == "generate_step":
        spans = step_spans(device)
        long, short = (
            measure(shard.generation(sizes["sequences"], STEP_PROMPT, tokens), device, budget) for tokens in spans
        )
        return Timing(max(long.seconds - short.seconds, 1e-9) / (spans[0] - spans[1]), long.spread)
    timing = measure(shard.operation(name, sizes), device, budget)
    if name == "block_recompute":
        backward = results.points["block_backward"][point].seconds
        return Timing(max(timing.seconds - backward, 0.1 * timing.seconds), timing.spread)
    return timing


def _collectives(request: ProfileRequest, results: Results) -> None:
    device = request.device
    sizes = GPU_BYTES if device.type == "cuda" else CPU_BYTES
    for ranks in (2, 4, 8):
        if ranks > device_count(device) or results.has("all_reduce_node", (ranks, sizes[0])):
            continue

        def fill(_: bool, ranks: int = ranks) -> None:
            for name, points in measure_collectives(device, ranks, sizes).items():
                for point, timing in points.items():
                    results.add(name, point, timing)

        _consistent(results, f"collectives of {ranks} ranks", fill)


def _release(device: torch.device, *, always: bool = True) -> None:
    """Give memory back: what cycles hold, and on a GPU what the allocator caches, once it is half of the device's."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        if always or free < total / 2:
            gc.collect()
            torch.cuda.empty_cache()
    elif always:
        gc.collect()
