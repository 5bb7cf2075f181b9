"""The hosts that a user has enrolled, and the one that is always there."""

from __future__ import annotations

import difflib
import re
import shlex
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from dispatch.hosts.table import with_table
from dispatch.places import Places, private_folder, write_atomic, writing
from latentforge.errors import RefusedError

LOCAL = "local"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_UNFIT = re.compile(r"[\s\x00-\x1f\x7f]")
_SHELL = frozenset("'`\";&<>|(){}")
_LOCK_SECONDS = 10.0

Gib = Annotated[float, Field(ge=0, allow_inf_nan=False, strict=True)]


class PinnedKey(BaseModel):
    """A host key that the user accepted: its type, its fingerprint, and when."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: str
    sha256: Annotated[str, Field(pattern=r"^SHA256:[A-Za-z0-9+/]{43}$")]
    date: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\d$")]


class Host(BaseModel):
    """One machine that can take work. A value of another type, or of a form that cannot be meant, is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(exclude=True)
    address: str = Field("", description="host name, address, or an alias of ~/.ssh/config")
    port: Annotated[int, Field(ge=1, le=65535, strict=True)] | None = Field(
        None, description="22, or what ~/.ssh/config says"
    )
    user: str | None = Field(None, description="login name, or what ~/.ssh/config says")
    identity: str | None = Field(None, description="private key file, or what ~/.ssh/config says")
    root: str | None = Field(None, description="state root; $XDG_STATE_HOME/latentforge of the host if absent")
    python: str = Field("python3", description="Python 3.11 or newer to build with")
    lock: str = Field("cpu", min_length=1, description="lock file in constraints/ to build from")
    gb10: bool = Field(False, strict=True, description="declared as a GB10: its checks apply")
    runner: Literal["auto", "detached", "systemd"] = Field("auto", description="what carries runs; 'auto' = probed")
    warn_below_gib: Gib | None = Field(None, description="available memory to warn at")
    kill_below_gib: Gib | None = Field(None, description="available memory to end a run at")
    link: Annotated[str, Field(pattern=r"^[A-Za-z0-9._@-]{1,15}$")] | None = Field(
        None, description="its network interface on the fast link to another host, for runs over both"
    )
    hca: Annotated[str, Field(pattern=r"^[A-Za-z0-9_:,=^-]{1,255}$")] | None = Field(
        None, description="its RDMA devices on that link (NCCL_IB_HCA); NCCL's own choice if absent"
    )
    link_deadline: Annotated[float, Field(ge=1, le=3600, allow_inf_nan=False, strict=True)] = Field(
        30.0, description="seconds of silence after which the other host of a run that it leads is lost"
    )
    keys: tuple[PinnedKey, ...] = ()

    @field_validator("address")
    @classmethod
    def _one_machine(cls, address: str) -> str:
        inner = address[1:-1] if address.startswith("[") and address.endswith("]") else address
        if not inner or inner.startswith("-") or _UNFIT.search(inner):
            raise ValueError("not a host name or address")
        if "@" in inner or "/" in inner:
            raise ValueError("a host name or address alone; the login name goes into `user`, the port into `port`")
        if address.startswith("[") != address.endswith("]") or (inner.count(":") == 1):
            raise ValueError("a host name or address alone; the port goes into `port`")
        return inner

    @field_validator("user")
    @classmethod
    def _one_user(cls, user: str | None) -> str | None:
        # What OpenSSH refuses as a login name too.
        if user is not None and (not user or user.startswith("-") or _UNFIT.search(user) or set(user) & _SHELL):
            raise ValueError("not a login name")
        return user

    @field_validator("identity", "root")
    @classmethod
    def _whole_path(cls, path: str | None) -> str | None:
        if path is not None and (not path.startswith(("/", "~")) or _CONTROL.search(path)):
            raise ValueError("not a whole path: begin it with / or ~/")
        return path

    @field_validator("python")
    @classmethod
    def _one_program(cls, python: str) -> str:
        if not python or python.startswith(("-", "~")) or _CONTROL.search(python):
            raise ValueError("not a program: its name, or its path from / on")
        return python

    @model_validator(mode="after")
    def _warned_before_ended(self) -> Host:
        if self.kill_below_gib and self.warn_below_gib and self.warn_below_gib < self.kill_below_gib:
            raise ValueError("warn_below_gib is less than kill_below_gib: it would be ended before it is warned of")
        return self

    @model_validator(mode="after")
    def _cards_of_a_link(self) -> Host:
        if self.hca is not None and self.link is None:
            raise ValueError("hca names the cards of a link, and there is no link: name its interface too")
        return self

    @property
    def is_local(self) -> bool:
        """Whether this is the machine that the command runs on."""
        return self.name == LOCAL


