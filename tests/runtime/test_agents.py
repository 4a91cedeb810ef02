"""What the machines of a run say to each other, and the files that travel between them, without a run."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from plan_cases import tiny_plan, tiny_run
from run_cases import PATIENCE_S

from plans.checkpoint_files import INDEX
from plans.errors import RealplanError
from plans.seals import seal_of
from runtime.machines.crew import equal_part
from runtime.machines.files import FileServer, Wanted, fetch
from runtime.machines.machines import Machines
from runtime.machines.mirror import Mirror, apply
from runtime.machines.resume import Spread, lone_files, spread_checkpoints
from runtime.machines.run import told
from runtime.machines.station import Station
from runtime.machines.storage import Storage, file_system
from runtime.machines.wire import Connection, Pace, difference, pace_of, work_of
from runtime.processes.member import Address, Member
from runtime.processes.network import free_port
from runtime.processes.place import Place, place_of
from runtime.reports.endings import RunFailed
from runtime.reports.records import records_path

HOST = "127.0.0.1"
PACE = Pace(0.1, 2.0)
WORK = {"the plan": "abc", "seed": "1"}


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """The first of two machines, with its own station."""
    found = Machines(Address(HOST, free_port(HOST)), 2, WORK, PACE)
    with Station(tiny_run(tmp_path / "first"), HOST, found.say, tmp_path) as station:
        found.settle(station)
        yield found
        found.close("", done=True)


def port_of(machines: Machines) -> int:
    return int(machines._listener.getsockname()[1])


def reach(machines: Machines, **changed: Any) -> Connection:
    """Say hello as node 1."""
    connection = Connection(socket.create_connection((HOST, port_of(machines))), Pace(0.1, PATIENCE_S))
    hello = {"kind": "hello", "node": 1, "name": "second", "source": [HOST, 1, "x"], "work": WORK}
    connection.send(hello | changed)
    return connection


def answer_to(connection: Connection, machines: Machines) -> dict[str, Any]:
    """What the first machine answers while it takes in what comes."""
    found: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: found.extend([next(connection.messages())]))
    reader.start()
    while reader.is_alive():
        machines.pump(0.05)
    return found[0]


def test_the_first_key_that_is_other_is_named(tmp_path: Path) -> None:
    plan, run = tiny_plan(1, "d1 t1 p1"), tiny_run(tmp_path / "a")
    ours = work_of(plan, run)
    assert not difference(ours, work_of(plan, tiny_run(tmp_path / "b", checkpoint={"every": 0, "folder": "x"})))
    assert difference(ours, work_of(plan, run.model_copy(update={"seed": 1}))) == "seed"
    assert difference(ours, work_of(tiny_plan(1, "d1 t1 p1", batch_size=4), run)) == "the plan"
    assert difference(ours, ["seed"]) == "the work"


def test_strangers_and_others_of_another_run_stay_out(machines: Machines) -> None:
    """Whatever comes to the port, the machine of the run comes in."""
    for noise in (
        b"GET / HTTP/1.1\r\n\r\n",
        b"[" * 100_000 + b"\n",
        b'{"kind": 1}\n',
        b"\0" * 2_000_000,
        b'{"kind":"hello"}\n',
    ):
        with suppress(OSError), socket.create_connection((HOST, port_of(machines))) as end:
            end.sendall(noise)
    for changed, words in (({"work": WORK | {"seed": "2"}}, "seed is not that of node 0"), ({"node": 7}, "has 2 nodes"),
                           ({"node": 0}, "node 0 is there already")):  # fmt: skip
        with closing(reach(machines, **changed)) as other:
            refused = answer_to(other, machines)
            assert refused["kind"] == "refused" and words in refused["words"], refused
    assert sorted(machines.there) == [0]
    with closing(reach(machines)):
        machines.gather(PATIENCE_S)
    assert machines.there[1].name == "second"


def test_a_machine_that_falls_silent_is_lost(machines: Machines) -> None:
    connection = reach(machines)
    machines.gather(PATIENCE_S)
    begun = time.monotonic()
    while 1 in machines.there:
        machines.pump(0.1)
    assert time.monotonic() - begun > 1.0 and "nothing was heard for 2 s" in machines.lost[1]
    with pytest.raises(RunFailed, match="node 1 is lost: second: nothing was heard"):
        machines.check([0, 1])
    connection.close()
    with pytest.raises(RealplanError, match=r"no machine came for node 1 within timeout_s = 0.2 s"):
        machines.gather(0.2)


def test_what_a_machine_cannot_do_is_said(machines: Machines) -> None:
    with pytest.raises(RunFailed, match=r"node 0 \(.*\): `dance` is nothing that a machine does"):
        machines.ask_all("dance", 5.0)
    assert pace_of(20) == Pace(1.0, 10.0) and pace_of(3600).quiet_s == 60 and pace_of(1).quiet_s == 2


def test_a_machine_that_cannot_take_part_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Node 0 ends at once with its words, and speaks of a machine with other work."""
    plan, run = tiny_plan(2, "d2 t1 p1", nodes=2), tiny_run(tmp_path / "out", timeout_s=PATIENCE_S)
    place = Place(1, Address(HOST, free_port(HOST)))

    def fail() -> None:
        with suppress(RealplanError), told(plan, run, place):
            raise RealplanError("no weights at `w`", "weights=FOLDER")

    sick = threading.Thread(target=fail)
    sick.start()  # before node 0 is there
    first = Machines(place.first, 2, work_of(plan, run), PACE)
    try:
        with closing(reach(first)) as other:
            assert answer_to(other, first)["kind"] == "refused"
        with pytest.raises(RunFailed, match=r"node 1 \(.*\) cannot take part: no weights at `w`\nhint: weights=FOLDER"):
            first.gather(PATIENCE_S)
        sick.join(10)
        assert not sick.is_alive() and not first.there
    finally:
        first.close("", done=True)
    assert "a machine at 127.0.0.1, which would be node 1, is refused: the plan is not that" in capsys.readouterr().err


