"""Rows of other origin: what is absent has a default, what is odd has a reason, and nothing ever breaks the report."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from cost_models.validation.published import library_files, read_rows
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
            assert "rows.json: rows[0]" in error.message
            continue
        json.dumps(document, allow_nan=False)
        for found in document["rows"]:
            assert (found["predicted"] is None) == bool(found.get("reason"))
            assert found["source"] in ("measured", "interpolated", "analytic")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"\xff\xfe\x00", "not a text file"),
        (b"{", "rows.json:1:2: not JSON"),
        (b"3", "rows: there is no list of rows"),
        (b'{"rows": {}}', "rows: there is no list of rows"),
        (b"[3]", r"rows\[0\]: int where an object must stand"),
        (b'[{"measured": {}}]', r"rows\[0\]: there is no `id`"),
        (b'[{"id": 3, "measured": {}}]', r"rows\[0\]: id: 3 must be a text"),
        (b'[{"id": "a", "measured": 3}]', r"rows\[0\] \(a\): measured: int where an object must stand"),
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
    with pytest.raises(SpecError, match="cannot be read: Is a directory"):
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
    ],
)
def test_rules_are_named(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    found = results(tmp_path, training_row() | changes)
    assert all(r.predicted is None and reason in r.reason for r in found)


def test_rows_of_one_id_are_all_answered(tmp_path: Path) -> None:
    row = training_row()
    assert len(results(tmp_path, row, row | {"measured": {"step_time_s": 1.0}})) == 2
