"""Runs over several machines: network namespaces with addresses of their own, one of which is cut off or killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from machines import Machine, machines
from plan_cases import FIXTURES, TINY, tiny_plan
from run_cases import PATIENCE_S, arguments, outcome
from warm import Started, start_warm

from plans.codec import load_plan
from plans.lora import Lora

RANKS = 3
TIMEOUT_S = 20
PLAN = tiny_plan(RANKS, "d3 t1 p1", batch_size=12)


@contextlib.contextmanager
def joined(found: Sequence[Machine], folder: Path, *, again: int = 0, **keys: Any) -> Iterator[list[Started]]:
    """Ranks that are started by hand, the first of them on the first machine and so on, those that are left on the last
    one; each machine has a folder of its own, the first one alone the data in it. again: how often the launcher has
    started them before. Afterwards nothing is in their folder for temporary files."""
    temporary, ranks = Path(tempfile.mkdtemp(prefix="rp")), list[Started]()
    try:
        for rank in range(RANKS):
            machine = found[min(rank, len(found) - 1)]
            own = folder / machine.name
            own.mkdir(exist_ok=True)
            data = own / "prompts.jsonl"
            if rank == 0:
                shutil.copy(FIXTURES / data.name, data)
            given = {"timeout_s": TIMEOUT_S, "checkpoint": {"every": 1}, "data": {"source": str(data)}} | keys
            command = arguments(own, plan=PLAN, **given)
            environment = {
                **os.environ, "RANK": str(rank), "WORLD_SIZE": str(RANKS), "MASTER_ADDR": found[0].address,
                "MASTER_PORT": "29500", "SLURM_RESTART_COUNT": str(again), "TMPDIR": str(temporary),
            }  # fmt: skip
            ranks.append(start_warm([*command[:2], machine.entering + command[2], *command[3:]], environment))
        yield ranks
        assert not list(temporary.iterdir())
    finally:
        for rank in ranks:
            rank.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def test_ranks_of_another_launcher_are_cut_off(tmp_path: Path) -> None:
    """No packet comes any more and no connection is closed: each side says within `timeout_s` whom it lost, all end,
    and nothing is exported."""
    with machines(RANKS) as found, joined(found, tmp_path, iterations=1000) as ranks:
        outputs = [tmp_path / machine.name / "out" for machine in found]
        _until(lambda: bool(_slices(outputs[2], 2)), ranks)
        found[-1].cut()
        cut_s = time.monotonic()
        said = _ends(ranks, 1, 1, 1)
        seconds = time.monotonic() - cut_s
    assert seconds < 2 * TIMEOUT_S  # half of timeout_s, and the end of the processes
    assert re.search(r"node 2 is lost: .*nothing was heard for 10 s\nrank 2: in iteration \d+, step `", said[0]), said[
        0
    ]
    assert "node 2 is lost" in said[1] and "node 2 stops: node 0" in said[2], said
    assert not any((output / "actor").exists() for output in outputs)
    assert (outputs[0] / "checkpoints" / "latest_checkpointed_iteration.txt").exists()


def test_ranks_of_another_launcher_share_no_folder(tmp_path: Path) -> None:
    """A rank is killed: the first machine says which one and where it was. Started again, all go on from a checkpoint
    whose slices lie on both machines, one of them damaged on one, as if nothing had been."""
    with machines(2) as found:
        outputs = [tmp_path / machine.name / "out" for machine in found]
        with joined(found, tmp_path, iterations=1000) as ranks:
            _until(lambda: bool(_slices(outputs[1], 2)), ranks)
            ranks[2].kill()
            said = _ends(ranks, 1, 1, -signal.SIGKILL)
        assert re.search(r"error: rank 2 ended in iteration \d+, step `[^`]+`, before it was done", said[0]), said[0]
        done = len(_output(outputs[0].parent)[1])
        for path in (outputs[1] / "checkpoints").glob("global_step_*/rank-00002.safetensors"):
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        with joined(found, tmp_path, again=1, iterations=done + 1) as ranks:
            said = _ends(ranks, 0, 0, 0)
    assert "going on from" in said[0] and _output(outputs[0].parent)[1] == list(range(done + 1)), said[0]
    assert [len(_slices(output, done + 1)) for output in outputs] == [RANKS, RANKS]
    assert [(output / "actor").exists() for output in outputs] == [True, False]
    assert not [path for output in outputs for path in output.rglob(".*")]
    alone = tmp_path / "alone"
    alone.mkdir()
    assert outcome(arguments(alone, plan=PLAN, iterations=done + 1, export=False)).returncode == 0
    assert _learnt(outputs[0]) == _learnt(alone / "out")


Agents = list[Started]
NONE: Mapping[int, Path] = {}
QUICK = "import runtime.launching.replan as r; r.SEARCH_S = 1; "


def agent(
    found: Sequence[Machine], node: int, folder: Path, temporary: Path, hidden: Mapping[int, Path] = NONE,
    lora: Lora | None = None, places: str = "", **keys: Any,
) -> Started:  # fmt: skip
    """A realrun on a machine: the same command as on the others but for its node, and a folder of its own. hidden: by
    node a folder that is not on its disk. places: of the plan's calls; default: a replica on each machine."""
    own = folder / found[node].name
    own.mkdir(exist_ok=True)
    plan = tiny_plan(len(found), places or f"d{len(found)} t1 p1", nodes=len(found), batch_size=12, lora=lora)
    given = {"timeout_s": TIMEOUT_S, "checkpoint": {"every": 1}, "restarts": 2, "on_loss": "replan"} | keys
    place = ["--node-rank", str(node), "--master-addr", found[0].address]
    command = arguments(own, *place, plan=plan, **given)
    hiding = found[node].hiding(hidden[node]) if node in hidden else ""
    command[2] = found[node].entering + hiding + QUICK + command[2]
    return start_warm(command, {**os.environ, "TMPDIR": str(temporary)})


