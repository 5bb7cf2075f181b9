"""One network interface of this host as the kernel names it, with its IPv4 address: what two hosts meet by."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from typing import Any

# Of <linux/sockios.h> and <net/if.h>.
_FLAGS, _ADDRESS, _MASK, _MTU = 0x8913, 0x8915, 0x891B, 0x8921
_UP, _RUNNING = 0x1, 0x40


def wire(interface: str) -> dict[str, Any]:
    """Address, network, MTU and state of an interface; all None where there is none of that name, and who there is.

    Asked of the kernel, and not of /sys, which may show the interfaces of another network namespace.
    """
    others = [name for _, name in socket.if_nameindex()]
    found: dict[str, Any] = {"interface": interface, "address": None, "network": None, "mtu": None}
    found |= {"up": None, "carrier": None}
    if interface not in others:
        return {**found, "others": others}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:

        def ask(what: int) -> bytes | None:
            try:
                return fcntl.ioctl(asked, what, struct.pack("256s", interface.encode()[:15]))
            except OSError:  # it has none
                return None

        address, mask, mtu, flags = ask(_ADDRESS), ask(_MASK), ask(_MTU), ask(_FLAGS)
    if address is not None:
        found["address"] = socket.inet_ntoa(address[20:24])
        width = socket.inet_ntoa(mask[20:24]) if mask is not None else "32"
        found["network"] = str(ipaddress.ip_interface(f"{found['address']}/{width}").network)
    found["mtu"] = None if mtu is None else struct.unpack_from("i", mtu, 16)[0]
    if flags is not None:
        bits = struct.unpack_from("H", flags, 16)[0]
        found |= {"up": bool(bits & _UP), "carrier": bool(bits & _RUNNING)}
    return {**found, "others": others}
