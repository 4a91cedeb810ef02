"""The output folder of a run: nothing in it is lost, and nothing that is not a run's own is touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from plan_cases import tiny_plan, tiny_run

from plans.codec import dump_plan
from plans.errors import RealplanError
from runtime.launching.output import check_output, held_output

PLAN = tiny_plan(1, "d1 t1 p1")


def finish(output: Path, mark: str, **keys: object) -> Path | None:
    """What a run leaves in its folder; where the output of the one before went."""
    with held_output(PLAN, tiny_run(output, **keys)) as earlier:
        (output / "metrics.jsonl").write_text(mark)
        (output / "timeline.json").write_text(mark)
        (output / "actor").mkdir()
        (output / "actor" / "model.safetensors").write_text(mark)
        (output / ".actor.partial").mkdir()
    return earlier


def test_the_output_of_an_earlier_run_moves_aside(tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "mine").mkdir(parents=True)
    assert finish(output, "first") is None
    assert finish(output, "second") == tmp_path / "out.1"
    assert finish(output, "third") == tmp_path / "out.2"
    for folder, mark in (("out.1", "first"), ("out.2", "second"), ("out", "third")):
        assert (tmp_path / folder / "actor" / "model.safetensors").read_text() == mark
        assert (tmp_path / folder / "metrics.jsonl").read_text() == mark
        assert (tmp_path / folder / "plan.json").read_text() == dump_plan(PLAN)
    assert (output / "mine").is_dir() and not (tmp_path / "out.1" / "mine").exists()
    assert sorted(os.listdir(output)) == ["actor", "metrics.jsonl", "mine", "plan.json", "run.yaml", "timeline.json"]


def test_a_run_that_did_nothing_leaves_nothing_to_keep(tmp_path: Path) -> None:
    for _ in range(2):
        with held_output(PLAN, tiny_run(tmp_path / "out")) as earlier:
            (tmp_path / "out" / "metrics.jsonl").write_text("")
        assert earlier is None
    assert os.listdir(tmp_path) == ["out"]


def test_weights_that_no_run_has_written_stay(tmp_path: Path) -> None:
    (tmp_path / "out" / "actor").mkdir(parents=True)
    (tmp_path / "out" / "actor" / "model.safetensors").write_text("precious")
    with pytest.raises(RealplanError, match="holds `actor`, which no run has written"):
        check_output(PLAN, tiny_run(tmp_path / "out"))
    with pytest.raises(RealplanError), held_output(PLAN, tiny_run(tmp_path / "out")):
        pass
    assert (tmp_path / "out" / "actor" / "model.safetensors").read_text() == "precious"
    check_output(PLAN, tiny_run(tmp_path / "out", export=False))


def test_weights_of_this_run_in_its_own_output(tmp_path: Path) -> None:
    finish(tmp_path / "out", "first")
    with pytest.raises(RealplanError, match=r"weights of `actor` .* lies in the output of the run"):
        check_output(PLAN, tiny_run(tmp_path / "out", weights=str(tmp_path / "out" / "actor")))
    finish(tmp_path / "elsewhere", "x", weights=str(tmp_path / "out" / "actor"))


def test_a_run_file_in_the_output_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.yaml").write_text("# my own words")
    (tmp_path / "out" / "plan.json").write_text(dump_plan(PLAN))
    assert finish(tmp_path / "out", "first") == tmp_path / "out.1"
    assert (tmp_path / "out.1" / "run.yaml").read_text() == "# my own words"


def test_links_are_followed_or_moved_and_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "disk" / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    assert finish(tmp_path / "out", "first") == tmp_path / "disk.1"
    assert (tmp_path / "out").is_symlink() and (tmp_path / "elsewhere").read_text() == "kept"
    assert (tmp_path / "disk" / "metrics.jsonl").read_text() == "first"


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "out")
    with (
        held_output(PLAN, run),
        pytest.raises(RealplanError, match="is being written by another run"),
        held_output(PLAN, run),
    ):
        pass


@pytest.mark.parametrize("name", ["file", "file/x", "/dev/null", "n" * 300])
def test_folders_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("kept")
    with pytest.raises(RealplanError, match="cannot write") as raised:
        check_output(PLAN, tiny_run(tmp_path / name))
    assert raised.value.hint and (tmp_path / "file").read_text() == "kept"
