"""A run on a Ray cluster: a bundle of devices for every node of the plan, and in each a `realrun` as it runs by hand.

Ray finds the machines and starts one actor in each; ranks, checkpoints, restarts and the loss of machines are those
of a run without Ray. Nothing of a run goes through Ray's object store.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from typing import Any

from plans.errors import RealplanError
from plans.plan import ExecutionPlan
from runtime.processes.lifetime import STOP_SIGNALS, die_with
from runtime.reports.endings import RunFailed, Stopped

POLL_S, LEAVE_S, HEARD_S = 0.5, 10.0, 10.0
ROOM_S = 120.0
"""How long the cluster may take to have room: other jobs end, an autoscaler brings machines."""
_CARRIED = (
    "OMP_NUM_THREADS", "NCCL_", "GLOO_", "UCX_", "FI_", "TORCH_", "PYTORCH_", "HF_", "WANDB_", "MLFLOW_",
)  # fmt: skip
"""Beginnings of names by which a user sets up communication, torch and trackers."""
_CHILD = "from runtime.launching.on_ray import follow; follow(); from runtime.cli import main; main()"


def run_on_ray(plan: ExecutionPlan, words: Sequence[str], address: str, room_s: float = ROOM_S) -> None:
    """Run a plan on the Ray cluster at an address (`auto`: the one that this machine belongs to), and wait.

    words: of `realrun`, with absolute paths that every machine sees. Raises RealplanError where Ray is not installed or
    reached or has no room within `room_s`, RunFailed and Stopped as the run on node 0 ends.
    """
    if importlib.util.find_spec("ray") is None:
        raise RealplanError("--ray needs Ray, which is not installed", "pip install 'realplan[ray]'")
    ray = importlib.import_module("ray")
    with _stops() as asked, _connected(ray, address), _placed(ray, plan, address, room_s) as group:
        machines = [_machine(ray, plan, group, node) for node in range(plan.cluster.nodes)]
        more = _meeting(ray, machines)
        environment = carried(os.environ)
        ray.get(
            [
                machine.start.remote([*words, *more(node)], os.getcwd(), environment)
                for node, machine in enumerate(machines)
            ]
        )
        _await(ray, machines, asked)


def carried(environment: Mapping[str, str]) -> dict[str, str]:
    """What of the caller's environment goes along to the machines, where otherwise that of Ray's own start holds."""
    return {name: value for name, value in environment.items() if name.startswith(_CARRIED)}


def follow() -> None:
    """Have this process, a machine's `realrun`, end with the actor that has started it, and hear signals, which Ray's
    workers block and ignore, and a process inherits that."""
    die_with(os.getppid())
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Machine:
    """An actor in a bundle: it starts `realrun` there, and says how it goes."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def meeting(self) -> tuple[str, int]:
        """The address of this machine in the cluster, and a port that is free now."""
        host = str(importlib.import_module("ray").util.get_node_ip_address())
        with closing(socket.socket()) as probe:
            probe.bind((host, 0))
            return host, int(probe.getsockname()[1])

    def start(self, words: Sequence[str], folder: str, environment: Mapping[str, str]) -> None:
        """Start `realrun` with these words in a folder. Ray sets the number of threads to that of its CPUs, which would
        be those of one rank: it is as in `environment`, or as without Ray."""
        own = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        place = folder if os.path.isdir(folder) else None
        self._process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, *words], cwd=place, env={**own, **environment}, start_new_session=True
        )

    def poll(self) -> int | None:
        """Exit code of `realrun`; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    def stop(self, number: int) -> None:
        """Send it a signal."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)


