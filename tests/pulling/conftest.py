"""A hub on loopback that can be made to fail in every way that a hub does, and what the dispatch tests have."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import json
import re
import socket
import struct
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from _pytest.fixtures import FixtureFunctionDefinition

from dispatch.agent import exitrec

from ..agent import conftest as _agent
from ..dispatch import conftest as _dispatch

COMMIT = "c0ffee" * 6 + "c0de"
REPO = "acme/tiny-lm"


for _module in (_agent, _dispatch):
    globals().update({key: one for key, one in vars(_module).items() if isinstance(one, FixtureFunctionDefinition)})


def safetensors(rows: int, columns: int, fill: int = 7, name: str = "model.embed_tokens.weight") -> bytes:
    """A file with one fp32 tensor."""
    data = bytes((fill + at) % 251 for at in range(rows * columns * 4))
    header = json.dumps({name: {"dtype": "F32", "shape": [rows, columns], "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def tiny_model(vocabulary: int = 300, fill: int = 7) -> dict[str, bytes]:
    """The files of a model's repository, with some that are left out."""
    tokens = {f"t{number}": number for number in range(vocabulary)}
    config = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "vocab_size": vocabulary}
    return {
        "config.json": json.dumps(config).encode(),
        "tokenizer.json": json.dumps({"model": {"type": "BPE", "vocab": tokens}, "added_tokens": []}).encode(),
        "model.safetensors": safetensors(vocabulary, 256, fill),
        "extra/notes.txt": b"one folder down\n",
        "README.md": b"",
        "pytorch_model.bin": b"a pickle" * 100,
    }


def wanted(files: dict[str, bytes]) -> dict[str, bytes]:
    """Those of a repository's files that are pulled."""
    return {name: content for name, content in files.items() if not name.endswith(".bin")}


@dataclass
class Fault:
    """What happens to the next answers for paths that match, ``times`` of them."""

    path: str
    status: int | None = None
    cut: int | None = None
    """Bytes after which the connection is reset."""
    short: int | None = None
    """Bytes after which the answer ends as if it were whole."""
    content: bytes | None = None
    ignore_range: bool = False
    etag: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    stall: bool = False
    times: int = 1


