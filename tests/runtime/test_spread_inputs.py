"""Data and tokenizer of machines that do not have them: whole copies from one that has, checked by their sums."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from plan_cases import TINY, tiny_plan, tiny_run

from plans.runfile import RunFile
from runtime.batches.files import read_data_rows
from runtime.batches.tokenizer import Tokenizer
from runtime.machines.files import FileServer
from runtime.machines.inputs import Inputs
from runtime.machines.named import input_paths
from runtime.machines.wire import difference, work_of

HOST = "127.0.0.1"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A disk with data in all forms and a tokenizer."""
    disk = tmp_path / "there"
    (disk / "rows").mkdir(parents=True)
    (disk / "one.jsonl").write_text('{"prompt": "a"}\n')
    (disk / "rows" / "b.jsonl").write_text('{"prompt": "b"}\n')
    (disk / "rows" / "a.csv").write_text("prompt\nc\n")
    (disk / "rows" / "README.md").write_text("not read")
    saved = disk / "saved" / "train"
    saved.mkdir(parents=True)
    (disk / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    (saved / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-0.arrow"}]}))
    table = pa.table({"prompt": ["d", "e"]})
    with pa.OSFile(str(saved / "data-0.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)
    shutil.copytree(TINY, disk / "tokenizer")
    return disk


def run_on(disk: Path, output: Path) -> RunFile:
    parts = [{"path": str(disk / "one.jsonl")}, {"path": str(disk / "rows"), "weight": 2.0}]
    evaluation = {"every": 1, "source": str(disk / "saved")}
    return tiny_run(output, tokenizer=str(disk / "tokenizer"), data={"source": parts}, evaluation=evaluation)


@pytest.fixture
def serving(there: Path, tmp_path: Path) -> Iterator[dict[str, Any]]:
    """What a machine with the disk says of it, with itself as the source."""
    with closing(FileServer(HOST, tmp_path)) as server:
        found = Inputs(run_on(there, tmp_path / "first"), server, 0).describe()["inputs"]
        yield {number: of | {"sources": [server.source]} for number, of in found.items()}


def test_a_machine_reads_what_another_one_has(there: Path, serving: dict[str, Any], tmp_path: Path) -> None:
    run = run_on(tmp_path / "nowhere", tmp_path / "out")
    with closing(FileServer(HOST, tmp_path)) as server:
        ours = Inputs(run, server, 1)
        assert ours.describe() == {"inputs": {}} and len(serving) == len(input_paths(run)) == 4
        come = ours.fetch(serving)["bytes"]
        assert come == sum(size for of in serving.values() for size, _ in of["files"].values())
        assert ours.fetch(serving)["bytes"] == 0, "what is there is not fetched again"
        for name in ("one.jsonl", "rows", "saved"):
            rows = [read_data_rows(place) for place in (ours.placed[str(tmp_path / "nowhere" / name)], there / name)]
            assert [row.values for row in rows[0]] == [row.values for row in rows[1]] and rows[0]
        tokens = [Tokenizer.of_folder(f) for f in (ours.placed[str(tmp_path / "nowhere" / "tokenizer")], TINY)]
        assert tokens[0].encode("a text") == tokens[1].encode("a text") and tokens[0].eos_ids == tokens[1].eos_ids
        assert not list((tmp_path / "out").rglob("README.md"))
        ours.close()
    assert not (tmp_path / "out").exists()


def test_what_has_changed_on_its_way_is_refused(there: Path, serving: dict[str, Any], tmp_path: Path) -> None:
    (there / "one.jsonl").write_text('{"prompt": "z"}\n')
    (there / "rows" / "b.jsonl").write_text('{"prompt": "b", "more": 1}\n')
    with closing(FileServer(HOST, tmp_path)) as server:
        ours = Inputs(run_on(tmp_path / "nowhere", tmp_path / "out"), server, 1)
        for number, name in (("1", "one.jsonl"), ("2", "b.jsonl")):
            with pytest.raises(OSError, match=rf"`{name}` cannot be fetched \(127.0.0.1: it has come otherwise"):
                ours.fetch({number: serving[number]})
        bad = serving["1"] | {"files": {"../one.jsonl": serving["1"]["files"]["one.jsonl"]}}
        with pytest.raises(ValueError, match="another machine names a file"):
            ours.fetch({"1": bad})


def test_other_content_has_another_mark(there: Path, serving: dict[str, Any], tmp_path: Path) -> None:
    """Wherever it lies, and only where ranks read it."""
    shutil.copytree(there, tmp_path / "copy")
    run = run_on(tmp_path / "copy", tmp_path / "out")
    assert not difference(
        *(work_of(tiny_plan(1, "d1 t1 p1"), each) for each in (run, run_on(there, tmp_path / "first")))
    )
    (tmp_path / "copy" / "rows" / "README.md").write_text("other words")
    with closing(FileServer(HOST, tmp_path)) as server:
        ours = Inputs(run, server, 1)
        marks = {number: of["mark"] for number, of in serving.items()}
        assert {number: of["mark"] for number, of in ours.describe()["inputs"].items()} == marks
        (tmp_path / "copy" / "rows" / "a.csv").write_text("prompt\nC\n")
        other = {number: of["mark"] for number, of in ours.describe()["inputs"].items()}
    assert [number for number in marks if marks[number] != other[number]] == ["2"]
