"""Rows of other origin: what is absent has a default, what is odd has a reason, and nothing ever breaks the report."""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from cost_models.validation.published import library_files, read_rows, row_cluster
from cost_models.validation.row_results import RowResult
from cost_models.validation.validation import validate
from cost_models.validation.validation_report import as_document
from plans.errors import RealplanError, SpecError

ODD = (None, -1, 0, 1.5, "x", "8", True, [], {}, [1], {"a": 1}, math.inf, math.nan, 1e30, 3, 2**40, "")
ROWS = {row["id"]: row for path in library_files() for row in read_rows(path)}


def results(tmp_path: Path, *rows: Any) -> list[RowResult]:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"rows": rows}))
    return list(validate([path]).rows)


def training_row() -> dict[str, Any]:
    return next(
        dict(row)
        for row in ROWS.values()
        if row.get("group") == "megatron" and row["bar"] and row["tp"] > 1 and row["pp"] > 1 and "H100" in row["gpu"]
    )


@pytest.mark.parametrize("path", library_files(), ids=lambda path: path.stem)
def test_odd_rows_never_break_a_report(path: Path, tmp_path: Path) -> None:
    generator, rows = random.Random(0), read_rows(path)
    for _ in range(60):
        row = json.loads(json.dumps(generator.choice(rows)))
        for _ in range(generator.choice((1, 1, 2))):
            target = generator.choice(
                [row, row, *(row[k] for k in ("arch", "measured") if isinstance(row.get(k), dict))]
            )
            key = generator.choice([*target, "nonsense"])
            target[key] = generator.choice(ODD)
            if generator.random() < 0.3:
                del target[key]
        (tmp_path / "rows.json").write_text(json.dumps([row]))
        try:
            document = as_document(validate([tmp_path / "rows.json"]))
        except RealplanError as error:
            assert re.search(r"rows.json:1:\d+: ", error.message)
            continue
        json.dumps(document, allow_nan=False)
        for found in document["rows"]:
            assert (found["predicted"] is None) == bool(found.get("reason"))
            assert found["source"] in ("measured", "interpolated", "analytic")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read measurements"),
        (b"\xff\xfe\x00", "rows.json:1:1: byte 0xff is not UTF-8"),
        (b"{", "rows.json:1:2: not JSON"),
        (b"1" * 5000, "rows.json:1:1: .* is no number that can be read"),
        (b"[" * 100_000, "rows.json:1:61: brackets stand more than 60 deep"),
        (b"3", "rows.json:1:1: there is no list of rows"),
        (b'{"rows": {}}', "rows.json:1:10: there is no list of rows"),
        (b"[3]", r"rows.json:1:2: int where an object must stand"),
        (b'[{"measured": {}}]', "rows.json:1:2: there is no `id`"),
        (b'[{"id": 3, "measured": {}}]', "rows.json:1:9: id: 3 must be a text"),
        (b'[{"id": "a", "measured": 3}]', "rows.json:1:26: a: measured: int where an object must stand"),
    ],
)
def test_files_that_are_none_are_named(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "rows.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SpecError, match=words) as error:
        validate([path])
    assert "rows.json" in error.value.message


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match=r"cannot read measurements .*: it is a folder"):
        validate([tmp_path])


