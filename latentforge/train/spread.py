"""A run whose training is spread over processes: they follow the recipe, and the one that started them speaks for
them."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

import torch

from latentforge.errors import RefusedError
from latentforge.events import EventLog
from latentforge.events.log import Unheard
from latentforge.memory import MemoryPlan
from latentforge.spec.endurance import endurance_of
from latentforge.spec.run import RunDir
from latentforge.train.capping import capped, each_planned
from latentforge.train.engines.launching import Place, Ranks, refuse_failed
from latentforge.train.engines.world import World
from latentforge.train.held import Peak, watching
from latentforge.train.hosts.abreast import Abreast
from latentforge.train.hosts.leading import Leading, counted
from latentforge.train.recipes import follow, set_up
from latentforge.train.stopping import deferred_stop, handled_signals


def run_spread(
    run: RunDir,
    log: EventLog,
    processes: int,
    planned: MemoryPlan | None,
    *,
    leading: Leading | None = None,
    text: TextIO | None = None,
) -> Peak:
    """Follow the recipe of ``run`` on ``processes`` of this host, of which the first writes, beside as many on each of
    the hosts that it is ``leading``; returns what those here held at most, summed. ``planned`` is what they
    are to hold together.

    A signal to stop is handed on: they end after the same step, with a checkpoint. One that is killed, or fails, ends
    them all, and so does a host that is lost. Raises what they ended by.
    """
    check_devices(run, processes)
    place, abreast = (None, Abreast([])) if leading is None else leading.meet()
    try:
        with deferred_stop(), begin(run, log, processes, planned, text=text, place=place) as ranks:
            ended = ranks.wait(look=lambda: abreast.look(ranks))
            others = abreast.ended(ended)
    finally:  # whatever is said of the end follows on what the first of them has written
        log.take_up()
    abreast.refuse_lost()
    refuse_failed([*ended, *others])
    return Peak.sum(Peak(*one.told["value"]) for one in ended)


def check_devices(run: RunDir, processes: int) -> None:
    """Refuse more processes than this host has GPUs, where it has any and ``run`` is to use them."""
    identity = run.load_identity()
    on_cpu = identity.spec[identity.kind]["device"] == "cpu"
    if not on_cpu and torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise RefusedError(
            f"processes = {processes}, and this host has {torch.cuda.device_count()} GPU(s): a GPU takes one process",
            next=f"set processes = {torch.cuda.device_count()}, or device = 'cpu'",
        )


def begin(
    run: RunDir,
    log: EventLog,
    processes: int,
    planned: MemoryPlan | None,
    *,
    text: TextIO | None,
    place: Place | None,
) -> Ranks:
    """Start the processes of a run on this host."""
    arguments = {"path": str(run.path), "planned": each_planned(planned, processes)}
    ranks = Ranks("latentforge.train.spread:follow_here", arguments, processes, text=text, place=place)
    log.say(f"{counted(processes)}: {', '.join(map(str, ranks.pids))}")
    return ranks


def follow_here(path: str, planned: int | None) -> Peak:
    """The recipe of a run in one of its processes, ``planned`` to hold so many bytes; returns what this one held at
    most."""
    run, first = RunDir(Path(path)), World.here().first
    grace = endurance_of(run).stop_grace
    identity = run.load_identity()
    with watching() as watch:
        with EventLog(run.events_file, run.run) if first else Unheard(run.run) as log, handled_signals(grace):
            log.take_up()
            set_up(int(identity.spec.get("seed", 0)))
            with capped(run, log, planned):
                follow(run, log, identity.kind)
        return watch.peak()
