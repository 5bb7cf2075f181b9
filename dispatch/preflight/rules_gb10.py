"""What is particular to a GB10: its system, its crashes, its firmware, its links, and what must be compiled for it."""

from __future__ import annotations

import json
import math
import re

from dispatch.agent.paths import NETWORK_FILESYSTEMS
from dispatch.agent.preflight import LINES
from dispatch.preflight.check import Found, failed, not_applicable, passed, unknown, warned
from dispatch.preflight.facts import Binary
from dispatch.preflight.seen import GIB, Seen, gib
from latentforge.memory import margin

_BAD_KERNELS = ("6.17.0-1008", "7.0.0-1019")
_SIGNS = re.compile(LINES["journal"].pattern.decode())
_RUNS = frozenset({"sm_121", "sm_121a", "sm_120"})
_ARCH = re.compile(r"sm_\d+[af]?")
_JOB_BYTES = 8 * GIB
_WINDOW = 0.75
"""What share of the host's memory CUDA must see: healthy hosts tell 98 %, a device window of 30 GiB is 25 %."""


def platform(seen: Seen) -> Found:
    """aarch64 with DGX OS (Ubuntu 24.04), and none of the kernels that are known to be bad."""
    found = seen.found.platform
    if found is None:
        return unknown(seen.why("platform"))
    said = f"{found.arch}, {found.pretty or 'system unknown'}" + (f", DGX OS {found.dgx}" if found.dgx else "")
    said += f", kernel {found.kernel}"
    remedy = "update DGX OS (7.5.0 or later) and reboot; avoid kernels " + " and ".join(_BAD_KERNELS)
    if found.arch != "aarch64":
        return failed(said, "this is no GB10:  latentforge dispatch enrol HOST --no-gb10 --replace")
    if found.kernel.startswith(_BAD_KERNELS) or (found.id, found.version) != ("ubuntu", "24.04"):
        return warned(said, remedy)
    return passed(said)


def watchdog(seen: Seen) -> Found:
    """Out of memory takes the whole host: somebody must watch, and sshd must survive."""
    found = seen.found.session
    if found is None:
        return unknown(seen.why("session"))
    if not found.watchdog:
        return failed("this agent has no memory watchdog", "update latentforge on the laptop")
    if found.sshd is None:
        return unknown("the watchdog is there; whether sshd is protected is not known")
    if found.sshd <= -1000:
        return passed(f"watchdog in the supervisor; sshd at {found.sshd}")
    return warned(
        f"watchdog in the supervisor; sshd is not protected (oom_score_adj {found.sshd})",
        "set OOMScoreAdjust=-1000 for ssh:  systemctl edit ssh",
    )


def crash(seen: Seen) -> Found:
    """How the boot before this one ended, by its kernel log."""
    answer = seen.command("journal")
    if not answer.answered:
        return unknown(answer.trouble("journalctl"), "keep the journal across boots:  mkdir -p /var/log/journal")
    if not answer.out.strip():
        return unknown(
            "the last boot's kernel log is empty for this user",
            "let it be read:  sudo usermod -aG systemd-journal USER",
        )
    signs = [line for line in answer.out.splitlines() if _SIGNS.search(line)]
    if not signs:
        return passed("nothing of the kind in the last boot's kernel log")
    return warned(
        f"{len(signs)} lines, the last: {signs[-1].strip()[:160]}",
        "the boot before ended in a memory or driver fault: lower the plan by 8 GiB, and probe:  --only power",
    )