@pytest.mark.parametrize(
    ("key", "default"),
    [
        ("cp", 1),
        ("ep", 1),
        ("vpp", 1),
        ("gpus_per_node", 8),
        ("engine", "megatron"),
        ("attention", "flash"),
        ("seq_parallel", True),
        ("zero", 1),
        ("recompute", "none"),
    ],
)
def test_absent_settings_take_their_defaults(tmp_path: Path, key: str, default: object) -> None:
    base = training_row() | {"cp": 1, "ep": 1, "vpp": 1, "zero": 1, "seq_parallel": True, "recompute": "none"}
    base |= {"dp": base["gpus"] // (base["tp"] * base["pp"])}
    absent = {k: v for k, v in base.items() if k != key}
    rows = [base | {"id": "a", key: default}, base | {"id": "b", key: None}, absent | {"id": "c"}]
    seconds = {r.predicted for r in results(tmp_path, *rows) if r.quantity == "step_time_s"}
    assert len(seconds) == 1 and None not in seconds


def test_hosts_are_eager_and_worlds_are_the_product_of_degrees(tmp_path: Path) -> None:
    row = next(dict(r) for r in ROWS.values() if r.get("group") == "eager-vllm" and "prefill_ms" in r["measured"])
    given, absent = results(tmp_path, row, row | {"id": "x", "host": None})[0::2][:2]
    assert given.predicted == absent.predicted is not None
    base = training_row()
    whole, derived = results(tmp_path, base, {k: v for k, v in base.items() if k != "gpus"} | {"id": "x"})
    assert whole.predicted == derived.predicted is not None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpus": 7}, "gpus is 7"),
        ({"tp": "8"}, "tp is '8'; it must be a positive whole number"),
        ({"arch": {"layers": -4}}, "arch.layers is -4"),
        ({"seq_parallel": "yes"}, "seq_parallel is 'yes'; it must be true or false"),
        ({"zero": 7}, "zero is 7; it must be a ZeRO stage"),
        ({"precision": None}, "precision is not published"),
        ({"gpu": None}, "not in the catalogue"),
        ({"bar": "false"}, "bar is 'false'; it must be true, false or a list"),
        ({"bar": 7}, "bar is 7"),
        ({"bar": math.nan}, "bar is nan"),
        ({"bar": ["prefil_ms"]}, "bar is ['prefil_ms']"),
        ({"mbs": 1.5}, "mbs is 1.5; it must be a positive whole number"),
        ({"gbs": 0.5}, "gbs is 0.5; it must be a positive whole number"),
        ({"gbs": 7}, "gbs is 7; it must be a multiple of dp x mbs"),
        ({"gpus": 1, "dp": None, "tp": 1, "pp": 500}, "multiple of tp x pp x cp"),
        ({"gpus": None, "dp": 1, "tp": 1, "pp": 128, "gbs": 128, "mbs": 1}, "pp is 128; it must be at most the layers"),
        ({"vpp": 500}, "it must be at most the layers"),
        ({"gpus": None, "dp": 1, "pp": 1, "tp": 128, "gbs": 128, "mbs": 1}, "tp is 128; it must be at most"),
        ({"gpus_per_node": 7}, "it must be a multiple of gpus_per_node, 7"),
        ({"gpus": 2**40}, "1000000 at the most"),
        ({"arch": {"layers": 10**6}}, "arch.layers is 1000000; it must be a whole number"),
        ({"measured": {"step_time_s": 10**30}}, "from 1e-15 to 1e15"),
        ({"measured": {"step_time_s": 10**400}}, "from 1e-15 to 1e15"),
        ({"measured": {"step_time_s": 5e-324}}, "from 1e-15 to 1e15"),
        ({"engine": "colossal", "measured": {"peak_mem_gib": 50.0}}, "engine `colossal`"),
        ({"attention": "ring", "measured": {"peak_mem_gib": 50.0}}, "ring attention is not modelled"),
        ({"measured": {"peak_mem_mib": 50.0}}, "no model of `peak_mem_mib`"),
    ],
)
def test_rules_are_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    found = results(tmp_path, training_row() | changes)
    assert all(r.predicted is None and reason in r.reason for r in found)


def test_rows_of_one_id_are_all_answered(tmp_path: Path) -> None:
    row = training_row()
    assert len(results(tmp_path, row, row | {"measured": {"step_time_s": 1.0}})) == 2
    other = row | {"arch": row["arch"] | {"layers": row["arch"]["layers"] * 2}}
    assert len(results(tmp_path, row, other, dict(row), other)) == 2


@pytest.mark.parametrize(("bars", "counted"), [(({}, {}), 2), (({"bar": None}, {}), 2), (({"bar": False}, {}), 0)])
def test_all_rows_count_where_none_says_which(tmp_path: Path, bars: Any, counted: int) -> None:
    base = {key: value for key, value in training_row().items() if key != "bar"}
    rows = [base | bar | {"id": str(index)} for index, bar in enumerate(bars)]
    assert sum(r.counted for r in results(tmp_path, *rows)) == counted


def memory_row() -> dict[str, Any]:
    return next(
        dict(row)
        for row in ROWS.values()
        if row.get("group") == "simumax" and row["bar"] and row["tp"] > 1 and row["gbs"] and row["seq_parallel"]
    )


