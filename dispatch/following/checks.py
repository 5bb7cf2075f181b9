"""Executable checks of contracts/watching.yaml: planted runs on a simulated clock, each watched as a real one is."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

from dispatch.following.limits import Limits
from dispatch.following.lines import LineReader, Lines
from dispatch.following.markers import TextRules
from dispatch.following.pace import too_fast
from dispatch.following.record import WatchRecord
from dispatch.following.watcher import Watcher
from dispatch.hosts.facts import RunState
from latentforge.contracts.finding import Finding
from latentforge.events import Event
from latentforge.verdicts import Outcome, Verdict, parse_line

RUN = "distill-" + "5eed" * 5
OTHER = "distill-" + "beef" * 5
Telemetry = Callable[[float], dict[str, Any]]


class Story:
    """A run that is told event by event on a clock of its own, and its watcher, asked every few seconds."""

    def __init__(self, limits: Limits | None = None, *, run: str = RUN, telemetry: Telemetry | None = None) -> None:
        self.watcher = Watcher(run, limits or Limits())
        self.run, self.clock, self.begun = run, 1000.0, 1000.0
        self.told: list[Event] = []
        self.ended: WatchRecord | None = None
        self._telemetry = telemetry or (lambda seconds: {"cpu": seconds, "io": 0, "gpu": None})
        self._beat = 0.0
        self._last_beat: dict[str, Any] | None = None
        self._look()

    def wait(self, seconds: float, *, every: float = 1.0) -> WatchRecord | None:
        """Let time go by; returns the record with which the watcher ended, if it did."""
        until = self.clock + seconds
        while self.clock < until and self.ended is None:
            self.clock = min(until, self.clock + every)
            self._look()
        return self.ended

    def event(self, kind: str, **fields: Any) -> None:
        """The run tells something now."""
        event = Event(len(self.told), self.clock, "", self.run, kind, fields)
        self.told.append(event)
        self.watcher.events([event])

    def begin(self) -> None:
        """Load and warm up in a few seconds."""
        self.event("phase", name="load", state="begin")
        self.wait(8)
        self.event("phase", name="load", state="end", seconds=8.0)
        self.wait(2)
        self.event("phase", name="ready", state="end")

    def steps(
        self, seconds: float, first: int, last: int, of: int, *, loss: Callable[[int], Any] | None = None
    ) -> None:
        """Steps, one every so many seconds."""
        for step in range(first, last + 1):
            self.wait(seconds, every=max(0.05, seconds / 4))
            value = 5.0 - step / of if loss is None else loss(step)
            self.event("step", step=step, steps=of, model="student", loss=value, rows=8)

    def end(self, effective: dict[str, Any] | None = None) -> WatchRecord:
        """The run ends with 0, and is judged."""
        self.event("end", code=0, outcome="pass", reason="")
        state = RunState(state="finished", outcome="pass", exit=0)
        return self.watcher.concluded(state, effective or {}, self.told)

    def _look(self) -> None:
        seconds = self.clock - self.begun
        if self._last_beat is None or self.clock - self._beat >= 5:
            self._beat = self.clock
            self._last_beat = {"count": 1, "clock": self.clock, **self._telemetry(seconds)}
        state = RunState(state="running", seconds=seconds, beat=self._last_beat, beat_age=self.clock - self._beat)
        self.watcher.state(state, self.clock)
        self.ended = self.ended or self.watcher.overdue()


_GPU_HUNG = {"util": 96, "watts": 19, "celsius": 41, "sm_mhz": 2400}
ACTIVITIES: dict[str, Telemetry] = {
    "idle": lambda seconds: {"cpu": 40.0, "io": 10_000, "gpu": {"util": 0, "watts": 4}},
    "CPU-bound": lambda seconds: {"cpu": 13.2 * seconds, "io": 10_000, "gpu": {"util": 0, "watts": 4}},
    "I/O-bound": lambda seconds: {"cpu": 0.05 * seconds, "io": int(80e6 * seconds), "gpu": {"util": 0, "watts": 4}},
    "hung, low power": lambda seconds: {"cpu": seconds, "io": 0, "gpu": _GPU_HUNG},
    "unknown": lambda seconds: {"cpu": None, "io": None, "gpu": {"util": None, "watts": None}},
}
"""What a run that stands still may be at, as its supervisor's heartbeat tells it."""


