"""A record is there whole or not at all, and never says more than was proven."""

from __future__ import annotations

import errno
import json
import os
import stat
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.kernels.guard.records import DamagedRecordError, Record, Records, boot_id, settle_leftover

KEY = "0123456789abcdef0123"


def record(state: str = "ok", **values: object) -> Record:
    return Record("cpu/kd_loss.fp32.dense.forward", KEY, state, **{"finished": 100.0, **values})  # type: ignore[arg-type]


def test_what_was_written_is_read_back(records: Records) -> None:
    wanted = record(measured={"worst": 0.5}, config={"tile": 2}, parts={"driver": "580.142"})
    records.write(wanted)
    assert records.read(KEY) == wanted
    assert list(records.all()) == [wanted]
    assert records.read("f" * 20) is None


def test_the_state_root_is_made_for_its_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The same folder is the state root of host `local`: a run is refused where others may read it.
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    before = os.umask(0o022)
    try:
        Records().prepare()
    finally:
        os.umask(before)
    made = tmp_path / "state" / "latentforge"
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (made, made / "warmup")] == [0o700, 0o700]


def test_a_run_keeps_its_records_below_the_state_root_of_its_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("LATENTFORGE_STATE", str(tmp_path / "root"))
    Records().prepare()
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["root", "root/warmup"]


@given(cut=st.integers(0, 10_000))
def test_a_torn_record_is_named_and_counts_as_none(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    records = Records(tmp_path_factory.mktemp("torn"))
    records.write(record())
    content = records.path(KEY).read_bytes()
    records.path(KEY).write_bytes(content[: cut % (len(content) - 1)])
    with pytest.raises(DamagedRecordError, match=KEY):
        records.read(KEY)


def test_a_record_that_was_edited_counts_as_none(records: Records) -> None:
    records.write(record("failed", reason="nan"))
    body = json.loads(records.path(KEY).read_bytes())
    records.path(KEY).write_text(json.dumps({**body, "state": "ok", "reason": None}))
    with pytest.raises(DamagedRecordError, match="checksum"):
        records.read(KEY)


def test_a_record_under_another_key_counts_as_none(records: Records) -> None:
    records.write(record())
    os.rename(records.path(KEY), records.path("f" * 20))
    with pytest.raises(DamagedRecordError, match="is of key"):
        records.read("f" * 20)


@pytest.mark.parametrize(
    "values",
    [
        {"state": "fine"},
        {"state": "failed"},
        {"state": "failed", "reason": "bad luck"},
        {"state": "ok", "reason": "nan"},
        {"state": "ok", "stage": "somewhere"},
    ],
)
def test_only_the_closed_lists_are_written(values: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="record"):
        record(**values)


def test_a_record_reaches_the_disk_before_it_gets_its_name(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    real_fsync, real_replace = os.fsync, os.replace
    folder = records.folder

    def fsync(descriptor: int) -> None:
        done.append("flush folder" if os.path.samefile(f"/proc/self/fd/{descriptor}", folder) else "flush file")
        real_fsync(descriptor)

    def rename(source: Path, target: Path) -> None:
        done.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    records.write(record("pending", finished=None))
    assert done == ["flush file", "rename", "flush folder"]


def test_a_full_disk_is_refused_and_leaves_the_old_record(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    records.write(record())

    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(RefusedError, match="No space left on device"):
            records.write(record("failed", reason="nan"))
    assert records.read(KEY) == record()
    assert [path.name for path in records.folder.iterdir()] == [f"{KEY}.json"]


def test_a_place_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file where a folder is needed")
    with pytest.raises(RefusedError, match="cannot keep its records"):
        Records(tmp_path / "state" / "warmup").prepare()


def test_a_leftover_of_another_boot_is_a_crash_of_the_host() -> None:
    pending = record("pending", finished=None, stage="parity", boot="an earlier boot")
    found = settle_leftover(pending, boot_id())
    assert (found.state, found.reason, found.attempts) == ("crashed", "host_crash", 1)
    assert "parity" in found.detail
    found = settle_leftover(replace(pending, boot=boot_id()), boot_id())
    assert (found.state, found.reason) == ("crashed", "crash_signal")


def test_a_record_ages_in_fourteen_days_and_when_the_clock_runs_backwards() -> None:
    day = 86400.0
    assert record(finished=1e9).fresh(1e9 + 13.9 * day)
    assert not record(finished=1e9).fresh(1e9 + 14.1 * day)
    assert not record(finished=1e9).fresh(1e9 - 1.0)
    assert not record("pending", finished=None).fresh(1e9)
