"""Following a run by bytes: cursors, markers, long polls, and never a lost tail."""

from __future__ import annotations

import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent import protocol

from .conftest import AgentHost, Refusal, wait_for

_SPEAKER = """
import os, time
def say(name, text):
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(fd, text); os.close(fd)
said = 0
while True:
    wanted = len(os.listdir("out"))
    while said < wanted:
        said += 1
        os.write(1, b"line %d\\n" % said)
        say("events.jsonl", b'{"n":%d}\\n' % said)
    if os.path.exists("out/end"): break
    time.sleep(0.005)
"""


def read(host: AgentHost, run: str, cursors: dict[str, Any], **args: Any) -> tuple[dict[str, Any], dict[str, bytes]]:
    """One read: the result, and each stream's bytes; the cursors are moved on."""
    frame = host.frame("read", {"run": run, "streams": cursors, "max": 1 << 20, "wait": 0, **args})
    result, data, rest = frame.document["result"], {}, frame.payload
    for name in result["order"]:
        size = result["streams"][name]["bytes"]
        data[name], rest = rest[:size], rest[size:]
        cursors[name] = result["streams"][name]["cursor"]
    assert rest == b""
    return result, data


def test_reads_in_pieces_give_the_same_bytes_as_the_file(host: AgentHost) -> None:
    state = host.ran("import os; os.write(1, bytes(range(256)) * 40 + '日本'.encode() + b'\\xff\\0\\r'); print('end')")
    whole, cursors = b"", {"launch.log": None}
    for _ in range(100):
        result, data = read(host, state["run"], cursors, max=997)
        whole += data["launch.log"]
        assert len(data["launch.log"]) <= 997
        if result["streams"]["launch.log"]["eof"]:
            break
    assert whole == host.paths(state["run"]).log.read_bytes()


def test_a_follower_gets_every_byte_and_then_the_end(host: AgentHost) -> None:
    host.call("install")
    host.installed = True
    run = host.python(_SPEAKER)
    host.call("launch", chain=[run])
    cursors: dict[str, Any] = {"events.jsonl": None, "launch.log": None}
    seen = dict.fromkeys(cursors, b"")
    for number in range(1, 20):
        (host.paths(run).out / ("end" if number == 19 else f"word-{number}")).touch()
        result, data = read(host, run, cursors, wait=10)
        for name in seen:
            seen[name] += data[name]
    while not all(stream["eof"] for stream in result["streams"].values()):
        result, data = read(host, run, cursors, wait=10)
        for name in seen:
            seen[name] += data[name]
    assert result["state"]["state"] == "finished"
    assert seen["launch.log"] == b"".join(b"line %d\n" % number for number in range(1, 20))
    assert seen["events.jsonl"] == b"".join(b'{"n":%d}\n' % number for number in range(1, 20))


def test_a_waiting_read_returns_with_a_new_line_at_once(host: AgentHost) -> None:
    run = host.python(_SPEAKER)
    host.call("launch", chain=[run])
    cursors: dict[str, Any] = {"launch.log": None}
    waits = []
    for number in range(1, 6):
        reading = host.start("read", {"run": run, "streams": cursors, "max": 100, "wait": 20})
        wait_for(lambda pid=reading.pid: _asleep(pid))
        (host.paths(run).out / f"word-{number}").touch()
        line = wait_for(lambda n=number: b"line %d\n" % n in host.paths(run).log.read_bytes() and time.monotonic())
        frame = host.finish(reading)
        waits.append(time.monotonic() - line)
        assert frame.payload == b"line %d\n" % number
        cursors = {"launch.log": frame.document["result"]["streams"]["launch.log"]["cursor"]}
    assert sorted(waits)[2] < 0.2, waits
    host.call("cancel", run=run, grace=0)


def _asleep(pid: int) -> bool:
    """Whether the agent has come to its waiting loop (a short timed sleep, with its modules loaded)."""
    try:
        return (
            "nanosleep" in Path(f"/proc/{pid}/wchan").read_text()
            or "nanosleep" in Path(f"/proc/{pid}/stack").read_text()
        )
    except OSError:
        return True


