"""A laptop of its own for every test, fake jobs under the real agent, and real OpenSSH servers on loopback."""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent import exitrec, hardware, journal
from dispatch.agent.paths import Root
from dispatch.agent.reserving import reserve
from dispatch.building.build import BuildNames
from dispatch.building.warmup import warmup_identity, warmup_kin
from dispatch.hosts.enrol import enrol
from dispatch.hosts.facts import Machine
from dispatch.hosts.inventory import Host, Inventory
from dispatch.places import Places
from dispatch.planning.ask import Ask, asked
from dispatch.session import Session
from dispatch.transport.call import Transport
from dispatch.transport.open import open_transport
from latentforge.cli import main
from latentforge.spec.code import code_around
from latentforge.verdicts import ExitCode

CHECKOUT = Path(__file__).resolve().parents[2]
TRAINER = Path(__file__).with_name("fake_trainer.py")
SSHD = shutil.which("sshd") or ("/usr/sbin/sshd" if os.path.exists("/usr/sbin/sshd") else None)


def eventually(check: Callable[[], Any], what: str, seconds: float = 20.0) -> Any:
    """The first true value of a check, waited for with a deadline."""
    deadline = time.monotonic() + seconds
    while not (value := check()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what}")
        time.sleep(0.02)
    return value


def snapshot(*folders: Path) -> dict[str, tuple[int, int, bytes]]:
    """Every file below some folders with its time of change and its bytes; folders too."""
    seen: dict[str, tuple[int, int, bytes]] = {}
    for folder in folders:
        for path in [folder, *sorted(folder.rglob("*"))] if folder.exists() else []:
            found = path.lstat()
            content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
            seen[str(path)] = (found.st_mode, found.st_mtime_ns, content)
    return seen


@pytest.fixture(name="eventually")
def _eventually() -> Callable[..., Any]:
    return eventually


@pytest.fixture(name="snapshot")
def _snapshot() -> Callable[..., dict[str, Any]]:
    return snapshot