@contextlib.contextmanager
def agents(found: Sequence[Machine], folder: Path, **keys: Any) -> Iterator[tuple[Agents, Callable[[int], Started]]]:
    """An agent on each machine, and how one is started again. Afterwards no process of theirs is left, and nothing in
    their folder for temporary files."""
    temporary = Path(tempfile.mkdtemp(prefix="rp"))  # a socket's address has 107 characters

    def begin(node: int) -> Started:
        made.append(agent(found, node, folder, temporary, **keys))
        return made[-1]

    made: Agents = []
    try:
        for node in range(len(found)):
            begin(node)
        yield made, begin
        assert not _left(made), [each.words for each in made]
        assert not list(temporary.iterdir())
    finally:
        for each in made:
            each.kill()
        shutil.rmtree(temporary, ignore_errors=True)


def _left(agents: Agents) -> list[int]:
    """Processes of the sessions that commands lead, a while after they should have ended."""
    sessions, end = {agent.pid for agent in agents}, time.monotonic() + 10
    while True:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(int(place.name)) in sessions:
                    found.append(int(place.name))
        if not found or time.monotonic() > end:
            return found
        time.sleep(0.1)


def _until(ready: Callable[[], bool], agents: Agents) -> None:
    """Wait for something while all agents run."""
    end = time.monotonic() + PATIENCE_S
    while not ready():
        ended = next((agent for agent in agents if agent.poll() is not None), None)
        assert ended is None, ended and ended.words
        assert time.monotonic() < end
        time.sleep(0.05)


def _ends(agents: Agents, *codes: int) -> list[str]:
    """What agents have said, when they have ended as they should."""
    said = [agent.communicate(timeout=PATIENCE_S)[1] for agent in agents]
    assert [agent.returncode for agent in agents] == [*codes] and "Traceback" not in "".join(said), said
    return said


def _output(folder: Path) -> tuple[Path, list[int]]:
    """The output of a run on a machine, and the iterations of its metrics."""
    lines = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return folder / "out", [json.loads(line)["iteration"] for line in lines]


def _slices(output: Path, step: int) -> set[str]:
    folder = output / "checkpoints" / f"global_step_{step}"
    return {path.name for path in folder.glob("rank-*")} if (folder / "index.json").exists() else set()


