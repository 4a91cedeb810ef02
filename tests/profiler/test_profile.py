"""The profiler on the fixture model: it times what the runtime runs, resumes, and leaves a table that can be used."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import run_ranks

from cost_models.tables.shards import shard_spec
from cost_models.tables.table_file import load_table, save_table
from plans.errors import RealplanError, SpecError
from plans.library import load_model
from profiler import profile as profiling
from profiler.cases import Cases, grids
from profiler.command import profile_command
from profiler.devices import kind_named
from profiler.profile import ProfileRequest, profile
from profiler.results import full_grid
from profiler.timers import Timed, Timing, measure, peak_bytes

FIXTURE = Path(__file__).parents[1] / "fixtures" / "tiny-llama"
CPU = torch.device("cpu")
FEW = Cases(
    tokens=(8, 64),
    sequences=(1, 4),
    sequence_tokens=(8, 32),
    rows=(1, 8),
    cached_tokens=(8, 64),
    call_sequences=(2,),
    call_tokens=(16,),
    budget_s=0.01,
)


def request_for(degrees: tuple[int, ...]) -> ProfileRequest:
    spec = replace(load_model(str(FIXTURE)), name=str(FIXTURE))
    return ProfileRequest(spec=spec, device=CPU, dtype="fp32", degrees=degrees, cases=FEW, collectives=False)


def profiled(folder: Path, degrees: tuple[int, ...]) -> Path:
    """Profile in a process of its own, because a profile makes the process group of its process."""
    path = folder / "table.json"
    run_ranks(1, lambda: _profile(degrees, path))
    return path


def _profile(degrees: tuple[int, ...], path: Path) -> None:
    torch.distributed.destroy_process_group()
    profile(request_for(degrees), path)
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


def test_profile_resumes_and_fills_every_grid(tmp_path: Path) -> None:
    path = profiled(tmp_path, (1,))
    first = load_table(path)
    assert {*grids(FEW), "optimizer_step", "block_forward_peak", "head_forward_peak"} <= set(first.entries)
    assert first.hardware == "cpu" and first.versions["megatron-core"] and first.device

    second = load_table(profiled(tmp_path, (1, 2)))
    for name, entry in first.entries.items():
        if "tp" in entry.axes:
            assert list(second.entries[name].axes["tp"]) == [1, 2]
            kept = second.entries[name].values[0]
            np.testing.assert_array_equal(kept, entry.values[0], err_msg=f"{name} was measured again")
    count = load_model(str(FIXTURE))
    vocabulary = count.padded_vocab * count.hidden
    whole = vocabulary + count.layer_params + count.norm_params
    assert whole in second.entries["optimizer_step"].axes["parameters"]


def test_other_conditions_start_anew(tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    results = profiling.Results(profiling._head(request_for((1,))), path)
    results.add("embedding_forward", (1, 8), Timing(1.0, 0.0))
    results.save()
    same, other = profiling._head(request_for((1,))), replace(profiling._head(request_for((1,))), precision="bf16")
    assert profiling.Results.resume(same, path).has("embedding_forward", (1, 8))
    assert not profiling.Results.resume(other, path).has("embedding_forward", (1, 8))


def test_a_missing_point_takes_its_row_along() -> None:
    points = {(tp, n, t): Timing(float(n * t), 0.0) for tp in (1, 2) for n in (1, 4) for t in (8, 16)}
    del points[1, 4, 16]  # out of memory
    entry = full_grid("block_forward", points)
    assert [list(axis) for axis in entry.axes.values()] == [[1, 2], [1], [8, 16]]
    np.testing.assert_array_equal(entry.values, [[[8, 16]], [[8, 16]]])


def test_shards_divide_and_refuse() -> None:
    spec = load_model("llama-70b")
    shard = shard_spec(spec, 8)
    assert (shard.layers, shard.heads, shard.kv_heads, shard.ffn) == (1, 8, 1, 28672 // 8)
    assert shard.layer_params - 2 * shard.norm_params == (spec.layer_params - 2 * spec.norm_params) / 8
    with pytest.raises(SpecError, match="kv_heads 8 is not a multiple of tp 3"):
        shard_spec(replace(spec, heads=48), 3)


def test_only_the_operation_is_timed() -> None:
    slow = torch.randn(400, 400)
    timing = measure(Timed(lambda x: x + 1.0, lambda: slow @ slow), CPU, 0.02)
    heavy = measure(Timed(lambda _: [slow @ slow for _ in range(10)]), CPU, 0.02)
    each = measure(Timed(lambda _: [slow @ slow for _ in range(10)], times=10), CPU, 0.02)
    assert 0 < timing.seconds < heavy.seconds
    assert heavy.seconds / 30 < each.seconds < heavy.seconds / 3


def test_peak_of_the_cpu_is_what_backward_keeps() -> None:
    x = torch.randn(1000, requires_grad=True)
    assert peak_bytes(Timed(lambda _: (x * 2).sin().exp()), CPU) == 2 * 4000  # the arguments of sin, the result of exp


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"model": "llama-7b"}, "a cost table of model `llama-7b` is there"),
        ({"precision": "bf16"}, "a cost table of precision `bf16` is there"),
    ],
)
def test_a_table_of_another_kind_is_not_overwritten(other: dict[str, str], says: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    spec = replace(load_model(str(FIXTURE)), name=str(FIXTURE.resolve()))
    head = profiling._head(replace(request_for((1,)), spec=spec))
    save_table(replace(head, **other), path)  # type: ignore[arg-type]
    before = path.read_text()
    with pytest.raises(RealplanError, match=says):
        profile_command(str(FIXTURE), "cpu", "1", "fp32", path)
    assert path.read_text() == before
    with pytest.raises(RealplanError, match="a folder"):
        profile_command(str(FIXTURE), "cpu", "1", "fp32", tmp_path)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 80GB HBM3", "h100-80gb-sxm"),
        ("NVIDIA H100 PCIe", "h100-80gb-pcie"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA B200", "b200-180gb"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA A100", None),
        ("NVIDIA GH200 480GB", None),
        ("Tesla V100-SXM2-32GB", None),
    ],
)
def test_drivers_names_of_gpus(name: str, kind: str | None) -> None:
    assert kind_named(name) == kind