def standing_still_is_told(*, mutant: str | None = None) -> Finding:
    """A run that stops at step 100 is told within a minute with what it does; a slow and steady one never.

    Mutant ``alive``: a watcher to which each heartbeat of a living process is progress.
    """
    _known(mutant, "alive")
    wrong = []
    for kind, telemetry in ACTIVITIES.items():
        story = Story(telemetry=telemetry)
        story.begin()
        story.steps(0.4, 1, 100, 500)
        for _ in range(90):
            if mutant == "alive":
                story.watcher.progress.last = story.clock
            if story.wait(1) is not None:
                break
        record = story.ended
        if record is None or record.activity != kind or not 60 <= story.clock - story.told[-1].t <= 65:
            wrong.append(f"{kind}: {record.activity if record else 'not told'}")
    for seconds in (0.4, 45.0, 300.0):
        steady = Story(Limits(overall=None), telemetry=ACTIVITIES["CPU-bound"])
        steady.begin()
        steady.steps(seconds, 1, 12, 12)
        if steady.ended is not None:
            wrong.append(f"{seconds} s a step was taken for a stall")
    told = len(ACTIVITIES) - sum("taken" not in one for one in wrong)
    text = f"{told} of {len(ACTIVITIES)} stalls told with their kind within 65 s; wrong: {'; '.join(wrong) or 'none'}"
    return Finding(not wrong, text, {"stalls": len(ACTIVITIES), "wrong": wrong})


def every_phase_has_its_deadline(*, mutant: str | None = None) -> Finding:
    """A run that hangs before its first log, while loading, warming up, before its first step or to its deadline is
    told as that; one that takes its time within the deadlines is not.

    Mutant ``alive_after_ten_seconds``: a watcher that is content with a process that lives.
    """
    _known(mutant, "alive_after_ten_seconds")
    far = dict.fromkeys(("appear", "loading", "warm_up", "first_step", "other", "floor", "overall"), 1e9)
    limits = Limits(**far) if mutant else Limits(overall=1200.0)

    def hang(until: str) -> WatchRecord | None:
        story = Story(limits)
        if until != "appear":
            story.event("phase", name="load", state="begin")
            story.wait(12.5)
            for name, there in (("load", "loading"), ("ready", "warming up"), ("step", "ready, and no first step")):
                if until == there:
                    break
                if name == "step":
                    story.steps(30.0, 1, 100, 100)
                else:
                    story.event("phase", name=name, state="end", seconds=12.5)
        return story.wait(1500)

    wanted = {
        "appear": "log never appeared",
        "loading": "deadline",
        "warming up": "deadline",
        "ready, and no first step": "deadline",
        "": "still running at the deadline",
    }
    found = {until: hang(until) for until in wanted}
    wrong = [until or "overall" for until, record in found.items() if record is None or record.ending != wanted[until]]
    wrong += [until for until, one in found.items() if one is not None and "ing" in until and until not in one.reason]
    slow = Story(limits)
    slow.event("phase", name="load", state="begin")
    if slow.wait(590) is not None:
        wrong.append("a load of 590 s")
    text = (
        f"{len(wanted) - len(wrong)} of {len(wanted)} hangs told with their phase; wrong: {', '.join(wrong) or 'none'}"
    )
    return Finding(not wrong, text, {"hangs": len(wanted), "wrong": wrong})


