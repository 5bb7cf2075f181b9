"""What runs in each process of a run: it joins the others, does its part, and tells how it ended."""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import signal
import sys
import traceback
from datetime import timedelta
from typing import Any

from latentforge.train.engines.beating import beat

_PR_SET_PDEATHSIG = 1
_JOINING = timedelta(minutes=10)


def main(target: str, arguments: str, report: str, beats: str, parent: str) -> None:
    """Call ``module:function`` with the JSON object ``arguments``, once all processes are there; write what it returned
    or how it failed as JSON to the descriptor ``report``, and beat into the descriptor ``beats`` meanwhile; end without
    the interpreter's own end, in which gloo's threads may abort after all work is done.
    """
    # Whoever started these processes ends them; where it was killed, the kernel does, also before it was asked to.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(128 + signal.SIGKILL)
    beat(int(beats))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    told = _told(target, json.loads(arguments))
    sys.stdout.flush()
    sys.stderr.flush()
    with os.fdopen(int(report), "w", encoding="utf-8") as file:
        json.dump(told, file)
    os._exit(int(told["code"]))


def _told(target: str, arguments: dict[str, Any]) -> dict[str, Any]:
    from latentforge.errors import LatentForgeError
    from latentforge.train.stopping import Interrupted
    from latentforge.verdicts import ExitCode

    try:
        join()
        module, _, name = target.partition(":")
        value = getattr(importlib.import_module(module), name)(**arguments)
    except Interrupted as error:
        return {"code": ExitCode.UNKNOWN, "interrupted": str(error)}
    except LatentForgeError as error:
        return {"code": error.code, "error": str(error), "next": error.next}
    except Exception as error:
        traceback.print_exc()
        return {"code": ExitCode.CRASHED, "crash": f"{type(error).__name__}: {error}"}
    return {"code": 0, "value": value}


def join() -> None:
    """Join the processes that the environment names as torchrun does: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

    The store at that address is held by whoever started them.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _set_pg_timeout

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    backend = "cpu:gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        backend += ",cuda:nccl"
    # A process that never comes, or that cannot be reached for a wall between the hosts, is missed sooner than ...
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_JOINING)
    # ... one that writes a checkpoint, or shows samples, for as long as that takes while the others wait for it.
    _set_pg_timeout(timedelta(hours=2))


if __name__ == "__main__":
    main(*sys.argv[1:])
