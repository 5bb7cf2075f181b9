"""Which keys are offered to a host, in OpenSSH's order: the agent's that were named, the agent's others, key files."""

from __future__ import annotations

import contextlib
import os
import shlex
import socket
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import Iterator
from pathlib import Path

import paramiko
from paramiko.agent import AgentKey, AgentSSH

from dispatch.hosts.address import Address
from dispatch.hosts.inventory import Host

_LIST_SECONDS = 5.0
_SIGN_SECONDS = 60.0  # a hardware key waits for a finger


class NoKeyError(paramiko.AuthenticationException):
    """No key was accepted; the message says which were tried and which could not be."""

    def __init__(self, what: str, *, next: str | None = None) -> None:
        super().__init__(what)
        self.next = next


class Keys:
    """The keys of one connection, as Paramiko's ``auth_strategy``.

    Nothing is read, and no agent is asked, before the host's own key has been found good.
    """

    def __init__(self, host: Host, address: Address) -> None:
        self._host = host
        self._address = address
        self._tried: list[str] = []
        self._unusable: list[tuple[str, str]] = []
        self._agent: AgentSSH | None = None

    def authenticate(self, transport: paramiko.Transport) -> list[str]:
        """Offer key after key until one is accepted; NoKeyError where none is."""
        takes: list[str] = []
        further: list[str] = []
        try:
            for name, key in self._keys():
                self._tried.append(name)
                try:
                    more = transport.auth_publickey(self._address.user, key)
                except paramiko.BadAuthenticationType as error:
                    takes = list(error.allowed_types)
                    break
                except paramiko.AuthenticationException as error:
                    if not transport.is_active() or "timeout" in str(error).lower():
                        raise self._hung_up(error) from error
                    continue
                except (paramiko.SSHException, OSError) as error:
                    if not transport.is_active():
                        raise self._hung_up(error) from error
                    self._unusable.append((name, str(error)))
                    continue
                if not more:
                    return []
                further = list(more)
                break
        finally:
            if self._agent is not None:
                with contextlib.suppress(Exception):
                    self._agent._close()  # type: ignore[attr-defined]
        raise self._none(takes, further)

    def _keys(self) -> Iterator[tuple[str, paramiko.PKey]]:
        listed = [(name, _public_blob(Path(name))) for name in self._address.identities]
        agent = {key.asbytes(): key for key in self._agent_keys()}
        for name, blob in listed:
            if blob is not None and blob in agent:
                yield from self._with_certificates(f"{name} (in ssh-agent)", agent.pop(blob))
        # A key that was named is used, and no other: a server counts the wrong ones.
        if self._host.identity is None and not self._address.identities_only:
            for key in agent.values():
                yield f"{getattr(key, 'comment', '') or key.get_name()} (in ssh-agent)", key
        for name, _ in listed:
            if not name.endswith(".pub") and (loaded := self._loaded(name)) is not None:
                yield from self._with_certificates(name, loaded)

    def _with_certificates(self, name: str, key: paramiko.PKey) -> Iterator[tuple[str, paramiko.PKey]]:
        """A key under each certificate that it has, then as itself: a certificate may have run out."""
        beside = f"{name}-cert.pub"
        for path in dict.fromkeys([*self._address.certificates, beside]):
            certified = _certified(path)
            if certified is None or certified != key.asbytes():
                continue
            key.public_blob = None
            key.load_certificate(path)
            yield (path if path == beside else f"{name} with {path}"), key
        key.public_blob = None
        yield name, key

    def _agent_keys(self) -> list[AgentKey]:
        path = self._address.agent
        if path is None:
            return []
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(_LIST_SECONDS)
        agent = AgentSSH()
        try:
            connection.connect(os.path.expanduser(path))
            agent._connect(connection)  # type: ignore[attr-defined]
            connection.settimeout(_SIGN_SECONDS)
        except (OSError, paramiko.SSHException) as error:
            connection.close()
            self._unusable.append(("ssh-agent", str(error) or type(error).__name__))
            return []
        self._agent = agent
        return list(agent.get_keys())

    def _loaded(self, name: str) -> paramiko.PKey | None:
        try:
            mode = os.stat(name)
            if mode.st_uid == os.getuid() and mode.st_mode & 0o077:
                # OpenSSH's own rule: what others could have read is no secret.
                self._unusable.append((name, f"mode {mode.st_mode & 0o777:04o}: others may read it"))
                return None
            return paramiko.PKey.from_path(name)
        except Exception as error:  # Paramiko and cryptography have no common type for "no key", nor for "encrypted"
            why = str(error) or type(error).__name__
            self._unusable.append((name, "encrypted" if "password" in why.lower() else why))
        return None

    def _hung_up(self, error: BaseException) -> NoKeyError:
        count = len(self._tried)
        if "timeout" in str(error).lower():
            return NoKeyError("the server stopped answering while a key was offered")
        if count > 1:
            return NoKeyError(
                f"the server hung up after {count} keys, none of which it accepts for user {self._address.user!r}",
                next=f"name the right one:  latentforge dispatch enrol {self._host.name} --identity FILE",
            )
        return NoKeyError(f"the server hung up while user {self._address.user!r} was being authenticated ({error})")

    def _none(self, takes: list[str], further: list[str]) -> NoKeyError:
        user = self._address.user
        encrypted = [name for name, why in self._unusable if why == "encrypted"]
        broken = [(name, why) for name, why in self._unusable if why != "encrypted"]
        if further:
            return NoKeyError(
                f"a key is accepted, but more is asked of user {user!r}: {', '.join(further)}",
                next="AuthenticationMethods publickey   in the host's sshd_config, for this user",
            )
        if takes:
            return NoKeyError(
                f"the server takes no keys for user {user!r} (it takes: {', '.join(takes)})",
                next="PubkeyAuthentication yes   in the host's sshd_config",
            )
        if encrypted:
            return NoKeyError(
                f"the key file {encrypted[0]!r} is encrypted, and not in ssh-agent",
                next=f"load it into ssh-agent:  ssh-add {shlex.quote(encrypted[0])}",
            )
        loose = [name for name, why in broken if why.startswith("mode ")]
        if loose and not self._tried:
            return NoKeyError(
                f"key file {loose[0]!r} is not used ({dict(broken)[loose[0]]}, so OpenSSH would not use it either)",
                next=f"chmod 600 {shlex.quote(loose[0])}",
            )
        if broken and not self._tried:
            name, why = broken[0]
            return NoKeyError(
                f"key file {name!r} cannot be used ({why})" if name != "ssh-agent" else f"ssh-agent: {why}",
                next=f"look whether it is a private key:  ssh-keygen -y -f {shlex.quote(name)}"
                if name != "ssh-agent"
                else "ssh-add -l   must list a key; or name a key file:  "
                f"latentforge dispatch enrol {self._host.name} --identity FILE",
            )
        tried = ", ".join(self._tried) or "none: there is no key file and no ssh-agent"
        besides = "".join(f"; not used: {name} ({why})" for name, why in broken)
        return NoKeyError(f"no key of yours is accepted for user {user!r} (tried: {tried}{besides})")