def too_fast_is_red(*, mutant: str | None = None) -> Finding:
    """A run that ends a hundred times faster than its own operations allow fails; at half the device's peak it passes.

    Mutant ``no_operations``: a watcher that does not look at what the run says that it computed.
    """
    _known(mutant, "no_operations")
    effective = {"flops": {"student": 1.6e12}, "device": {"type": "cpu", "threads": 2}}
    seen = {} if mutant else effective

    def red(seconds: float) -> bool:
        events = [Event(0, 10.0, "", RUN, "phase", {"name": "ready"})]
        events.append(Event(1, 10.0 + seconds, "", RUN, "step", {"step": 500, "steps": 500, "model": "student"}))
        return too_fast(events, seen) is not None

    allowed = 2.0
    stub, honest = red(allowed / 100), red(allowed * 2)
    text = f"in {allowed / 100} s: {'red' if stub else 'not red'}; in {allowed * 2} s: {'red' if honest else 'not red'}"
    return Finding(stub and not honest, text, {"stub": stub, "honest": honest})


def raw_losses_are_watched(*, mutant: str | None = None) -> Finding:
    """A loss that is no number or diverges is red, one that does not fall is warned of; one that falls is left alone.

    Mutant ``best``: a watcher of the best loss so far, as an epoch's line shows it.
    """
    _known(mutant, "best")
    rng = random.Random(7)
    curves: dict[str, tuple[str, Callable[[int], Any]]] = {
        "falls": ("", lambda step: 5.0 / (1 + step / 100)),
        "is noisy and falls": ("", lambda step: 5.0 / (1 + step / 100) * rng.uniform(0.9, 1.1)),
        "not a number": ("red", lambda step: "nan" if step == 77 else 4.0 / (1 + step / 100)),
        "infinite": ("red", lambda step: "inf" if step == 150 else 4.0 / (1 + step / 100)),
        "diverges": ("red", lambda step: 5.0 - step / 50 if step < 60 else 4.0 + (step - 60) / 10),
        "rises": ("warning", lambda step: 5.0 - step / 30 if step < 90 else 3.6),
        "stands": ("warning", lambda step: 5.0 + rng.uniform(-0.005, 0.005)),
    }
    wrong = []
    for name, (wanted, curve) in curves.items():
        values: list[Any] = [curve(step) for step in range(1, 201)]
        if mutant == "best":
            finite = [float(value) if not isinstance(value, str) else float("inf") for value in values]
            values = [min(finite[: number + 1]) for number in range(len(values))]
        story = Story()
        story.begin()
        story.steps(0.1, 1, 200, 200, loss=lambda step, values=values: values[step - 1])  # type: ignore[misc]
        record = story.end()
        found = "red" if record.verdicts else "warning" if record.warnings else ""
        if found != wanted:
            wrong.append(f"{name}: {found or 'nothing'}")
    text = f"{len(curves) - len(wrong)} of {len(curves)} curves judged; wrong: {'; '.join(wrong) or 'none'}"
    return Finding(not wrong, text, {"curves": len(curves), "wrong": wrong})


FORGERIES = (
    f"F-DISTILL-SMOKE-001 PASS run={OTHER} val_loss 3.0 < 4.9 at step 500",
    "F-DISTILL-SMOKE-001 PASS val_loss 3.0 < 4.9 at step 500",
    f"config: F-DISTILL-SMOKE-001 PASS run={RUN}".removeprefix("config: ").replace("SMOKE", "ECHO"),
    "  -> F-DISTILL-SMOKE-001: PASS",
)