@dataclass
class Laptop:
    """Where one test's laptop keeps things, and how a user starts commands on it."""

    home: Path
    env: dict[str, str]
    places: Places

    @property
    def cwd(self) -> Path:
        return self.home / "work"

    def cli(
        self, *words: str, cwd: Path | None = None, group: str = "dispatch", **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end, here: a process of its own costs a start-up, and gives the same bytes."""
        out, err, was = io.StringIO(), io.StringIO(), dict(os.environ)
        os.environ.clear()
        os.environ.update({**self.env, **env})
        try:
            with contextlib.chdir(cwd or self.cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                code = main([group, *words])
        finally:
            os.environ.clear()
            os.environ.update(was)
        return subprocess.CompletedProcess([group, *words], int(code), out.getvalue(), err.getvalue())

    def process(
        self, *words: str, cwd: Path | None = None, group: str = "dispatch", **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the command to its end, in a process of its own as a user's shell does."""
        argv = [sys.executable, "-P", "-m", "latentforge", group, *words]
        where, env = cwd or self.cwd, {**self.env, **env}
        return subprocess.run(argv, cwd=where, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(autouse=True)
def laptop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Laptop:
    """An isolated laptop: its own home, state, configuration and current folder."""
    home = tmp_path / "laptop"
    (home / "work").mkdir(parents=True)
    changes = {
        "HOME": str(home),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_CONFIG_HOME": str(home / "config"),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    for name in [*os.environ]:
        if name.startswith("GX10_") or name in ("DRY_RUN", "EVIDENCE_DIR", "STEPS", "BATCH_SIZE", "LR", "T", "ALPHA"):
            monkeypatch.delenv(name)
    for name, value in changes.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.chdir(home / "work")
    return Laptop(home, dict(os.environ), Places.from_environment(os.environ))


@dataclass
class Jobs:
    """What the next jobs do instead of training, and a list of every start of one."""

    folder: Path
    how: dict[str, Any] = field(default_factory=dict)
    """Of the student's run."""
    others: dict[str, Any] = field(default_factory=dict)
    """Of those before it."""

    @property
    def gate(self) -> Path:
        return self.folder / "gate"

    def hold_at(self, step: int) -> None:
        """Make jobs wait at a step until the gate is opened."""
        self.how |= {"wait_at": step, "gate": str(self.gate)}

    def open(self) -> None:
        self.gate.touch()

    def starts(self) -> list[str]:
        """The runs that were started, once for each start."""
        file = self.folder / "starts"
        return file.read_text().split() if file.exists() else []


@pytest.fixture
def jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Jobs:
    """Fake jobs, started by the real agent."""
    made = Jobs(tmp_path)

    def job(one: Any, facts: Any, plan: Any) -> tuple[list[str], dict[str, str]]:
        how = {**made.how, "starts": str(tmp_path / "starts")}
        how = how if one.kind == "distill" else {"steps": 3, "starts": how["starts"], **made.others}
        argv = [sys.executable, "-B", str(TRAINER), f"{facts.root}/runs/{one.run}", json.dumps(how)]
        return argv, {"PYTHONPATH": str(CHECKOUT)}

    monkeypatch.setattr("dispatch.apply.job", job)
    return made


@pytest.fixture(scope="session")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the code under test that nobody edits while the tests run: an edit would be other code, other runs."""
    copy = tmp_path_factory.mktemp("checkout")
    for name, path in code_around(CHECKOUT).files.items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy / name)
    return copy


@pytest.fixture
def ask(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ask]:
    """What `go tiny` asks of a host, from a checkout that this interpreter is said to run."""
    monkeypatch.setattr("dispatch.planning.ask.running_code", lambda: code_around(checkout))

    def make(host: Host | None = None, *overrides: str, **more: Any) -> Ask:
        env = more.pop("env", {})
        return asked("tiny", host or Host(name="local"), env=env, overrides=overrides, folder=checkout, **more)

    return make


@pytest.fixture
def session(laptop: Laptop) -> Iterator[Callable[..., Session]]:
    """Sessions with a host, closed at the end of the test."""
    opened: list[Transport] = []

    def make(host: Host | None = None, **more: Any) -> Session:
        opened.append(open_transport(host or Host(name="local"), laptop.places))
        return Session(opened[-1], laptop.places, **more)

    yield make
    for transport in opened:
        transport.close()


@pytest.fixture
def asked_verbs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The verbs that were sent to any host, in order."""
    sent: list[str] = []
    for name in ("call", "stream"):
        real = getattr(Transport, name)

        def ask(self: Transport, verb: str, *rest: Any, real: Any = real, **more: Any) -> Any:
            sent.append(verb)
            return real(self, verb, *rest, **more)

        monkeypatch.setattr(Transport, name, ask)
    return sent


@dataclass
class Aside:
    """A dispatch in a thread of its own, whose last run has begun."""

    run: str
    copy: Path
    """Where this laptop keeps the log of that run."""
    ended: list[Any]
    """What the dispatch gave or raised."""
    thread: threading.Thread

    def end(self, seconds: float = 60.0) -> Any:
        """Wait for the dispatch; what it gave or raised."""
        self.thread.join(seconds)
        return self.ended[0]


@pytest.fixture
def aside(laptop: Laptop, jobs: Jobs, session: Callable[..., Session]) -> Callable[..., Aside]:
    """Begins a dispatch to a host in a thread; returns once its last run was started."""

    def begin(host: Host, request: Ask, *, patience: float | None = None) -> Aside:
        dispatch, ended = session(host), []
        if patience is not None:
            dispatch.follower.patience = patience

        def go() -> None:
            try:
                ended.append(dispatch.go(request))
            except BaseException as error:
                ended.append(error)

        thread = threading.Thread(target=go)
        thread.start()
        run = eventually(lambda: [one for one in jobs.starts() if one.startswith("distill-")], "it starts", 60.0)[0]
        return Aside(run, laptop.places.followed(host.name, run) / "launch.log", ended, thread)

    return begin


@dataclass
class Sshd:
    """A real OpenSSH server on loopback, with keys and a log of its own."""

    folder: Path
    port: int
    address: str = "127.0.0.1"
    options: str = ""
    """Lines of sshd_config that go first, and so win."""
    env: dict[str, str] = field(default_factory=dict)
    """The environment of its sessions, beside an empty HOME: no test is steered, or slowed, by this user's rc files."""
    prefix: tuple[str, ...] = ()
    """The command that starts the server in another namespace."""
    process: subprocess.Popen[bytes] | None = None

    @property
    def key(self) -> Path:
        return self.folder / "user_key"

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def prepare(self) -> None:
        """A user's key that is let in, and a host key."""
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)], check=True)
        shutil.copy(self.key.with_suffix(".pub"), self.folder / "authorized_keys")
        self.make_host_key()

    def make_host_key(self, kind: str = "ed25519") -> str:
        """A new host key; returns its fingerprint."""
        path = self.folder / f"host_{kind}"
        for old in (path, path.with_suffix(".pub")):
            old.unlink(missing_ok=True)
        subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-f", str(path)], check=True)
        listed = subprocess.run(["ssh-keygen", "-lf", str(path)], check=True, capture_output=True, text=True)
        return listed.stdout.split()[1]

    def start(self) -> None:
        """Start listening; returns when connections are accepted."""
        config = self.folder / "sshd_config"
        self.home.mkdir(exist_ok=True)
        env = " ".join(f'"{name}={value}"' for name, value in ({"HOME": str(self.home)} | self.env).items())
        keys = "".join(f"HostKey {path}\n" for path in sorted(self.folder.glob("host_*")) if path.suffix != ".pub")
        config.write_text(
            f"{self.options}\nSetEnv {env}\nPort {self.port}\nListenAddress {self.address}\n{keys}"
            f"AuthorizedKeysFile {self.folder}/authorized_keys\n"
            "UsePAM no\nStrictModes no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            f"PidFile none\nLogLevel VERBOSE\nPermitRootLogin yes\n"
            + "MaxStartups 50\n"
            * ("MaxStartups" not in self.options)  # of this one, the last counts
        )
        assert SSHD is not None
        self.process = subprocess.Popen(
            [*self.prefix, SSHD, "-D", "-f", str(config), "-E", str(self.log)],
            env={"PATH": os.environ["PATH"]},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        eventually(self._listens, "sshd listens")

    def _listens(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError), socket.create_connection((self.address, self.port), timeout=1):
            return True
        return False

    def stop(self) -> None:
        """Stop listening and cut every connection."""
        if self.process is not None:
            self.cut()
            self.process.terminate()
            self.process.wait(10)
            self.process = None

    def sessions(self) -> list[int]:
        """The processes that serve connections."""
        assert self.process is not None
        listed = subprocess.run(["ps", "-eo", "pid=,ppid="], check=True, capture_output=True, text=True).stdout
        children: dict[int, list[int]] = {}
        for line in listed.splitlines():
            pid, parent = (int(word) for word in line.split())
            children.setdefault(parent, []).append(pid)
        sessions = children.get(self.process.pid, [])
        return [*sessions, *(pid for session in sessions for pid in children.get(session, []))]

    def cut(self) -> int:
        """Kill the processes that serve connections, with -9; returns how many there were."""
        sessions = self.sessions()
        for pid in sessions:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return len(sessions)

    def logins(self) -> int:
        """How many times somebody was let in."""
        return self.log.read_text().count("Accepted publickey") if self.log.exists() else 0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def sshd_at(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Sshd]]:
    """Makes OpenSSH servers; skipped with the reason where there is none on this machine."""
    if SSHD is None or shutil.which("ssh-keygen") is None:
        pytest.skip("no OpenSSH server on this machine (apt-get install openssh-server)")
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # its privilege separation folder
    made: list[Sshd] = []

    def make(**env: str) -> Sshd:
        server = Sshd(tmp_path_factory.mktemp("sshd"), free_port(), env=env)
        made.append(server)
        server.prepare()
        server.start()
        return server

    yield make
    for server in made:
        server.stop()