def toolkit(seen: Seen) -> Found:
    """A compiler that knows sm_121 and is no newer than the driver."""
    version, targets = seen.command("nvcc"), seen.command("nvcc-targets")
    if version.status == "missing":
        return warned("no nvcc: a host that lives from wheels", "install CUDA 13.0 to build the extension with kernels")
    if not version.answered or not targets.answered:
        return unknown((version if not version.answered else targets).trouble("nvcc"))
    released = re.search(r"release (\d+)\.(\d+)", version.out)
    driver = re.search(r"CUDA(?: UMD)? Version: *(\d+)\.(\d+)", seen.command("banner").out)
    if released is None:
        return unknown("nvcc does not tell its release")
    said = f"nvcc {released[1]}.{released[2]}"
    if "sm_121" not in targets.out.split():
        return failed(f"{said}, which does not know sm_121", "install CUDA 13.0, or build in the pinned environment")
    if driver is None:
        return unknown(f"{said}; which CUDA the driver serves is not known")
    said += f", driver {driver[1]}.{driver[2]}"
    newer = tuple(map(int, released.groups())) > tuple(map(int, driver.groups()))
    return (
        warned(f"{said}: code that the driver must compile fails", "use the driver's CUDA") if newer else passed(said)
    )


def torch(seen: Seen) -> Found:
    """A CUDA 13 torch, tried: the warning about compute capability says nothing, a kernel that ran does."""
    did = seen.found.did.get("torch") or {}
    answer = did.get("answer")
    remedy = "install the cu130 aarch64 build; its warning about the compute capability is harmless"
    if not isinstance(answer, dict):
        return failed(_said(did), remedy) if did.get("status") == "ended" else unknown(_said(did))
    cuda, arches, mean = str(answer.get("cuda")), answer.get("arches") or [], answer.get("mean")
    said = f"torch {answer.get('torch')}, CUDA {cuda}, {' '.join(arches)}"
    if not cuda.startswith("13."):
        return failed(said, remedy)
    if not {"sm_120", "sm_121"} & set(arches):
        return failed(f"{said}: neither sm_120 nor sm_121", remedy)
    if not isinstance(mean, int | float) or not math.isfinite(mean):
        return failed(f"{said}: a small product gave {mean}", remedy)
    return passed(said)


def window(seen: Seen) -> Found:
    """How much of the memory torch may have, by its own word: to allocate the peak as a trial can freeze a GB10."""
    did = seen.found.did.get("torch") or {}
    answer, host = did.get("answer"), seen.facts.host
    total = answer.get("total") if isinstance(answer, dict) else None
    if not isinstance(total, int) or isinstance(total, bool) or host.mem_total is None:
        return unknown(f"torch does not tell its device's memory: {_said(did)}")
    said = f"{gib(total)} of the host's {gib(host.mem_total)}"
    said += f", {gib(seen.need.bytes)} needed" if seen.need.bytes else ""
    if total >= max(_WINDOW * host.mem_total, seen.need.bytes):
        return passed(said)
    return failed(
        said, "an allocator with a window of its own: use the cu130 aarch64 build of torch, or a smaller plan"
    )


def nvrtc(seen: Seen) -> Found:
    """The library that really compiled at run time."""
    did = seen.found.did.get("nvrtc") or {}
    answer = did.get("answer")
    remedy = "an old NVRTC is loaded: take CUDA 12 libraries out of the environment"
    if not isinstance(answer, dict):
        return failed(_said(did), remedy) if did.get("status") == "ended" else unknown(_said(did))
    loaded = [str(one).rpartition("/")[2] for one in answer.get("loaded") or []]
    if any(".so.12" in one or ".so.11" in one for one in loaded):
        return failed(", ".join(loaded), remedy)
    return passed(", ".join(loaded) or "compiled; the library is not named")


def _said(did: dict[str, object]) -> str:
    lines = str(did.get("said") or did.get("error") or "").strip().splitlines()
    return lines[-1][:200] if lines else f"no answer ({did.get('status', 'it was not run')})"