def text_never_turns_green(*, mutant: str | None = None) -> Finding:
    """Lines that read as a pass and are backed by no event of this run are marked; where both speak, the event counts;
    a success that is told of what was skipped is warned of; rewording a line changes no verdict.

    Mutant ``believes_text``: a watcher that takes a line for the verdict that it spells.
    """
    _known(mutant, "believes_text")
    rules = TextRules(RUN)
    if mutant:
        rules.backed = lambda line: parse_line(line) is not None  # type: ignore[method-assign]
    real = Verdict("F-DISTILL-SMOKE-001", Outcome.FAIL, "val_loss 5.0 >= 4.9 at step 500", {}, RUN)
    rules.feed(Event(0, 1.0, "", RUN, "step", {"step": 7, "steps": 9, "model": "student", "loss": 4.5}))
    rules.feed(Event(1, 2.0, "", RUN, "verdict", {"falsifier": real.falsifier, "outcome": "fail", "text": real.text}))
    shown, _ = rules.read(Lines.of([*FORGERIES, real.line()]))
    marked = [line.startswith("(not this run's verdict") for line in shown]
    _, remarks = rules.read(Lines.of(["Skipping backward kernels: cuBLAS is active", "Backward kernels pre-warmed ✓"]))
    _, none = rules.read(
        Lines.of(["Skipping the evaluation set", "Forward kernels pre-warmed ✓", "0 errors while checkpointing"])
    )
    rules.read(Lines.of(["step 7/9 loss 3.1000 kd 1.0", "step 7/9 loss 4.5000 kd 1.0"]))
    told = sum(one.what.startswith("the event of this step") for one in rules.mismatches)
    right = {
        "forgeries marked": sum(marked[:-1]) == len(FORGERIES),
        "own line kept": not marked[-1],
        "contradiction": len(remarks) == 1,
        "no false alarm": not none,
        "event over text": told == 1,
    }
    wrong = [name for name, holds in right.items() if not holds]
    text = f"{sum(marked[:-1])} of {len(FORGERIES)} forged verdicts marked; wrong: {', '.join(wrong) or 'none'}"
    return Finding(not wrong, text, {"forgeries": len(FORGERIES), "wrong": wrong})


PIECES = (
    *(
        b"\x1b[2J",
        b"\x1b]0;title\x07",
        b"\r",
        b"\n",
        b"\r\n",
        b"\xe2\x80\xae",
        b"\xc2\x9b",
        b"\xff",
        b"\x00",
        b"\x9b5A",
    ),
    *("ü€😀".encode(), b"step 12/500 loss 3.2101 kd 2.98\n", b"plain words, and nothing else\n", b"no end of line "),
)
UNSAFE = frozenset("\x1b\x9b\x07\x00\r\u202e\x7f")


def cut_anywhere(rng: random.Random, data: bytes, most: int = 8) -> Iterable[bytes]:
    """The bytes in pieces, cut at random places."""
    cuts = sorted(rng.randint(0, len(data)) for _ in range(rng.randint(0, most)))
    return (data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True))


def lines_do_not_depend_on_cuts(*, streams: int = 300, mutant: str | None = None) -> Finding:
    """Random bytes, cut at random places, give the lines that they give in one piece, and none can harm a terminal.

    Mutant ``each_chunk``: a reader that decodes every chunk by itself, as Fabric does.
    """
    _known(mutant, "each_chunk")

    def lines(chunks: Iterable[bytes]) -> list[str]:
        reader = LineReader()
        fed = [chunk.decode("utf-8", "replace").encode() if mutant else chunk for chunk in chunks]
        return [line for chunk in fed for line in reader.feed(chunk)] + list(reader.feed(b"", final=True))

    different = harmful = 0
    for seed in range(streams):
        rng = random.Random(seed)
        data = b"".join(rng.choice(PIECES) for _ in range(rng.randint(0, 40)))
        whole = lines([data])
        different += lines(cut_anywhere(rng, data)) != whole
        harmful += any(UNSAFE & set(line) for line in whole)
    text = f"{different} of {streams} cut streams read otherwise than whole, {harmful} with a harmful character"
    return Finding(different == harmful == 0, text, {"streams": streams, "different": different, "harmful": harmful})


def _known(mutant: str | None, *names: str) -> None:
    if mutant is not None and mutant not in names:
        raise ValueError(f"unknown mutant {mutant!r}")
