"""The network interface that a node reaches the others through."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from contextlib import suppress
from pathlib import Path

SIOCGIFADDR = 0x8915
LOOPBACK = "lo"


def interface_of(address: str) -> str | None:
    """The interface of this machine that has an address; None where none has."""
    wanted = ipaddress.ip_address(address)
    if wanted.is_loopback:
        return LOOPBACK
    if wanted.version == 6:
        return _with_ipv6(wanted)
    return next((name for _, name in socket.if_nameindex() if _ipv4(name) == str(wanted)), None)


def _ipv4(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(found[20:24])
    return None


def _with_ipv6(wanted: ipaddress.IPv4Address | ipaddress.IPv6Address) -> str | None:
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, *_, name = line.split()
            if int(digits, 16) == int(wanted):
                return name
    return None