def test_a_waiting_read_returns_when_the_state_changes(host: AgentHost) -> None:
    run = host.python("import os, time\nwhile not os.path.exists('out/end'): time.sleep(0.005)")
    host.call("launch", chain=[run])
    host.wait(run, "running")
    reading = host.start("read", {"run": run, "streams": {"launch.log": None}, "wait": 20, "known_state": "running"})
    (host.paths(run).out / "end").touch()
    begun = time.monotonic()
    result = host.finish(reading).document["result"]
    assert result["state"]["state"] in ("finishing", "finished")
    assert time.monotonic() - begun < 5
    assert host.call("read", run=run, streams={}, wait=20, known_state="running")["state"]["state"] == "finished"


def test_a_waiting_read_with_nothing_to_tell_ends_with_its_time(host: AgentHost) -> None:
    run = host.python("import time; time.sleep(600)")
    host.call("launch", chain=[run])
    begun = time.monotonic()
    result, data = read(host, run, {"launch.log": None}, wait=0.3)
    assert 0.3 <= time.monotonic() - begun < 5
    assert data == {"launch.log": b""}
    assert not result["streams"]["launch.log"]["eof"]
    host.call("cancel", run=run, grace=0)


def test_the_end_is_told_only_by_a_state_sampled_before_the_last_byte(host: AgentHost) -> None:
    run = host.python("import time; print('x', flush=True); time.sleep(600)")
    host.call("launch", chain=[run])
    cursors: dict[str, Any] = {"launch.log": None}
    wait_for(lambda: host.paths(run).log.exists() and host.paths(run).log.stat().st_size)
    result, _ = read(host, run, cursors)
    assert (result["state"]["state"], result["streams"]["launch.log"]["eof"]) == ("running", False)
    host.call("cancel", run=run, grace=0)
    result, _ = read(host, run, cursors)
    assert (result["state"]["state"], result["streams"]["launch.log"]["eof"]) == ("finished", True)


def test_a_run_that_was_taken_away_or_waits_for_a_launch_does_not_keep_its_follower(host: AgentHost) -> None:
    for run, state in ((host.python("pass"), "reserved"), ("data-" + "0" * 20, "absent")):
        begun = time.monotonic()
        result, _ = read(host, run, {"launch.log": None, "events.jsonl": None}, wait=20)
        assert result["state"]["state"] == state
        assert all(stream["eof"] for stream in result["streams"].values())
        assert time.monotonic() - begun < 5


def test_a_truncated_log_is_marked_and_read_from_its_start(host: AgentHost) -> None:
    state = host.ran("print('a long line of the log')")
    cursors: dict[str, Any] = {"launch.log": None}
    read(host, state["run"], cursors)
    host.paths(state["run"]).log.write_text("short\n")
    result, data = read(host, state["run"], cursors)
    assert result["streams"]["launch.log"]["truncated"] is True
    assert data["launch.log"] == b"short\n"
    result, data = read(host, state["run"], cursors)
    assert (result["streams"]["launch.log"]["truncated"], data["launch.log"]) == (False, b"")


@pytest.mark.parametrize("size", [300, 5_000, 100_000])
@pytest.mark.parametrize("told", [True, False], ids=["", "a cursor that says nothing of its end"])
def test_a_log_truncated_and_grown_beyond_the_cursor_between_two_looks_is_noticed(
    host: AgentHost, size: int, told: bool
) -> None:
    state = host.ran("pass")
    log, cursors = host.paths(state["run"]).log, {"launch.log": None}
    banner = b"the same first words at every start\n" * 8
    log.write_bytes(banner + b"old\n" * size)
    read(host, state["run"], cursors)
    if not told:
        del cursors["launch.log"]["tail"]  # type: ignore[attr-defined]
    os.truncate(log, 0)
    fresh = banner + b"new\n" * (size + 10)
    with open(log, "ab") as stream:
        stream.write(fresh)
    result, data = read(host, state["run"], cursors)
    # What is planted: without the digest of its end, a cursor goes on in the middle of other words.
    assert result["streams"]["launch.log"]["truncated"] is told
    assert data["launch.log"] == (fresh if told else b"new\n" * 10)
    result, data = read(host, state["run"], cursors)
    assert (result["streams"]["launch.log"]["truncated"], data["launch.log"]) == (False, b"")


@pytest.mark.parametrize("same_inode", [False, True])
def test_a_replaced_log_is_marked_and_read_from_its_start(host: AgentHost, same_inode: bool) -> None:
    state = host.ran("print('a line')")
    log = host.paths(state["run"]).log
    cursors: dict[str, Any] = {"launch.log": None}
    read(host, state["run"], cursors)
    if same_inode:  # as when the file system gives the freed inode to the new file
        log.write_text("another story, longer than the first\n")
    else:
        other = log.with_name("other")
        other.write_text("another story, longer than the first\n")
        os.replace(other, log)
    result, data = read(host, state["run"], cursors)
    assert result["streams"]["launch.log"]["replaced"] is True
    assert data["launch.log"] == b"another story, longer than the first\n"


