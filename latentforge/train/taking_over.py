"""What an earlier attempt of a run had stored of its teacher, taken over: it need not be asked again."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentforge.errors import RefusedError
from latentforge.events import EventLog
from latentforge.spec.run import RunDir


def take_over(run: RunDir, log: EventLog, name: str, open_store: Callable[[Path], Any]) -> None:
    """Copy the store ``name`` that an earlier attempt filled; its own folder is not touched.

    ``open_store`` opens the copy for writing, refuses another's, and has ``drop_damaged``. Rows that were damaged are
    dropped, and a store that cannot be read at all is left behind: both are said.
    """
    store = run.out / name
    earlier = run.predecessor()
    while earlier is not None and earlier.path.is_dir() and not (earlier.out / name).is_file():
        earlier = earlier.predecessor()
    if store.exists() or earlier is None or not earlier.path.is_dir():
        return
    # The journal comes along: it holds the rows that were committed last, and opening the copy takes them in.
    for one in (f"{name}-wal", name):
        if (earlier.out / one).is_file():
            shutil.copyfile(earlier.out / one, run.out / one)
    try:
        with open_store(store) as copied:
            damaged = copied.drop_damaged()
    except RefusedError as error:
        log.warning(f"the store of {earlier.run} is not taken over: {error}")
        for path in run.out.glob(f"{name}*"):
            path.unlink()
        return
    log.say(f"takes over the store of {earlier.run}")
    if damaged:
        log.warning(f"{damaged} rows of {earlier.run} were damaged and are asked for again")
