"""The teacher that a run asks: opened, how it computes said, and watched while it is asked."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from latentforge.events import EventLog
from latentforge.memory.estimate import place_of
from latentforge.spec.run import RunDir
from latentforge.spec.sections import TeacherSpec
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.opening import open_teacher
from latentforge.teachers.protocol import behind
from latentforge.teachers.utilisation import EVERY, IdleWatch, Read, gpu_tool, gpu_utilisation, watched
from latentforge.train import effective
from latentforge.verdicts import Outcome, Verdict

FAST_PATH = "F-BACKEND-SELECT-001"


def open_asked(
    run: RunDir, log: EventLog, asked: TeacherSpec, folder: Path, held: ExitStack, *, rows: Mapping[str, Any] | None
) -> Any:
    """The teacher of ``folder`` that ``asked`` describes, on the GPU where there is one; ``held`` closes it.

    ``rows`` is what will be asked of its top-k rows (``k``, ``temperatures``, ``rounding``), which a cache keeps; None
    where something else is asked, which no cache holds: said where one is named.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    teacher = open_teacher(asked, folder, device, os.environ, say=log.say, **(rows or {}))
    held.callback(teacher.close)
    report_precision(run, log, teacher)
    if rows is None and asked.cache is not None:
        log.warning(f"teacher.cache = {asked.cache} holds top-k rows: nothing is read from it or kept there")
    return teacher


def in_process(teacher: Any) -> HFTeacher | None:
    """The model in this process that answers, behind a cache or an alignment; None where something else answers."""
    return next((one for one in behind(teacher) if isinstance(one, HFTeacher)), None)


def in_force(teacher: Any) -> dict[str, Any]:
    """The precision that the teacher really computes in, as the spec's field says it; empty of one elsewhere."""
    found = in_process(teacher)
    if found is None:
        return {}
    if found.choice is not None:
        return {"precision": found.choice.precision}
    return {"precision": "fp32" if found.dtype == "float32" else "bf16"}


def report_precision(run: RunDir, log: EventLog, teacher: Any) -> None:
    """The choice, its reason and its figures: an event, a line, and a part of ``effective.json``."""
    found = in_process(teacher)
    if found is None or found.choice is None:
        return
    choice = found.choice
    device, dtype = str(found.model.device), str(found.model.dtype).removeprefix("torch.")
    fields = {**choice.as_json(), "device": device, "dtype": dtype, "weights": found.kept}
    log.emit("phase", name="precision", state="chosen", **fields)
    log.say(f"teacher precision {choice.precision} on {device}: {choice.reason}")
    if choice.idle:
        log.warning(f"teacher: {choice.reason}")
    effective.record(run, teacher_precision={name: fields[name] for name in ("precision", "reason", "device", "dtype")})


@contextmanager
def idleness(
    log: EventLog,
    teacher: Any,
    asked: TeacherSpec,
    *,
    read: Read | None = None,
    every: float = EVERY,
    watch: IdleWatch | None = None,
) -> Iterator[None]:
    """While the block asks the teacher: a GPU that it leaves idle is a warning and a verdict, within a minute.

    The verdict is FAIL where the path was chosen for the user; who asked for one is told by the warning alone. Readings
    that the GPU does not give are none: then the end says that it is not known. Nothing is watched where the teacher
    computes on no GPU of this host. ``read`` replaces nvidia-smi.
    """
    found = in_process(teacher)
    here = found is not None and found.model.device.type == "cuda"
    if read is None:
        if not here and (place_of(asked) != "engine" or gpu_tool() is None):
            yield
            return
        read = _reader(found)
    watch = IdleWatch() if watch is None else watch
    state = watch

    def see(seconds: float, utilisation: float | None) -> None:
        sentence = state.see(seconds, utilisation)
        if sentence is None:
            return
        log.warning(sentence)
        if asked.precision == "auto":
            log.verdict(Verdict(FAST_PATH, Outcome.FAIL, sentence, {"readings": state.readings[-20:]}, run=log.run))

    with watched(read, see, every=every):
        yield
    if watch.reported:
        return
    if watch.median is None:
        log.say(f"GPU utilisation while it scored: not known ({len(watch.readings)} readings)")
        return
    text = f"GPU {watch.median:.0f} % busy in the middle of {len(watch.readings)} readings"
    if asked.precision != "auto" or watch.median < watch.threshold:
        log.say(f"{text} while it scored")
        return
    log.verdict(Verdict(FAST_PATH, Outcome.PASS, text, {"median_percent": watch.median}, run=log.run))


def _reader(teacher: HFTeacher | None) -> Callable[[], float | None]:
    if teacher is None:
        return gpu_utilisation
    uuid = str(torch.cuda.get_device_properties(teacher.model.device).uuid)
    return lambda: gpu_utilisation(uuid)
