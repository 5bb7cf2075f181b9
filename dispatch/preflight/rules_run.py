"""What every host must give a run: an interpreter, a place to write, memory, a clock, and the package's abilities."""

from __future__ import annotations

from dispatch.agent.paths import NETWORK_FILESYSTEMS
from dispatch.preflight.check import Found, failed, not_applicable, passed, unknown, warned
from dispatch.preflight.seen import GIB, Seen, gib
from latentforge.memory import kill_floor, margin
from latentforge.spec.capabilities import missing
from latentforge.verdicts import Outcome

PYTHON = (3, 11)
DISK_FLOOR = 2 * GIB
_SLACK = 1.5
_INODES = 10_000
_OFFSET = 2.0
_SWAP_USED = 4 * GIB
_ROOT_ELSEWHERE = "name another state root with GX10_REPO_PATH"


def python(seen: Seen) -> Found:
    """The interpreter that builds and runs."""
    found, name = seen.facts.python, seen.host.name
    needed = ".".join(str(part) for part in PYTHON)
    if found.numbers >= PYTHON:
        return passed(f"{found.version} ({found.executable})")
    return failed(
        f"{found.executable} on {name} is Python {found.version}; {needed} is needed",
        f"install a newer Python there, then:  latentforge dispatch enrol {name} --python PATH --replace",
    )


def root(seen: Seen) -> Found:
    """Whether the state root takes a write: tried by name where that was asked for, else with a nameless file."""
    place = seen.found.storage
    if place is None:
        return unknown(seen.why("storage"))
    where = place.root if place.exists else f"{place.root} (to be made in {place.base})"
    if (did := seen.found.did.get("write")) is not None:
        if did.get("ok"):
            return passed(f"{where}: written, synced, renamed and removed in {did['seconds'] * 1e3:.0f} ms")
        why = did.get("error")
        return failed(
            f"{where}: {did.get('step', 'the write')} failed: {why}", _remedy_of(did.get("errno"), place.base)
        )
    if place.read_only:
        return failed(f"{place.base} lies on a file system that is mounted read-only", _ROOT_ELSEWHERE)
    if place.unnamed == "ok":
        return passed(f"{where}: takes a write and a sync")
    if place.unnamed != "unsupported":
        return failed(f"{where}: a write fails with {place.unnamed}", _remedy_of(place.unnamed, place.base))
    if not place.writable:
        return failed(f"{where}: this user may not write into {place.base}", _remedy_of("EACCES", place.base))
    return passed(f"{where}: may be written")


def _remedy_of(code: str | None, base: str) -> str:
    remedies = {
        "ENOSPC": "free some space (or inodes) there",
        "EDQUOT": "the quota of this user is used up: remove something, or have it raised",
        "EROFS": "mount it for writing",
        "EACCES": f"make {base} this user's own (chown, chmod 700)",
    }
    first = remedies.get(code or "")
    return f"{first}, or {_ROOT_ELSEWHERE}" if first else _ROOT_ELSEWHERE


def permissions(seen: Seen) -> Found:
    """Owner and mode of the state root, and whether programs may be started from it."""
    place = seen.found.storage
    if place is None:
        return unknown(seen.why("storage"))
    if place.noexec and not seen.host.is_local:
        return failed(f"{place.base} is mounted noexec: an environment in it cannot be run", _ROOT_ELSEWHERE)
    if not place.exists:
        return passed(f"{place.root} will be made, mode 0700")
    if place.owner != place.uid:
        return failed(f"{place.root} belongs to uid {place.owner}, not to uid {place.uid}", _ROOT_ELSEWHERE)
    if place.mode & 0o077:
        return failed(
            f"{place.root} has mode {place.mode:04o}: others may {'write' if place.mode & 0o022 else 'read'} there",
            f"on the host:  chmod 700 {place.root}",
        )
    return passed(f"{place.root} is this user's own, mode {place.mode:04o}")


def filesystem(seen: Seen) -> Found:
    """Locks do not hold on network file systems."""
    place = seen.found.storage
    if place is None:
        return unknown(seen.why("storage"))
    if place.filesystem is None:
        return unknown(f"the type of the file system of {place.base} is not known")
    if place.filesystem in NETWORK_FILESYSTEMS or place.filesystem.startswith(("nfs", "fuse.ssh", "fuse.gluster")):
        return failed(
            f"{place.root} lies on {place.filesystem}, where locks cannot be trusted",
            "set GX10_REPO_PATH to a folder on a local disk",
        )
    return passed(place.filesystem)


def disk(seen: Seen) -> Found:
    """Room on the file system of the run, not of the home folder."""
    free = seen.found.storage.bytes_free if seen.found.storage is not None else seen.facts.host.disk_free
    if free is None:
        return unknown("free space is not known")
    where = seen.found.storage.base if seen.found.storage is not None else seen.facts.root
    terms = " + ".join(f"{term.name} {term.bytes / GIB:.2f}" for term in seen.need.disk if term.bytes)
    wanted = max(int(_SLACK * seen.need.disk_bytes), DISK_FLOOR)
    said = f"{gib(free)} free in {where} on {seen.host.name}, {gib(wanted)} needed"
    said += f" ({_SLACK} x ({terms}))" if wanted > DISK_FLOOR else ""
    if free >= wanted:
        return passed(said)
    return failed(said, f"free some space there, or {_ROOT_ELSEWHERE}")


