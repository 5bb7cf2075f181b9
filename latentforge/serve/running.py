"""The process of a server: its socket, its signals, from the loading of the model to a stop that finishes its work."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn

from latentforge.errors import CrashedError, LatentForgeError, RefusedError
from latentforge.serve.app import Service, build
from latentforge.serve.connections import Connection
from latentforge.serve.engine import Engine
from latentforge.serve.limits import Limits
from latentforge.serve.measures import Measures
from latentforge.writers.opening import Writer

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
_SWITCH = 0.0001
"""Seconds after which the thread that computes lets the event loop run: it waits so long after each line that it sends,
and at Python's 5 ms sixty-four streams would make everybody wait for a third of a second."""


@dataclass(frozen=True)
class Place:
    """Where a server listens, and for whom; RefusedError where that is not safe or not possible."""

    host: str
    port: int
    key: str | None
    origins: tuple[str, ...]

    def __post_init__(self) -> None:
        for origin in self.origins:
            parts = urlsplit(origin)
            said = f"{parts.scheme}://{parts.netloc}"
            if said != origin or not parts.netloc or parts.scheme not in ("http", "https"):
                raise RefusedError(
                    f"--cors {origin!r} is no origin of a web page", next="--cors https://example.org, each by itself"
                )

    def bind(self) -> socket.socket:
        """A socket that listens there."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)[0]
        except (OSError, UnicodeError) as error:
            said = error.strerror if isinstance(error, OSError) else "no name of a machine"
            raise RefusedError(f"--host {self.host}: {said}", next="--host 127.0.0.1") from None
        if self.key is None and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
            raise RefusedError(
                f"--host {self.host}: without a key, whoever reaches this machine could ask",
                next="--api-key-env NAME or --api-key-file FILE, or --host 127.0.0.1",
            )
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            found.bind(address)
            found.listen()  # two that are bound and do not listen yet may have the same port
        except OSError as error:
            found.close()
            raise RefusedError(f"port {self.port} of {self.host}: {error.strerror}", next="--port 0") from None
        return found

    @property
    def hosts(self) -> list[str] | None:
        """The names that a request may give this server; None with a key: then any."""
        return None if self.key is not None else [*_LOOPBACK, self.host, f"[{self.host}]"]


def read_key(variable: str | None, file: Path | None, environ: Mapping[str, str]) -> str | None:
    """The key of an environment variable or of a file, None where neither is named; RefusedError where it is none."""
    if variable is not None and file is not None:
        raise RefusedError("--api-key-env and --api-key-file are two keys", next="name one")
    if variable is None and file is None:
        return None
    if variable is not None:
        where, key = f"--api-key-env {variable}", environ.get(variable, "")
    else:
        assert file is not None
        where = f"--api-key-file {file}"
        try:
            key = file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise RefusedError(f"{where} cannot be read: {type(error).__name__}") from None
    if not key or not all("!" <= character <= "~" for character in key):
        raise RefusedError(
            f"{where} holds no key: it is empty, or has spaces or other than ASCII characters",
            next="openssl rand -hex 32",
        )
    return key


def serve(
    opening: Callable[[], Writer], place: Place, limits: Limits, *, name: str, say: Callable[[str], None], as_json: bool
) -> None:
    """Serve until a signal asks to stop, then finish what is under way; LatentForgeError where there is no model.

    ``say`` is told, line by line, when it listens, is ready, stops and has stopped.
    """
    listener = place.bind()
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        asyncio.run(_serve(opening, place, limits, listener, name, _Teller(say, as_json)))
    finally:
        sys.setswitchinterval(before)
        listener.close()


@dataclass
class _Teller:
    say: Callable[[str], None]
    as_json: bool

    def tell(self, event: str, text: str, **facts: object) -> None:
        self.say(json.dumps({"event": event, **facts}) if self.as_json else text)


async def _serve(
    opening: Callable[[], Writer], place: Place, limits: Limits, listener: socket.socket, name: str, teller: _Teller
) -> None:
    host, port = listener.getsockname()[:2]
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def changed() -> None:
        if engine.failure is not None:
            server.should_exit = True
        elif engine.state == "ready":
            facts = service.served.facts()
            text = f"ready: {name} ({facts['kind']}, K = {facts['chunk']}, {facts['parameters']:,} parameters)"
            digests = "".join(f"\n  {part:<9} sha256 {digest}" for part, digest in facts["digests"].items())
            teller.tell("ready", text + digests, url=url, model=name, **facts)

    measures = Measures()
    engine = Engine(opening, limits, measures, asyncio.get_running_loop().call_soon_threadsafe, changed)
    service = Service(engine, limits, measures, name)
    app = build(service, key=place.key, hosts=place.hosts, origins=list(place.origins))
    server = _Server(app, engine, limits, teller)
    teller.tell("listening", f"{url}  loading the model; its description is at {url}/docs", url=url)
    engine.start()
    await server.serve(sockets=[listener])
    if engine.failure is not None:
        if isinstance(engine.failure, LatentForgeError):
            raise engine.failure
        raise CrashedError(f"the model could not be served: {type(engine.failure).__name__}") from engine.failure
    cut = f"; {engine.cut} texts were cut off after the grace time" if engine.cut else ""
    teller.tell("stopped", f"stopped{cut}", cut=engine.cut)
    engine.stop(0)  # nobody is left who could want a text scored


class _Server(uvicorn.Server):
    """uvicorn's, whose first signal lets the engine finish and whose second does not."""

    def __init__(self, app: object, engine: Engine, limits: Limits, teller: _Teller) -> None:
        self._engine, self._limits, self._teller = engine, limits, teller
        # What is cut off by the engine is still answered; what is not read then is cut off by uvicorn.
        wait = math.ceil(limits.grace) + 5
        super().__init__(
            uvicorn.Config(
                app,  # type: ignore[arg-type]
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_graceful_shutdown=wait,
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """While it serves, signals ask to stop; none is raised again afterwards, since it was obeyed. Those that its
        caller ignores, as under nohup, stay ignored."""
        loop = asyncio.get_running_loop()
        before = {one: signal.getsignal(one) for one in _SIGNALS}
        stopping = [one for one in _SIGNALS if before[one] != signal.SIG_IGN]
        for one in stopping:
            loop.add_signal_handler(one, self._asked_to_stop)
        try:
            yield
        finally:
            for one in stopping:
                loop.remove_signal_handler(one)
                signal.signal(one, before[one])

    def _asked_to_stop(self) -> None:
        if self.should_exit:
            self.force_exit = True
            self._engine.stop(0)
            return
        texts, grace = self._engine.stop(self._limits.grace), self._limits.grace
        again = "; once more ends it at once" if texts else ""
        self._teller.tell("stopping", f"stopping: what is under way ({texts}) has {grace:g} s{again}", texts=texts)
        self.should_exit = True
