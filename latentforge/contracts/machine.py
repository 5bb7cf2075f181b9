"""What this machine is, as far as a contract's scope asks: read without torch, so that it works everywhere."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Processor architecture (``x86_64``) and GPU architectures (``sm_121``), empty where there is no GPU."""

    arch: str
    gpus: tuple[str, ...]


def this_machine() -> Machine:
    """Facts of the running machine; a driver that does not answer counts as no GPU."""
    return Machine(platform.machine(), tuple(_gpus()))


def _gpus() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run(
            [program, "--query-gpu=compute_cap", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    capabilities = [line.strip().replace(".", "") for line in answer.splitlines()]
    return [f"sm_{capability}" for capability in capabilities if capability.isdigit()]
