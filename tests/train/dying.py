"""A run that is killed at a chosen point: of its steps, or of the writing of a checkpoint.

Asked by a line of JSON on standard input for each start of a run folder; every start is a process of its own, forked
from one that has imported everything and computed nothing. Answered by a line: how it ended, and at how many points
it could have been killed.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def count_points(kill_at: int | None, told: int) -> None:
    """Before and after each call that leaves something on the disk, and after each optimiser step, is a point; SIGKILL
    at the ``kill_at``-th, from whatever thread. The number of points so far is kept in the file ``told``."""
    from latentforge.train import checkpoint
    from latentforge.train.optimiser import MasterOptimiser

    lock, passed = threading.Lock(), [0]

    def point() -> None:
        with lock:
            passed[0] += 1
            os.pwrite(told, str(passed[0]).encode(), 0)
            if passed[0] == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    def with_points(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            point()
            try:
                return real(*args, **kwargs)
            finally:
                point()

        return call

    def torn(tensors: Any, path: Path) -> None:
        """Written in two parts with a point between them: a file of which half is there."""
        save(tensors, path)
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])
        point()
        Path(path).write_bytes(content)

    save = checkpoint.save_file
    checkpoint.save_file = with_points(torn)
    checkpoint.os = type("os", (), {**vars(os), "fsync": with_points(os.fsync), "replace": with_points(os.replace)})
    checkpoint.shutil = type("shutil", (), {"rmtree": with_points(shutil.rmtree)})
    MasterOptimiser.step = with_points(MasterOptimiser.step)  # type: ignore[method-assign]


def start(folder: Path, kill_at: int | None, restarted: int, told: int) -> None:
    """Execute the folder in this process, which ends with the run's code."""
    from latentforge.train.run import execute

    count_points(kill_at, told)
    with open(folder / "launch.log", "a", encoding="utf-8") as text:
        os._exit(int(execute(folder, text=text, restarted=restarted, restarts_left=0)))


def main() -> None:
    """Answer one start after the other."""
    # What they import as they go, too: it is three times the time that a run itself takes.
    import torch._dynamo  # noqa: F401
    import transformers.models.qwen3.modeling_qwen3  # noqa: F401

    import latentforge.train.autoencoder
    import latentforge.train.continuations
    import latentforge.train.data
    import latentforge.train.distill
    import latentforge.train.latent
    import latentforge.train.run
    import latentforge.train.score
    import latentforge.train.teacher  # noqa: F401

    for line in sys.stdin:
        asked = json.loads(line)
        told = os.memfd_create("points")
        child = os.fork()
        if child == 0:
            sys.stdout = io.StringIO()
            start(Path(asked["folder"]), asked["kill_at"], asked["restarted"], told)
        _, status = os.waitpid(child, 0)
        points = int(os.pread(told, 20, 0) or b"0")
        os.close(told)
        print(json.dumps({"ended": os.waitstatus_to_exitcode(status), "points": points}), flush=True)


if __name__ == "__main__":
    main()
