"""A checkpoint that lies on several machines: each has what its ranks read, as it was sealed, and no more has come."""

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flat_files import flat_header
from plan_cases import tiny_plan, tiny_run

from plans.checkpoint import written
from plans.checkpoint_files import (
    INDEX,
    MASTER,
    CheckpointError,
    RankIndex,
    RoleState,
    StoredEntry,
    joined,
    open_checkpoint,
    sealed_index,
)
from plans.codec import dump_plan
from plans.errors import RealplanError
from plans.flat_tensors import header_bytes
from plans.plan import ExecutionPlan
from plans.seals import seal_of
from runtime.checkpoints.export import export_checkpoint
from runtime.checkpoints.folder import rank_file
from runtime.checkpoints.held import Held, resumed_folder
from runtime.machines.files import FileServer, Wanted
from runtime.machines.resume import choose_among, give
from runtime.machines.storage import Storage
from runtime.machines.takeover import drop_resumed, take_masters, take_needed

HOST, CHUNK = "127.0.0.1", 2**12
TEXTS = ("plan.json", "run.yaml", "metrics.jsonl")


def plan_of(degrees: str) -> ExecutionPlan:
    return tiny_plan(2, degrees, nodes=2, algorithm="sft", order=("actor_train",))


@pytest.fixture
def machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[list[Path], list[Wanted]]]:
    """Folders of three machines, and the files of a checkpoint of two pipeline stages, in small chunks: the first two
    machines have a stage each, the third has both."""
    for module in ("plans.seals", "runtime.machines.takeover"):
        monkeypatch.setattr(f"{module}.CHUNK_BYTES", CHUNK)
    places = [tmp_path / name for name in "abc"]
    step = places[2] / "global_step_7"
    step.mkdir(parents=True)
    plan, parts = plan_of("d1 t1 p2"), []
    for name, text in zip(TEXTS, (dump_plan(plan), "seed: 0\n", "{}\n"), strict=True):
        (step / name).write_text(text)
    for rank in range(2):
        entries = [
            StoredEntry(role="actor", parameter=e.parameter, part=e.part, parts=e.parts, start=e.start, stop=e.stop,
                        file=rank_file(rank))
            for e in written(plan.layout("actor_train"), rank)
        ]  # fmt: skip
        write_tensors(step / rank_file(rank), entries, rank)
        seals = {name: seal_of(step / name) for name in (*TEXTS, rank_file(rank))}
        state = {"actor": RoleState(steps=4, adam_steps=4)}
        parts.append(RankIndex(iteration=7, rank=rank, roles=state, entries=entries, files=seals))
    (step / INDEX).write_text(sealed_index(joined(parts)))
    for rank, place in enumerate(places[:2]):
        (place / step.name).mkdir(parents=True)
        for name in (INDEX, rank_file(rank)):
            shutil.copy(step / name, place / step.name)
    with ExitStack() as stack:
        sources = [stack.enter_context(closing(FileServer(HOST, place))).source for place in places]
        yield places, [Wanted(path.name, seal_of(path), sources) for path in sorted(step.iterdir())]


