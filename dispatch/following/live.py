"""The live display of runs on a terminal: two or three lines each that keep still while their numbers move."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from dispatch.following.lines import Lines
from dispatch.following.view import RunView, duration, short, sparkline
from dispatch.following.watching import unreachable
from dispatch.hosts.facts import RunState
from latentforge.events import Event

_BAR, _NARROW_BAR, _SPARK, _NARROW_SPARK = 24, 10, 14, 8
_NARROW = 90
_ACCENT = "cyan"


class Screen:
    """A terminal's lower lines, shared by the displays of all runs that are followed at once."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._live: Live | None = None
        self._shown: list[LiveObserver] = []

    @property
    def several(self) -> bool:
        """Whether more than one run is shown: then each keeps to two lines, and says whose its words are."""
        return len(self._shown) > 1

    def observer(self, host: str) -> LiveObserver:
        """A further run's display."""
        return LiveObserver(host, screen=self)

    def add(self, observer: LiveObserver) -> None:
        """Show an observer's lines too."""
        self._shown.append(observer)

    def start(self) -> None:
        """Begin to show, unless that was done."""
        if self._live is None:
            self._live = Live(get_renderable=self.render, console=self.console, refresh_per_second=4, transient=True)
            self._live.start()

    def stop(self) -> None:
        """Give the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def render(self) -> Group:
        """What stands on the screen now."""
        return Group(*(line for one in self._shown for line in one.lines()))


class LiveObserver:
    """Shows the run that is followed; what deserves to stay (verdicts, warnings, ends) is printed above."""

    def __init__(self, host: str, console: Console | None = None, screen: Screen | None = None) -> None:
        self._host = host
        self._own = screen is None
        self._screen = screen or Screen(console)
        self.console = self._screen.console
        self._screen.add(self)
        self._ended = False
        self._state = RunState(state="queued")
        self._seen = time.monotonic()
        self._trouble = ""
        self._tail: list[str] = []
        self.views: dict[str, RunView] = {}
        self.run = ""
        self._position = ""

    def begin(self, run: str, position: int, of: int) -> None:
        """Turn to a run."""
        self.run = run
        self.views[run] = RunView(run)
        self._position = f"{position} of {of}" if of > 1 else ""
        self._tail = []
        self._ended = False
        self._screen.start()

    def state(self, state: RunState) -> None:
        """Take the state in."""
        self._state, self._seen, self._trouble = state, time.monotonic(), ""

    def events(self, events: list[Event]) -> None:
        """Take events in; verdicts and warnings stay on the screen."""
        view = self.views[self.run]
        for event in events:
            view.feed(event)
            if event.kind == "warning":
                self.note(f"warning: {view.warnings[-1]}")

    def log(self, lines: Lines) -> None:
        """Remember the last lines, for a run that tells no events (a build) or ends badly."""
        self._tail = [*self._tail, *(line[:2000] for line in lines.last(8))][-8:]

    def note(self, line: str) -> None:
        """Leave a line of the watcher's own on the screen."""
        self._keep(line, "red" if " FAIL " in line else "yellow")

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
        self._ended = True

    def close(self) -> None:
        """Give the terminal back; that of several runs is given back by whoever shares it out."""
        if self._own:
            self._screen.stop()

    def lines(self) -> list[Text]:
        """What stands on the screen now."""
        if not self.run or (self._ended and self._screen.several):
            return []
        view = self.views.get(self.run) or RunView(self.run)
        found = [self._head(view), self._progress(view)]
        if not self._screen.several:
            found.append(self._foot(view))
        return [line for line in found if line is not None]

    def _keep(self, line: str, style: str = "") -> None:
        whose = f"{short(self.run)}  " if self._screen.several and self.run not in line else ""
        self.console.print(Text(whose + line, style=style))

    @property
    def _width(self) -> int:
        return self.console.width

    def _head(self, view: RunView) -> Text:
        elapsed = (self._state.seconds or 0.0) + (time.monotonic() - self._seen if self._state.going_on else 0.0)
        doing = view.phase or self._state.state
        who = f" {view.model}" if view.model not in ("", "student", doing) else ""
        run = self.run if self._width >= _NARROW else short(self.run)
        head = Text.assemble((run, _ACCENT), f"  {self._host}  {doing}{who}  {_clock(elapsed)}")
        if self._position:
            head.append(f"   {self._position}", "dim")
        return _one_line(head)

    def _progress(self, view: RunView) -> Text | None:
        if self._trouble:
            return _one_line(Text(f"  {self._trouble}", "yellow"))
        if not view.total:
            return _one_line(Text(f"  {self._tail[-1]}", "dim")) if self._tail else None
        done, total, narrow = int(view.done or 0), int(view.total), self._width < _NARROW
        parts: list[_Part] = [(0, f"step {done}/{total}" if view.losses else f"{done}/{total}", "")]
        parts.append((3, *_bar(done / total, _NARROW_BAR if narrow else _BAR)))
        if view.losses:
            parts.append((1, f"loss {view.losses[-1]:.2f}", ""))
            parts.append((5, sparkline(list(view.losses), _NARROW_SPARK if narrow else _SPARK), ""))
        for name in ("kd", "ce"):
            if isinstance(value := view.last.get(name), int | float):
                parts.append((8, f"{name} {value:.2f}", ""))
        if isinstance(rate := view.last.get("tokens_per_second"), int | float):
            parts.append((6, f"{_count(rate)} tok/s", ""))
        if view.memory_bytes:
            parts.append((7, f"{view.memory_bytes / 2**30:.1f} GiB", ""))
        gpu = (self._state.beat or {}).get("gpu")
        if isinstance(gpu, dict) and isinstance(celsius := gpu.get("celsius"), int | float):
            parts.append((4, f"{celsius:.0f} °C", ""))
        if (eta := self._eta(view)) is not None:
            parts.append((2, f"eta {_clock(eta)[3:]}" if eta < 3600 else f"eta {_clock(eta)}", ""))
        return _fitted(parts, self._width)

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
        return _one_line(Text("  " + " · ".join(parts), "dim")) if parts else None


_Part = tuple[int, str, str]
"""How dispensable a part of a line is (0: not at all), its text, its style."""


def _fitted(parts: Iterable[_Part], width: int) -> Text:
    """The parts in their order, without the most dispensable ones where the terminal is too narrow for all."""
    kept = list(parts)
    while len(kept) > 1 and 2 * len(kept) + sum(cell_len(text) for _rank, text, _style in kept) > width - 1:
        kept.remove(max(kept, key=lambda part: part[0]))
    line = Text()
    for _rank, text, style in kept:
        line.append("  ").append(text, style)
    return _one_line(line)


def _one_line(line: Text) -> Text:
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _bar(share: float, width: int) -> tuple[str, str]:
    full = max(0.0, min(1.0, share)) * width
    partial = " ▏▎▍▌▋▊▉"[int(full % 1 * 8)].strip()
    bar = "█" * int(full) + partial
    return bar + "·" * (width - len(bar)), _ACCENT


def _clock(seconds: float) -> str:
    whole = max(0, int(seconds))
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _count(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 1000 else f"{value:.0f}"


def _size(count: Any) -> str:
    return f"{count / 1e6:.0f} MB" if isinstance(count, int) and count >= 1e6 else f"{(count or 0) / 1e3:.0f} kB"
