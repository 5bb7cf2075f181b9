"""The live display of a run on a terminal: two or three lines that keep still while their numbers move."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dispatch.following.lines import LineReader
from dispatch.following.view import RunView, duration, sparkline
from dispatch.following.watching import unreachable
from dispatch.hosts.facts import RunState
from latentforge.events import Event

_BAR, _SPARK = 24, 14
_ACCENT = "cyan"


class LiveObserver:
    """Shows the run that is followed; what deserves to stay (verdicts, warnings, ends) is printed above."""

    def __init__(self, host: str, console: Console | None = None) -> None:
        self._host = host
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._state = RunState(state="queued")
        self._seen = time.monotonic()
        self._trouble = ""
        self._reader = LineReader()
        self._tail: list[str] = []
        self.views: dict[str, RunView] = {}
        self.run = ""
        self._position = ""

    def begin(self, run: str, position: int, of: int) -> None:
        """Turn to a run."""
        self.run = run
        self.views[run] = RunView(run)
        self._position = f"{position} of {of}" if of > 1 else ""
        self._reader, self._tail = LineReader(), []
        if self._live is None:
            self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def state(self, state: RunState) -> None:
        """Take the state in."""
        self._state, self._seen, self._trouble = state, time.monotonic(), ""

    def events(self, events: list[Event]) -> None:
        """Take events in; verdicts and warnings stay on the screen."""
        view = self.views[self.run]
        for event in events:
            view.feed(event)
            if event.kind == "warning":
                self._keep(f"warning: {view.warnings[-1]}", "yellow")

    def log(self, data: bytes, *, anew: bool) -> None:
        """Remember the last lines, for a run that tells no events (a build) or ends badly."""
        for line in self._reader.feed(data):
            self._tail = [*self._tail[-7:], line]

    def unreachable(self, seconds: float, error: BaseException, retry_in: float) -> None:
        """Show that the host does not answer."""
        self._trouble = unreachable(self.run, self._host, self.views[self.run], seconds, retry_in)

    def end(self, state: RunState) -> None:
        """Leave one line that says how the run ended."""
        self._state = state
        view = self.views[self.run]
        took = duration(state.seconds) if state.seconds is not None else ""
        if state.passed:
            self._keep(f"{self.run}  pass  {took}")
        else:
            for line in self._tail:
                self._keep(f"  {line}", "dim")
            self._keep(f"{self.run}  {state.outcome or state.state}  {took}", "red")
        view.done = view.total = None

    def close(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def render(self) -> Group:
        """What stands on the screen now."""
        view = self.views.get(self.run) or RunView(self.run)
        return Group(*(line for line in (self._head(view), self._progress(view), self._foot(view)) if line is not None))

    def _keep(self, line: str, style: str = "") -> None:
        self.console.print(Text(line, style=style))

    def _head(self, view: RunView) -> Text:
        elapsed = (self._state.seconds or 0.0) + (time.monotonic() - self._seen if self._state.going_on else 0.0)
        doing = view.phase or self._state.state
        who = f" {view.model}" if view.model not in ("", "student", doing) else ""
        head = Text.assemble((self.run, _ACCENT), f"  {self._host}  {doing}{who}  {_clock(elapsed)}")
        if self._position:
            head.append(f"   {self._position}", "dim")
        return head

    def _progress(self, view: RunView) -> Text | None:
        if self._trouble:
            return Text(f"  {self._trouble}", "yellow")
        if not view.total:
            return Text(f"  {self._tail[-1]}", "dim", no_wrap=True, overflow="ellipsis") if self._tail else None
        done, total = int(view.done or 0), int(view.total)
        line = Text("  ", no_wrap=True, overflow="ellipsis")
        line.append(f"step {done}/{total}  " if view.losses else f"{done}/{total}  ")
        line.append(*_bar(done / total))
        if view.losses:
            line.append(f"  loss {view.losses[-1]:.2f} {sparkline(list(view.losses), _SPARK)}")
        for name in ("kd", "ce"):
            if isinstance(value := view.last.get(name), int | float):
                line.append(f"  {name} {value:.2f}")
        if isinstance(rate := view.last.get("tokens_per_second"), int | float):
            line.append(f"  {_count(rate)} tok/s")
        if view.memory_bytes:
            line.append(f"  {view.memory_bytes / 2**30:.1f} GiB")
        if (eta := self._eta(view)) is not None:
            line.append(f"  eta {_clock(eta)[3:]}" if eta < 3600 else f"  eta {_clock(eta)}")
        return line

    def _eta(self, view: RunView) -> float | None:
        """Seconds left at the pace of the last step, on the host's own figures."""
        rate, rows = view.last.get("tokens_per_second"), view.last.get("rows")
        if not view.losses or not isinstance(rate, int | float) or not isinstance(rows, int) or rate <= 0:
            return None
        return (int(view.total or 0) - int(view.done or 0)) * rows / rate

    def _foot(self, view: RunView) -> Text | None:
        parts = [f"{name} {duration(seconds)}" for name, seconds in list(view.phases.items())[-4:]]
        if view.ready:
            parts.append(f"{view.compiles} compiles since ready")
        if view.checkpoint:
            parts.append(f"checkpoint step {view.checkpoint.get('step')} ({_size(view.checkpoint.get('bytes'))})")
        return Text("  " + " · ".join(parts), "dim", no_wrap=True, overflow="ellipsis") if parts else None


def _bar(share: float) -> tuple[str, str]:
    full = max(0.0, min(1.0, share)) * _BAR
    partial = " ▏▎▍▌▋▊▉"[int(full % 1 * 8)].strip()
    bar = "█" * int(full) + partial
    return bar + "·" * (_BAR - len(bar)), _ACCENT


def _clock(seconds: float) -> str:
    whole = max(0, int(seconds))
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _count(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _size(count: Any) -> str:
    return f"{count / 1e6:.0f} MB" if isinstance(count, int) and count >= 1e6 else f"{(count or 0) / 1e3:.0f} kB"
