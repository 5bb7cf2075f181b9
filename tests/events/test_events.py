"""Events can be read back as written, whatever was in them and however the writer died."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.events import EventLog, parse_event, read_events, standing
from latentforge.verdicts import ExitCode, Outcome, Verdict, parse_line

RUN = "distill-" + "0" * 20
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=st.text(), extra=_json)
def test_any_text_and_value_comes_back_as_written(tmp_path: Path, message: str, extra: Any) -> None:
    file = tmp_path / "events.jsonl"
    file.unlink(missing_ok=True)
    with EventLog(file, RUN, text=io.StringIO()) as log:
        log.warning(message)
        log.emit("metric", extra=extra)
    first, second = read_events(file)
    assert first.fields == {"message": message}
    assert second.fields == {"extra": extra}
    assert (first.seq, second.seq) == (0, 1)
    assert first.t <= second.t


@given(cut=st.integers(min_value=1))
def test_a_line_torn_by_a_crash_is_left_out_and_the_rest_is_read(tmp_path_factory: Any, cut: int) -> None:
    file = tmp_path_factory.mktemp("torn") / "events.jsonl"
    with EventLog(file, RUN, text=io.StringIO()) as log:
        for step in range(3):
            log.metric("val_loss", 1.0, step=step, split="held-out")
    content = file.read_bytes()
    last = content.rstrip(b"\n").rfind(b"\n") + 1
    file.write_bytes(content[: last + cut % (len(content) - last)])
    assert [event.seq for event in read_events(file)] == [0, 1]


@pytest.mark.parametrize(
    "line", ["", "{}", "[]", "null", "not json", '{"seq":0,"t":0,"wall":"","run":"","kind":"step2"}']
)
def test_a_line_that_is_no_event_is_refused(line: str) -> None:
    with pytest.raises(RefusedError, match="not an event"):
        parse_event(line)


def test_the_text_of_a_step_begins_with_step_and_shows_the_values_in_force(tmp_path: Path) -> None:
    text = io.StringIO()
    with EventLog(tmp_path / "e", RUN, text=text) as log:
        log.step(
            120, 500, model="student", loss=3.2101, kd=2.9817, ce=3.944, learning_rate=1e-3, rows=2032,
            tokens_per_second=41200.4, memory_bytes=int(11.2 * 2**30),
        )  # fmt: skip
    line = "step 120/500 loss 3.2101 kd 2.9817 ce 3.9440 lr 1.00e-03 tok/s 41200 mem 11.2GiB\n"
    assert text.getvalue() == line
    assert read_events(tmp_path / "e")[0].fields["rows"] == 2032


def test_a_verdicts_line_can_be_parsed_from_the_text(tmp_path: Path) -> None:
    text = io.StringIO()
    verdict = Verdict("F-DISTILL-SMOKE-001", Outcome.PASS, "val_loss 3.04 < 4.91 at step 500", {"a": 1}, RUN)
    with EventLog(tmp_path / "e", RUN, text=text) as log:
        log.verdict(verdict)
        log.end(ExitCode.PASS)
    assert parse_line(text.getvalue()) == Verdict(verdict.falsifier, verdict.outcome, verdict.text, run=RUN)
    assert read_events(tmp_path / "e")[-1].fields == {"code": 0, "outcome": "pass", "reason": ""}


def test_values_without_json_are_written_as_text_not_as_broken_json(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e", RUN, text=io.StringIO()) as log:
        log.emit("metric", value=float("nan"), list=[float("inf")])
    assert json.loads((tmp_path / "e").read_text())["value"] == "nan"
    assert read_events(tmp_path / "e")[0].fields["list"] == ["inf"]


def test_a_phase_that_raises_has_no_end(tmp_path: Path) -> None:
    with EventLog(tmp_path / "e", RUN, text=io.StringIO()) as log:
        with log.phase("load"):
            pass
        with pytest.raises(ZeroDivisionError), log.phase("train"):
            raise ZeroDivisionError
    told = [(event.fields["name"], event.fields["state"]) for event in read_events(tmp_path / "e")]
    assert told == [("load", "begin"), ("load", "end"), ("train", "begin")]
    assert list(log.timings) == ["load"]


def test_what_a_run_went_back_behind_does_not_stand_and_all_else_does(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, "distill-" + "0" * 20, text=io.StringIO()) as log:
        for model in ("student", "twin"):
            log.emit("metric", name="val_loss", value=9.0, step=0, model=model)
            for step in (1, 2, 3):
                log.emit("step", step=step, model=model, loss=float(step))
            log.emit("metric", name="val_loss", value=3.0, step=3, model=model)
        log.emit("phase", name="resume", state="end", model="student", step=1)
        log.emit("step", step=2, model="student", loss=20.0)
        log.emit("phase", name="resume", state="end", model="twin", step=3, steps=3)
        log.emit("metric", name="val_loss", value=3.0, step=3, model="twin")
        log.emit("warning", message="said once", step=3, model="student")
    found = [
        (e.kind, e.fields.get("model"), e.fields.get("step"), e.fields.get("loss")) for e in standing(read_events(path))
    ]
    assert [one[1:] for one in found if one[0] == "step"] == [
        ("student", 1, 1.0),
        ("twin", 1, 1.0),
        ("twin", 2, 2.0),
        ("twin", 3, 3.0),
        ("student", 2, 20.0),
    ]
    assert [one[1:3] for one in found if one[0] == "metric"] == [("student", 0), ("twin", 0), ("twin", 3)]
    assert ("warning", "student", 3, None) in found


def test_a_log_that_a_killed_process_left_is_gone_on_with_behind_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path, "distill-" + "0" * 20, text=io.StringIO()) as log:
        log.emit("phase", name="load", state="begin")
        log.emit("phase", name="load", state="end")
    with path.open("ab") as file:
        file.write(b'{"seq": 2, "t": 1.0, "wa')
    with EventLog(path, "distill-" + "0" * 20, text=io.StringIO()) as log:
        log.emit("end", code=0)
    assert [(event.seq, event.kind) for event in read_events(path)] == [(0, "phase"), (1, "phase"), (2, "end")]
