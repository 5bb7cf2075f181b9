"""The live display fits its terminal, and shows what UX.md promises where there is room."""

from __future__ import annotations

import io

import pytest
from rich.cells import cell_len
from rich.console import Console

from dispatch.following.checks import OTHER, RUN
from dispatch.following.live import LiveObserver, Screen
from dispatch.hosts.facts import RunState
from latentforge.events import Event


def screen(width: int) -> Screen:
    console = Console(file=io.StringIO(), width=width, height=24, force_terminal=True, highlight=False, soft_wrap=True)
    return Screen(console)


def trained(observer: LiveObserver, run: str) -> None:
    observer.begin(run, 2, 4)
    gpu = {"util": 97, "watts": 82, "celsius": 71.4, "sm_mhz": 2300}
    observer.state(RunState(state="running", seconds=192.0, beat={"clock": 1.0, "gpu": gpu}))
    fields = {"model": "student", "steps": 500, "kd": 2.98, "ce": 4.02, "rows": 9000, "tokens_per_second": 41_200.0}
    fields["memory_bytes"] = int(11.2 * 2**30)
    observer.events([Event(0, 1.0, "", run, "phase", {"name": "training", "state": "begin"})])
    for step in range(1, 313):
        observer.events([Event(step, 1.0 + step, "", run, "step", {**fields, "step": step, "loss": 5.0 - step / 200})])


def shown(board: Screen) -> list[str]:
    """The lines as they stand on a terminal of that width."""
    paper = Console(file=io.StringIO(), width=board.console.width, highlight=False)
    paper.print(board.render())
    return str(paper.file.getvalue()).splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [40, 60, 80, 120, 200])
def test_every_line_keeps_to_the_terminal_and_the_step_is_always_there(width: int) -> None:
    board = screen(width)
    try:
        trained(board.observer("gx10"), RUN)
        lines = shown(board)
    finally:
        board.stop()
    assert max(map(cell_len, lines)) <= width, lines
    assert any("step 312/500" in line for line in lines)
    assert any("loss 3.44" in line for line in lines)
    if width >= 200:
        whole = "\n".join(lines)
        for part in (
            RUN,
            "gx10",
            "00:03:12",
            "█",
            "kd 2.98",
            "ce 4.02",
            "41.2k tok/s",
            "11.2 GiB",
            "71 °C",
            "eta 00:41",
        ):
            assert part in whole, whole


def test_several_runs_keep_to_two_lines_each_and_an_ended_one_leaves() -> None:
    board = screen(80)
    try:
        first, second = board.observer("one"), board.observer("two")
        trained(first, RUN)
        trained(second, OTHER)
        assert len(shown(board)) == 4
        first.end(RunState(state="finished", outcome="pass", exit=0, seconds=200.0))
        assert len(shown(board)) == 2
    finally:
        board.stop()


def test_what_a_run_says_cannot_move_the_cursor() -> None:
    board = screen(80)
    try:
        one = board.observer("gx10")
        trained(one, RUN)
        one.events([Event(900, 1.0, "", RUN, "warning", {"message": "evil \x1b[2J\x1b]0;title\x07 \u202ewords"})])
        one.events([Event(901, 1.0, "", RUN, "phase", {"name": "\x1b[31mred", "state": "begin", "seconds": "x"})])
        said = one.console.file.getvalue()  # type: ignore[attr-defined]
    finally:
        board.stop()
    assert "evil" in said
    assert "\x1b[2J\x1b]0" not in said
    assert "\u202e" not in said
    assert not any("\x1b" in line for line in shown(board))