def short_type(key_type: str) -> str:
    """A key type in a user's words: ED25519, ECDSA or RSA."""
    for word in ("ed25519", "ecdsa", "rsa"):
        if word in key_type:
            return word.upper()
    return key_type


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
        return cls(path, *_parsed(_document(path, _text(path)), path))

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
            next=f"{hint}To enrol it:  {_enrolment(name)}",
        )

    def choose(self, flag: str | None, env: Mapping[str, str]) -> Host:
        """The host that a command means: flag, then ``GX10_HOST``, then the file's ``default``, then ``local``.

        ``GX10_USER`` and ``GX10_REPO_PATH`` replace the user and the state root.
        """
        name, said = self._named(flag, env)
        if "," in name:
            raise RefusedError(
                f"{said} names several hosts: `go` and `plan` take two for one run over both, this takes one",
                next=f"one of them, or the same on each:  --each {name}",
            )
        return self._host(name, said, flag, env)

    def choose_all(self, flag: str | None, env: Mapping[str, str]) -> tuple[Host, ...]:
        """The host that a run is given to, or the two (``a,b``: ``a`` leads) that it is spread over, as ``choose``."""
        named, said = self._named(flag, env)
        names = [name.strip() for name in named.split(",")]
        if len(names) == 1:
            return (self._host(named, said, flag, env),)
        if not all(names):
            raise RefusedError(f"{said} holds an empty name", next="--host A,B")
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise RefusedError(f"{said} names {twice} twice: a run is spread over two hosts", next=f"--host {twice}")
        if len(names) > 2:
            raise RefusedError(
                f"{said} names {len(names)} hosts, and a run is spread over two at most",
                next=f"two of them:  --host {names[0]},{names[1]}\n"
                f"one of them, the first that is fit:  --lanes {','.join(names)}",
            )
        return tuple(self._linked(self._host(name, said, flag, env)) for name in names)

    def _named(self, flag: str | None, env: Mapping[str, str]) -> tuple[str, str]:
        """What a command names, and how it says so."""
        if flag is not None and not flag.strip():
            # A script's unset variable must not turn into another machine.
            raise RefusedError(f"--host {flag!r} names no host", next="latentforge dispatch hosts   lists them")
        name = flag or env.get("GX10_HOST") or self.default or LOCAL
        return name, f"--host {name!r}" if flag else f"GX10_HOST={name!r}"

    def _host(self, name: str, said: str, flag: str | None, env: Mapping[str, str]) -> Host:
        try:
            host = self.get(name)
        except RefusedError as error:
            if flag or not env.get("GX10_HOST"):
                raise
            raise RefusedError(f"{said} (environment variable): {error}", next=error.next) from None
        if (user := env.get("GX10_USER")) and not host.is_local:
            host = _changed(host, "user", user, "GX10_USER")
        if root := env.get("GX10_REPO_PATH"):
            host = _changed(host, "root", root, "GX10_REPO_PATH")
        return host

    def _linked(self, host: Host) -> Host:
        """The host itself; refused where its interface on the link to another is not known."""
        if host.is_local:
            raise RefusedError(
                "local cannot be one of two hosts: nothing says which interface leads to the other",
                next="enrol this machine by name:  latentforge dispatch enrol NAME --address ADDRESS --link INTERFACE",
            )
        if host.link is None:
            raise RefusedError(
                f"{host.name} has no link in {self.path}: its interface on the cable to the other host",
                next=f"latentforge dispatch enrol {host.name} --link INTERFACE   (there:  ip -br addr   lists them)",
            )
        return host

    def put(self, host: Host) -> None:
        """Write one host's table, in place of the one it had; what others wrote meanwhile stays."""
        check_name(host.name)
        real = self.path.resolve()  # a link into somebody's dotfiles stays one
        with writing():
            private_folder(real.parent)
            try:
                with FileLock(real.with_name(f".{real.name}.lock"), timeout=_LOCK_SECONDS):
                    self._put(host, real)
            except Timeout:
                raise RefusedError(
                    f"another command is writing {self.path}", next="the same command again, when it has ended"
                ) from None

    def _put(self, host: Host, real: Path) -> None:
        text = _text(self.path)
        now = _parsed(_document(self.path, text), self.path)[0]
        changed = with_table(text, host.name, host.model_dump(exclude_defaults=True))
        try:
            hosts = _parsed(tomllib.loads(changed), self.path)[0]
        except (tomllib.TOMLDecodeError, RefusedError):
            hosts = {}
        if hosts != {**now, host.name: host}:
            raise RefusedError(
                f"{self.path} is written in a way that cannot be changed safely (table [hosts.{host.name}])",
                next=f"edit it by hand, or write the host as one table [hosts.{host.name}]",
            )
        self.hosts = hosts
        write_atomic(real, changed.encode(), mode=real.stat().st_mode & 0o777 if real.exists() else 0o644)


def check_name(name: str) -> str:
    """A name that can be a TOML key, a file name and a word on a command line; refused otherwise."""
    if name == LOCAL:
        raise RefusedError("'local' is this machine; it is built in and needs no enrolment")
    if not _NAME.fullmatch(name):
        raise RefusedError(
            f"{name!r} cannot name a host: letters, digits, dot, hyphen and underscore only", next=_enrolment(name)
        )
    return name