def test_who_comes_to_a_run_that_is_over_is_told() -> None:
    machines = Machines(Address(HOST, free_port(HOST)), 3, WORK, PACE)
    closer = threading.Thread(target=machines.close, args=("no GPU",), kwargs={"done": False, "late_s": 60.0})
    closer.start()
    for node in (1, 2):
        with closing(reach(machines, node=node)) as late:
            assert next(late.messages()) == {"kind": "over", "words": "no GPU", "done": False}
    closer.join(10)
    assert not closer.is_alive(), "all have been told"


def test_files_are_fetched_whole_or_not_at_all(tmp_path: Path) -> None:
    good, bad, ours = (tmp_path / name / "global_step_1" for name in ("good", "bad", "ours"))
    name = "rank-00000.safetensors"
    for folder, content in ((good, b"right"), (bad, b"wrong")):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(content)
        (folder / "secret.txt").write_bytes(b"no")
    seal = seal_of(good / name)
    servers = [FileServer(HOST, folder.parent) for folder in (bad, good)]
    try:
        sources = [server.source for server in servers]
        with pytest.raises(OSError, match=r"cannot be fetched .*was altered"):
            fetch(ours, Wanted(name, seal, sources[:1]), "global_step_1")
        assert not list(ours.iterdir())
        fetch(ours, Wanted(name, seal, sources), "global_step_1")
        assert (ours / name).read_bytes() == b"right" and len(list(ours.iterdir())) == 1
        (ours / name).write_bytes(b"wring")  # damaged since: the whole one comes again
        fetch(ours, Wanted(name, seal, sources), "global_step_1")
        assert (ours / name).read_bytes() == b"right"
        host, port, _ = sources[1]
        for source, step, wanted in (((host, port, "guess"), "global_step_1", name), (sources[1], "..", name),
                                     (sources[1], "global_step_1", "secret.txt")):  # fmt: skip
            with pytest.raises(OSError, match=r"no such file|closed|reset"):
                fetch(tmp_path / "none", Wanted(wanted, seal, [source]), step)
        with socket.create_connection((host, port)) as end:
            end.sendall(b"x" * 100)
        fetch(tmp_path / "more", Wanted(name, seal, [sources[1]]), "global_step_1")
    finally:
        for server in servers:
            server.close()


def test_the_newest_checkpoint_that_machines_hold_together() -> None:
    """Three machines; step 3 lacks a file, step 2 was written twice, and is whole in one of the two states."""
    files = {"rank-0": {}, "rank-1": {}, INDEX: {}}

    def step(iteration: int, digest: str, *here: str) -> dict[str, Any]:
        return {"iteration": iteration, "digest": digest, "files": files, "here": [*here, INDEX]}

    inventories = {
        0: {"steps": [step(3, "a", "rank-0"), step(2, "b", "rank-0"), step(1, "z", "rank-0", "rank-1")]},
        1: {"steps": [step(3, "a", "rank-0"), step(2, "c", "rank-0", "rank-1")]},
        2: {"steps": [step(2, "b", "rank-0", "rank-1")]},
    }
    found = list(spread_checkpoints(inventories))
    assert [(spread.iteration, spread.digest) for spread in found] == [(2, "c"), (2, "b"), (1, "z")]
    assert found[1].holders == {"rank-0": [0, 2], "rank-1": [2], INDEX: [0, 2]}


def test_what_lies_on_one_machine_alone_is_copied_to_another() -> None:
    """Four machines, of which the last two see one folder; the machine that had the second copies is lost."""
    names = [f"rank-{rank}.safetensors" for rank in range(4)]
    holders = {names[0]: [0], names[1]: [0, 1], names[2]: [2, 3], names[3]: [1, 3], INDEX: [0, 1, 2, 3]}
    spread = Spread(2, "a", {name: {} for name in holders}, holders)
    assert lone_files(spread, {0: 0, 1: 1, 2: 2, 3: 2}) == {1: {INDEX, names[0]}, 0: {INDEX, names[2]}}
    assert lone_files(spread, {0: 0, 1: 1}) == {1: {INDEX, names[0]}, 0: {INDEX, names[3]}}, "others are no part of it"


