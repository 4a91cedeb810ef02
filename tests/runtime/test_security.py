"""Who can talk to a run: on one machine nobody else, on several whoever reaches the port, and nobody with code."""

from __future__ import annotations

import ast
import contextlib
import os
import pickle
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

import pytest
from run_cases import PATIENCE_S, ROOT, arguments
from warm import start_warm

TCP_LISTENS = "0A"


def family(pid: int) -> set[int]:
    """A process and everything below it."""
    parents: dict[int, list[int]] = {}
    for place in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = place.read_text().rsplit(")", 1)[1].split()
            parents.setdefault(int(fields[1]), []).append(int(place.parent.name))
    found, waiting = set(), [pid]
    while waiting:
        found.add(waiting[-1])
        waiting += parents.get(waiting.pop(), [])
    return found


def listening(pids: set[int]) -> set[IPv4Address | IPv6Address]:
    """Addresses at which some processes accept TCP connections, read from /proc."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    inodes.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    found = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            _, local, _, state, *rest = line.split()
            if state == TCP_LISTENS and f"socket:[{rest[5]}]" in inodes:
                words = bytes.fromhex(local.split(":")[0])
                swapped = b"".join(words[i : i + 4][::-1] for i in range(0, len(words), 4))
                found.add(ip_address(swapped))
    return found


def test_the_reader_of_sockets_sees_an_open_one() -> None:
    with socket.create_server(("0.0.0.0", 0)), socket.create_server(("::", 0), family=socket.AF_INET6):
        assert {ip_address("0.0.0.0"), ip_address("::")} <= listening({os.getpid()})


@pytest.fixture
def private() -> Iterator[Path]:
    """A folder for temporary files with a short name, as the address of a socket needs."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_local_run_listens_on_loopback_alone(private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(private))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")  # as users of several machines have it
    seen: set[IPv4Address | IPv6Address] = set()
    modes: set[int] = set()
    command = arguments(tmp_path, iterations=3, export=False)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        seen |= listening(family(process.pid))
        for folder in (*private.glob("realplan-*"), tmp_path / "out" / ".ranks"):
            with contextlib.suppress(OSError):
                modes.add(stat.S_IMODE(folder.stat().st_mode))
        time.sleep(0.3)
    assert process.returncode == 0, process.communicate()[1]
    assert seen and all(address.is_loopback for address in seen), seen
    assert modes == {0o700}
    assert not list(private.glob("realplan-*")) and not (tmp_path / "out" / ".ranks").exists()


class Payload:
    """A pickle that leaves a mark when somebody loads it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def test_a_client_of_the_store_cannot_make_a_rank_run_code(tmp_path: Path) -> None:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    mark, poison = tmp_path / "mark", pickle.dumps(Payload(tmp_path / "mark"))
    pickle.loads(poison)
    mark.rmdir()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = arguments(tmp_path, iterations=2, export=False, timeout_s=10)
    processes = [start_warm(command, {**os.environ, **environment, "RANK": str(rank)}) for rank in (0, 1)]
    overwritten: set[str] = set()
    seen: set[IPv4Address | IPv6Address] = set()
    try:
        deadline = time.monotonic() + PATIENCE_S
        store = None
        while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
            seen |= listening({process.pid for process in processes})
            with contextlib.suppress(Exception):
                wait = timedelta(seconds=1)
                store = store or TCPStore("127.0.0.1", port, is_master=False, timeout=wait, wait_for_workers=False)
                for key in store.list_keys():
                    store.set(key, poison)
                    overwritten.add(key)
            time.sleep(0.1)
        said = [process.communicate(timeout=PATIENCE_S)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert overwritten, "the attack has begun"
    assert not mark.exists() and not any("Traceback" in words for words in said)
    assert seen and all(address.is_loopback for address in seen)


def test_nothing_unpickles_what_peers_send() -> None:
    objects = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "send_object_list"}
    for package in ("runtime", "profiler"):
        for path in (ROOT / package).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
            assert not names & objects and "pickle" not in modules, path