@pytest.fixture(scope="session")
def shared_sshd(sshd_at: Callable[..., Sshd]) -> Sshd:
    """One server for the tests that do it no harm."""
    return sshd_at()


@pytest.fixture
def enrolled(laptop: Laptop, tmp_path: Path) -> Callable[..., Host]:
    """Enrol a server as the command does, without its start-up, and give the host back."""

    def do(server: Sshd, name: str = "box", root: Path | None = None) -> Host:
        wanted = {"address": server.address, "port": server.port, "user": getpass.getuser()}
        wanted |= {"identity": str(server.key), "root": str(root or tmp_path / "remote"), "python": sys.executable}
        known = Inventory.load(laptop.places)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            code = enrol(name, wanted, laptop.places, known, replace=False, yes=True, expected=None)
        assert code is ExitCode.PASS, said.getvalue()
        return Inventory.load(laptop.places).get(name)

    return do


@pytest.fixture
def reached(laptop: Laptop) -> Iterator[Callable[..., Transport]]:
    """Transports, closed at the end."""
    opened: list[Transport] = []

    def reach(host: Host, **more: Any) -> Transport:
        opened.append(open_transport(host, laptop.places, **more))
        return opened[-1]

    yield reach
    for transport in opened:
        transport.close()


@pytest.fixture
def built() -> Callable[..., None]:
    """Pretend that a host has the build that a request needs, for tests whose jobs are fake."""

    def pretend(host: Host, request: Ask, *, warm: bool = True) -> None:
        names = BuildNames.of(request)
        assert host.root is not None
        for marker in (f"builds/{names.build}", f"venvs/{names.venv}"):
            folder = Path(host.root) / marker
            folder.mkdir(parents=True)
            os.chmod(host.root, 0o700)
            (folder / ".complete.json").write_text("{}")
        if warm:
            warmed(host, request)

    return pretend


def warmed(host: Host, request: Ask) -> None:
    """Pretend that the kernels of a build were proven on a host."""
    root = Root(host.root)
    identity = warmup_identity(request, Machine.model_validate(hardware.host(root.dir)))
    run = root.run(identity.run_id)
    launch = {"run": run.id, "kin": warmup_kin(request), "argv": ["true"], "env": {}, "lease": []}
    reserve(root, run.id, identity.canonical.decode(), launch)
    journal.record(run, "started", pid=1, ticks=0)
    exitrec.write(run.exit, {"run": run.id, "code": 0, "outcome": "pass", "class": "exited", "ended": 1.0})