def _enrolment(name: str) -> str:
    """The command that enrols what somebody typed for a host: its name, or ``user@name:port`` as ssh takes it."""
    user, at, rest = name.rpartition("@")
    rest, colon, port = rest.partition(":") if rest.count(":") == 1 else (rest, "", "")
    words = [*(["--user", user] if at else []), *(["--port", port] if colon else [])]
    named = [rest] if _NAME.fullmatch(rest) else ["NAME", *(["--address", rest] if rest[:1] not in ("", "-") else [])]
    return shlex.join(["latentforge", "dispatch", "enrol", *named, *words])


def problem(error: ValidationError) -> tuple[str, str]:
    """The field that a host's description fails at ("" for the whole), and what is wrong with which value of it."""
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    said = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, Host.model_fields, n=1)
        fields = ", ".join(name for name in Host.model_fields if name != "name")
        return field, "is no field of a host; " + (f"did you mean {near[0]!r}?" if near else f"there are: {fields}")
    return field, f"= {first['input']!r}: {said}" if field else said


def _changed(host: Host, field: str, value: str, variable: str) -> Host:
    try:
        return Host.model_validate({**host.model_dump(exclude_unset=True), "name": host.name, field: value})
    except ValidationError as error:
        raise RefusedError(f"{variable}{problem(error)[1].replace('= ', '=', 1)} (environment variable)") from None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise RefusedError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise RefusedError(f"{path} is not TOML: {error}") from error


def _document(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RefusedError(f"{path} is not TOML: {error}", next=_EXAMPLE) from error


_EXAMPLE = 'a host is written so:  [hosts.gx10]\n                       address = "gx10.lan"'


def _parsed(document: dict[str, Any], path: Path) -> tuple[dict[str, Host], str | None, dict[str, tuple[str, ...]]]:
    for key in document:
        if key not in (known := ("hosts", "default", "lanes")):
            near = difflib.get_close_matches(key, known, n=1)
            raise RefusedError(
                f"{path}: unknown key {key!r} (known: default, hosts, lanes)",
                next=f"did you mean {near[0]!r}?" if near else None,
            )
    hosts: dict[str, Host] = {}
    for name, table in _tables(document.get("hosts", {}), f"{path}: hosts").items():
        try:
            check_name(name)
        except RefusedError as error:
            raise RefusedError(f"{path}: hosts: {error}") from None
        if "name" in table:
            raise RefusedError(f"{path}: hosts.{name}.name = {table['name']!r}: the table's own name is the host's")
        try:
            hosts[name] = Host.model_validate({"name": name, "address": name, **table})
        except ValidationError as error:
            field, wrong = problem(error)
            where = f"hosts.{name}.{field} " if field else f"hosts.{name}: "
            raise RefusedError(f"{path}: {where}{wrong}", next=f"edit {path}") from None
    default = document.get("default")
    if default is not None and (not isinstance(default, str) or (default != LOCAL and default not in hosts)):
        raise RefusedError(
            f"{path}: default = {default!r} is not one of its hosts", next=f"one of: {', '.join([LOCAL, *hosts])}"
        )
    return hosts, default, _lanes(document.get("lanes", {}), hosts, path)


def _tables(found: Any, where: str) -> dict[str, dict[str, Any]]:
    """A table of tables; refused where it is anything else."""
    if not isinstance(found, dict):
        raise RefusedError(f"{where} = {found!r} is not a table of hosts", next=_EXAMPLE)
    for name, table in found.items():
        if not isinstance(table, dict):
            raise RefusedError(f"{where}.{name} = {table!r} is not a table", next=_EXAMPLE)
    return found


def _lanes(table: Any, hosts: Mapping[str, Host], path: Path) -> dict[str, tuple[str, ...]]:
    """The named lists of fallback hosts: ``[lanes]`` with a list of host names a name, in the order of preference."""
    if not isinstance(table, dict):
        raise RefusedError(f"{path}: lanes = {table!r} is not a table", next='[lanes]\nnight = ["gx10", "gx11"]')
    for name, listed in table.items():
        if not _NAME.fullmatch(name):
            raise RefusedError(f"{path}: {name!r} cannot name a lane", next="letters, digits, dot, hyphen, underscore")
        if name in hosts or name == LOCAL:
            raise RefusedError(f"{path}: lanes.{name} has the name of a host", next="give the lane another name")
        if not (isinstance(listed, list) and listed and all(isinstance(host, str) for host in listed)):
            raise RefusedError(f"{path}: lanes.{name} = {listed!r} is not a list of host names")
        for number, host in enumerate(listed):
            if host in listed[:number]:
                raise RefusedError(f"{path}: lanes.{name} names {host!r} twice")
            if host in table:
                raise RefusedError(f"{path}: lanes.{name} names the lane {host!r}", next="a lane is a list of hosts")
            if host != LOCAL and host not in hosts:
                raise RefusedError(
                    f"{path}: lanes.{name} names {host!r}, which is not one of its hosts",
                    next=f"latentforge dispatch enrol {host}   or take it out of the lane",
                )
    return {name: tuple(listed) for name, listed in table.items()}
