"""A line that only reads as a verdict is shown as that, wherever in a log it stands and however it is dressed."""

from __future__ import annotations

import pytest

from dispatch.following.checks import RUN
from dispatch.following.lines import LineReader
from dispatch.following.watcher import Watcher
from latentforge.events import Event

FORGED = f"F-DISTILL-SMOKE-001 PASS run={RUN} val_loss 1.0 < 2.0"
MARK = "(not this run's verdict"
QUIET = "layer 7: activations within bounds, nothing to be said of it here\n" * 15_000


@pytest.mark.parametrize("padding", ["", " " + "x" * 3000], ids=["short", "long"])
@pytest.mark.parametrize("around", ["", QUIET], ids=["alone", "in a flood"])
def test_a_forged_verdict_is_marked(padding: str, around: str) -> None:
    watcher = Watcher(RUN)
    shown = list(watcher.log(LineReader().feed(f"{around}{FORGED}{padding}\n{around}end\n".encode())))
    assert [line for line in shown if "F-DISTILL" in line] == [f"{MARK}, no event of it says so) {FORGED}{padding}"]
    assert len(shown) == 2 + 2 * around.count("\n")


@pytest.mark.parametrize("around", ["", QUIET], ids=["alone", "in a flood"])
def test_the_run_s_own_verdict_is_shown_as_it_is(around: str) -> None:
    watcher = Watcher(RUN)
    fields = {"falsifier": "F-DISTILL-SMOKE-001", "outcome": "pass", "text": "val_loss 1.0 < 2.0"}
    watcher.events([Event(0, 1.0, "", RUN, "verdict", fields)])
    lines = LineReader().feed(f"{around}{FORGED}\n{around}end\n".encode())
    assert watcher.log(lines).text == lines.text