def test_a_deleted_log_is_told_as_missing(host: AgentHost) -> None:
    state = host.ran("print('a line')")
    cursors: dict[str, Any] = {"launch.log": None}
    read(host, state["run"], cursors)
    host.paths(state["run"]).log.unlink()
    result, data = read(host, state["run"], cursors, wait=5)
    assert result["streams"]["launch.log"]["missing"] is True
    assert data["launch.log"] == b""


def test_only_the_streams_of_a_run_can_be_read(host: AgentHost) -> None:
    state = host.ran("pass")
    for bad in ({"launch.json": None}, {"../x": None}, {"launch.log": 3}, {"launch.log": {"offset": -1}}):
        with pytest.raises(Refusal, match="read: "):
            host.call("read", run=state["run"], streams=bad)
    with pytest.raises(Refusal, match="wait=60"):
        host.call("read", run=state["run"], streams={}, wait=60)


def test_a_file_is_fetched_in_pieces(host: AgentHost) -> None:
    state = host.ran("open('out/model', 'wb').write(bytes(range(256)) * 1000)")
    whole, offset, eof = b"", 0, False
    while not eof:
        frame = host.frame("fetch", {"run": state["run"], "path": "out/model", "offset": offset, "max": 100_000})
        whole += frame.payload
        offset, eof = offset + len(frame.payload), frame.document["result"]["eof"]
    assert whole == (host.paths(state["run"]).out / "model").read_bytes()


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "../secret",
        "out/../../secret",
        "./launch.log",
        "out//x",
        "link",
        "out/link/x",
        "fifo",
        "out",
        "a\0b",
    ],
)
def test_a_fetch_never_leads_outside_the_run(host: AgentHost, path: str) -> None:
    run = host.python("pass")
    folder = host.paths(run).dir
    (folder.parent / "secret").write_text("secret")
    os.symlink(folder.parent / "secret", folder / "link")
    os.symlink(folder.parent, folder / "out" / "link")
    os.mkfifo(folder / "fifo")
    with pytest.raises(Refusal) as refusal:
        host.frame("fetch", {"run": run, "path": path})
    assert refusal.value.code == 2


def test_follow_answers_until_the_last_byte_and_says_which_answer_is_the_last(host: AgentHost) -> None:
    run = host.python("import sys, time\nfor n in range(40):\n    print('line', n, flush=True); time.sleep(0.01)")
    host.call("launch", chain=[run])
    process = host.start("follow", {"run": run, "streams": {"launch.log": {}}, "seconds": 60.0, "quiet": 0.2})
    out, err = process.communicate(timeout=60)
    replies, content = [], b""
    while (frame := protocol.find_frame(out)) is not None:
        replies.append(frame.document["result"])
        content, out = content + frame.payload, frame.rest
    assert err == b""
    assert [reply["last"] for reply in replies] == [False] * (len(replies) - 1) + [True]
    assert replies[-1]["state"]["state"] == "finished"
    assert content == host.paths(run).log.read_bytes()
    assert all(later["clock"] >= earlier["clock"] for earlier, later in pairwise(replies))


def test_follow_of_a_quiet_run_gives_a_sign_of_life_and_ends_after_its_seconds(host: AgentHost) -> None:
    run = host.python("import time; time.sleep(60)")
    host.call("launch", chain=[run])
    host.wait(run, "running")
    process = host.start("follow", {"run": run, "streams": {"launch.log": {}}, "seconds": 1.0, "quiet": 0.2})
    out, _err = process.communicate(timeout=30)
    assert 4 <= out.count(b"=LF-BEGIN") <= 8
    host.call("cancel", run=run, grace=1.0)


def test_follow_ends_when_nobody_listens_any_more(host: AgentHost) -> None:
    run = host.python("import time; time.sleep(60)")
    host.call("launch", chain=[run])
    process = host.start("follow", {"run": run, "streams": {"launch.log": {}}, "seconds": 100.0, "quiet": 0.1})
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.wait(10) == 0
    host.call("cancel", run=run, grace=1.0)