def test_folders_in_common_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [tiny_run(tmp_path / name) for name in ("shared", "shared", "own")]
    storages = [Storage(run, HOST) for run in runs]
    try:
        for number, storage in enumerate(storages):
            storage.probe(f".probe-{number}")
        seen = [storage.sees([f".probe-{number}" for number in range(3)]).result()["seen"] for storage in storages]
        assert seen == [[".probe-0", ".probe-1"], [".probe-0", ".probe-1"], [".probe-2"]]
        # On a network file system what another machine has made may show late.
        monkeypatch.setattr("runtime.machines.storage.file_system", lambda _: "nfs4")
        late = storages[2].sees([".probe-2", ".probe-3"])
        time.sleep(0.3)
        storages[2].probe(".probe-3")
        assert late.result(PATIENCE_S)["seen"] == [".probe-2", ".probe-3"]
        storages[2].unprobe(".probe-3")
        for number, storage in enumerate(storages):
            storage.unprobe(f".probe-{number}")
        assert not [path for run in runs for path in run.checkpoint_folder.iterdir()]
    finally:
        for storage in storages:
            storage.close()


@pytest.mark.parametrize(
    ("folder", "kind"), [("/a/b/c", "ext4"), ("/a b/c", "nfs4"), ("/ab", "overlay"), ("/a", "xfs")]
)
def test_the_file_system_of_a_folder(folder: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest place above it counts, of two at one place the later one."""
    table = [("/", "overlay"), ("/a", "tmpfs"), ("/a", "xfs"), ("/a/b", "ext4"), (r"/a\040b", "nfs4")]
    lines = "".join(f"1 0 8:1 / {place} rw shared:1 - {kind} /dev/x rw\n" for place, kind in table)
    monkeypatch.setattr(Path, "read_text", lambda *_: lines)
    assert file_system(Path(folder)) == kind


def test_what_ranks_say_arrives_as_it_stands(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    mirror = Mirror(here)
    text = "é".encode()
    steps = [
        ("status-3", b"{}"),
        (records_path(here, 3).name, b"one\n" + text[:1]),
        ("error-3.json", b"{}"),
        ("reserve-3", b"x"),
    ]
    for name, content in steps:
        (here / name).write_bytes(content)
    sent = list(mirror.changes())
    with records_path(here, 3).open("ab") as file:
        file.write(text[1:] + b"\n")
    (here / "status-3").write_bytes(b"[]")
    sent += mirror.changes()
    assert not list(mirror.changes())
    for message in sent:
        apply(there, json.loads(json.dumps(message)))
    assert {path.name for path in there.iterdir()} == {name for name, _ in steps} - {"reserve-3"}
    assert all((here / path.name).read_bytes() == path.read_bytes() for path in there.iterdir())
    with pytest.raises(ValueError, match="no file of a rank"):
        apply(there, {"name": "../status-3", "at": 0, "text": ""})


def test_the_most_of_what_machines_have() -> None:
    """Machines, and devices of each: all of a node or a power of two, with machine 0 among them."""
    assert equal_part({0: 8, 1: 8, 2: 7}, 8) == (2, 8)
    assert equal_part({0: 7, 1: 8}, 8) == (2, 4)
    assert equal_part({0: 8, 1: 7, 2: 7}, 8) == (3, 4)
    assert equal_part({0: 6, 1: 6, 2: 3}, 6) == (2, 6)
    assert equal_part({0: 1, 1: 0}, 1) == (1, 1) and equal_part({0: 0, 1: 8}, 8) == (0, 0) == equal_part({}, 8)


def test_checkpoints_of_an_earlier_run_go_aside(tmp_path: Path) -> None:
    run = tiny_run(tmp_path / "out")
    with closing(Storage(run, HOST)) as storage:
        storage.set_aside()
        assert not run.checkpoint_folder.exists()
        (run.checkpoint_folder / "global_step_4").mkdir(parents=True)
        storage.set_aside()
    assert (tmp_path / "out.1" / "checkpoints" / "global_step_4").exists() and not run.checkpoint_folder.exists()


def test_which_machine_a_process_is() -> None:
    plan, alone = tiny_plan(4, "d4 t1 p1", nodes=2), tiny_plan(2, "d2 t1 p1")
    assert place_of(plan, None, None, None, None) is None
    given = place_of(plan, None, 1, "node1", None)
    assert given is not None and (given.node, given.first.host, given.first.port) == (1, "node1", 29500)
    task = Member(1, 2, 0, Address("node1", 15007))
    found = place_of(plan, task, None, None, None)
    assert found is not None and (found.node, found.first.port) == (1, 15007), "srun, one task per machine"
    assert place_of(plan, Member(1, 4, 0, Address("node1", 15007)), None, None, None) is None, "a rank of four"
    assert place_of(alone, Member(1, 2, 0, Address("node1", 15007)), None, None, None) is None
    assert place_of(plan, Member(1, 2, 0, Address("node1", 15007, served=True)), None, None, None) is None
    for words, message in (((1, None, None), "go together"), ((2, "node1", None), "the plan has 2 nodes")):
        with pytest.raises(RealplanError, match=message):
            place_of(plan, None, *words)
