"""The hosts that a user has enrolled, and the one that is always there."""

from __future__ import annotations

import difflib
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dispatch.places import Places, write_atomic
from latentforge.errors import RefusedError

LOCAL = "local"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


class PinnedKey(BaseModel):
    """A host key that the user accepted: its type, its fingerprint, and when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    sha256: Annotated[str, Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]


class Host(BaseModel):
    """One machine that can take work."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(exclude=True)
    address: str = Field("", description="host name, address, or an alias of ~/.ssh/config")
    port: Annotated[int, Field(ge=1, le=65535)] | None = Field(None, description="22, or what ~/.ssh/config says")
    user: str | None = Field(None, description="login name, or what ~/.ssh/config says")
    identity: str | None = Field(None, description="private key file, or what ~/.ssh/config says")
    root: str | None = Field(None, description="state root; $XDG_STATE_HOME/latentforge of the host if absent")
    python: str = Field("python3", min_length=1, description="Python 3.11 or newer to build with")
    lock: str = Field("cpu", min_length=1, description="lock file in constraints/ to build from")
    gb10: bool = Field(False, description="declared as a GB10: its checks apply")
    runner: Literal["auto", "detached", "systemd"] = Field("auto", description="what carries runs; 'auto' = probed")
    warn_below_gib: Annotated[float, Field(ge=0)] | None = Field(None, description="available memory to warn at")
    kill_below_gib: Annotated[float, Field(ge=0)] | None = Field(None, description="available memory to end a run at")
    keys: tuple[PinnedKey, ...] = ()

    @property
    def is_local(self) -> bool:
        """Whether this is the machine that the command runs on."""
        return self.name == LOCAL