def triton(seen: Seen) -> Found:
    """Triton 3.6 or newer whose Blackwell assembler takes sm_121a."""
    found = seen.found.triton
    if found is None:
        return unknown(seen.why("triton"))
    if found.version is None:
        return not_applicable("Triton is not in the environment of runs")
    numbers = tuple(int(part) for part in re.findall(r"\d+", found.version)[:2])
    said = f"Triton {found.version}, {(found.ptxas or '?').rpartition('/')[2]}"
    remedy = "upgrade Triton to 3.6 or newer (3.8 at best); on 3.5 let TRITON_PTXAS_PATH name a CUDA 13 ptxas"
    if found.assembled is None or found.assembled.status != "ended":
        return unknown(f"{said}: the assembler was not run")
    if not found.assembled.answered:
        return failed(f"{said} does not assemble sm_121a: {found.assembled.trouble('ptxas')}", remedy)
    if numbers < (3, 6):
        return failed(f"{said}: older than 3.6", remedy) if "TRITON_PTXAS_PATH" not in found.variables else passed(said)
    if "TRITON_PTXAS_PATH" in found.variables and "TRITON_PTXAS_BLACKWELL_PATH" not in found.variables:
        return warned(f"{said}; TRITON_PTXAS_PATH is set and ignored", "set TRITON_PTXAS_BLACKWELL_PATH, or neither")
    if numbers == (3, 7):
        return warned(f"{said}: repeats differed with 3.7 elsewhere", "prefer 3.8; else check that repeats agree")
    return passed(said)


def _codes(lines: tuple[str, ...] | None) -> set[str]:
    return {found for line in lines or () for found in _ARCH.findall(line)}


def _fit(binary: Binary) -> Found:
    name = binary.path.rpartition("/")[2]
    if binary.elf is None or binary.ptx is None:
        return unknown(f"{name}: there is no cuobjdump that looks into it", "install the CUDA toolkit or Triton")
    elf, ptx = _codes(binary.elf), _codes(binary.ptx)
    if elf & _RUNS:
        return passed(f"{name}: {' '.join(sorted(elf & _RUNS))}")
    if ptx:
        return warned(f"{name}: PTX only ({' '.join(sorted(ptx))})", "rebuild with machine code for sm_121")
    remedy = "rebuild with code for sm_121 (and sm_120 with PTX)"
    return failed(f"{name}: {' '.join(sorted(elf)) or 'no code for a GPU'}", remedy)


def binaries(seen: Seen) -> Found:
    """The machine code in our extension. ``120f`` is listed as ``sm_120``; ``sm_120a`` does not run on a GB10."""
    found = seen.found.binaries
    if found is None:
        return unknown(seen.why("binaries"))
    return _fit(found.own[0]) if found.own else not_applicable("nothing is built there yet")


def third_party(seen: Seen) -> Found:
    """Extensions of others: PTX alone is slow, the CUDA 12 runtime does not load."""
    found = seen.found.binaries
    if found is None:
        return unknown(seen.why("binaries"))
    if not found.third:
        return not_applicable("none of bitsandbytes, flash-attn, vLLM and FlashInfer is installed")
    old = [name for name, files in found.third.items() if any(one.cudart12 for one in files)]
    remedy = "replace it with a CUDA 13 aarch64 build, or do without"
    if old:
        return failed(f"{', '.join(old)} needs libcudart.so.12", remedy)
    unread = [name for name, files in found.third.items() if any(one.cudart12 is None for one in files)]
    unread += [name for name, files in found.third.items() if all(one.elf is None for one in files)]
    if unread:
        names = ", ".join(dict.fromkeys(unread))
        return unknown(f"{names}: there is no cuobjdump that looks into it", "install the CUDA toolkit or Triton")
    slow = []
    for name, files in found.third.items():
        if not any(_codes(one.elf) & _RUNS for one in files) and any(_codes(one.ptx) for one in files):
            slow.append(name)
    return warned(f"{', '.join(slow)}: PTX only", remedy) if slow else passed(", ".join(sorted(found.third)))


def caches(seen: Seen) -> Found:
    """Compilers' caches on a local disk: Triton's code is not portable between hosts."""
    if seen.found.caches is None:
        return unknown(seen.why("caches"))
    remedy = "set {} to a local folder of this host alone"
    for one in seen.found.caches:
        if not one.writable:
            return failed(f"{one.path} cannot be written", remedy.format(one.variable))
    for one in seen.found.caches:
        if one.filesystem in NETWORK_FILESYSTEMS:
            return warned(f"{one.path} lies on {one.filesystem}", remedy.format(one.variable))
    if (untold := next((one for one in seen.found.caches if one.filesystem is None), None)) is not None:
        return unknown(f"the type of the file system of {untold.path} is not known")
    return passed("local and writable")


