"""Turn the measured kernel tables of the PyPI wheel aiconfigurator-core (Apache-2.0) into efficiency tables of ours.

    pip download --no-deps -d wheels aiconfigurator-core
    pip install pandas pyarrow
    python scripts/import_aiconfigurator.py wheels/aiconfigurator_core-*.whl

writes cost_models/library/kernels/{a100,h100,h200,b200,l40s}.json. Where several inference frameworks measured the same
kernel (they agree within 2 %), the median of their newest versions is taken. Sizes of messages are elements of two
bytes there and bytes here. Latencies are milliseconds there.
"""

from __future__ import annotations

import argparse
import datetime
import io
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cost_models.tables.table_file import save_table
from cost_models.tables.table_schema import OPERATIONS
from cost_models.tables.tables import CostTable, TableEntry
from plans.cluster import GpuSpec
from plans.library import load_gpu

if TYPE_CHECKING:
    import pandas as pd

GPUS: Mapping[str, tuple[str, str]] = {
    "a100": ("a100_sxm", "a100-80gb"),
    "h100": ("h100_sxm", "h100-80gb-sxm"),
    "h200": ("h200_sxm", "h200-141gb"),
    "b200": ("b200_sxm", "b200-180gb"),
    "l40s": ("l40s", "l40s"),
}
# The wheel's L40S server moved 1.4 GB/s between its cards; PCIe hosts differ too much for one of them to stand for all.
WITHOUT_COLLECTIVES = {"l40s"}
M = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384, 32768)
N = (128, 256, 512, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 8192, 12288, 16384, 65536)
K = (128, 256, 512, 1024, 1536, 2048, 3072, 4096, 5120, 6144, 8192, 12288, 16384, 51200)
LANES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TOKENS = (128, 256, 512, 1024, 2048, 4096, 8192, 16384)
CACHED = (128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
MESSAGE_BYTES = tuple(512 * 4**i for i in range(11))
COLLECTIVES = {
    "all_reduce": "all_reduce",
    "all_gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
}
HEAD_DIM = 128


@dataclass(frozen=True)
class Wheel:
    """The parquet files of one GPU kind in the wheel."""

    archive: zipfile.ZipFile
    system: str

    def read(self, pattern: str, *, newest: bool = True) -> Iterator[tuple[str, pd.DataFrame]]:
        """(path, table) of the files under `<system>/<pattern>`: the newest version per framework, or all."""
        import pandas as pd

        chosen: dict[str, str] = {}
        for path in self.archive.namelist():
            if re.search(rf"/data/{self.system}/{pattern}", path):
                key = path.rsplit("/", 2)[0] if newest else path
                chosen[key] = max(chosen.get(key, path), path, key=_version)
        for path in chosen.values():
            yield path, pd.read_parquet(io.BytesIO(self.archive.read(path)))


def _version(path: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", path.rsplit("/", 2)[1])]


def _seconds(table: pd.DataFrame, by: list[str]) -> pd.Series[float]:
    series: pd.Series[float] = table.groupby(by)["latency"].median() * 1e-3
    return series


def _median(parts: list[pd.Series[float]]) -> pd.Series[float]:
    import pandas as pd

    median: pd.Series[float] = pd.concat(parts, axis=1).median(axis=1)
    return median


def full_grid(operation: str, series: pd.Series[float], points: tuple[tuple[int, ...], ...]) -> TableEntry:
    """The values at the points; axis points are dropped, those with the most holes first, until no hole is left."""
    kept = [list(axis) for axis in points]
    while True:
        grid = np.asarray(series.reindex(_product(kept)), dtype=np.float64).reshape([len(axis) for axis in kept])
        holes = np.isnan(grid)
        if not holes.any():
            names = OPERATIONS[operation].axes
            axes = {name: np.array(axis, dtype=np.float64) for name, axis in zip(names, kept, strict=True)}
            return TableEntry(axes=axes, values=grid)
        shares = [holes.mean(axis=tuple(j for j in range(grid.ndim) if j != i)) for i in range(grid.ndim)]
        worst = max(range(grid.ndim), key=lambda i: shares[i].max())
        del kept[worst][int(shares[worst].argmax())]


def _product(axes: list[list[int]]) -> pd.MultiIndex:
    import pandas as pd

    return pd.MultiIndex.from_product(axes)


def gemm(wheel: Wheel, gpu: GpuSpec) -> dict[str, TableEntry]:
    """Share of the bf16 peak that C[m, n] = A[m, k] B[k, n] reaches."""
    parts = []
    for _, table in wheel.read(r"gemm/\w+/[^/]+/gemm_perf.parquet"):
        parts.append(_seconds(table[table.gemm_dtype.isin(["bfloat16", "float16"])], ["m", "n", "k"]))
    seconds = _median(parts)
    sizes = seconds.index.to_frame()
    share = 2.0 * sizes.m * sizes.n * sizes.k / seconds / (gpu.bf16_tflops * 1e12)
    return {"gemm_efficiency": full_grid("gemm_efficiency", share.clip(upper=1.0), (M, N, K))}


def _attention(wheel: Wheel, kind: str) -> pd.DataFrame:
    import pandas as pd

    tables = []
    for _, table in wheel.read(rf"attention/\w+/[^/]+/{kind}_attention_perf.parquet"):
        half = ["bfloat16", "float16"]
        chosen = table[table.attn_dtype.isin(half) & table.kv_cache_dtype.isin(half) & (table.head_dim == HEAD_DIM)]
        tables.append(chosen[chosen.window_size == 0] if "window_size" in chosen else chosen)
    return pd.concat(tables, ignore_index=True)


def attention(wheel: Wheel, gpu: GpuSpec) -> dict[str, TableEntry]:
    """Causal prefill as a share of the bf16 peak (half of the score matrix counted), decode as a share of the memory
    bandwidth (the KV cache read once), by what runs side by side and the sequence length. Head dimension 128."""
    prefill = _attention(wheel, "context")
    prefill["lanes"], flops = prefill.batch_size * prefill.num_heads, 2.0 * HEAD_DIM * prefill.isl**2
    prefill["share"] = flops * prefill.lanes / (prefill.latency * 1e-3) / (gpu.bf16_tflops * 1e12)
    decode = _attention(wheel, "generation")
    decode["lanes"], decode["cached"] = decode.batch_size * decode.num_key_value_heads, decode.isl + decode.step
    read = 4.0 * HEAD_DIM * decode.lanes * decode.cached
    decode["share"] = read / (decode.latency * 1e-3) / (gpu.hbm_gbps * 1e9)
    found = {}
    for name, table, by, tokens in (
        ("attention_prefill_efficiency", prefill, "isl", TOKENS),
        ("attention_decode_efficiency", decode, "cached", CACHED),
    ):
        share = table.groupby(["lanes", by])["share"].median().clip(upper=1.0)
        found[name] = full_grid(name, share, (LANES, tokens))
    return found


def collectives(wheel: Wheel) -> dict[str, TableEntry]:
    """Seconds of NCCL collectives (median over its versions: single points are noisy) and of a one-kernel
    all-reduce (TensorRT-LLM), inside a node."""
    import pandas as pd

    table = pd.concat([table for _, table in wheel.read(r"comm/nccl/[^/]+/nccl_perf.parquet", newest=False)])
    table = table[table.nccl_dtype == "half"]
    custom = next(t for path, t in wheel.read(r"comm/\w+/[^/]+/custom_allreduce_perf.parquet") if "/trtllm/" in path)
    sources = {ours: table[table.op_name == theirs] for theirs, ours in COLLECTIVES.items()}
    sources["custom_all_reduce"] = custom
    found = {}
    for name, chosen in sources.items():
        seconds = _seconds(chosen.assign(bytes=2 * chosen.message_size), ["num_gpus", "bytes"])
        found[f"{name}_node"] = full_grid(f"{name}_node", seconds, ((2, 4, 8), MESSAGE_BYTES))
    return found


def import_gpu(archive: zipfile.ZipFile, system: str, hardware: str, release: str) -> CostTable:
    """The table of one GPU kind."""
    wheel, gpu = Wheel(archive, system), load_gpu(hardware)
    paths, device = [], ""
    for path, table in wheel.read(r"gemm/\w+/[^/]+/gemm_perf.parquet"):
        paths.append(path.split(f"{system}/")[1].rsplit("/", 1)[0])
        device = str(table.device.iloc[0])
    return CostTable(
        hardware=hardware,
        device=device,
        precision="bf16",
        versions={"aiconfigurator-core": release},
        date=str(datetime.date.today()),
        source=f"aiconfigurator-core {release} (Apache-2.0, NVIDIA), systems/data/{system}: {', '.join(sorted(paths))}"
        " and attention and comm beside them; median over frameworks",
        entries={
            **gemm(wheel, gpu),
            **attention(wheel, gpu),
            **({} if system in WITHOUT_COLLECTIVES else collectives(wheel)),
        },
    )


def main() -> None:
    """Write one table per GPU kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("--to", type=Path, default=Path("cost_models/library/kernels"))
    arguments = parser.parse_args()
    try:
        import pyarrow  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        raise SystemExit("the wheel's tables are parquet files\nhint: pip install pandas pyarrow") from None
    arguments.to.mkdir(parents=True, exist_ok=True)
    release = arguments.wheel.name.split("-")[1]
    with zipfile.ZipFile(arguments.wheel) as archive:
        for name, (system, hardware) in GPUS.items():
            table = import_gpu(archive, system, hardware, release)
            save_table(table, arguments.to / f"{name}.json")
            sizes = ", ".join(f"{key} {entry.values.shape}" for key, entry in table.entries.items())
            print(f"{name}: {(arguments.to / f'{name}.json').stat().st_size / 1000:.0f} kB, {sizes}")


if __name__ == "__main__":
    main()