class Inventory:
    """``hosts.toml``. It is edited by people too: a change here rewrites one host's table and keeps all else."""

    def __init__(
        self,
        path: Path,
        hosts: Mapping[str, Host],
        default: str | None = None,
        lanes: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        self.path = path
        self.hosts = dict(hosts)
        self.default = default
        self.lanes = dict(lanes or {})

    @classmethod
    def load(cls, places: Places) -> Inventory:
        """Read the inventory; an absent file is an empty one, a wrong one is refused with the field."""
        path = places.hosts_file
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            document = {}
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RefusedError(f"{path} is not TOML: {error}") from error
        return cls(path, *_parsed(document, path))

    def names(self) -> list[str]:
        """Every host that can be named."""
        return [LOCAL, *sorted(self.hosts)]

    def get(self, name: str) -> Host:
        """The host of that name; an unknown one is refused with the nearest and the command that enrols it."""
        if name == LOCAL:
            return Host(name=LOCAL)
        if name in self.hosts:
            return self.hosts[name]
        close = difflib.get_close_matches(name, self.names(), n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise RefusedError(
            f"host {name!r} is not enrolled (known: {', '.join(self.names())})",
            next=f"{hint}To enrol it:  latentforge dispatch enrol "
            + (name if _NAME.fullmatch(name) else f"NAME --address {shlex.quote(name)}"),
        )

    def choose(self, flag: str | None, env: Mapping[str, str]) -> Host:
        """The host that a command means: flag, then ``GX10_HOST``, then the file's ``default``, then ``local``.

        ``GX10_USER`` and ``GX10_REPO_PATH`` replace the user and the state root.
        """
        if flag is not None and not flag.strip():
            # A script's unset variable must not turn into another machine.
            raise RefusedError(f"--host {flag!r} names no host", next="latentforge dispatch hosts   lists them")
        name = flag or env.get("GX10_HOST") or self.default or LOCAL
        if "," in name:
            said = f"--host {name!r}" if flag else f"GX10_HOST={name!r}"
            raise RefusedError(
                f"{said} asks for one run spread over several hosts, and no recipe can be (distributed = none)",
                next=f"one of them, the first that is fit:  --lanes {name}\nthe same on each:  --each {name}",
            )
        host = self.get(name)
        changes: dict[str, Any] = {}
        if (user := env.get("GX10_USER")) and not host.is_local:
            changes["user"] = user
        if root := env.get("GX10_REPO_PATH"):
            changes["root"] = root
        return host.model_copy(update=changes)

    def put(self, host: Host) -> None:
        """Write one host's table, in place of the one it had."""
        check_name(host.name)
        try:
            text = self.path.read_text(encoding="utf-8")
        except FileNotFoundError:
            text = ""
        changed = _with_table(text, host)
        hosts, _default, _lanes = _parsed(tomllib.loads(changed), self.path)
        if hosts != {**self.hosts, host.name: host}:
            raise RefusedError(
                f"{self.path} is written in a way that cannot be changed safely (table [hosts.{host.name}])",
                next=f"edit it by hand, or write the host as one table [hosts.{host.name}]",
            )
        self.hosts = hosts
        write_atomic(self.path, changed.encode())


def check_name(name: str) -> str:
    """A name that can be a TOML key, a file name and a word on a command line; refused otherwise."""
    if name == LOCAL:
        raise RefusedError("'local' is this machine; it is built in and needs no enrolment")
    if not _NAME.fullmatch(name):
        raise RefusedError(f"{name!r} cannot name a host: letters, digits, dot, hyphen and underscore only")
    return name


def _parsed(document: dict[str, Any], path: Path) -> tuple[dict[str, Host], str | None, dict[str, tuple[str, ...]]]:
    for key in document:
        if key not in ("hosts", "default", "lanes"):
            raise RefusedError(f"{path}: unknown key {key!r} (known: default, hosts, lanes)")
    hosts: dict[str, Host] = {}
    for name, table in document.get("hosts", {}).items():
        check_name(name)
        try:
            hosts[name] = Host.model_validate({"name": name, "address": name, **table})
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            field = ".".join(str(part) for part in problem["loc"])
            hint = difflib.get_close_matches(field, Host.model_fields, n=1)
            raise RefusedError(
                f"{path}: hosts.{name}.{field} = {problem['input']!r}: {problem['msg']}",
                next=f"did you mean {hint[0]!r}?" if hint and problem["type"] == "extra_forbidden" else None,
            ) from None
    default = document.get("default")
    if default is not None and default != LOCAL and default not in hosts:
        raise RefusedError(f"{path}: default = {default!r} is not one of its hosts")
    return hosts, default, _lanes(document.get("lanes", {}), hosts, path)


def _lanes(table: Any, hosts: Mapping[str, Host], path: Path) -> dict[str, tuple[str, ...]]:
    """The named lists of fallback hosts: ``[lanes]`` with a list of host names a name, in the order of preference."""
    if not isinstance(table, dict):
        raise RefusedError(f"{path}: lanes = {table!r} is not a table", next='[lanes]\nnight = ["gx10", "gx11"]')
    for name, listed in table.items():
        if name in hosts or name == LOCAL:
            raise RefusedError(f"{path}: lanes.{name} has the name of a host", next="give the lane another name")
        if not (isinstance(listed, list) and listed and all(isinstance(host, str) for host in listed)):
            raise RefusedError(f"{path}: lanes.{name} = {listed!r} is not a list of host names")
        for number, host in enumerate(listed):
            if host in listed[:number]:
                raise RefusedError(f"{path}: lanes.{name} names {host!r} twice")
            if host != LOCAL and host not in hosts:
                raise RefusedError(
                    f"{path}: lanes.{name} names {host!r}, which is not one of its hosts",
                    next=f"latentforge dispatch enrol {host}   or take it out of the lane",
                )
    return {name: tuple(listed) for name, listed in table.items()}


def _with_table(text: str, host: Host) -> str:
    """The text with the host's table replaced or added; comments and other tables stay as they are."""
    header = re.compile(rf"^\[\s*hosts\s*\.\s*(?:\"{re.escape(host.name)}\"|{re.escape(host.name)})\s*\]\s*(?:#.*)?$")
    kept: list[str] = []
    inside = False
    for line in text.splitlines():
        if line.lstrip().startswith("["):
            inside = header.match(line.strip()) is not None
        if not inside:
            kept.append(line)
    while kept and not kept[-1].strip():
        kept.pop()
    return "\n".join([*kept, *([""] if kept else []), *_table(host)]) + "\n"


def _table(host: Host) -> list[str]:
    lines = [f'[hosts."{host.name}"]' if "." in host.name else f"[hosts.{host.name}]"]
    for name, value in host.model_dump(exclude_defaults=True, exclude={"name", "keys"}).items():
        lines.append(f"{name} = {_toml(value)}")
    if host.keys:
        lines.append("keys = [")
        for key in host.keys:
            inner = ", ".join(f"{name} = {_toml(value)}" for name, value in key.model_dump().items())
            lines.append(f"    {{ {inner} }},")
        lines.append("]")
    return lines


def _toml(value: str | int | float | bool) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    # A TOML basic string: quotes and backslashes escaped, control characters as \uXXXX.
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(f"\\u{ord(c):04x}" if ord(c) < 32 or ord(c) == 127 else c for c in escaped) + '"'
