"""All checks in their order, and the pure function from facts to a report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.planning.ask import Ask
from dispatch.preflight import rules_gb10 as gb10
from dispatch.preflight import rules_gpu as gpu
from dispatch.preflight import rules_run as run
from dispatch.preflight.check import Check, Found, Report, not_applicable
from dispatch.preflight.facts import PreflightFacts
from dispatch.preflight.need import Need, need_of
from dispatch.preflight.seen import Rule, Seen
from dispatch.preflight.smi import gpus

Judgement = Callable[[Seen], Found]
_NVCC = ("nvcc", "nvcc-targets", "banner")


def _every(number: int | None, id: str, title: str, rule: str, judge: Judgement, *groups: str, **more: Any) -> Rule:
    return Rule(id, title, rule, judge, groups, number=number, **more)


def _gb10(number: int, id: str, title: str, rule: str, judge: Judgement, *groups: str, gate: bool = False) -> Rule:
    return Rule(id, title, rule, judge, groups, gb10_only=True, gate=gate, number=number)


def _asked(number: int | None, id: str, title: str, rule: str, judge: Judgement, *groups: str, **more: Any) -> Rule:
    return Rule(id, title, rule, judge, groups, scope="asked", number=number, **more)


RULES: tuple[Rule, ...] = (
    _every(None, "python", "Python", "3.11 or newer", run.python, gate=True),
    _every(None, "root", "run root", "takes write, fsync, rename", run.root, "storage", gate=True, action="write"),
    _every(None, "filesystem", "file system of the root", "local: locks hold", run.filesystem, "storage", gate=True),
    _every(None, "permissions", "owner and mode", "own, 0700, not noexec", run.permissions, "storage", gate=True),
    _every(21, "disk", "disk of the root", "1.5 x what the pipeline writes", run.disk, "storage", gate=True),
    _every(None, "inodes", "inodes of the root", "1.5 x what the pipeline makes", run.inodes, "storage", gate=True),
    _every(None, "memory", "memory estimate", "terms + margin <= available", run.memory, "models", gate=True),
    _every(4, "headroom", "memory headroom", "need + min(16 GiB, 12 %) <= available", run.headroom),
    _every(8, "swap", "swap", "none, or watched; under 4 GiB used", run.swap, "memory", "session"),
    _every(None, "clock", "clock offset", "within 2 s of this laptop", run.clock, "clock"),
    _every(26, "ntp", "clock sync", "synchronised", run.ntp, "clock"),
    _every(25, "linger", "lingering", "on", run.linger, "session", gate=True),
    _every(
        None,
        "capabilities",
        "abilities of the build",
        "all that is needed",
        run.capabilities,
        "capabilities",
        gate=True,
    ),
    _every(7, "tenants", "others on the device", "none", gpu.tenants, "tenants", "apps", gate=True),
    _gb10(1, "platform", "platform", "aarch64, DGX OS, a good kernel", gb10.platform, "platform"),
    _gb10(2, "gpu", "GPU answers", "GB10, 12.1", gpu.answers, gate=True),
    _gb10(3, "driver", "driver", "580.142 or a later 580", gpu.driver),
    _gb10(5, "page-cache", "page cache", "at most 20 GiB, or free >= need", gpu.page_cache, "memory"),
    _gb10(6, "leaked", "leaked memory", "idle: at most 12 GiB used", gpu.leaked, "tenants", "apps"),
    _gb10(9, "watchdog", "watchdog and sshd", "jobs watched, sshd at -1000", gb10.watchdog, "session"),
    _gb10(10, "crash", "recent crash", "clean kernel log", gb10.crash, "journal"),
    _gb10(11, "thermals", "idle temperature", "below 70 °C", gpu.thermals),
    _gb10(14, "toolkit", "CUDA toolkit", "knows sm_121, not newer than the driver", gb10.toolkit, *_NVCC),
    _gb10(17, "triton", "Triton", "3.6 or newer, assembles sm_121a", gb10.triton, "triton"),
    _gb10(18, "binaries", "our machine code", "sm_121, sm_121a or sm_120", gb10.binaries, "binaries"),
    _gb10(19, "third-party", "others' machine code", "not PTX only, no CUDA 12", gb10.third_party, "binaries"),
    _gb10(20, "caches", "compilers' caches", "local, writable", gb10.caches, "caches"),
    _gb10(22, "jobs", "build jobs", "at least 1", gb10.jobs, gate=True),
    _gb10(27, "firmware", "firmware", "nothing waits", gb10.firmware, "firmware", "reboot"),
    _asked(5, "drop-caches", "dropping caches", "done", gpu.drop_caches, action="drop-caches"),
    _asked(12, "power", "power under load", ">= 80 TFLOP/s at >= 1900 MHz", gpu.power, gb10_only=True, action="power"),
    _asked(13, "hot", "temperature under load", "below 85 °C", gpu.hot, gb10_only=True, action="power"),
    _asked(15, "torch", "torch on the GPU", "CUDA 13, sm_120 or sm_121", gb10.torch, gb10_only=True, action="torch"),
    _asked(None, "window", "memory CUDA sees", "75 % of the host's", gb10.window, gb10_only=True, action="torch"),
    _asked(16, "nvrtc", "NVRTC", "that of CUDA 13", gb10.nvrtc, gb10_only=True, action="nvrtc"),
    _asked(28, "link", "two-host link", "up, MTU 9000, CMA", gb10.link, "link", "memory", gb10_only=True),
    _asked(29, "nccl", "NCCL rate", ">= 18 GB/s", gb10.nccl, gb10_only=True),
    _asked(30, "teacher-server", "teacher server", "k finite values", gb10.teacher_server, action="teacher-server"),
)
IDS = tuple(rule.id for rule in RULES)
GROUPS = tuple(sorted({group for rule in RULES for group in rule.groups}))


def judge(
    facts: HostFacts, ask: Ask | Host, *, asked: Iterable[str] = (), waived: Mapping[str, str] | None = None
) -> Report:
    """Judge what was found of a host, for a pipeline or for any (a bare host). ``asked`` names the checks that are
    only judged when named; ``waived`` gives reasons for which failures are let through."""
    host = ask if isinstance(ask, Host) else ask.host
    need = Need(in_place=False) if isinstance(ask, Host) else need_of(ask, facts)
    found = facts.preflight or PreflightFacts()
    seen = Seen(host, facts, found, need, is_gb10(host, facts), frozenset(asked))
    return Report(host.name, seen.gb10, tuple(_check(rule, seen, waived or {}) for rule in RULES))


def is_gb10(host: Host, facts: HostFacts) -> bool:
    """Whether a host is a GB10: declared, or by its GPU's own name."""
    names = [str(one.get("name")) for one in facts.host.gpus if isinstance(one, dict)]
    if facts.preflight is not None and (answer := facts.preflight.commands.get("gpu")) is not None:
        names += [row["name"] or "" for row in gpus(answer)]
    return host.gb10 or any("GB10" in name for name in names)


def _check(rule: Rule, seen: Seen, waived: Mapping[str, str]) -> Check:
    found = _judged(rule, seen)
    return Check(
        id=rule.id,
        title=rule.title,
        outcome=found.outcome,
        measured=found.measured,
        rule=rule.rule,
        remedy=None if found.remedy is None else found.remedy.replace("HOST", seen.host.name),
        gate=rule.gate,
        waived=waived.get(rule.id) if found.outcome == "fail" else None,
    )


def _judged(rule: Rule, seen: Seen) -> Found:
    if rule.gb10_only and not seen.gb10:
        return not_applicable("not a GB10")
    if rule.scope == "asked" and rule.id not in seen.asked:
        return not_applicable(f"only when asked for: --only {rule.id}")
    return rule.judge(seen)
