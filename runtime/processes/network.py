"""Addresses of the machines of a run, and which interface leads to them. Light: no torch."""

from __future__ import annotations

import ipaddress
import socket

from plans.errors import RealplanError
from runtime.processes.member import Address


def resolve(address: Address) -> tuple[socket.AddressFamily, str]:
    """Family and number of the address of rank 0's machine."""
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RealplanError(
            f"the environment has MASTER_ADDR={address.host!r}, which is no host: {reason}",
            "MASTER_ADDR is the name or address of the machine of rank 0, as the other machines see it",
        ) from None
    family, *_, place = found[0]
    return family, str(place[0])


def interface_of(host: str) -> str:
    """The network interface of this machine on the way to a host's address; empty when there is none to name."""
    own = own_address(host)
    if not own:
        return ""
    if ipaddress.ip_address(own).is_loopback:
        return "lo"
    return next((name for _, name in socket.if_nameindex() if _address_of(name) == own), "")


def own_address(host: str) -> str:
    """The address of this machine on the way to a host's; empty when there is no way."""
    with socket.socket(family_of(host), socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))  # sends nothing
        except OSError:
            return ""
        return str(probe.getsockname()[0])


def family_of(host: str) -> socket.AddressFamily:
    """IPv4 or IPv6."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def listener(host: str, port: int = 0) -> socket.socket:
    """A socket that listens on one address of this machine; port 0: any that is free. Raises OSError."""
    found = socket.socket(family_of(host), socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((host, port))
        found.listen()
    except OSError:
        found.close()
        raise
    return found


def free_port(host: str) -> int:
    """A port of an address of this machine that nobody listens at now."""
    with listener(host) as probe:
        return int(probe.getsockname()[1])


def _address_of(interface: str) -> str:
    import fcntl

    siocgifaddr = 0x8915
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe, siocgifaddr, interface.encode()[:15].ljust(256, b"\0"))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])
