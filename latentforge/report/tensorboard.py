"""A run's numbers as an event file of TensorBoard, for those who live there.

Its own protobufs and its own writer of records make the file, imported when one is asked for: who reads such files has
TensorBoard. Only ``EventFileWriter`` is left out, since it names its file by the clock, the host and the process: here
a run has one file, the same bytes whenever it is written.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from latentforge.errors import RefusedError
from latentforge.events import Event, in_course
from latentforge.evidence.reading import RunRecord, as_number
from latentforge.report import telling
from latentforge.report.placing import whole
from latentforge.report.words import number, plain

_SKIPPED = frozenset({"step", "steps"})


def check_tensorboard() -> None:
    """RefusedError where TensorBoard, which makes its event files, is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise RefusedError(
            "--tensorboard needs the package tensorboard, which is not installed",
            next="in a checkout:  pip install '.[tensorboard]'",
        )


def write_events(record: RunRecord, folder: Path) -> Path:
    """Write the event file of a run into ``folder/<run>`` and return its path; the same file when written again.

    Each number of a step is ``<model>/<name>``, each metric ``<split>/<model>/<name>``, with the steps and times (UTC)
    of the run's own events; not-a-number stays what it is, as 32 bits hold it. ``report`` is a text: what happened, and
    the verdicts. The file is named by the run's first event, so that a run that went on replaces its own. OSError where
    it cannot be written, ModuleNotFoundError without TensorBoard.
    """
    from tensorboard.compat.proto import event_pb2  # type: ignore[import-untyped]
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata  # type: ignore[import-untyped]
    from tensorboard.compat.proto.tensor_pb2 import TensorProto  # type: ignore[import-untyped]
    from tensorboard.compat.proto.types_pb2 import DT_STRING  # type: ignore[import-untyped]
    from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]

    times = [_seconds(event.wall) for event in record.events]
    first, last = (times[0], max(times)) if times else (0.0, 0.0)
    lines = [telling.sentence(record), *(verdict.line() for verdict in record.verdicts)]
    lost = sum(event.kind in ("step", "metric") and _step(event) is None for event in record.events)
    lines += [f"{number(lost)} events are left out: they have no step that TensorBoard can hold"] if lost else []
    said = plain("\n\n".join(lines)).encode()
    text = TensorProto(dtype=DT_STRING, tensor_shape={"dim": [{"size": 1}]}, string_val=[said])
    named = SummaryMetadata(plugin_data={"plugin_name": "text"})
    path = folder / record.id / f"events.out.tfevents.{int(first)}.latentforge"
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole(path) as partial, open(partial, "wb") as file:
        writer = RecordWriter(file)
        writer.write(event_pb2.Event(wall_time=first, file_version="brain.Event:2").SerializeToString())
        for wall, step, tag, value in _scalars(record):
            scalar = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.write(event_pb2.Event(wall_time=wall, step=step, summary=scalar).SerializeToString())
        report = Summary(value=[Summary.Value(tag="report", tensor=text, metadata=named)])
        writer.write(event_pb2.Event(wall_time=last, summary=report).SerializeToString())
    return path


def _scalars(record: RunRecord) -> Iterator[tuple[float, int, str, float]]:
    for event in record.events:
        said, step = event.fields, _step(event)
        if step is None:
            continue
        wall, model = _seconds(event.wall), plain(said.get("model", "run"))
        if event.kind == "step":
            for name, value in said.items():
                found = as_number(value)
                if name not in _SKIPPED and found is not None:
                    yield wall, step, f"{model}/{plain(name)}", found
        elif event.kind == "metric" and in_course(event) and (found := as_number(said.get("value"))) is not None:
            noise = f" at noise {said['noise']}" if "noise" in said else ""
            split = f"{said['split']}/" if "split" in said else ""
            yield wall, step, plain(f"{split}{model}/{said.get('name')}{noise}"), found


def _step(event: Event) -> int | None:
    """The step of an event, None where it is none that 64 bits hold."""
    step = event.fields.get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**63 else None


def _seconds(wall: str) -> float:
    """Seconds since 1970; 0 for what is no time."""
    try:
        return datetime.fromisoformat(wall).timestamp()
    except (ValueError, OverflowError):
        return 0.0
