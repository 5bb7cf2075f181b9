"""A run whose training is spread over processes of this host: they follow the recipe, and this one speaks for them."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import TextIO

import torch

from latentforge.errors import RefusedError
from latentforge.events import EventLog
from latentforge.events.log import Unheard
from latentforge.spec.endurance import endurance_of
from latentforge.spec.run import RunDir
from latentforge.train import effective, memory
from latentforge.train.engines.launching import Ranks, refuse_failed
from latentforge.train.engines.world import World
from latentforge.train.recipes import follow, set_up
from latentforge.train.stopping import deferred_stop, handled_signals, stop_requested


def run_spread(run: RunDir, log: EventLog, processes: int, *, text: TextIO | None = None) -> int:
    """Follow the recipe of ``run`` on ``processes`` of this host, of which the first writes; returns the bytes that
    they held at most, summed.

    A signal to stop is handed on: they end after the same step, with a checkpoint. One that is killed, or fails, ends
    them all. Raises what they ended by.
    """
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise RefusedError(
            f"processes = {processes}, and this host has {torch.cuda.device_count()} GPU(s): a GPU takes one process",
            next=f"set processes = {torch.cuda.device_count()}, or device = 'cpu'",
        )
    handed_on = False

    def look() -> None:
        nonlocal handed_on
        if stop_requested() is not None and not handed_on:
            handed_on = True
            ranks.tell(signal.SIGTERM)

    with (
        deferred_stop(),
        Ranks("latentforge.train.spread:follow_here", {"path": str(run.path)}, processes, text=text) as ranks,
    ):
        log.say(f"{processes} processes: {', '.join(map(str, ranks.pids))}")
        ended = ranks.wait(look=look)
    log.take_up()
    refuse_failed(ended)
    return sum(int(one.told["value"]) for one in ended)


def follow_here(path: str) -> int:
    """The recipe of a run in one of its processes; returns the bytes that this one held at most."""
    run, first = RunDir(Path(path)), World.here().first
    grace = endurance_of(run).stop_grace
    identity = run.load_identity()
    memory.begin_measuring()
    with EventLog(run.events_file, run.run) if first else Unheard(run.run) as log, handled_signals(grace):
        log.take_up()
        set_up(int(identity.spec.get("seed", 0)))
        follow(run, log, identity.kind)
    return effective.peak_memory_bytes()
