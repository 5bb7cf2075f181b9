"""The device: whether it answers, who uses it, how warm it is, what it does under load. Nothing here rests on the
GPU's own memory figure, which a GB10 does not have."""

from __future__ import annotations

import math
import re
from statistics import median

from dispatch.preflight.check import Found, failed, not_applicable, passed, unknown, warned
from dispatch.preflight.facts import Tenant
from dispatch.preflight.seen import GIB, Seen, gib
from dispatch.preflight.smi import compute_apps, gpus, number

_DESKTOP = ("Xorg", "Xwayland", "gnome-shell", "kwin_wayland", "sddm", "gdm", "plasmashell", "firefox", "chrome")
_SYSTEM = ("nvidia-persiste", "nvidia-smi", "nv-hostengine", "dcgm-exporter", "nvidia-powerd", "nvsm", "lf-agent")
_POWER_CYCLE = "shut down, take the power cord out for 60 s, boot"
_LEAKED = 12 * GIB
_BUSY = 10.0


def answers(seen: Seen) -> Found:
    """A GB10 that says so."""
    answer = seen.command("gpu")
    if not answer.answered:
        return failed(
            answer.trouble("nvidia-smi"),
            f"the driver does not answer: {_POWER_CYCLE}; DOE mailbox timeouts in the kernel log are one for support",
        )
    rows = gpus(answer)
    if not rows:
        return failed(f"nvidia-smi names no GPU: {answer.out.strip()[:80]!r}", "reinstall the driver that DGX OS ships")
    known = [(row["name"] or "a GPU without a name", row["compute_cap"]) for row in rows]
    said = "; ".join(f"{name}, compute capability {capability or 'not told'}" for name, capability in known)
    if any(capability is None for _name, capability in known):
        return unknown(said, "update the driver: this one does not tell the compute capability")
    if all("GB10" in name and capability == "12.1" for name, capability in known):
        return passed(said)
    return failed(
        said, "this host is declared a GB10 and is none:  latentforge dispatch enrol HOST --no-gb10 --replace"
    )


def driver(seen: Seen) -> Found:
    """The 580 branch, new enough."""
    rows = gpus(seen.command("gpu"))
    version = rows[0]["driver_version"] if rows else None
    if version is None:
        return unknown("the driver's version is not known")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not numbers:
        return unknown(f"the driver's version is told as {version!r}")
    remedy = "install the 580 branch that DGX OS ships"
    if numbers[0] < 580:
        return failed(version, remedy)
    return passed(version) if numbers[0] == 580 and numbers[1:] >= (142,) else warned(version, remedy)


def page_cache(seen: Seen) -> Found:
    """Page cache counts as used where CUDA looks."""
    found = seen.found.memory
    if found is None or "Cached" not in found.numbers or "MemFree" not in found.numbers:
        return unknown(seen.why("memory"))
    cached, free = found.numbers["Cached"], found.numbers["MemFree"]
    said = f"{gib(cached)} of page cache, {gib(free)} free without it"
    if cached > 20 * GIB and free < max(seen.need.bytes, GIB):
        return warned(said, "while no job runs:  latentforge dispatch preflight HOST --only drop-caches   (needs root)")
    return passed(said)


def drop_caches(seen: Seen) -> Found:
    """The remedy of the one before, done when it is asked for by name."""
    did = seen.found.did.get("drop-caches")
    if did is None:
        return unknown("it was not done")
    if did.get("done"):
        return passed("synced and dropped")
    return warned(
        f"not dropped: {did.get('why') or did.get('error')}",
        "as root, while no job runs:  sync; echo 3 > /proc/sys/vm/drop_caches",
    )


def _foreign(seen: Seen) -> tuple[list[Tenant], list[Tenant]] | None:
    """(desktop, others) of all that use the device and are not ours; None where nobody can say."""
    found = seen.found.tenants
    listed = compute_apps(seen.command("apps"))
    if found is None:
        return None
    by_pid = {one.pid: one for one in found.processes if one.pid not in found.ours}
    for pid, name, _size in listed or ():
        if pid not in found.ours and pid not in by_pid:
            by_pid[pid] = Tenant(pid=pid, command=name, name=name.rpartition("/")[2], why=("is on the driver's list",))
    desktop: list[Tenant] = []
    others: list[Tenant] = []
    for pid in sorted(by_pid):
        one = by_pid[pid]
        name = one.name or one.command.split()[0].rpartition("/")[2]
        if name.startswith(_SYSTEM):
            continue
        (desktop if name.startswith(_DESKTOP) else others).append(one)
    return desktop, others


def told(one: Tenant) -> str:
    """A tenant in one line: pid, owner, age, command."""
    age = "age unknown" if one.age is None else f"for {_span(one.age)}"
    return f"pid {one.pid} of {one.owner or 'an unknown user'}, {age}: {one.command}"