_CERTIFICATE = "-cert-v01@openssh.com"
_FIELDS = {"ssh-ed25519": 1, "ssh-rsa": 2}  # of the public key, in the certificate as in the plain key; ECDSA: 2


def _certified(path: str) -> bytes | None:
    """The public key that a certificate file is for; None where it is none."""
    with contextlib.suppress(OSError, UnicodeDecodeError, Base64Error, ValueError, IndexError, paramiko.SSHException):
        blob = paramiko.Message(b64decode(Path(path).read_text(encoding="utf-8").split()[1], validate=True))
        kind = blob.get_text()
        if kind.endswith(_CERTIFICATE):
            plain = kind.removesuffix(_CERTIFICATE)
            blob.get_binary()  # the nonce
            public = paramiko.Message()
            public.add_string(plain)
            for _ in range(_FIELDS.get(plain, 2)):
                public.add_string(blob.get_binary())
            return public.asbytes()
    return None


def _public_blob(path: Path) -> bytes | None:
    """The public half of a key file, read beside it or from it; None where neither tells."""
    for one in (path, path.with_name(path.name + ".pub")):
        with contextlib.suppress(OSError, UnicodeDecodeError, Base64Error, ValueError):
            words = one.read_text(encoding="utf-8").split()
            if len(words) >= 2 and words[0].startswith(("ssh-", "ecdsa-", "sk-")):
                return b64decode(words[1], validate=True)
    with contextlib.suppress(Exception):
        return paramiko.PKey.from_path(path).asbytes()
    return None
