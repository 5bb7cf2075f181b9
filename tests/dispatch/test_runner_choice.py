"""The runner of a plan: what the probe found, what the inventory asks for, shown before it is used."""

from __future__ import annotations

from typing import Any

import pytest

from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.planning.runner import choose_runner

GIB = 2**30
UNITS = {"systemd": True, "why": "systemd 255, lingering is on", "linger": True}
NONE = {"systemd": False, "why": "lingering is off", "linger": False}
FLOORS = {"floors": {"warn": 15 * GIB, "kill": 7 * GIB}}


def _facts(runner: dict[str, Any] | None) -> HostFacts:
    seen = None if runner is None else {**runner, **FLOORS}
    machine = {"hostname": "h", "arch": "aarch64"}
    python = {"executable": "/usr/bin/python3", "version": "3.12.3"}
    return HostFacts.model_validate({"host": machine, "python": python, "root": "/r", "runner": seen})


@pytest.mark.parametrize(
    ("asked", "seen", "name", "obstacle"),
    [
        ("auto", UNITS, "systemd", None),
        ("auto", NONE, "detached", None),
        ("auto", None, "detached", None),
        ("detached", UNITS, "detached", None),
        ("systemd", UNITS, "systemd", None),
        ("systemd", NONE, "detached", "lingering is off"),
    ],
)
def test_a_runner_is_chosen_by_what_is_there_and_a_named_one_is_that_or_refused(
    asked: str, seen: dict[str, Any] | None, name: str, obstacle: str | None
) -> None:
    host = Host.model_validate({"name": "box", "runner": asked})
    choice = choose_runner(host, _facts(seen))
    assert (choice.name, choice.obstacle) == (name, obstacle)


def test_the_floors_are_the_hosts_own_unless_the_inventory_sets_them() -> None:
    usual = choose_runner(Host(name="box"), _facts(UNITS))
    assert usual.text == (
        "runner: systemd (systemd 255, lingering is on); "
        "watchdog: warns below 15.0 GiB available, ends the run below 7.0"
    )
    assert usual.launch_fields() == {}
    set_ = choose_runner(Host(name="box", kill_below_gib=20.5), _facts(UNITS))
    floor = int(20.5 * GIB)
    assert set_.launch_fields() == {"memory_floors": {"warn": floor, "kill": floor}}
    off = choose_runner(Host(name="box", kill_below_gib=0, warn_below_gib=0), _facts(NONE))
    assert off.launch_fields() == {"memory_floors": {"warn": 0, "kill": 0}}
    assert "memory is not watched" in off.text