@dataclass
class StubHub:
    """A hub with one repository, its faults, and what was asked of it."""

    files: dict[str, bytes]
    repo: str = REPO
    commit: str = COMMIT
    faults: list[Fault] = field(default_factory=list)
    asked: list[dict[str, Any]] = field(default_factory=list)
    page: int = 3
    redirect: bool = True
    token: str | None = None
    etags: dict[str, str] = field(default_factory=dict)
    port: int = 0
    packed: str | None = None
    """How the content of every answer is said to be packed."""
    elsewhere: str | None = None
    """The server that the second page of a list is said to be at."""
    stopping: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def asked_for(self, name: str) -> list[dict[str, Any]]:
        """The requests for one file's bytes."""
        return [one for one in self.asked if one["path"].startswith("/cdn/") and one["path"].endswith("/" + name)]

    @property
    def sent(self) -> int:
        """Bytes of files that left the hub."""
        return sum(one["sent"] for one in self.asked if one["path"].startswith("/cdn/"))

    def fault_for(self, path: str) -> Fault | None:
        for fault in self.faults:
            if fault.times and re.search(fault.path, path):
                fault.times -= 1
                return fault
        return None

    def rows(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = [{"type": "directory", "path": "extra", "size": 0, "oid": "0" * 40}]
        for name, content in sorted(self.files.items()):
            git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
            row: dict[str, Any] = {"type": "file", "path": name, "size": len(content), "oid": git}
            if name.endswith((".safetensors", ".bin")):
                sha256 = hashlib.sha256(content).hexdigest()
                row["lfs"] = {"oid": sha256, "size": len(content), "pointerSize": 130}
            rows.append(row)
        return rows


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StubHub

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: what was asked is kept."""

    def do_GET(self) -> None:
        hub, (path, _, query) = self.hub, self.path.partition("?")
        path = urllib.parse.unquote(path)
        note = {"path": path, "headers": dict(self.headers.items()), "sent": 0, "status": 0}
        hub.asked.append(note)
        self.note, self.fault = note, hub.fault_for(self.path)
        if self.fault is not None and self.fault.stall:
            hub.stopping.wait(60)
            return
        if self.fault is not None and self.fault.status is not None:
            self.answer(self.fault.status, b"no", self.fault.headers)
            return
        shut = hub.token is not None and not path.startswith("/cdn/")
        if shut and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.answer(401, b"no")
            return
        base = f"/api/models/{hub.repo}"
        if path.startswith(f"{base}/revision/"):
            known = path.rsplit("/", 1)[1] in ("main", "v1", hub.commit)
            self.answer(*((200, json.dumps({"sha": hub.commit}).encode()) if known else (404, b"")))
        elif path == f"{base}/tree/{hub.commit}":
            begin = int(urllib.parse.parse_qs(query).get("cursor", ["0"])[0])
            rows, headers = hub.rows(), {}
            if begin + hub.page < len(rows):
                following = f"{hub.elsewhere or hub.url}{path}?recursive=true&cursor={begin + hub.page}"
                headers["Link"] = f'<{following}>; rel="next"'
            self.answer(200, json.dumps(rows[begin : begin + hub.page]).encode(), headers)
        elif path.startswith(f"/{hub.repo}/resolve/{hub.commit}/") and hub.redirect:
            name = path.split("/", 5)[5]
            # Another origin, as the stores of large files are.
            self.answer(302, b"", {"Location": f"http://localhost:{hub.port}/cdn/{urllib.parse.quote(name)}"})
        elif path.startswith(("/cdn/", f"/{hub.repo}/resolve/{hub.commit}/")):
            self.file(path.split("/", 2)[2] if path.startswith("/cdn/") else path.split("/", 5)[5])
        else:
            self.answer(404, b"")

    def file(self, name: str) -> None:
        hub, fault = self.hub, self.fault
        if name not in hub.files:
            self.answer(404, b"")
            return
        content = fault.content if fault is not None and fault.content is not None else hub.files[name]
        if fault is not None and fault.etag is not None:
            hub.etags[name] = fault.etag
        etag = hub.etags.get(name, f'"{hashlib.md5(content).hexdigest()}"')
        headers = {"ETag": etag, "Accept-Ranges": "bytes"}
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        same = self.headers.get("If-Range", etag) == etag
        if found and same and not (fault is not None and fault.ignore_range):
            begin = int(found[1])
            if begin >= len(content):
                self.answer(416, b"")
                return
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            self.answer(206, content[begin:], headers)
        else:
            self.answer(200, content, headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.note["status"] = status
        fault = self.fault
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.hub.packed and status < 300:
            self.send_header("Content-Encoding", self.hub.packed)
        if fault is not None and fault.short is not None:
            content = content[: fault.short]  # and no length: only who knows the size can tell
            self.send_header("Connection", "close")
            self.close_connection = True
        else:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        cut = fault is not None and fault.cut is not None and fault.cut < len(content)
        content = content[: fault.cut] if cut and fault is not None else content
        with contextlib.suppress(OSError):
            self.wfile.write(content)
            self.note["sent"] = len(content)
            self.wfile.flush()
        if cut:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the hub's."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A hub with a tiny model, on a port of its own; HF_ENDPOINT names it."""
    made = StubHub(tiny_model())
    handler = type("Handler", (_Handler,), {"hub": made})
    server = _Server(("127.0.0.1", 0), handler)
    made.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", made.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("dispatch.pulling.listing.WAIT_SECONDS", 0.01)
    monkeypatch.setattr("dispatch.pulling.pull.WAIT_SECONDS", 0.01)
    monkeypatch.setattr("dispatch.pulling.pull.MARGIN", 1 << 20)
    yield made
    made.stopping.set()
    server.shutdown()
    server.server_close()
    thread.join(5)


@pytest.fixture
def on_host(hub: StubHub, tmp_path: Path) -> Callable[..., tuple[int, Path]]:
    """The host's program, called here: pulls the hub's model, and gives its exit code and the model's folder."""
    from dispatch.pulling.listing import Catalogue, resolve_url
    from dispatch.pulling.onhost import pull as program
    from dispatch.pulling.refs import parse_ref

    ref = parse_ref(f"{REPO}@{COMMIT}")
    listing = Catalogue(hub.url).files_of(ref)
    hub.asked.clear()

    def pull(**more: Any) -> tuple[int, Path]:
        file = tmp_path / "list.json"
        file.write_bytes(more.pop("listing", listing).content)
        asked = {"models": str(tmp_path / "models"), "name": ref.folder, "list": str(file), "margin": 0, "wait": 0.01}
        asked |= {"url": resolve_url(hub.url, ref), **more}
        was, sys.argv = sys.argv, ["pull", json.dumps(asked)]
        try:
            return program.main(), tmp_path / "models" / ref.folder
        finally:
            sys.argv = was

    return pull


def content_of(folder: Path) -> dict[str, bytes]:
    """The files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    return content_of


@pytest.fixture
def fault() -> Callable[..., Fault]:
    return Fault


@pytest.fixture
def pulled_files() -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    return wanted


@pytest.fixture
def model() -> Callable[..., dict[str, bytes]]:
    return tiny_model


class Gc:
    """Asks one host what can go, with proofs of what was collected, and has it removed."""

    def __init__(self, host: Any) -> None:
        self.host = host
        self.collected: dict[str, str] = {}

    def collect(self, *runs: str) -> None:
        for run in runs:
            record = exitrec.read(self.host.paths(run).exit)
            assert record is not None
            self.collected[run] = record["artifacts"]

    def wishes(self, **more: Any) -> dict[str, Any]:
        return {"keep": 1, "uncollected": False, "collected": self.collected, **more}

    def look(self, **more: Any) -> dict[str, Any]:
        found: dict[str, Any] = self.host.call("probe", gc=self.wishes(**more))["gc"]
        return found

    def goes(self, room: str = "runs", **more: Any) -> set[str]:
        return {item["name"] for item in self.look(**more)["items"] if item["room"] == room}

    def why(self, name: str, **more: Any) -> str:
        found = self.look(**more)
        return next(one["why"] for one in [*found["kept"], *found["items"]] if one["name"] == name)

    def apply(self, names: list[dict[str, Any]] | None = None, **more: Any) -> dict[str, Any]:
        names = names if names is not None else self.look(**more)["items"]
        rows = [{"room": one["room"], "name": one["name"]} for one in names]
        done: dict[str, Any] = self.host.call("gc", **self.wishes(**more), names=rows)
        return done


@pytest.fixture
def tidy(host: Any) -> Gc:
    return Gc(host)


@pytest.fixture
def running(host: Any) -> Iterator[Callable[..., str]]:
    """Starts runs that go on until the test ends."""
    gate = host.dir.parent / "gate"
    program = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.02)"
    started: list[str] = []

    def start(**fields: Any) -> str:
        run = str(host.python(program, **fields))
        host.call("launch", chain=[run])
        host.wait(run, "running")
        started.append(run)
        return run

    yield start
    gate.touch()
    for run in started:
        if host.paths(run).dir.exists():
            host.wait(run, "finished", "lost")


def ended_run(host: Any, program: str = "pass", **fields: Any) -> str:
    """A run that has ended."""
    return str(host.ran(program, **fields)["run"])


@pytest.fixture
def ended() -> Callable[..., str]:
    return ended_run
