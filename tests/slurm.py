"""A slurm of two nodes on this machine, in a folder of its own, for as long as a test needs it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

DAEMONS = ("munged", "slurmctld", "slurmd")
MOST_S = 60.0
CONF = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldPort={ports[0]}
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=p Nodes=ALL Default=YES MaxTime=10 State=UP
"""


@contextlib.contextmanager
def slurm() -> Iterator[Mapping[str, str]]:
    """The environment in which `srun` finds the two nodes; skips the test where slurm is not installed."""
    search = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    found = {name: shutil.which(name, path=search) for name in (*DAEMONS, "srun", "sinfo")}
    lacks = [name for name, path in found.items() if path is None]
    if lacks or os.getuid() != 0:
        pytest.skip(
            f"slurm needs root and {', '.join(lacks) or 'nothing else'} (slurmctld, slurmd, slurm-client, munge)"
        )
    # A socket's address has 107 characters, and a test's own folder may have more.
    folder, running = Path(tempfile.mkdtemp(prefix="slurm-")), []
    try:
        for place in ("state", "n1", "n2"):
            (folder / place).mkdir()
        (folder / "key").write_bytes(os.urandom(1024))
        (folder / "key").chmod(0o600)
        conf = folder / "slurm.conf"
        conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=_ports(3)))
        environment = {**os.environ, "SLURM_CONF": str(conf)}
        places = {
            "key-file": "key",
            "socket": "munge.socket",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        munge = [f"--{option}={folder / place}" for option, place in places.items()]
        for words in (
            ["munged", "--foreground", "--force", "--num-threads=1", *munge],
            ["slurmctld", "-D"], ["slurmd", "-D", "-N", "n1"], ["slurmd", "-D", "-N", "n2"],
        ):  # fmt: skip
            with (folder / "said").open("ab") as said:
                command = [found[words[0]] or "", *words[1:]]
                running.append(subprocess.Popen(command, env=environment, stdout=said, stderr=said))
            if words[0] == "munged":
                _until(lambda: (folder / "munge.socket").exists(), folder)
        _until(lambda: _idle(environment) == 2, folder)
        yield environment
    finally:
        for process in reversed(running):
            process.kill()
            process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _idle(environment: Mapping[str, str]) -> int:
    done = subprocess.run(["sinfo", "-hN", "-o", "%t"], env=environment, capture_output=True, text=True, timeout=MOST_S)
    return done.stdout.split().count("idle")


def _until(ready: Callable[[], bool], folder: Path) -> None:
    end = time.monotonic() + MOST_S
    while not ready():
        assert time.monotonic() < end, (folder / "said").read_text()
        time.sleep(0.1)


def _ports(count: int) -> list[int]:
    """Free ports."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