def write_tensors(path: Path, entries: list[StoredEntry], seed: int) -> None:
    """A safetensors file of random numbers."""
    header, size = flat_header(entries)
    numbers = np.random.default_rng(seed).standard_normal(size // 4, dtype=np.float32)
    path.write_bytes(header + numbers.tobytes())


def small_bytes(files: list[Wanted]) -> int:
    """The texts, which every machine needs; the index is there."""
    return sum(wanted.seal.bytes for wanted in files if wanted.name in TEXTS)


def headers(places: list[Path], rank: int) -> int:
    size = 8 + header_bytes(places[2] / "global_step_7" / rank_file(rank))
    return -(-size // CHUNK) * CHUNK


def test_only_what_ranks_read_comes(machines: tuple[list[Path], list[Wanted]]) -> None:
    places, files = machines
    sizes = {wanted.name: wanted.seal.bytes for wanted in files}
    pipeline, replicas = plan_of("d1 t1 p2"), plan_of("d2 t1 p1")
    # The stage that lies here: of the other one the header alone.
    come = take_needed(places[0], 7, pipeline, [0], files)["bytes"]
    assert come == small_bytes(files) + headers(places, 1) < sizes[rank_file(1)] / 10
    taken = resumed_folder(places[0], 7)
    assert (taken / rank_file(0)).samefile(places[0] / "global_step_7" / rank_file(0))
    tensor = open_checkpoint(taken).index.entries[-1].tensor(MASTER)
    with pytest.raises(CheckpointError, match=r"elements 0 to 9 of `actor/.*` of `rank-00001.safetensors` were not"):
        Held(taken).check(rank_file(1), tensor, 0, 9)
    # The other stage: all but that of this one. What has come stays.
    come = take_needed(places[0], 7, pipeline, [1], files)["bytes"]
    assert come == sizes[rank_file(1)] - headers(places, 1)
    Held(taken).check(rank_file(1), tensor, 0, 9)
    # Replicas hold everything.
    assert take_needed(places[0], 7, replicas, [0], files)["bytes"] == 0
    for rank in range(2):
        assert (taken / rank_file(rank)).read_bytes() == (places[2] / "global_step_7" / rank_file(rank)).read_bytes()
    drop_resumed(places[0])
    assert [path.name for path in places[0].iterdir()] == ["global_step_7"]


def test_damage_is_mended_from_another_machine_or_refused(machines: tuple[list[Path], list[Wanted]]) -> None:
    places, files = machines
    right = (places[2] / "global_step_7" / rank_file(0)).read_bytes()
    flip(places[0] / "global_step_7" / rank_file(0))
    come = take_needed(places[0], 7, plan_of("d1 t1 p2"), [0], files)["bytes"]
    assert (resumed_folder(places[0], 7) / rank_file(0)).read_bytes() == right
    assert come == small_bytes(files) + headers(places, 1) + 2 * CHUNK, "its own copy was asked for first"
    flip(places[0] / "global_step_7" / rank_file(0))
    flip(places[2] / "global_step_7" / rank_file(0))
    with pytest.raises(OSError, match=r"`global_step_7/rank-00000.safetensors` cannot be had as it was written"):
        take_needed(places[1], 7, plan_of("d2 t1 p1"), [1], files)


def test_an_export_reads_masters_alone(
    machines: tuple[list[Path], list[Wanted]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masters of the stage that lies elsewhere come, a third of it, and no moments. The exported folder is that of
    the whole checkpoint. Room for them is asked for first."""
    places, files = machines
    whole = places[2] / "global_step_7"
    entries = [entry for entry in open_checkpoint(whole).index.entries if entry.file == rank_file(1)]
    masters = 4 * sum(entry.entry.size for entry in entries)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: namedtuple("Usage", "free")(masters // 2))
        with pytest.raises(RealplanError, match="what is read here of checkpoint 7, and is on other machines, needs"):
            take_masters(places[0], 7, "actor", files)
        drop_resumed(places[0])
    come = take_masters(places[0], 7, "actor", files)["bytes"]
    assert masters < come < small_bytes(files) + headers(places, 1) + masters + CHUNK
    export_checkpoint(resumed_folder(places[0], 7), tmp_path / "ours")
    export_checkpoint(whole, tmp_path / "theirs")
    for path in (tmp_path / "theirs").iterdir():
        assert (tmp_path / "ours" / path.name).read_bytes() == path.read_bytes(), path.name
    held = Held(resumed_folder(places[0], 7))
    with pytest.raises(CheckpointError, match="were not fetched"):
        held.check(rank_file(1), entries[0].tensor("exp_avg_sq"), 0, entries[0].entry.size)


class Asked:
    """Two machines as the first one asks them, each with a stage of another run's checkpoint in a folder of its own,
    from which a run goes on."""

    def __init__(self, whole: Path, folder: Path) -> None:
        self.others = [folder / f"machine{node}" / "other" for node in range(2)]
        self.runs = [tiny_run(at.parent / "out", iterations=9, resume_from=str(at)) for at in self.others]
        for node, (other, run) in enumerate(zip(self.others, self.runs, strict=True)):
            shutil.copytree(whole, other / whole.name, ignore=lambda *_, node=node: [rank_file(1 - node)])
            Path(run.output).mkdir()
        self.storages = [Storage(run, HOST) for run in self.runs]
        self.there = {node: SimpleNamespace(source=s.files.source) for node, s in enumerate(self.storages)}

    def close(self) -> None:
        for storage in self.storages:
            storage.close()

    def ask_all(self, kind: str, patience_s: float, **words: Any) -> dict[int, Any]:
        return {node: getattr(storage, kind)(**words) for node, storage in enumerate(self.storages)}

    def ask(self, kind: str, each: dict[int, Any], patience_s: float) -> dict[int, Any]:
        return {node: getattr(self.storages[node], kind)(**words).result() for node, words in each.items()}


def test_the_checkpoint_of_another_run_is_put_together_from_its_machines(
    machines: tuple[list[Path], list[Wanted]], tmp_path: Path
) -> None:
    whole, plan, ranks = machines[0][2] / "global_step_7", plan_of("d2 t1 p1"), {0: [0], 1: [1]}
    with closing(Asked(whole, tmp_path)) as asked:
        found: Any = asked
        for place in (asked.others[0], asked.others[0] / whole.name):
            run = asked.runs[0].model_copy(update={"resume_from": str(place)})
            start = choose_among(plan, run, found, ranks, 1.0)
            assert (start.iteration, start.own, start.checkpoint) == (7, False, asked.others[0].resolve() / whole.name)
        assert give(found, plan, asked.runs[0], start, ranks, 1.0)
        for other, run in zip(asked.others, asked.runs, strict=True):
            taken = resumed_folder(Path(run.output), 7)
            assert {p.name: p.read_bytes() for p in whole.iterdir()}.items() <= {
                p.name: p.read_bytes() for p in taken.iterdir()
            }.items()
            assert len(list((other / whole.name).iterdir())) == len(list(whole.iterdir())) - 1, "nothing is put there"
    assert not [path for run in asked.runs for path in Path(run.output).iterdir()]


def test_nothing_of_another_state_is_used_or_changed(machines: tuple[list[Path], list[Wanted]], tmp_path: Path) -> None:
    """A folder of the same name with files of the same sizes, and another index."""
    places, files = machines
    step, right = places[0] / "global_step_7", (places[2] / "global_step_7" / rank_file(0)).read_bytes()
    (step / INDEX).write_text((step / INDEX).read_text() + " ")
    flip(step / rank_file(0))
    other = (step / rank_file(0)).read_bytes()
    take_needed(places[0], 7, plan_of("d2 t1 p1"), [0], files)
    assert (resumed_folder(places[0], 7) / rank_file(0)).read_bytes() == right
    assert (step / rank_file(0)).read_bytes() == other
    with closing(Asked(places[2] / step.name, tmp_path)) as asked:
        (asked.others[1] / step.name / rank_file(1)).unlink()
        found: Any = asked
        with pytest.raises(CheckpointError, match=r"the machines do not hold a checkpoint in `.*other` together"):
            choose_among(plan_of("d2 t1 p1"), asked.runs[0], found, {0: [0], 1: [1]}, 1.0)


def flip(path: Path) -> None:
    """Change a byte in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
