"""What the text of a log may add to its events: a reason, a warning or red, never green."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dispatch.following.lines import Lines, single_line
from dispatch.following.losses import Remark
from latentforge.events import Event
from latentforge.verdicts import FALSIFIER_ID, parse_line

_VERDICT = re.compile(rf"^\W*(?:{FALSIFIER_ID.pattern})\W+(?:PASS|FAIL|UNKNOWN)\b")
_STEP = re.compile(r"step (\d+)/\d+ (?:(?!loss )(\w+) )?loss (\S+)")
_SKIPPED = re.compile(r"\b(?:skip(?:s|ped|ping)?|disabled|not (?:run|needed|done|available))\b", re.I)
_DONE = re.compile(r"✓|✔|\b(?:done|complete[d]?|succe(?:ss|eded)|ready|finished|ok|pre-?warmed|warmed)\b", re.I)
_CHECKPOINT = re.compile(r"\bcheckpoint", re.I)
_TROUBLE = re.compile(r"\b(?:fail(?:ed|s|ure)?|error|could not|cannot|unable|training continues)\b", re.I)
_NO_TROUBLE = re.compile(r"\b(?:0|no|without) (?:errors?|failures?)\b", re.I)
_ENDED = re.compile(r"^(?:Killed|Out of memory|.*\bCUDA out of memory\b|.*\bpanicked at\b|Segmentation fault)", re.I)
_WORD = re.compile(r"[a-z][a-z0-9-]{2,}")
_NO_SUBJECT = frozenset(
    {"the", "and", "for", "with", "was", "were", "has", "have", "not", "all", "are", "its", "this", "that", "run"}
    | {"done", "complete", "completed", "success", "succeeded", "ready", "finished", "available", "needed", "step"}
    | {"skip", "skips", "skipped", "skipping", "disabled", "warning", "info", "debug"}
)
_FLOOD, _LOOKED, _LONGEST = 512 << 10, 64 << 10, 2000
_NEAR, _KEPT_STEPS, _COMPARED, _KEPT_REMARKS = 20, 4096, 1000, 50
_LITERALS = (
    *("f-", "skip", "disabled", "not run", "not needed", "not done", "not available"),
    *("checkpoint", "killed", "out of memory", "panicked", "segmentation"),
)


@dataclass(frozen=True)
class Mismatch:
    """A line that says otherwise than the events: the event counts, the line is kept."""

    what: str
    line: str


class TextRules:
    """Reads a run's log beside its events, which must have been fed as far as the log tells.

    The cost is bounded: lines that hold no word of interest are not looked at; of the step lines in one chunk the first
    thousand are compared; and of more than 512 Ki characters that come at once, only what reads as a verdict is looked
    for between the first and the last 64 Ki.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._losses: dict[tuple[str, int], str] = {}
        self._verdicts: set[tuple[str, str]] = set()
        self._skipped: deque[tuple[int, frozenset[str], str]] = deque(maxlen=_NEAR)
        self._line = 0
        self._told: set[str] = set()
        self._failed_checkpoint = ""
        self.mismatches: list[Mismatch] = []
        self.uncounted = 0
        """Mismatches beyond those that are kept."""

    def feed(self, event: Event) -> None:
        """Take an event of this run in."""
        fields = event.fields
        loss, step = fields.get("loss"), fields.get("step")
        if event.kind == "step" and isinstance(loss, int | float) and isinstance(step, int):
            self._losses[str(fields.get("model", "")), step] = f"{loss:.4f}"
            if len(self._losses) > _KEPT_STEPS:
                del self._losses[next(iter(self._losses))]
        elif event.kind == "verdict":
            self._verdicts.add((str(fields.get("falsifier")), str(fields.get("outcome")).upper()))
        elif event.kind == "checkpoint":
            self._failed_checkpoint = ""  # what was said of one that failed is overtaken by one that is whole

    def backed(self, line: str) -> bool:
        """Whether a line that reads as a verdict is this run's: by its id, and by an event that says the same."""
        said = parse_line(line)
        return said is not None and said.run == self._run and (said.falsifier, said.outcome.name) in self._verdicts

    def read(self, lines: Lines) -> tuple[Lines, list[Remark]]:
        """The lines as they may be shown, and what is to be remarked on them."""
        text = lines.text
        begin, end = text.find("\n", _LOOKED), text.rfind("\n", 0, max(0, len(text) - _LOOKED))
        if len(text) <= _FLOOD or not 0 < begin < end:
            shown, remarks = self._look_at(several := list(lines))
            return (Lines.of(shown) if shown is not several else lines), remarks
        first, early = self._look_at(one := text[:begin].split("\n"))
        self._line += _NEAR
        middle = self._marked(between := text[begin + 1 : end])
        last, late = self._look_at(other := text[end + 1 :].split("\n"))
        if first is not one or middle is not between or last is not other:
            lines = Lines.of([*first, middle, *last])
        return lines, early + late

    def _marked(self, text: str) -> str:
        """Text of which only the lines that may read as verdicts are looked at."""
        parts, done, at = [], 0, text.find("F-")
        while at >= 0:
            start, end = text.rfind("\n", 0, at) + 1, text.find("\n", at)
            end = len(text) if end < 0 else end
            if (shown := self._shown(line := text[start:end])) is not line:
                parts += [text[done:start], shown]
                done = end
            at = text.find("F-", end)
        return "".join([*parts, text[done:]]) if parts else text

    def _shown(self, line: str) -> str:
        if not _VERDICT.search(line) or self.backed(line):
            return line
        self._mismatch("a line reads as a verdict that no event of this run gives", line)
        return f"(not this run's verdict, no event of it says so) {line}"

    def _look_at(self, lines: list[str]) -> tuple[list[str], list[Remark]]:
        """As ``read``; the very same list where nothing is to be shown otherwise."""
        steps = [line for line in lines if line.startswith("step ")][:_COMPARED]
        for line in steps:
            self._compare(line)
        block = "\n".join(lines).lower()
        if not any(word in block for word in _LITERALS) and not self._skipped:
            self._line += len(lines)
            return lines, []
        remarks: list[Remark] = []
        shown = lines
        for number, line in enumerate(lines):
            self._line += 1
            if line.startswith("step "):
                continue
            if "F-" in line and (said := self._shown(line)) is not line:
                shown = list(lines) if shown is lines else shown
                shown[number] = said
            if len(line) <= _LONGEST:
                remarks += self._judge(line)
        return shown, remarks

    def finish(self) -> list[Remark]:
        """What is left to be said when the run has ended."""
        if not self._failed_checkpoint:
            return []
        text = f"a checkpoint failed, and none that is whole came after: {self._failed_checkpoint}"
        return [Remark("red", "checkpoint", text)]

    def _judge(self, line: str) -> Iterable[Remark]:
        if _CHECKPOINT.search(line) and _TROUBLE.search(line) and not _NO_TROUBLE.search(line):
            self._failed_checkpoint = single_line(line, 200)
            yield from self._once("warning", "checkpoint", f"the log speaks of a failed checkpoint: {line}")
        if _ENDED.match(line):
            yield from self._once("warning", "ended", f"the log says: {line}")
        skipped, done = _SKIPPED.search(line), _DONE.search(line)
        if not skipped and not done:
            return
        subject = _subject(line)
        if done and not skipped:
            for at, other, earlier in self._skipped:
                if self._line - at <= _NEAR and _same(subject, other):
                    told = f"contradiction: {single_line(line, 120)!r} after {single_line(earlier, 120)!r}"
                    self._mismatch("a success is told of what was skipped", line)
                    yield from self._once("warning", f"contradiction {sorted(subject)}", told)
                    break
        elif skipped:
            self._skipped.append((self._line, subject, line))

    def _once(self, colour: Any, rule: str, text: str) -> Iterable[Remark]:
        if rule not in self._told and len(self._told) < _KEPT_REMARKS:
            self._told.add(rule)
            yield Remark(colour, rule, single_line(text))

    def _compare(self, line: str) -> None:
        said = _STEP.match(line)
        if said is None:
            return
        number, model, loss = said.groups()
        known = self._losses.get((model or "student", int(number[:15])))
        if known is not None and loss != known:
            self._mismatch(f"the event of this step says loss {known}", line)

    def _mismatch(self, what: str, line: str) -> None:
        if len(self.mismatches) < _KEPT_REMARKS:
            self.mismatches.append(Mismatch(what, single_line(line, 200)))
        else:
            self.uncounted += 1


def _subject(line: str) -> frozenset[str]:
    """The words that say what a line is about, without their endings."""
    words = _WORD.findall(_DONE.sub(" ", _SKIPPED.sub(" ", line)).lower()) + _WORD.findall(line.lower())
    return frozenset(re.sub(r"(?:ing|ed|s)$", "", word) for word in words if word not in _NO_SUBJECT)


def _same(one: frozenset[str], other: frozenset[str]) -> bool:
    common = len(one & other)
    return common >= 2 and 2 * common >= min(len(one), len(other))