@contextmanager
def _connected(ray: Any, address: str) -> Iterator[None]:
    host, _, port = address.rpartition(":")
    try:
        if host and port.isdecimal() and "//" not in host:  # Ray itself waits for minutes, and then ends the process
            socket.create_connection((host.strip("[]"), int(port)), timeout=HEARD_S).close()
        ray.init(address=address, logging_level="ERROR")
    except (OSError, OverflowError, RuntimeError, ValueError) as error:
        said = (str(error).splitlines() or [""])[0]
        raise RealplanError(
            f"no Ray cluster at `{address}`: {said}", "--ray HOST:PORT of its head, or `ray start --head`"
        ) from None
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _placed(ray: Any, plan: ExecutionPlan, address: str, room_s: float) -> Iterator[Any]:
    """The placement group: bundle i is node i of the plan, with all of its devices, and no two are on one machine."""
    cluster = plan.cluster
    device = "CPU" if cluster.gpu.name == "cpu" else "GPU"
    bundle = {device: cluster.gpus_per_node} | ({"CPU": 1} if device == "GPU" else {})
    placement = importlib.import_module("ray.util")
    strategy = "STRICT_SPREAD" if cluster.nodes > 1 else "PACK"
    group = placement.placement_group([bundle] * cluster.nodes, strategy=strategy)
    try:
        if not group.wait(room_s):
            there = ", ".join(
                f"{node['NodeManagerAddress']} {node['Resources'].get(device, 0):g}"
                for node in ray.nodes()
                if node["Alive"]
            )
            raise RealplanError(
                f"the Ray cluster at `{address}` had no room within {room_s:g} s for {cluster.nodes} x "
                f"{cluster.gpus_per_node} {device}s, each on a machine of its own; it has {there or 'no machine'}",
                "a plan for what is free there, or wait until others are done",
            )
        yield group
    finally:
        placement.remove_placement_group(group)


def _machine(ray: Any, plan: ExecutionPlan, group: Any, node: int) -> Any:
    """An actor that holds a bundle."""
    scheduling = importlib.import_module("ray.util.scheduling_strategies")
    place = scheduling.PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=node)
    cpu = plan.cluster.gpu.name == "cpu"
    held = plan.cluster.gpus_per_node
    options = {"num_cpus": held if cpu else 1, "num_gpus": 0 if cpu else held}
    return ray.remote(Machine).options(scheduling_strategy=place, max_restarts=0, **options).remote()


def _meeting(ray: Any, machines: Sequence[Any]) -> Callable[[int], list[str]]:
    """The words by which the machines find each other; none where there is one."""
    if len(machines) == 1:
        return lambda node: []
    host, port = ray.get(machines[0].meeting.remote())
    return lambda node: ["--node-rank", str(node), "--master-addr", host, "--master-port", str(port)]


def _await(ray: Any, machines: Sequence[Any], asked: list[int]) -> None:
    """Wait until node 0 has ended; how it ends is how the run ends. What other machines do is for it to judge."""
    sent = 0
    while True:
        try:
            while sent < len(asked):
                sent += 1
                ray.get(machines[0].stop.remote(asked[sent - 1]))
            code = ray.get(machines[0].poll.remote())
        except ray.exceptions.RayActorError:
            raise RunFailed(
                "the machine of node 0 left the Ray cluster", "the same command with --resume goes on elsewhere"
            ) from None
        if code is not None:
            break
        time.sleep(POLL_S)
    _leave(ray, machines[1:])
    if asked and code:
        raise Stopped(
            f"stopped by {signal.Signals(asked[0]).name}", "the same command with --resume goes on from there"
        )
    if code:
        raise RunFailed(f"the run on node 0 ended with {code}; what it said is above")


def _leave(ray: Any, machines: Sequence[Any]) -> None:
    """Give the other machines, where they are still there, time to end."""
    end = time.monotonic() + LEAVE_S
    for machine in machines:
        with suppress(ray.exceptions.RayActorError):
            while ray.get(machine.poll.remote()) is None and time.monotonic() < end:
                time.sleep(POLL_S)


@contextmanager
def _stops() -> Iterator[list[int]]:
    """The signals that asked this process to stop, which are passed on to the run: the first one makes a checkpoint."""
    asked: list[int] = []
    old = {number: signal.signal(number, lambda got, _: asked.append(got)) for number in STOP_SIGNALS}
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