def jobs(seen: Seen) -> Found:
    """How many compilers fit beside what must stay free: min(cores / 2, (available - 16 GiB) / 8 GiB)."""
    host = seen.facts.host
    if host.mem_available is None or host.mem_total is None or host.cores is None:
        return unknown("memory or cores are not known")
    count = min(host.cores // 2, (host.mem_available - margin(host.mem_total)) // _JOB_BYTES)
    said = f"{max(0, count)} at a time ({gib(host.mem_available)} available, {host.cores} cores)"
    if count >= 1:
        return passed(said)
    remedy = "not enough memory to compile: free some first"
    return failed(said, remedy) if seen.need.compiles else warned(said, remedy)


def firmware(seen: Seen) -> Found:
    """Updates that wait, and a restart that is wanted."""
    answer, remedy = seen.command("firmware"), "apply firmware and reboot, in a maintenance window"
    if seen.found.reboot:
        return warned("a restart is wanted (reboot-required)", remedy)
    if answer.status == "ended" and answer.code == 2:  # fwupdmgr: nothing to do
        return passed("no updates wait")
    if not answer.answered:
        return unknown(answer.trouble("fwupdmgr"))
    try:
        waiting = [str(one.get("Name", "?")) for one in json.loads(answer.out)["Devices"] if one.get("Releases")]
    except (ValueError, AttributeError, TypeError, KeyError):
        return unknown("fwupdmgr's answer is not the JSON that was asked for")
    return warned(f"updates wait for {', '.join(waiting[:4])}", remedy) if waiting else passed("no updates wait")


def link(seen: Seen) -> Found:
    """The cable between two hosts: port up, large frames, memory that the card can register."""
    ports, found = seen.found.link, seen.found.memory
    if ports is None:
        return unknown(seen.why("link"))
    remedy = "cable the same ports; set MTU 9000; boot a 6.17 kernel"
    up = [one for one in ports if "ACTIVE" in one.state]
    if not up:
        return failed(f"{len(ports)} ports, none active", remedy)
    said = ", ".join(f"{one.card}/{one.port} {one.net or '?'} MTU {one.mtu or '?'}" for one in up)
    if found is None:
        return unknown(f"{said}; whether memory can be registered is not known: {seen.why('memory')}")
    if found.numbers.get("CmaTotal", 0) == 0:
        return failed(f"{said}; no CMA: memory cannot be registered", remedy)
    return passed(said) if all((one.mtu or 0) >= 9000 for one in up) else warned(said, remedy)


def nccl(seen: Seen) -> Found:
    """The rate between two hosts, at most 2 GiB: the 16 GiB test takes a host down."""
    rate = (seen.found.did.get("nccl") or {}).get("gigabytes_per_second")
    remedy = "name both cards in NCCL_IB_HCA, MTU 9000, NCCL of a release; never run the 16 GiB test"
    if not isinstance(rate, int | float):
        return unknown("not measured: it takes two linked hosts at once, which this command does not drive yet")
    said = f"{rate:.1f} GB/s"
    return passed(said) if rate >= 18 else warned(said, remedy) if rate >= 5 else failed(said, remedy)


def teacher_server(seen: Seen) -> Found:
    """A server that gives fewer log-probabilities than asked starves the student without an error."""
    did = seen.found.did.get("teacher-server")
    if did is None:
        return unknown("no server was named", "--teacher-server URL --teacher-k K")
    remedy = "raise --max-logprobs of the server; take away samplers that truncate"
    if not did.get("reached"):
        return unknown(f"the server was not reached from the host: {did.get('error')}", "start it, or mend the address")
    if did.get("error"):
        return failed(str(did["error"])[:200], remedy)
    rows, k = list(did.get("prompt") or []) + list(did.get("next") or []), int(did.get("k") or 0)
    if not rows:
        return failed(f"{did.get('model')}: an answer without log-probabilities", remedy)
    said = f"{did.get('model')}: {min(rows)} of {k} finite log-probabilities at the poorest of {len(rows)} positions"
    return passed(said) if min(rows) >= k and did.get("prompt") else failed(said, remedy)