@pytest.mark.parametrize("key", ["zero", "seq_parallel", "engine", "attention", "recompute", "cp", "ep", "dp", "pp"])
def test_memory_takes_the_defaults_that_times_take(tmp_path: Path, key: str) -> None:
    given = memory_row() | {"pp": 1, "dp": 4, "tp": 2, "gpus": 8, "cp": 1, "gbs": 16, "mbs": 1, "recompute": "none"}
    given |= {"zero": 1, "seq_parallel": True, "ep": 1}
    found = results(tmp_path, given, given | {"id": "null_cef", key: None})
    for quantity in ("peak_mem_alloc_gib", "step_time_s"):
        figures = {r.predicted for r in found if r.quantity == quantity}
        assert len(figures) == 1 and None not in figures


def test_all_peaks_of_memory_are_answered_and_one_counts(tmp_path: Path) -> None:
    measured = {"peak_mem_gib": 72.0, "peak_mem_reserved_gib": 70, "peak_mem_alloc_gib": 66.0, "peak_mem_x": 3}
    found = {r.quantity: r for r in results(tmp_path, memory_row() | {"bar": True, "measured": measured})}
    assert set(found) == set(measured)
    assert [q for q, r in found.items() if r.counted] == ["peak_mem_alloc_gib"]
    assert found["peak_mem_x"].predicted is None and "peak_mem_x" in found["peak_mem_x"].reason
    assert found["peak_mem_gib"].predicted == found["peak_mem_reserved_gib"].predicted is not None


def ppo_row() -> dict[str, Any]:
    return next(dict(row) for row in ROWS.values() if row.get("plan"))


def test_ppo_iterations_run_on_the_gpu_that_is_stated(tmp_path: Path) -> None:
    row = ppo_row()
    gpus = ("A100-80GB-SXM", "H100-80GB-SXM", "nonsense")
    none, same, faster, unknown = results(tmp_path, row, *(row | {"id": gpu, "gpu": gpu} for gpu in gpus))
    assert none.predicted == same.predicted is not None
    assert faster.predicted is not None and faster.predicted < same.predicted
    assert "`nonsense`, which is not in the catalogue" in unknown.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpus": 20}, "multiple of gpus_per_node, 8"),
        ({"gpus": 8000}, "its 40 layers"),
        ({"tp": 4, "pp": 4}, "tp is 4; `real-heuristic` has 8"),
    ],
)
def test_ppo_layouts_are_checked(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    assert reason in results(tmp_path, ppo_row() | changes)[0].reason


def test_replicas_share_the_batch_of_an_inference_row(tmp_path: Path) -> None:
    row = next(dict(r) for r in ROWS.values() if r.get("group") == "eager-vllm" and r["tp"] == 8 and r["batch"] == 8)
    rows = [row, {"id": "a", "gpus": 16, "dp": 2, "batch": 16}, {"id": "b", "gpus": 16, "batch": 16}]
    rows += [{"id": "c", "gpus": 16, "batch": 3}, {"id": "d", "gpus": 12}, {"id": "e", "gpus": 16, "cp": 2}]
    decode = [r for r in results(tmp_path, *(row | change for change in rows)) if r.quantity == "decode_ms_per_token"]
    one, stated, derived, uneven, surplus, context = decode
    assert one.predicted == pytest.approx(stated.predicted, rel=0.05)
    assert stated.predicted == derived.predicted
    assert "batch is 3; it must be a multiple of dp" in uneven.reason
    assert "gpus is 12; it must be a multiple of tp x pp x cp, 8" in surplus.reason
    assert "cp is 2" in context.reason


@pytest.mark.parametrize(
    ("notes", "gigabits"),
    [
        ("inter-node 800 Gb/s per node", 800),
        ("1.6 Gb/s per node", 1.6),
        ("8x200 Gb/s per node", 1600),
        ("8 x 200 Gb/s per node", 1600),
        ("1,600 Gb/s per node", 1600),
        ("ib0.800 Gb/s per node", None),
        ("v800 Gb/s per node", None),
        ("800 Gb/s per GPU", None),
    ],
)
def test_networks_in_notes(notes: str, gigabits: float | None) -> None:
    row = training_row() | {"gpus": 16, "gpus_per_node": 8}
    usual = row_cluster(row | {"notes": None}).inter_node_gbps
    expected = usual if gigabits is None else gigabits / 8 / 8
    assert row_cluster(row | {"notes": notes}).inter_node_gbps == pytest.approx(expected)
