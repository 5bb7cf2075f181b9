"""Fabric tasks over the commands of ``latentforge dispatch``:  fab -r dispatch -H gx10 smoke

Each task is its command: the same functions, the same pinned and hardened transport, the same environment names
(``GX10_HOST`` where there is no ``-H``, ``GX10_USER``, ``STEPS``, ``DRY_RUN=1``, …), the same exit codes. ``-H`` names
enrolled hosts. Fabric makes a connection object for each of them, and it is never opened: Fabric by itself accepts
every host key. With several hosts a task is done on each, one after the other, and ``fab`` ends with the worst of their
exit codes before a further task begins; ``latentforge dispatch … --each a,b`` does them at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import fabric  # type: ignore[import-untyped]
from invoke.exceptions import Exit

from latentforge.verdicts import ExitCode

Work = TypeVar("Work", bound=Callable[..., None])

_SETTINGS = {"set": "FIELD=VALUE of the pipeline; repeatable", "wait": "wait for the device lease"}


_codes: list[ExitCode] = []


def _end(c: Any) -> None:
    """End ``fab`` with the worst code of a task's hosts, once it was done on all of them."""
    from dispatch.conclude import worst

    codes, _codes[:] = list(_codes), []
    if code := worst(codes):
        raise Exit(code=code)


_AFTER = (fabric.Task(_end),)  # within a tuple it is no task of its own


def _task(**how: Any) -> Callable[[Work], Work]:
    """Fabric's decorator, which has no types; what comes after a task is done once for all of its hosts."""
    return cast("Callable[[Work], Work]", fabric.task(post=_AFTER, **how))


def _host(c: Any) -> list[str]:
    """The enrolled host that ``-H`` names, as words of a command; none where it is left out."""
    if not isinstance(c, fabric.Connection):
        return []
    known = c.ssh_config.get
    if (c.user, c.port) != (known("user", c.config.user), int(known("port", c.config.port))):
        raise Exit(f"error: -H {c.user}@{c.original_host}:{c.port}: name an enrolled host alone; GX10_USER", 2)
    return ["--host", c.original_host]


def _do(*words: str) -> None:
    """Run a command of ``latentforge dispatch``; its exit code counts for that of ``fab``."""
    from latentforge.cli import main

    code = main(["dispatch", *words])
    if code not in list(ExitCode) or code == ExitCode.DETACHED:
        raise Exit(code=code)  # Ctrl-C, or nobody reads any more: the further hosts are not wanted
    _codes.append(ExitCode(code))


def _go(c: Any, pipeline: str, settings: list[str], wait: bool, detach: bool) -> None:
    flags = [*(["--wait"] if wait else []), *(["--detach"] if detach else [])]
    _do("go", pipeline, *(word for setting in settings for word in ("--set", setting)), *flags, *_host(c))


@_task(help={"only": "ids of checks, separated by commas", "json": "JSON on standard output"})
def preflight(c: Any, only: str | None = None, json: bool = False) -> None:
    """Judge whether the host is fit."""
    flags = [*(["--only", only] if only else []), *(["--json"] if json else [])]
    _do("preflight", *_host(c)[1:], *flags)


@_task()
def build(c: Any) -> None:
    """Send this code and build it there."""
    _do("build", *_host(c))


@_task(help={"model": "repo@revision, or a folder here", "name": "what a folder's model is called on hosts"})
def pull(c: Any, model: str, name: str | None = None) -> None:
    """Bring a model to the host, each file verified."""
    _do("pull", model, *(["--name", name] if name else []), *_host(c))


@_task(iterable=["set"], help=_SETTINGS)
def smoke(c: Any, set: list[str], wait: bool = False, detach: bool = False) -> None:
    """Do the recipe smoke to its verdict."""
    _go(c, "smoke", set, wait, detach)


@_task(iterable=["set"], help={**_SETTINGS, "pipeline": "a recipe by name, or a .toml file"})
def full(c: Any, pipeline: str, set: list[str], wait: bool = False, detach: bool = False) -> None:
    """Do a pipeline with profile full, its canary first."""
    _go(c, pipeline, [*set, "profile=full"], wait, detach)


@_task(iterable=["set"], help={**_SETTINGS, "pipeline": "a recipe by name, or a .toml file"})
def go(c: Any, pipeline: str, set: list[str], wait: bool = False, detach: bool = False) -> None:
    """Do a pipeline as it is."""
    _go(c, pipeline, set, wait, detach)


@_task()
def watch(c: Any, run: str) -> None:
    """Follow a run to its end."""
    _do("watch", run, *_host(c))


@_task()
def status(c: Any) -> None:
    """Say how the runs are."""
    _do("status", *_host(c))


@_task()
def collect(c: Any, run: str) -> None:
    """Copy what a finished run left."""
    _do("collect", run, *_host(c))


@_task()
def cancel(c: Any, run: str) -> None:
    """End a run and look whether it is gone."""
    _do("cancel", run, *_host(c))
