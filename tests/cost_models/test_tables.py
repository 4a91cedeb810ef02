"""Cost tables: the file format and its errors, interpolation against scipy, the kernel tables that ship."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.interpolate import RegularGridInterpolator

from cost_models.tables.interpolation import Grid, Source
from cost_models.tables.kernels import kernel_table
from cost_models.tables.table_file import load_table, parse_table, save_table
from cost_models.tables.table_schema import OPERATIONS, TableError
from cost_models.tables.tables import table_text


def answer(gpu: str, operation: str, **points: float) -> float:
    """What the kernel table of a GPU says."""
    table = kernel_table(gpu)
    assert table is not None
    return float(table.answer(operation, points, np.nan).value)


TABLE: dict[str, Any] = {
    "format": "realplan-costs/1",
    "hardware": "h100-80gb-sxm",
    "device": "NVIDIA H100 80GB HBM3",
    "model": "llama2-7b",
    "precision": "bf16",
    "clocks_mhz": {"graphics": 1980},
    "versions": {"torch": "2.13.0"},
    "date": "2026-08-21",
    "source": "realplan profile",
    "entries": {
        "block_forward": {
            "axes": {"tp": [1, 2], "sequences": [1, 4], "sequence_tokens": [512, 2048, 8192]},
            "values": [
                [[0.001, 0.0035, 0.016], [0.0034, 0.013, 0.063]],
                [[0.0006, 0.0019, 0.0082], [0.0018, 0.0067, 0.032]],
            ],
            "spread": 0.01,
        },
        "optimizer_step": {"axes": {"parameters": [1000000, 100000000]}, "values": [0.0001, 0.004]},
    },
}


def changed(path: str, value: Any) -> dict[str, Any]:
    """The table with one value changed (or removed, when it is None); the path is written with dots."""
    table = copy.deepcopy(TABLE)
    *parents, last = path.split(".")
    place: Any = table
    for parent in parents:
        place = place[int(parent)] if isinstance(place, list) else place[parent]
    key: Any = int(last) if isinstance(place, list) else last
    if value is ...:
        del place[key]
    else:
        place[key] = value
    return table


def test_round_trip(tmp_path: Path) -> None:
    table = parse_table(TABLE, "table.json")
    save_table(table, tmp_path / "table.json")
    again = load_table(tmp_path / "table.json")
    assert json.loads(table_text(again)) == TABLE
    assert table_text(again) == (tmp_path / "table.json").read_text()


VALUES = "entries.block_forward.values"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("speed", 1, ["unknown key `speed`"]),
        ("device", ..., ["key `device` is missing"]),
        ("format", "realplan-costs/0", ["format", "realplan-costs/1"]),
        ("hardware", "h100", ["hardware", "`h100` is unknown", "h100-80gb-sxm"]),
        ("precision", "bf32", ["precision", "`bf32` is unknown", "bf16"]),
        ("date", "", ["date", "not empty"]),
        ("entries.block_foward", {}, ["unknown operation `block_foward`", "block_forward"]),
        ("entries", [], ["entries", "list where an object must stand"]),
        ("clocks_mhz", 1980, ["clocks_mhz", "int where an object must stand"]),
        ("entries.optimizer_step.spread", "1 %", ["entries.optimizer_step.spread", "not negative"]),
        ("entries.optimizer_step.median", 1, ["entries.optimizer_step", "unknown key `median`"]),
        ("entries.optimizer_step.axes", {"params": [1]}, ["entries.optimizer_step.axes", "parameters"]),
        ("entries.block_forward.axes.sequences", [4, 1], ["axes.sequences", "must ascend"]),
        ("entries.block_forward.axes.sequences", [0, 1], ["axes.sequences", "positive"]),
        (f"{VALUES}.1.0.2", None, [f"{VALUES}[1][0][2]", "hole"]),
        (f"{VALUES}.1.0.2", float("nan"), [f"{VALUES}[1][0][2]", "hole"]),
        (f"{VALUES}.1.0.2", -0.1, [f"{VALUES}[1][0][2]", "positive"]),
        (f"{VALUES}.1.0", [1.0, 2.0], [f"{VALUES}[1][0]", "3 points"]),
        (f"{VALUES}.0.0.2", 0.001, [VALUES, "sequence_tokens 2048 to 8192", "half"]),
    ],
)
def test_bad_tables_name_file_key_and_rule(path: str, value: Any, says: list[str]) -> None:
    with pytest.raises(TableError) as error:
        parse_table(changed(path, value), "costs/table.json")
    text = str(error.value)
    assert text.startswith("costs/table.json: ")
    assert all(part in text for part in says), text


def test_an_efficiency_above_one_is_refused() -> None:
    entry = {"axes": {"m": [1], "n": [1], "k": [1]}, "values": [[[1.2]]]}
    with pytest.raises(TableError, match="at most 1"):
        parse_table(changed("entries.gemm_efficiency", entry), "table.json")


def test_unreadable_files_say_where(tmp_path: Path) -> None:
    with pytest.raises(TableError, match="no such cost table"):
        load_table(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text('{\n  "format": ,\n}')
    with pytest.raises(TableError, match=r"bad\.json:2:13: not JSON"):
        load_table(tmp_path / "bad.json")


AXES = {"m": np.array([1.0, 4.0, 64.0]), "n": np.array([16.0, 128.0]), "k": np.array([2.0, 8.0, 32.0, 128.0])}


class TestInterpolation:
    def grid(self, *, grows: bool = True) -> Grid:
        values = np.random.default_rng(0).uniform(0.1, 1.0, size=(3, 2, 4))
        return Grid(axes=AXES, values=values, grows=grows)

    def points(self, low: float = 1.0, high: float = 1.0) -> dict[str, Any]:
        draw = np.random.default_rng(1)
        return {
            name: np.exp(draw.uniform(np.log(axis[0] / low), np.log(axis[-1] * high), size=200))
            for name, axis in AXES.items()
        }

    def scipy(self, grid: Grid, points: dict[str, Any]) -> Any:
        logs = tuple(np.log(axis) for axis in AXES.values())
        reference = RegularGridInterpolator(logs, np.log(grid.values), bounds_error=False, fill_value=None)
        return np.exp(reference(np.log(np.stack(list(points.values()), axis=-1))))

    def test_equals_scipy_inside(self) -> None:
        grid, points = self.grid(), self.points()
        answer = grid.answer(points)
        np.testing.assert_allclose(answer.value, self.scipy(grid, points), rtol=1e-12)
        assert (answer.beyond == 1).all() and (answer.source == Source.INTERPOLATED).all()

    def test_equals_scipy_above_and_flags_the_distance(self) -> None:
        grid, points = self.grid(), self.points(high=8.0)
        answer = grid.answer(points)
        np.testing.assert_allclose(answer.value, self.scipy(grid, points), rtol=1e-12)
        far = grid.answer({"m": 128.0, "n": 384.0, "k": 8.0})
        assert far.beyond == pytest.approx(2 * 3)

    def test_holds_below_and_holds_efficiencies_everywhere(self) -> None:
        edge = {name: axis[0] for name, axis in AXES.items()}
        below = self.grid().answer({name: point / 10 for name, point in edge.items()})
        assert below.value == pytest.approx(self.grid().values[0, 0, 0]) and below.beyond == pytest.approx(1000)
        above = self.grid(grows=False).answer({name: axis[-1] * 10 for name, axis in AXES.items()})
        assert above.value == pytest.approx(self.grid().values[-1, -1, -1])

    def test_grid_points_are_measured(self) -> None:
        answer = self.grid().answer({"m": np.array([4.0, 4.0]), "n": 16.0, "k": np.array([8.0, 9.0])})
        assert answer.source.tolist() == [Source.MEASURED, Source.INTERPOLATED]
        assert answer.value[0] == pytest.approx(self.grid().values[1, 0, 1])
        assert answer.shares() == {"measured": 0.5, "interpolated": 0.5, "analytic": 0.0}

    def test_an_exact_axis_is_never_interpolated(self) -> None:
        table = parse_table(TABLE, "table.json")
        points: dict[str, Any] = {"tp": np.array([1.0, 2.0, 4.0]), "sequences": 1.0, "sequence_tokens": 512.0}
        answer = table.answer("block_forward", points, fallback=9.0)
        assert answer.value.tolist() == pytest.approx([0.001, 0.0006, 9.0])
        assert answer.source.tolist() == [Source.MEASURED, Source.MEASURED, Source.ANALYTIC]

    def test_a_missing_operation_is_the_fallback_and_says_so(self) -> None:
        table = parse_table(TABLE, "table.json")
        points: dict[str, Any] = {"tp": 1.0, "sequences": np.array([1.0, 2.0]), "cached_tokens": 512.0}
        answer = table.answer("block_decode", points, fallback=0.5)
        assert answer.value.tolist() == [0.5, 0.5]
        assert (answer.source == Source.ANALYTIC).all()


class TestShippedKernels:
    @pytest.mark.parametrize("gpu", ["a100-80gb", "h100-80gb-sxm", "h200-141gb", "b200-180gb", "l40s"])
    def test_tables_are_whole(self, gpu: str) -> None:
        table = kernel_table(gpu)
        assert table is not None and table.hardware == gpu and "Apache-2.0" in table.source
        assert {"gemm_efficiency", "attention_prefill_efficiency", "attention_decode_efficiency"} <= set(table.entries)
        assert set(table.entries) <= set(OPERATIONS)

    def test_large_products_reach_what_is_known_of_the_cards(self) -> None:
        # Largest sustained bf16 products: A100 271 to 299, H100 SXM 786 to 794, B200 1,552 to 1,745 TFLOP/s.
        for gpu, peak, low, high in (
            ("a100-80gb", 312, 255, 299),
            ("h100-80gb-sxm", 989, 690, 800),
            ("b200-180gb", 2250, 1400, 1750),
        ):
            reached = answer(gpu, "gemm_efficiency", m=8192.0, n=8192.0, k=8192.0) * peak
            assert low <= reached <= high, (gpu, reached)

    def test_streaming_one_row_is_bound_by_memory(self) -> None:
        # m = 1 reads the weights once: 2,827 GB/s on the H100 over shapes of more than 3e7 weights.
        share = answer("h100-80gb-sxm", "gemm_efficiency", m=1.0, n=8192.0, k=8192.0)
        assert share * 989e12 == pytest.approx(2.7e12, rel=0.2)

    def test_attention_and_collectives_follow_their_sizes(self) -> None:
        card = "h100-80gb-sxm"
        long, short = (
            answer(card, "attention_prefill_efficiency", lanes=32.0, sequence_tokens=t) for t in (8192.0, 256.0)
        )
        assert 0.45 < long < 0.85 and short < long
        few, many = (answer(card, "attention_decode_efficiency", lanes=n, cached_tokens=2048.0) for n in (1.0, 512.0))
        assert few < 0.1 and 0.5 < many < 1.0
        # 512 MB over 8 GPUs: bus bandwidth 445 GB/s with NVLS (time x 2 x 7/8).
        large = answer(card, "all_reduce_node", ranks=8.0, bytes=512 * 2.0**20)
        assert 512 * 2**20 * 2 * 7 / 8 / large / 1e9 == pytest.approx(445, rel=0.05)
        small = [answer(card, f"{kind}_node", ranks=8.0, bytes=16384.0) for kind in ("all_reduce", "custom_all_reduce")]
        assert small[1] < small[0] / 3

    def test_a_card_with_fewer_links_has_the_products_of_its_chip_but_not_the_collectives(self) -> None:
        whole, cut = kernel_table("h100-80gb-sxm"), kernel_table("h800-80gb")
        assert whole is not None and cut is not None
        np.testing.assert_array_equal(cut.entries["gemm_efficiency"].values, whole.entries["gemm_efficiency"].values)
        assert not any(name.endswith("_node") for name in cut.entries)
        assert kernel_table("rtx-4090") is None