def inodes(seen: Seen) -> Found:
    """Files that can still be made on the file system of the run."""
    place = seen.found.storage
    if place is None:
        return unknown(seen.why("storage"))
    if place.inodes_free is None:
        return passed(f"{place.filesystem or 'the file system'} makes inodes as they are needed")
    wanted = max(int(_SLACK * seen.need.inodes), _INODES)
    said = f"{place.inodes_free} inodes free in {place.base}, {wanted} needed"
    if place.inodes_free >= wanted:
        return passed(said)
    return failed(said, f"remove folders with many small files there, or {_ROOT_ELSEWHERE}")


def memory(seen: Seen) -> Found:
    """The closed-form estimate of the pipeline, each term shown, against what the host has and what is free."""
    plan = seen.need.memory
    if plan is None:
        return not_applicable("no pipeline was named (--for PIPELINE)")
    host = seen.facts.host
    verdict = plan.verdict(host.mem_total, host.mem_available)
    said = "; ".join([verdict.text, *seen.need.notes])
    if verdict.outcome is Outcome.PASS:
        return passed(said)
    if verdict.outcome is Outcome.FAIL:
        return failed(
            said,
            "free memory there, or make it smaller: --set distill.micro_batch_size=…, --set teacher.batch_size=…, "
            "--set data.sequence_length=…",
        )
    return unknown(said, "name a model whose config.json can be counted")


def headroom(seen: Seen) -> Found:
    """What stays free beside the run, by the system's own figure: CUDA counts page cache as used."""
    host = seen.facts.host
    if host.mem_total is None or host.mem_available is None:
        return unknown("the host does not say how much memory is available")
    reserve, need = margin(host.mem_total), seen.need.bytes
    said = f"{gib(host.mem_available)} of {gib(host.mem_total)} available, {gib(need)} + {gib(reserve)} wanted"
    remedy = "stop other jobs, drop caches, or choose a smaller plan"
    if host.mem_available >= need + reserve:
        return passed(said)
    if host.mem_available >= need + max(reserve * 3 // 4, kill_floor(host.mem_total)):
        return warned(said, remedy)
    return failed(said, remedy)


def swap(seen: Seen) -> Found:
    """Swap turns a refusal into hours of thrashing."""
    found = seen.found.memory
    if found is None:
        return unknown(seen.why("memory"))
    if not found.swaps:
        return passed("none")
    size, used = sum(one.size for one in found.swaps), sum(one.used for one in found.swaps)
    said = f"{gib(used)} of {gib(size)} used, swappiness {found.swappiness}"
    if used > _SWAP_USED:
        remedy = "disable swap for dispatch hosts, or reclaim it while idle:  swapoff -a && swapon -a"
        return failed(said, remedy) if seen.gb10 else warned(said, remedy)
    watched = seen.found.session is not None and seen.found.session.watchdog
    return passed(said) if watched else warned(said, "without a memory watchdog swap is better off:  swapoff -a")


def clock(seen: Seen) -> Found:
    """The host's clock against the laptop's, at the middle of the question. Only what people read rests on it."""
    offset = seen.found.offset
    if offset is None:
        return unknown("the clocks were not compared")
    ahead, trip = offset
    said = f"{abs(ahead):.1f} s {'ahead of' if ahead >= 0 else 'behind'} this laptop (+- {trip:.1f} s)"
    if abs(ahead) + trip <= _OFFSET or (seen.host.is_local and abs(ahead) <= trip):
        return passed(said)
    if abs(ahead) - trip <= _OFFSET:
        return unknown(f"{said}: the answer took too long to tell", "ask again when the link is quiet")
    return warned(said, "set the clock of one of the two (NTP); durations and states do not depend on it")


def ntp(seen: Seen) -> Found:
    """Whether somebody keeps the host's clock right."""
    found = seen.found.clock
    if found is None or found.synchronised is None:
        return unknown("the kernel does not say whether its clock is synchronised")
    if found.synchronised:
        return passed("synchronised")
    return warned("not synchronised", "enable NTP:  timedatectl set-ntp true")


def linger(seen: Seen) -> Found:
    """Without lingering the user's manager, and every unit of it, ends with the last logout."""
    found = seen.found.session
    if found is None:
        return unknown(seen.why("session"))
    if not found.systemd:
        return not_applicable("no systemd here; the detached runner needs none")
    if found.linger:
        return passed("on")
    said = "off: user units end with the last logout"
    remedy = "on the host:  loginctl enable-linger"
    return failed(said, remedy) if seen.host.runner == "systemd" else warned(said, remedy)


def capabilities(seen: Seen) -> Found:
    """What the built package offers against what the plan needs of it, name by name."""
    if seen.need.in_place:
        return passed("the running interpreter has this code")
    found = seen.found.capabilities
    if found is None:
        return unknown(seen.why("capabilities"))
    if found.source is None:
        return not_applicable("nothing is built there yet; a build is asked the same before it counts")
    if found.offered is None:
        said = f": {found.said}" if found.said else ""
        return failed(
            f"the built latentforge does not say what it can do (status {found.code}{said})",
            "build it again from this checkout:  latentforge dispatch go PIPELINE --attempt next",
        )
    lacking = missing(seen.need.wanted, found.offered) if seen.need.wanted else []
    if lacking:
        more = f" and {len(lacking) - 5} more" if len(lacking) > 5 else ""
        return failed(
            f"the latentforge on {seen.host.name} ({found.offered.get('version', 'version not told')}) lacks "
            + ", ".join(lacking[:5])
            + more,
            "dispatch from a checkout of the code that is to run; what is built there is other code",
        )
    count = sum(len(names) for names in seen.need.wanted.values())
    return passed(f"all {count} that the plan needs" if count else f"version {found.offered.get('version')}")
