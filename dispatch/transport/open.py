"""Choosing the carrier for a host."""

from __future__ import annotations

from dispatch.hosts.inventory import Host
from dispatch.places import Places
from dispatch.transport.call import Transport
from dispatch.transport.local import LocalTransport


def open_transport(host: Host, places: Places, *, readonly: bool = False) -> Transport:
    """The transport to a host; nothing is connected before the first call."""
    if host.is_local:
        return LocalTransport(host, readonly=readonly)
    from dispatch.transport.ssh import SshTransport  # fabric is slow to import, and not needed here for `local`

    return SshTransport(host, places, readonly=readonly)
