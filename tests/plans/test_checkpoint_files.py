"""Folders of checkpoints, made by hand: which is taken, and what is said of one that is torn or of other work."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from flat_files import flat_header
from plan_cases import CRITIC_FREE, tiny_plan
from typer.testing import CliRunner

from planner.cli.app import app
from plans.checkpoint import Entry, parameters_of, written
from plans.checkpoint_files import (
    CheckpointError,
    RankIndex,
    RoleState,
    StoredEntry,
    find_usable,
    find_whole,
    joined,
    open_checkpoint,
    sealed_index,
    steps_in,
    takeover_problems,
    verify_files,
)
from plans.codec import dump_plan, save_plan
from plans.plan import ExecutionPlan
from plans.runfile import CHECKPOINTS
from plans.seals import seal_of

SHARD = "rank-00000.safetensors"


@pytest.fixture
def ours() -> ExecutionPlan:
    return tiny_plan(1, "d1 t1 p1", algorithm="grpo", order=CRITIC_FREE, group_size=2)


def make(folder: Path, iteration: int, plan: ExecutionPlan) -> Path:
    """A whole checkpoint whose tensors are a hole of zeros."""
    here = folder / f"global_step_{iteration}"
    here.mkdir(parents=True)
    contents = {"plan.json": dump_plan(plan), "run.yaml": "", "metrics.jsonl": "{}\n", SHARD: ""}
    for name, text in contents.items():
        (here / name).write_text(text)
    layout = plan.layout("actor_train")
    entries = [
        StoredEntry(
            role="actor", parameter=e.parameter, part=e.part, parts=e.parts, start=e.start, stop=e.stop, file=SHARD
        )
        for rank in layout.places
        for e in written(layout, rank)
    ]
    _zeros(here / SHARD, entries)
    seals = {name: seal_of(here / name) for name in contents}
    rank = RankIndex(
        iteration=iteration, rank=0, roles={"actor": RoleState(steps=4, adam_steps=4)}, entries=entries, files=seals
    )
    (here / "index.json").write_text(sealed_index(joined([rank])))
    return here


def _zeros(path: Path, entries: list[StoredEntry]) -> None:
    header, size = flat_header(entries)
    path.write_bytes(header)
    os.truncate(path, len(header) + size)


def reindexed(here: Path, edit: str, into: str) -> None:
    """Change the text of an index and sign it anew."""
    index = json.loads((here / "index.json").read_text().replace(edit, into))
    index.pop("digest")
    digest = hashlib.sha256(json.dumps(index, separators=(",", ":")).encode()).hexdigest()
    (here / "index.json").write_text(json.dumps(index | {"digest": digest}, separators=(",", ":")))


def test_a_whole_checkpoint_is_opened(tmp_path: Path, ours: ExecutionPlan) -> None:
    here = make(tmp_path, 20, ours)
    text = (here / "index.json").read_text()
    assert text.endswith("}\n") and text.count("\n") == 1
    found = open_checkpoint(here)
    assert found.plan == ours and found.index.iteration == 20 and found.index.roles["actor"].steps == 4
    verify_files(found)
    held = {entry.parameter for entry in found.index.entries}
    assert held == set(parameters_of(ours.workload.spec("actor_train")))
    stored = found.index.entries[0]
    assert stored.entry == Entry(stored.parameter, stored.part, stored.parts, stored.start, stored.stop)
    assert stored.tensor("exp_avg") == f"actor/{stored.parameter}/0of1/0-{stored.stop}/exp_avg"


def test_the_newest_that_is_whole_is_taken(tmp_path: Path, ours: ExecutionPlan) -> None:
    """By number, not by name; torn ones are told, older ones are not looked at."""
    folder = tmp_path / CHECKPOINTS
    for iteration in (5, 9, 10):
        make(folder, iteration, ours)
    (folder / "global_step_x").mkdir()
    (folder / "global_step_11").write_text("a file")
    (folder / "other").mkdir()
    assert [path.name for path in steps_in(folder)] == ["global_step_10", "global_step_9", "global_step_5"]
    found, refusals = find_usable(tmp_path, ours)
    assert found is not None and found.index.iteration == 10 and refusals == []
    with (folder / "global_step_10" / SHARD).open("r+b") as shard:
        shard.seek(-1, os.SEEK_END)
        shard.write(b"z")
    found, refusals = find_usable(folder, ours)
    assert found is not None and found.index.iteration == 9
    assert len(refusals) == 1 and f"`{SHARD}` was altered: bytes" in refusals[0]
    alone, none = find_usable(folder / "global_step_5", ours)
    assert alone is not None and alone.index.iteration == 5 and none == []
    with pytest.raises(CheckpointError, match="was altered"):
        find_usable(folder / "global_step_10", ours)
    for name in ("global_step_9", "global_step_5"):
        shutil.rmtree(folder / name)
    with pytest.raises(CheckpointError, match="was altered") as raised:
        find_usable(tmp_path, ours)
    assert "start anew" in raised.value.hint
    assert find_usable(tmp_path / "nowhere", ours) == (None, [])


def test_a_torn_checkpoint_says_where(tmp_path: Path, ours: ExecutionPlan) -> None:
    whole = make(tmp_path / "whole", 1, ours)

    def torn(**changes: str | None) -> str:
        here = tmp_path / "torn"
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(whole, here)
        for name, text in changes.items():
            file = here / {"shard": SHARD, "index": "index.json", "plan": "plan.json", "run": "run.yaml"}[name]
            file.unlink() if text is None else file.write_text(text)
        with pytest.raises(CheckpointError) as raised:
            open_checkpoint(here)
        return raised.value.message.removeprefix(f"checkpoint `{here}` cannot be used: ")

    assert torn(shard=None) == f"`{SHARD}` is missing"
    assert torn(shard="tensor") == f"`{SHARD}` has 6 bytes, not {(whole / SHARD).stat().st_size:,}"
    assert torn(index=None) == "`index.json` is missing"
    assert torn(index="{").startswith("`index.json` is ")
    index = (whole / "index.json").read_text()
    assert torn(index=index.replace('"steps":4', '"steps":5')).startswith("`index.json` was altered: its digest")
    assert torn(index=index.replace('"iteration":1', '"iteration":-1')).startswith("`index.json`: Input should be")
    plan = (whole / "plan.json").read_text()
    assert torn(plan=plan.replace("grpo", "gprq")).startswith("`plan.json` was altered: bytes 0 to")
    assert torn(plan=plan[:-5]).startswith("`plan.json` has ")


@pytest.mark.parametrize(
    ("edit", "into", "words"),
    [
        ('"start":0,', '"start":1,', "state of `actor`: "),
        ('"role":"actor"', '"role":"critic"', "state of `actor`: "),
        ('{"actor":{"steps"', '{"judge":{"steps"', "state of `judge`: no model `judge`"),
        (f'"file":"{SHARD}"', '"file":"elsewhere"', "its index lacks `elsewhere`"),
        ('"part":0,', '"part":1,', "`index.json`: part 1 of 1"),
    ],
)
def test_an_index_that_does_not_say_all(edit: str, into: str, words: str, tmp_path: Path, ours: ExecutionPlan) -> None:
    here = make(tmp_path, 1, ours)
    open_checkpoint(here)
    reindexed(here, "", "")
    open_checkpoint(here)
    reindexed(here, edit, into)
    with pytest.raises(CheckpointError) as raised:
        open_checkpoint(here)
    assert words in raised.value.message


def test_what_a_plan_may_change_and_what_not(tmp_path: Path, ours: ExecutionPlan) -> None:
    found = open_checkpoint(make(tmp_path, 1, ours))
    assert takeover_problems(found, ours) == []
    other_layout = tiny_plan(2, "d2 t1 p1", algorithm="grpo", order=CRITIC_FREE, group_size=2)
    assert takeover_problems(found, other_layout) == []
    work = ours.workload
    sizes = {"batch_size": 16, "group_size": 4, "minibatches": 1, "prompt_tokens": 9, "response_tokens": 9}
    for name, value in sizes.items():
        changed = replace(ours, workload=replace(work, **{name: value}))
        assert takeover_problems(found, changed) == [f"{name} is {getattr(work, name)} there and {value} in the plan"]
    ppo = tiny_plan(1, "d1 t1 p1")
    assert "it was written by grpo, the plan runs ppo" in takeover_problems(found, ppo)[0]
    wider = replace(work.models["actor"], ffn=2 * work.models["actor"].ffn)
    other = replace(ours, workload=replace(work, models=dict(work.models) | {"actor": wider}))
    assert takeover_problems(found, other) == [f"`actor` is another model there ({work.models['actor'].name})"]
    renamed = replace(work.models["actor"], name="x")
    assert (
        takeover_problems(found, replace(ours, workload=replace(work, models=dict(work.models) | {"actor": renamed})))
        == []
    )
    lost = replace(found, index=found.index.model_copy(update={"roles": {}}))
    assert takeover_problems(lost, ours) == ["it trains nothing, the plan `actor`"]


def test_of_a_checkpoint_on_several_machines_the_index_says_what_can_be_known(tmp_path: Path) -> None:
    """Three nodes without a folder in common; here are the parts of nodes 0 and 2. A check asks for no more; who needs
    all of it is told which files are missing, and who wrote them; and what is here must be as it was written."""
    plan = tiny_plan(3, "d3 t1 p1", nodes=3, algorithm="grpo", order=CRITIC_FREE, group_size=2, batch_size=12)
    whole = make(tmp_path / "out" / CHECKPOINTS, 4, plan)
    index = json.loads((whole / "index.json").read_text())
    names = [f"rank-{rank:05d}.safetensors" for rank in range(3)]
    entries = index["entries"]
    for number, entry in enumerate(entries):
        entry["file"] = names[number % 3]
    for name in names:
        _zeros(whole / name, [StoredEntry(**entry) for entry in entries if entry["file"] == name])
        index["files"][name] = json.loads(seal_of(whole / name).model_dump_json(exclude_none=True))
    (whole / "index.json").write_text(json.dumps(index, separators=(",", ":")))
    reindexed(whole, "", "")
    assert find_usable(tmp_path / "out", plan)[0] is not None
    (whole / names[1]).unlink()
    found, refusals = find_usable(tmp_path / "out", plan, whole=False)
    assert found is not None and found.absent == [names[1]] and not refusals
    with pytest.raises(CheckpointError, match=rf"`{names[1]}` is missing\n") as raised:
        find_whole(tmp_path / "out")
    assert "node 1 of its run wrote what is missing, and the node after each has a copy" in raised.value.hint
    save_plan(plan, tmp_path / "plan.json")
    said = CliRunner().invoke(app, ["check", str(tmp_path / "plan.json"), "--resume-from", str(tmp_path / "out")])
    assert said.exit_code == 0 and "4 iterations are done" in said.stderr, said.output
    assert f"1 of its 6 files are not here, such as `{names[1]}`" in " ".join(said.stderr.split())
    with (whole / names[2]).open("r+b") as shard:
        shard.seek(-1, os.SEEK_END)
        shard.write(b"z")
    with pytest.raises(CheckpointError, match=rf"`{names[2]}` was altered"):
        find_usable(tmp_path / "out", plan, whole=False)


def test_on_one_node_a_file_that_is_missing_is_lost(tmp_path: Path, ours: ExecutionPlan) -> None:
    (make(tmp_path, 3, ours) / SHARD).unlink()
    with pytest.raises(CheckpointError, match=f"`{SHARD}` is missing"):
        find_usable(tmp_path, ours, whole=False)
