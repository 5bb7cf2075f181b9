"""What was read of a run is kept so that reading resumes at the byte, in any process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.following.cursor import Reading


def reply(name: str, content: bytes, start: int, length: int, **marks: bool) -> tuple[dict[str, Any], list[str], bytes]:
    data = content[start : start + length]
    answer = {"bytes": len(data), "cursor": {"inode": 7, "offset": start + len(data), "head": "x"}, "missing": False}
    answer |= {"truncated": False, "replaced": False, **marks}
    return {name: answer}, [name], data


@settings(max_examples=50)
@given(content=st.binary(max_size=400), sizes=st.lists(st.integers(1, 90), min_size=1, max_size=20), data=st.data())
def test_any_interruption_leaves_the_host_s_bytes_exactly(
    tmp_path_factory: Any, content: bytes, sizes: list[int], data: st.DataObject
) -> None:
    folder: Path = tmp_path_factory.mktemp("reading")
    reading = Reading(folder, every=0.0)
    while True:
        offset = int(reading.cursors["launch.log"].get("offset") or 0)
        if offset == len(content):
            break
        size = data.draw(st.sampled_from(sizes))
        if data.draw(st.booleans()):
            # The command dies after the bytes are stored and before the cursor is.
            saved = (folder / "cursor.json").read_bytes() if (folder / "cursor.json").exists() else None
            reading.take(*reply("launch.log", content, offset, size))
            if saved is None:
                (folder / "cursor.json").unlink()
            else:
                (folder / "cursor.json").write_bytes(saved)
            reading = Reading(folder, every=0.0)
            size += 1
            offset = int(reading.cursors["launch.log"].get("offset") or 0)
        reading.take(*reply("launch.log", content, offset, size))
        if data.draw(st.booleans()):
            reading = Reading(folder, every=0.0)
    assert Reading(folder).stored("launch.log") == content


def test_two_commands_that_follow_one_run_do_not_double_its_bytes(tmp_path: Path) -> None:
    content = b"0123456789" * 10
    one, two = Reading(tmp_path), Reading(tmp_path)
    one.take(*reply("launch.log", content, 0, 60))
    two.take(*reply("launch.log", content, 0, 40))
    one.take(*reply("launch.log", content, 60, 40))
    two.take(*reply("launch.log", content, 40, 60))
    assert (tmp_path / "launch.log").read_bytes() == content


def test_a_replaced_file_is_read_anew(tmp_path: Path) -> None:
    reading = Reading(tmp_path)
    reading.take(*reply("launch.log", b"the old file", 0, 12))
    taken = reading.take(*reply("launch.log", b"new", 0, 3, replaced=True))
    assert taken["launch.log"] == (b"new", True)
    assert reading.stored("launch.log") == b"new"
    assert (tmp_path / "launch.log").read_bytes() == b"new"


def test_a_cursor_beyond_the_stored_bytes_is_not_believed(tmp_path: Path) -> None:
    (tmp_path / "cursor.json").write_text(json.dumps({"launch.log": {"inode": 1, "offset": 50, "head": "x"}}))
    (tmp_path / "launch.log").write_bytes(b"short")
    assert Reading(tmp_path).cursors["launch.log"] == {}