def _span(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def tenants(seen: Seen) -> Found:
    """Nobody else on the device: the driver's list, its files' holders and the process table, all asked."""
    if not seen.has_gpu:
        return not_applicable("no GPU on this host")
    foreign, found = _foreign(seen), seen.found.tenants
    if foreign is None or found is None:
        return unknown(seen.why("tenants"))
    desktop, others = foreign
    held = f"; our own lease is held by {found.lease.get('run') or 'a run'}" if found.lease else ""
    if others:
        return failed(
            "; ".join(told(one) for one in others[:4]) + (f" and {len(others) - 4} more" if len(others) > 4 else ""),
            "stop them (of a server kill the EngineCore process too), or:  --waive tenants='why they may stay'",
        )
    use = [number(row["utilization.gpu"]) for row in gpus(seen.command("gpu"))]
    busy = max((one for one in use if one is not None), default=None)
    if busy is not None and busy > _BUSY and not found.lease:
        return unknown(f"nobody is seen, and the GPU is {busy:.0f} % busy", "look as root:  fuser -v /dev/nvidia*")
    if compute_apps(seen.command("apps")) is None and found.unseen:
        return unknown(
            f"the driver gives no list, and {found.unseen} processes of others cannot be looked into",
            "look as root:  fuser -v /dev/nvidia*",
        )
    used = _used(seen)
    if seen.gb10 and found.unseen and used is not None and used > _LEAKED and not found.lease:
        return unknown(
            f"nobody is seen, {gib(used)} of memory are used, and {found.unseen} processes of others cannot be looked "
            "into",
            "look as root:  fuser -v /dev/nvidia*",
        )
    if desktop:
        names = ", ".join(sorted({one.name or "?" for one in desktop}))
        return warned(
            f"a desktop ({names}){held}", "dispatch hosts do without:  systemctl set-default multi-user.target"
        )
    return passed(f"none{held}")


def _used(seen: Seen) -> int | None:
    host = seen.facts.host
    return None if host.mem_total is None or host.mem_available is None else host.mem_total - host.mem_available


def leaked(seen: Seen) -> Found:
    """Memory that a killed job left with the driver, where no tool shows it."""
    used, foreign = _used(seen), _foreign(seen)
    if used is None or foreign is None:
        return unknown("who uses the memory is not known")
    found = seen.found.tenants
    if foreign[1] or (found is not None and found.lease):
        return not_applicable(f"{gib(used)} used, and the device is in use")
    if used > _LEAKED:
        return failed(
            f"{gib(used)} used by nobody on the device",
            "memory of a killed job is held by the driver: wait up to 4 minutes; if it stays, reboot",
        )
    return passed(f"{gib(used)} used")


def thermals(seen: Seen) -> Found:
    """Idle temperature."""
    warm = [(number(row["temperature.gpu"]), row) for row in gpus(seen.command("gpu"))]
    if not warm or any(celsius is None for celsius, _row in warm):
        return unknown("the GPU does not tell its temperature")
    celsius, row = max(((celsius or 0.0, row) for celsius, row in warm), key=lambda one: one[0])
    said = f"{celsius:.0f} °C, {row['clocks.sm'] or '?'} MHz, {row['power.draw'] or '?'} W, {row['pstate'] or '?'}"
    if celsius < 70:
        return passed(said)
    if (number(row["utilization.gpu"]) or 0.0) > _BUSY:
        return unknown(f"{said}: it is {row['utilization.gpu']} % busy, which is no idle temperature")
    remedy = "improve the airflow; or cap the clock:  nvidia-smi -lgc 0,2100"
    return warned(said, remedy) if celsius <= 80 else failed(said, remedy)


def _samples(seen: Seen, position: int) -> list[float]:
    lines = seen.found.did.get("power", {}).get("samples") or []
    found = []
    for line in lines:
        cells = str(line).strip().splitlines()[:1]
        parts = cells[0].split(",") if cells else []
        value = number(parts[position]) if len(parts) > position else None
        if value is not None:
            found.append(value)
    return found


def power(seen: Seen) -> Found:
    """The rate, clock and power under load: a GB10 can sit in a low-power state without any sign of it."""
    did = seen.found.did.get("power")
    answer = (did or {}).get("answer") or {}
    rate = answer.get("tflops")
    if not isinstance(rate, int | float) or not math.isfinite(rate):
        return unknown(f"the probe did not run: {((did or {}).get('said') or 'no answer')[-200:]}")
    clock, watts, use = (_samples(seen, position) for position in (0, 1, 2))
    mhz = median(clock) if clock else None
    said = f"{rate:.1f} TFLOP/s" + (f" at {mhz:.0f} MHz" if mhz is not None else " at an unknown clock")
    said += f", {median(watts):.0f} W" if watts else ""
    remedy = f"low-power state: {_POWER_CYCLE}, with the original adapter; if it returns, it is one for the vendor"
    if rate < 60 or (mhz is not None and mhz < 1400 and use and median(use) > 90):
        return failed(said, remedy)
    if rate < 80 or (mhz is not None and mhz < 1900):
        return warned(said, remedy)
    return passed(said) if mhz is not None else unknown(said)


def hot(seen: Seen) -> Found:
    """Temperature under the same load."""
    celsius = _samples(seen, 3)
    if not celsius:
        return unknown("no temperature was read under load")
    said, most = f"{max(celsius):.0f} °C", max(celsius)
    if most < 85:
        return passed(said)
    remedy = "cap the clock (root, again after a reboot):  nvidia-smi -lgc 0,2100"
    return warned(said, remedy) if most <= 90 else failed(said, remedy)