def _learnt(output: Path) -> list[dict[str, float]]:
    """Metrics of a run without those of time and memory."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("timing_s/", "perf/", "plan/"))} for line in lines]


def test_a_run_goes_on_without_a_machine_that_is_cut_off(tmp_path: Path) -> None:
    """Three machines without a folder in common: two plan again and finish, the third stops and says so."""
    with machines(3) as found, agents(found, tmp_path, iterations=6) as (made, _):
        outputs = [tmp_path / machine.name / "out" for machine in found]
        _until(lambda: bool(_slices(outputs[2], 2)), made)
        found[2].cut()
        cut_s = time.monotonic()
        _until(lambda: "is lost" in made[0].words, made[:1])
        seconds = time.monotonic() - cut_s
        said = _ends(made, 0, 0, 1)
    assert seconds < TIMEOUT_S, said
    assert "node 2 is lost" in said[1], said[1]
    assert "2 of 3 devices are left" in said[0] and "going on with a plan for 2 devices" in said[0], said[0]
    assert "what lay on one machine alone is copied to a second one" in said[0], said[0]
    assert "node 2 stops: node 0" in said[2] and "nothing was heard" in said[2], said[2]
    output, iterations = _output(tmp_path / found[0].name)
    assert iterations == list(range(6)) and load_plan(output / "plan.json").cluster.nodes == 2
    assert [(each / "actor").exists() for each in outputs] == [True, False, False]
    # A slice lies on its own machine and on another one; the lost machine has not the end.
    assert [len(_slices(each, 6)) for each in outputs] == [2, 2, 0]
    assert not [path for each in outputs[:2] for path in each.rglob(".*")]


def test_a_machine_that_is_started_again(tmp_path: Path) -> None:
    """A realrun is killed and started again, as a supervisor would: the run waits for it, and goes on with the same
    plan from the newest checkpoint. A signal to any machine then ends it with a checkpoint."""
    keys = {"iterations": 100, "on_loss": "stop"}
    with machines(2) as found, agents(found, tmp_path, **keys) as (made, begin):
        output = tmp_path / found[0].name / "out"
        _until(lambda: bool(_slices(output, 1)), made)
        made[1].kill()
        _until(lambda: "waiting for a machine" in made[0].words, made[:1])
        begin(1)
        _until(lambda: made[0].words.count("starting 2 ranks") == 2 and len(_output(output.parent)[1]) > 3, made[::2])
        made[2].send_signal(signal.SIGUSR2)
        said = _ends(made, 1, -signal.SIGKILL, 1)
    assert "node 1 is lost" in said[0] and "it went away" in said[0] and "going on from" in said[0], said[0]
    assert "stopped by SIGUSR2 to node 1" in said[0] and "stopped by SIGUSR2" in said[2], said
    iterations = _output(output.parent)[1]
    assert iterations == list(range(len(iterations))) and len(_slices(output, len(iterations))) == 2


def test_what_is_left_goes_on_without_the_first_machine(tmp_path: Path) -> None:
    """It is killed, the other one says so and ends, and has every slice: it goes on alone."""
    with machines(2) as found, agents(found, tmp_path, iterations=3) as (made, _):
        left = tmp_path / found[1].name
        _until(lambda: bool(_slices(left / "out", 1)), made)
        made[0].kill()
        said = _ends(made, -signal.SIGKILL, 1)
    assert "node 1 stops: node 0" in said[1] and "--resume" in said[1], said[1]
    done = outcome(arguments(left, "--resume", plan=tiny_plan(1, "d1 t1 p1", batch_size=12), checkpoint={"every": 1}))
    assert done.returncode == 0 and "going on from" in done.stderr, done.stderr
    assert _output(left)[1] == [0, 1, 2]


def test_a_run_with_weights_data_and_tokenizer_on_one_machine(tmp_path: Path) -> None:
    """The same metrics, and the same exported folders (adapters are merged into weights that the first machine may not
    have), whichever machine lacks them. The best weights, of which each machine has a stage, are on the first machine.
    What the first run has left goes aside on both machines."""
    disk, lines = tmp_path / "disk", []
    for name in ("weights", "tokenizer"):
        shutil.copytree(TINY, disk / name)
    (disk / "data").mkdir()
    shutil.copy(FIXTURES / "prompts.jsonl", disk / "data")
    keys = {
        "iterations": 2, "weights": str(disk / "weights"), "tokenizer": str(disk / "tokenizer"),
        "data": {"source": str(disk / "data")}, "lora": Lora(4), "places": "d1 t1 p2",
        "evaluation": {"every": 2, "held_out": 2, "keep_best": True},
    }  # fmt: skip
    for lacks in range(2):
        with machines(2) as found, agents(found, tmp_path, hidden={lacks: disk}, **keys) as (made, _):
            said = _ends(made, 0, 0)
            outputs = [tmp_path / machine.name / "out" for machine in found]
        assert [("are not on this machine" in words) for words in said] == [node == lacks for node in range(2)], said
        assert not [path for output in outputs for path in output.rglob(".*")]
        lines.append(_learnt(outputs[0]))
    assert len(lines[0]) == 2 and lines[0] == lines[1]
    earlier = [output.with_name("out.1") for output in outputs]
    assert [len(_slices(output, 2)) for output in (*outputs, *earlier)] == [2] * 4
    assert [(output / "best").exists() for output in outputs] == [True, False]
    for name, file in (
        ("actor", "tokenizer.json"), ("actor-adapter", "adapter_model.safetensors"),
        ("best", "model.safetensors.index.json"), ("best-adapter", "adapter_model.safetensors"),
    ):  # fmt: skip
        held = [{f.name: f.read_bytes() for f in (out / name).iterdir()} for out in (outputs[0], earlier[0])]
        assert held[0] == held[1] and file in held[0]
