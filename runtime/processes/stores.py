"""The store in which ranks leave word for each other.

On one machine a file in a folder that only this user can open; on several a TCP port on the run's own interface, open
to whoever reaches it. What stands in a store is numbers and addresses: nothing reads code or pickles from it.
"""

from __future__ import annotations

import ipaddress
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import FileStore, PrefixStore, TCPStore

from plans.errors import RealplanError
from runtime.processes.member import Address, Member
from runtime.processes.network import resolve

RETRY_S = 0.1


def open_store(member: Member, timeout: timedelta) -> Any:
    """The store of an attempt, for one rank. Raises RealplanError when rank 0's machine cannot be found or reached."""
    meeting = member.meeting
    if isinstance(meeting, Path):
        store: Any = FileStore(str(meeting), member.world)
        store.set_timeout(timeout)
        return store
    family, host = resolve(meeting)
    if member.rank == 0 and not meeting.served:
        return _serve(meeting, family, host, member.world, timeout)
    _await(meeting, host, timeout)
    store = TCPStore(host, meeting.port, member.world, is_master=False, timeout=timeout, wait_for_workers=False)
    return PrefixStore(f"realplan/{meeting.attempt}", store)


def _serve(address: Address, family: socket.AddressFamily, host: str, world: int, timeout: timedelta) -> Any:
    where = f"MASTER_ADDR={address.host}, MASTER_PORT={address.port}"
    if ipaddress.ip_address(host.partition("%")[0]).is_loopback and address.alone is False:
        raise RealplanError(
            f"rank 0: {where} is {host} here, which the other machines cannot reach",
            "MASTER_ADDR=ADDRESS of this machine on the network of the run",
        )
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, address.port))
    except OSError as error:
        listener.close()
        raise RealplanError(
            f"rank 0 cannot listen at {where} ({host}): {error.strerror}",
            "MASTER_ADDR names the machine of rank 0, MASTER_PORT a port that is free there",
        ) from None
    store: Any = TCPStore(
        host,
        address.port,
        world,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
    return PrefixStore(f"realplan/{address.attempt}", store)


def _await(address: Address, host: str, timeout: timedelta) -> None:
    """Wait until the port is open: torch's own attempts fill the screen with stacks."""
    deadline = time.monotonic() + timeout.total_seconds()
    while True:
        try:
            socket.create_connection((host, address.port), timeout=max(RETRY_S, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                reason = error.strerror or str(error)
                raise RealplanError(
                    f"nobody answered at MASTER_ADDR={address.host}, MASTER_PORT={address.port} ({host}) within "
                    f"timeout_s = {timeout.total_seconds():g} s: {reason}",
                    "is rank 0 running there, and is the port open between the machines?",
                ) from None
        time.sleep(RETRY_S)
