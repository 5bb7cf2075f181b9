"""Watching in plain lines, for pipes and files, and the words that both displays share."""

from __future__ import annotations

import os
import sys
from typing import TextIO

from dispatch.following.lines import Lines
from dispatch.following.view import RunView, duration
from dispatch.hosts.facts import RunState
from latentforge.events import Event


class PlainObserver:
    """The run's own log lines, as they come, each as it is: ``grep`` works on them.

    With a ``prefix`` (several runs at once) each line says whose it is.
    """

    def __init__(self, host: str, out: TextIO | None = None, prefix: str = "") -> None:
        self._host = host
        self._out = out if out is not None else sys.stdout
        self._prefix = prefix
        self.views: dict[str, RunView] = {}
        self.run = ""

    def begin(self, run: str, position: int, of: int) -> None:
        """Say whose turn it is."""
        self.run = run
        self.views[run] = RunView(run)
        self.note(f"run {run} on {self._host}" + (f" ({position} of {of})" if of > 1 else ""))

    def state(self, state: RunState) -> None:
        """Nothing: the log tells."""

    def events(self, events: list[Event]) -> None:
        """Keep what the summary needs."""
        for event in events:
            self.views[self.run].feed(event)

    def log(self, lines: Lines) -> None:
        """Print whole lines."""
        self._say(lines.text)

    def note(self, line: str) -> None:
        """Print a line of the watcher's own."""
        self._say(line)

    def unreachable(self, seconds: float, error: BaseException, retry_in: float) -> None:
        """Say so, as often as it is tried."""
        self.note(unreachable(self.run, self._host, self.views[self.run], seconds, retry_in))

    def end(self, state: RunState) -> None:
        """Nothing: the last line has been printed."""

    def close(self) -> None:
        """Nothing to put back."""

    def _say(self, text: str) -> None:
        if self._prefix:
            text = self._prefix + text.replace("\n", f"\n{self._prefix}")
        try:
            # In one piece: what another run's thread prints must not get between a prefix and its line.
            self._out.write(text + "\n")
            self._out.flush()
        except BrokenPipeError:
            # The reader has what it wanted (`| grep -m1`); the run is still followed to its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())


def unreachable(run: str, host: str, view: RunView, seconds: float, retry_in: float) -> str:
    """The line that stands for a run whose host does not answer."""
    step = view.last.get("step")
    seen = f"last seen: step {step}" if step is not None else f"last seen: {view.phase or 'not started'}"
    return (
        f"UNKNOWN  {run}  {host} unreachable for {duration(seconds)} ({seen}). "
        f"Retrying in {retry_in:.1f} s; the run is not affected."
    )


def phase_lines(views: dict[str, RunView]) -> list[str]:
    """The time of each phase of each run that was followed."""
    lines = []
    for run, view in views.items():
        if view.phases:
            parts = ", ".join(f"{name} {duration(seconds)}" for name, seconds in view.phases.items())
            lines.append(f"  {run.partition('-')[0]:<13} {duration(view.seconds):>9}   {parts}")
    return ["time of each phase:", *lines] if lines else []
