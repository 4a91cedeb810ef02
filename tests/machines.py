"""Machines on this one: network namespaces with an address each, on one switch, whose cables can be cut."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
IP, TC = shutil.which("ip", path=PATH), shutil.which("tc", path=PATH)


@dataclass(frozen=True)
class Machine:
    """A machine: its namespace and its address. `cable`: its end at the switch, which is in namespace `switch`."""

    name: str
    address: str
    switch: str
    cable: str

    def limit(self, mbit: int) -> None:
        """Have its cable carry so many megabits per second in either direction."""
        for words in (f"-n {self.name} eth0", f"-n {self.switch} {self.cable}"):
            *where, link = words.split()
            shaped = ["qdisc", "add", "dev", link, "root", "tbf", "rate", f"{mbit}mbit", "burst", "256kb"]
            _run([str(TC), *where, *shaped, "latency", "400ms"])

    @property
    def entering(self) -> str:
        """Python code by which a process that has one thread comes to run on it."""
        clone_newnet = 0x40000000
        where = f"os.open('/run/netns/{self.name}', os.O_RDONLY)"
        return f"import ctypes, os; assert ctypes.CDLL(None).setns({where}, {clone_newnet}) == 0; "

    @staticmethod
    def hiding(folder: Path) -> str:
        """Python code by which a process comes to see nothing in a folder."""
        clone_newns, private, recursive = 0x20000, 0x40000, 0x4000
        return (
            f"import ctypes; c = ctypes.CDLL(None); assert c.unshare({clone_newns}) == 0; "
            f"assert c.mount(b'none', b'/', None, {private | recursive}, None) == 0; "
            f"assert c.mount(b'none', {os.fsencode(folder)!r}, b'tmpfs', 0, None) == 0; "
        )

    def cut(self) -> None:
        """Take it off the network for good; nobody is told."""
        _ip(f"-n {self.switch} link set {self.cable} down")


@contextlib.contextmanager
def machines(count: int) -> Iterator[list[Machine]]:
    """Some machines that reach each other; skips the test where namespaces cannot be made."""
    if IP is None or os.getuid() != 0:
        pytest.skip("network namespaces need root and `ip` (iproute2)")
    switch, made = f"rp{os.getpid()}", list[str]()
    try:
        try:
            _ip(f"netns add {switch}")
            made.append(switch)
            _ip(f"-n {switch} link add switch type bridge")
            _ip(f"-n {switch} link set switch up")
            found = [_machine(switch, number, made) for number in range(count)]
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield found
    finally:
        for name in made:
            _ip(f"netns delete {name}")


def _machine(switch: str, number: int, made: list[str]) -> Machine:
    machine = Machine(f"{switch}-{number}", f"10.77.0.{number + 1}", switch, f"cable{number}")
    _ip(f"netns add {machine.name}")
    made.append(machine.name)
    _ip(f"-n {switch} link add {machine.cable} type veth peer name eth0 netns {machine.name}")
    _ip(f"-n {switch} link set {machine.cable} master switch up")
    _ip(f"-n {machine.name} addr add {machine.address}/24 dev eth0")
    for link in ("eth0", "lo"):
        _ip(f"-n {machine.name} link set {link} up")
    return machine


def _ip(words: str) -> None:
    _run([str(IP), *words.split()])


def _run(command: Sequence[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
