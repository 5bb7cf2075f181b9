"""Runs to follow: launched and left by one command, watched by the next."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dispatch.following.limits import Limits
from dispatch.hosts.inventory import Host
from latentforge.verdicts import ExitCode


@dataclass
class Going:
    """A run that goes on, and how this laptop watches it."""

    run: str
    host: Host | None
    root: Path
    laptop: Any
    session: Callable[..., Any]
    capsys: Any

    @property
    def folder(self) -> Path:
        """The run's folder on its host."""
        return self.root / "runs" / self.run

    @property
    def copy(self) -> Path:
        """Where the laptop keeps what it read of the run."""
        return Path(self.laptop.places.followed(self.host.name if self.host else "local", self.run))

    @property
    def record(self) -> dict[str, Any]:
        """The verdict record of the last command that followed it."""
        return dict(json.loads((self.copy / "verdict.json").read_text()))

    def watch(self, *deadlines: str, stall: float | None = None, **more: Any) -> tuple[ExitCode, str]:
        """Watch it to the end; the exit code and what was printed."""
        self.capsys.readouterr()
        session = self.session(self.host, adjust=Limits.adjuster(deadlines, stall))
        for name, value in more.items():
            setattr(session.follower, name, value)
        code = session.watch(self.run, [self.run], {"digest": "x"})
        return code, self.capsys.readouterr().out

    def state(self) -> dict[str, Any]:
        """Its state on the host."""
        return dict(self.session(self.host).transport.call("status", {"runs": [self.run]}).result[self.run])


@pytest.fixture
def going(
    laptop: Any,
    jobs: Any,
    ask: Any,
    session: Any,
    built: Any,
    eventually: Any,
    capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Iterator[Callable[..., Going]]:
    """Launches a run that behaves as it is told, and leaves it; what still runs at the end is cancelled."""
    # A shell that runs the tests in the background has its jobs ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    made: list[Going] = []

    def go(host: Host | None = None, *overrides: str, **how: Any) -> Going:
        jobs.how.clear()
        jobs.how |= {"gate": str(jobs.gate), **how}
        request = ask(host, *overrides)
        if host is not None and not (Path(host.root or "") / "builds").exists():
            built(host, request)
        # By position: the same question put to another host is the same run, and starts there all the same.
        before = len(jobs.starts())
        assert session(host).go(request, detach=True) is ExitCode.PASS
        started = lambda: [one for one in jobs.starts()[before:] if one.startswith("distill-")]  # noqa: E731
        run = eventually(lambda: next(iter(started()), None), "it starts", 60.0)
        root = Path(host.root or "") if host else Path(laptop.home) / "state" / "latentforge"
        made.append(Going(run, host, root, laptop, session, capsys))
        return made[-1]

    yield go
    jobs.open()
    for one in made:
        eventually(lambda one=one: one.state()["state"] in ("finished", "lost", "interrupted"), "it ends", 60.0)
