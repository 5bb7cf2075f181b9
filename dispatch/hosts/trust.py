"""Host keys: fetched without authenticating, shown, pinned by the user, and compared ever after."""

from __future__ import annotations

import base64
import contextlib
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime

import paramiko

from dispatch.hosts.address import Address
from dispatch.hosts.inventory import Host, PinnedKey, short_type
from dispatch.places import Places, write_atomic
from dispatch.transport.dial import open_link
from dispatch.transport.failures import classified
from dispatch.transport.link import EXCHANGE_SECONDS, GREETING_SECONDS, HostKeyError
from latentforge.errors import RefusedError, TransportError

# Asked for one by one, so that every key the server has is shown and pinned.
_KEY_TYPES = ("ssh-ed25519", "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521", "rsa-sha2-512")


def fingerprint(key: paramiko.PKey) -> str:
    """The fingerprint as OpenSSH writes it: ``SHA256:`` and 43 characters."""
    digest = hashlib.sha256(key.asbytes()).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def unknown_key(host: Host, offered: paramiko.PKey) -> HostKeyError:
    """The refusal of a host that was never enrolled."""
    return HostKeyError(
        "unknown host key",
        f"host key of {host.name} is not pinned\n"
        f"  offered  {short_type(offered.get_name())} {fingerprint(offered)}\n"
        f"  nothing was sent",
        next=f"compare it with the host's own (ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub there), then\n"
        f"latentforge dispatch enrol {host.name}",
    )


def changed_key(host: Host, offered: paramiko.PKey) -> HostKeyError:
    """The refusal of a host whose key is not the pinned one, with both fingerprints."""
    lines = [f"host key of {host.name} changed"]
    for key in host.keys:
        lines.append(f"  pinned   {short_type(key.type)} {key.sha256}  ({key.date}, enrolled by you)")
    lines.append(f"  offered  {short_type(offered.get_name())} {fingerprint(offered)}")
    lines.append("  nothing was sent")
    return HostKeyError(
        "changed host key",
        "\n".join(lines),
        next=f"if the machine was reinstalled:  latentforge dispatch enrol {host.name} --replace",
    )


def pinned(host: Host, places: Places) -> list[paramiko.PKey]:
    """The keys pinned for a host. Both records, the inventory's fingerprints and our known_hosts, must agree."""
    path = places.known_hosts(host.name)
    fingerprints = {key.sha256 for key in host.keys}
    keys: list[paramiko.PKey] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    for line in lines:
        with contextlib.suppress(Exception):  # a damaged line is no key, whatever Paramiko makes of it
            entry = paramiko.hostkeys.HostKeyEntry.from_line(line)
            if entry is not None and entry.key is not None and fingerprint(entry.key) in fingerprints:
                keys.append(entry.key)
    return keys


def pin(host: Host, keys: Sequence[paramiko.PKey], places: Places) -> Host:
    """The host with these keys pinned; our known_hosts file for it is written."""
    today = datetime.now(UTC).date().isoformat()
    since = {key.sha256: key.date for key in host.keys}
    records = tuple(
        PinnedKey(type=key.get_name(), sha256=(sha256 := fingerprint(key)), date=since.get(sha256, today))
        for key in keys
    )
    lines = [f"{host.name} {key.get_name()} {key.get_base64()}\n" for key in keys]
    write_atomic(places.known_hosts(host.name), "".join(lines).encode(), mode=0o600)
    return host.model_copy(update={"keys": records})


def offered_keys(host: Host, address: Address) -> list[paramiko.PKey]:
    """Every key that the server offers, fetched by key exchanges that end before authentication."""
    found = (_offered(host, address, key_type) for key_type in _KEY_TYPES)
    keys = {fingerprint(key): key for key in found if key is not None}
    if not keys:
        raise TransportError(f"{host.name} offered no host key of a type that is accepted ({', '.join(_KEY_TYPES)})")
    return list(keys.values())


def _offered(host: Host, address: Address, key_type: str) -> paramiko.PKey | None:
    link = open_link(host, address)
    try:
        transport = paramiko.Transport(link)
        try:
            transport.banner_timeout = GREETING_SECONDS
            transport.get_security_options().key_types = [key_type]
            transport.start_client(timeout=EXCHANGE_SECONDS)
            return transport.get_remote_server_key()
        finally:
            transport.close()
    except paramiko.ssh_exception.IncompatiblePeer as error:
        if "host key" in str(error):
            return None
        raise classified(host, address, error) from error
    except (paramiko.SSHException, OSError, EOFError) as error:
        raise classified(host, address, error) from error
    finally:
        link.close()


def check_fingerprint(keys: Sequence[paramiko.PKey], expected: str) -> list[paramiko.PKey]:
    """The offered key that has the expected fingerprint, as a list of one; refused where none has it."""
    matching = [key for key in keys if fingerprint(key) == expected]
    if not matching:
        offered = ", ".join(f"{short_type(key.get_name())} {fingerprint(key)}" for key in keys)
        raise RefusedError(
            f"no offered host key has the fingerprint {expected} (offered: {offered})",
            next="what the host itself says, there:  ssh-keygen -lf /etc/ssh/ssh_host_ed25519_key.pub",
        )
    return matching
