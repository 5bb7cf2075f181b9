"""Each check passes on a good GB10, fails or warns on what it is for, and is unknown where nothing is said."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host
from dispatch.preflight.facts import PreflightFacts
from dispatch.preflight.judge import IDS, RULES, judge

Facts = Callable[..., HostFacts]
GIB = 2**30
GB10: dict[str, str] = json.loads(Path(__file__).with_name("gb10.json").read_text())

ASKED = frozenset(rule.id for rule in RULES if rule.scope == "asked")


def gpu(**fields: str) -> dict[str, Any]:
    row = {**GB10, **{name.replace("__", "."): value for name, value in fields.items()}}
    return {"commands": {**COMMANDS, "gpu": ended(", ".join(row.values()) + "\n")}}


def ended(out: str = "", code: int | None = 0, status: str = "ended", err: str = "") -> dict[str, Any]:
    return {"status": status, "code": code, "out": out, "err": err, "seconds": 20.0}


ROW = ", ".join(GB10.values())
COMMANDS = {"apps": ended(), "banner": ended("CUDA Version: 13.0"), "gpu": ended(", ".join(GB10.values()) + "\n")}
MISSING = ended(code=None, status="missing")
TIMEOUT = ended(code=None, status="timeout")


def commands(**answers: dict[str, Any]) -> dict[str, Any]:
    return {"commands": {**COMMANDS, **{name.replace("_", "-"): one for name, one in answers.items()}}}


def numbers(**sizes: int) -> dict[str, Any]:
    known = {"MemTotal": 122 * GIB, "MemFree": 100 * GIB, "Cached": 6 * GIB, "CmaTotal": GIB}
    return {"memory": {"numbers": {**known, **sizes}, "swaps": []}}


def swap(used: int) -> dict[str, Any]:
    return {"memory": {"swaps": [{"name": "/swap", "size": 16 * GIB, "used": used}]}}


def tenant(command: str, name: str | None = None, **more: Any) -> dict[str, Any]:
    one = {"pid": 4242, "owner": "alice", "age": 237_600.0, "command": command, "name": name or command.split()[0]}
    return {"tenants": {"processes": [{**one, "why": ["is a model server"]}], **more}}


def sampled(rate: float, row: str) -> dict[str, Any]:
    return {"did": {"power": {"status": "ended", "answer": {"tflops": rate}, "samples": [row] * 20}}}


def torch(**answer: Any) -> dict[str, Any]:
    known = {"torch": "2.11.0+cu130", "cuda": "13.0", "arches": ["sm_90", "sm_120"], "mean": 18.1}
    return {"did": {"torch": {"status": "ended", "code": 0, "answer": {**known, **answer}, "said": ""}}}


def nvrtc(library: str) -> dict[str, Any]:
    return {"did": {"nvrtc": {"status": "ended", "code": 0, "answer": {"sum": 1.0, "loaded": [library]}}}}


def died(name: str, said: str) -> dict[str, Any]:
    return {"did": {name: {"status": "ended", "code": 1, "answer": None, "said": said}}}


def binary(elf: list[str] | None, ptx: list[str] | None) -> dict[str, Any]:
    return {"binaries": {"own": [{"path": "/v/_native.so", "elf": elf, "ptx": ptx}]}}


def third(cudart12: bool | None, elf: list[str] | None, ptx: list[str] | None) -> dict[str, Any]:
    one = {"path": "/v/lib.so", "cudart12": cudart12, "elf": elf, "ptx": ptx}
    return {"binaries": {"third": {"bitsandbytes": [one]}}}


def port(**fields: Any) -> dict[str, Any]:
    return {"link": [{"card": "mlx5_0", "port": "1", "state": "4: ACTIVE", "net": "enp1s0", "mtu": 9000, **fields}]}


def server(**fields: Any) -> dict[str, Any]:
    known = {"reached": True, "error": None, "model": "m", "prompt": [21, 21, 21], "next": [21], "k": 20}
    return {"did": {"teacher-server": {**known, **fields}}}


def nccl(rate: float) -> dict[str, Any]:
    return {"did": {"nccl": {"gigabytes_per_second": rate}}}


CASES: list[tuple[str, str, dict[str, Any], str]] = [
    # id, outcome, what is different on the host, words of the answer
    ("root", "pass", {}, "takes a write"),
    ("root", "pass", {"did": {"write": {"ok": True, "seconds": 0.003}}}, "renamed and removed"),
    ("root", "fail", {"did": {"write": {"ok": False, "step": "fsync", "error": "No space left", "errno": "ENOSPC"}}},
     "fsync"),
    ("root", "fail", {"storage": {"read_only": True}}, "mounted read-only"),
    ("root", "fail", {"storage": {"unnamed": "EDQUOT"}}, "EDQUOT"),
    ("root", "fail", {"storage": {"unnamed": "unsupported", "writable": False}}, "may not write"),
    ("root", "unknown", {"storage": None}, "did not say"),
    ("filesystem", "pass", {}, "ext4"),
    ("filesystem", "fail", {"storage": {"filesystem": "nfs4"}}, "lies on nfs4"),
    ("filesystem", "fail", {"storage": {"filesystem": "fuse.sshfs"}}, "cannot be trusted"),
    ("filesystem", "unknown", {"storage": {"filesystem": None}}, "not known"),
    ("permissions", "pass", {}, "mode 0700"),
    ("permissions", "fail", {"storage": {"mode": 0o755}}, "others may read"),
    ("permissions", "fail", {"storage": {"mode": 0o770}}, "others may write"),
    ("permissions", "fail", {"storage": {"owner": 0}}, "belongs to uid 0"),
    ("permissions", "fail", {"storage": {"noexec": True}}, "noexec"),
    ("permissions", "unknown", {"storage": None}, "did not say"),
    ("disk", "pass", {}, "900.0 GiB free"),
    ("disk", "fail", {"storage": {"bytes_free": GIB}}, "1.0 GiB free in /r on box, 2.0 GiB needed"),
    ("disk", "unknown", {"storage": None, "machine": {"disk_free": None}}, "not known"),
    ("inodes", "pass", {}, "10000000 inodes free"),
    ("inodes", "pass", {"storage": {"inodes_free": None}}, "as they are needed"),
    ("inodes", "fail", {"storage": {"inodes_free": 12}}, "12 inodes free in /r, 10000 needed"),
    ("inodes", "unknown", {"storage": None}, "did not say"),
    ("headroom", "pass", {}, "112.0 GiB of 122.0 GiB"),
    ("headroom", "warn", {"machine": {"mem_available": 12 * GIB}}, "12.0 GiB of"),
    ("headroom", "fail", {"machine": {"mem_available": 5 * GIB}}, "5.0 GiB of"),
    ("headroom", "unknown", {"machine": {"mem_available": None}}, "does not say"),
    ("swap", "pass", {}, "none"),
    ("swap", "pass", swap(1 * GIB), "1.0 GiB of 16.0 GiB used"),
    ("swap", "warn", {**swap(1 * GIB), "session": {"watchdog": False}}, "1.0 GiB of"),
    ("swap", "fail", swap(5 * GIB), "5.0 GiB of 16.0 GiB used"),
    ("swap", "unknown", {"memory": None}, "did not say"),
    ("clock", "pass", {}, "0.0 s"),
    ("clock", "warn", {"received": 4600.0, "answered": 4600.2}, "3600.0 s ahead"),
    ("clock", "warn", {"received": 997.0, "answered": 997.2}, "3.0 s behind"),
    ("clock", "unknown", {"received": None}, "not compared"),
    ("clock", "unknown", {"received": 998.0, "answered": 998.1, "heard": 1003.9}, "took too long"),
    ("ntp", "pass", {}, "synchronised"),
    ("ntp", "warn", {"clock": {"synchronised": False}}, "not synchronised"),
    ("ntp", "unknown", {"clock": {"synchronised": None}}, "does not say"),
    ("linger", "pass", {}, "on"),
    ("linger", "warn", {"session": {"linger": False}}, "last logout"),
    ("linger", "n/a", {"session": {"systemd": False, "linger": None}}, "no systemd"),
    ("linger", "unknown", {"session": None}, "did not say"),
    ("tenants", "pass", {}, "none"),
    ("tenants", "fail", tenant("VLLM::EngineCore"), "pid 4242 of alice, for 3 d: VLLM::EngineCore"),
    ("tenants", "fail", commands(apps=ended("4243, python3, [N/A]\n")), "pid 4243 of an unknown user"),
    ("tenants", "warn", tenant("/usr/lib/xorg/Xorg -core", "Xorg"), "a desktop (Xorg)"),
    ("tenants", "pass", tenant("/usr/bin/nvidia-persistenced", "nvidia-persiste"), "none"),
    ("tenants", "pass", tenant("python train.py", ours=[4242], lease={"run": "distill-1"}), "held by distill-1"),
    ("tenants", "unknown", gpu(utilization__gpu="96"), "nobody is seen, and the GPU is 96 % busy"),
    ("tenants", "unknown", {**commands(apps=TIMEOUT), "tenants": {"unseen": 9}}, "9 processes of others"),
    ("tenants", "unknown", {"tenants": None}, "did not say"),
    ("tenants", "unknown", {"tenants": {"unseen": 9}, "machine": {"mem_available": 40 * GIB}},
     "82.0 GiB of memory are"),
    ("tenants", "fail", commands(apps=ended("4243, vllm serve --x a, b, [N/A]\n")), "vllm serve --x a, b"),
    ("tenants", "unknown", {**commands(apps=ended("[N/A], [N/A], [N/A]")), "tenants": {"unseen": 9}}, "gives no list"),
    ("platform", "pass", {}, "DGX OS 7.5.0"),
    ("platform", "warn", {"platform": {"kernel": "6.17.0-1008-nvidia"}}, "6.17.0-1008"),
    ("platform", "warn", {"platform": {"id": "debian", "version": "12"}}, "aarch64"),
    ("platform", "fail", {"platform": {"arch": "x86_64"}}, "x86_64"),
    ("platform", "unknown", {"platform": None}, "did not say"),
    ("gpu", "pass", {}, "NVIDIA GB10, compute capability 12.1"),
    ("gpu", "fail", commands(gpu=TIMEOUT), "did not answer within 20 s"),
    ("gpu", "fail", commands(gpu=MISSING), "there is no nvidia-smi"),
    ("gpu", "fail", commands(gpu=ended("", 9, err="couldn't communicate with the NVIDIA driver")),
     "couldn't communicate"),
    ("gpu", "fail", gpu(name="NVIDIA H100", compute_cap="9.0"), "NVIDIA H100"),
    ("gpu", "unknown", gpu(compute_cap="[N/A]"), "not told"),
    ("driver", "pass", {}, "580.142"),
    ("driver", "pass", gpu(driver_version="580.173.02"), "580.173.02"),
    ("driver", "warn", gpu(driver_version="580.95.05"), "580.95.05"),
    ("driver", "warn", gpu(driver_version="590.48"), "590.48"),
    ("driver", "fail", gpu(driver_version="570.133"), "570.133"),
    ("driver", "unknown", commands(gpu=MISSING), "not known"),
    ("driver", "unknown", gpu(driver_version="[Unknown Error]"), "not known"),
    ("driver", "unknown", gpu(driver_version="none"), "'none'"),
    ("gpu", "fail", commands(gpu=ended(f"{ROW}\n{ROW.replace('GB10', 'H100')}\n")), "12.1; NVIDIA H100"),
    ("gpu", "fail", commands(gpu=ended("No devices were found\n")), "No devices were found"),
    ("gpu", "unknown", gpu(name="[GPU is lost]", compute_cap="[GPU is lost]"), "without a name"),
    ("page-cache", "pass", {}, "6.0 GiB of page cache"),
    ("page-cache", "warn", numbers(Cached=60 * GIB, MemFree=GIB // 2), "60.0 GiB of page cache"),
    ("page-cache", "unknown", {"memory": None}, "did not say"),
    ("leaked", "pass", {}, "10.0 GiB used"),
    ("leaked", "fail", {"machine": {"mem_available": 80 * GIB}}, "42.0 GiB used by nobody"),
    ("leaked", "n/a", {**tenant("VLLM::EngineCore"), "machine": {"mem_available": 20 * GIB}}, "in use"),
    ("leaked", "unknown", {"tenants": None}, "not known"),
    ("watchdog", "pass", {}, "sshd at -1000"),
    ("watchdog", "warn", {"session": {"sshd": 0}}, "not protected"),
    ("watchdog", "fail", {"session": {"watchdog": False}}, "no memory watchdog"),
    ("watchdog", "unknown", {"session": {"sshd": None}}, "not known"),
    ("crash", "pass", {}, "nothing of the kind"),
    ("crash", "warn", commands(journal=ended("h kernel: NVRM: NV_ERR_NO_MEMORY\nh kernel: NVRM: Xid (PCI:1): 79\n")),
     "2 lines"),
    ("crash", "unknown", commands(journal=ended("\n")), "empty for this user"),
    ("crash", "unknown", commands(journal=ended("", 1, err="no such boot ID in journal")), "no such boot"),
    ("thermals", "pass", {}, "46 °C"),
    ("thermals", "warn", gpu(temperature__gpu="75"), "75 °C"),
    ("thermals", "fail", gpu(temperature__gpu="91"), "91 °C"),
    ("thermals", "unknown", gpu(temperature__gpu="[N/A]"), "does not tell"),
    ("thermals", "unknown", gpu(temperature__gpu="84", utilization__gpu="97"), "97 % busy"),
    ("thermals", "fail", commands(gpu=ended(f"{ROW}\n{ROW.replace(', 46,', ', 91,')}\n")), "91 °C"),
    ("toolkit", "pass", {}, "nvcc 13.0, driver 13.0"),
    ("toolkit", "warn", commands(nvcc=MISSING), "no nvcc"),
    ("toolkit", "warn", commands(nvcc=ended("release 13.2,"), nvcc_targets=ended("sm_121")), "nvcc 13.2, driver 13.0"),
    ("toolkit", "fail", commands(nvcc=ended("release 12.8,"), nvcc_targets=ended("sm_90\nsm_120")),
     "does not know sm_121"),
    ("toolkit", "unknown", commands(nvcc=TIMEOUT, nvcc_targets=TIMEOUT), "did not answer"),
    ("triton", "pass", {}, "Triton 3.8.0, ptxas-blackwell"),
    ("triton", "warn", {"triton": {"version": "3.7.1"}}, "repeats differed"),
    ("triton", "warn", {"triton": {"variables": {"TRITON_PTXAS_PATH": "/x"}}}, "set and ignored"),
    ("triton", "fail", {"triton": {"assembled": ended("", 255, err="Value 'sm_121a' is not defined")}}, "sm_121a"),
    ("triton", "fail", {"triton": {"version": "3.5.0"}}, "older than 3.6"),
    ("triton", "n/a", {"triton": {"version": None}}, "not in the environment"),
    ("triton", "unknown", {"triton": {"assembled": MISSING}}, "was not run"),
    ("binaries", "pass", {}, "sm_121"),
    ("binaries", "pass", binary(["ELF file 1: a.sm_120.cubin"], []), "sm_120"),
    ("binaries", "warn", binary([], ["PTX file 1: a.sm_90.ptx"]), "PTX only (sm_90)"),
    ("binaries", "fail", binary(["ELF file 1: a.sm_120a.cubin", "ELF file 2: a.sm_100.cubin"], []), "sm_100 sm_120a"),
    ("binaries", "fail", binary([], []), "no code for a GPU"),
    ("binaries", "n/a", {"binaries": {"own": []}}, "nothing is built"),
    ("binaries", "unknown", binary(None, None), "no cuobjdump"),
    ("binaries", "unknown", binary(None, ["PTX file 1: a.sm_90.ptx"]), "no cuobjdump"),
    ("third-party", "pass", third(False, ["x.sm_121.cubin"], []), "bitsandbytes"),
    ("third-party", "warn", third(False, ["x.sm_90.cubin"], ["x.sm_90.ptx"]), "PTX only"),
    ("third-party", "fail", third(True, ["x.sm_120.cubin"], []), "libcudart.so.12"),
    ("third-party", "unknown", {"binaries": None}, "did not say"),
    ("third-party", "unknown", third(False, None, None), "bitsandbytes: there is no cuobjdump"),
    ("third-party", "unknown", third(None, ["x.sm_121.cubin"], []), "bitsandbytes"),
    ("caches", "pass", {}, "local and writable"),
    ("caches", "warn", {"caches": [{"variable": "V", "path": "/n", "filesystem": "nfs4", "writable": True}]},
     "lies on nfs4"),
    ("caches", "fail", {"caches": [{"variable": "V", "path": "/n", "filesystem": "ext4", "writable": False}]},
     "cannot be written"),
    ("caches", "unknown", {"caches": None}, "did not say"),
    ("caches", "unknown", {"caches": [{"variable": "V", "path": "/n", "filesystem": None, "writable": True}]},
     "of /n is"),
    ("jobs", "pass", {}, "10 at a time"),
    ("jobs", "warn", {"machine": {"mem_available": 20 * GIB}}, "0 at a time"),
    ("jobs", "unknown", {"machine": {"cores": None}}, "not known"),
    ("firmware", "pass", {}, "no updates wait"),
    ("firmware", "warn", commands(firmware=ended('{"Devices": [{"Name": "EC", "Releases": [{}]}]}')), "wait for EC"),
    ("firmware", "warn", {"reboot": True}, "restart is wanted"),
    ("firmware", "unknown", commands(firmware=MISSING), "there is no fwupdmgr"),
    *(("firmware", "unknown", commands(firmware=ended(text)), "not the JSON")
      for text in ("no json", "[]", '{"Devices": null}', '{"Devices": ["EC"]}', "{}")),
    ("drop-caches", "pass", {"did": {"drop-caches": {"done": True}}}, "dropped"),
    ("drop-caches", "warn", {"did": {"drop-caches": {"done": False, "why": "Permission denied"}}}, "Permission denied"),
    ("drop-caches", "unknown", {}, "not done"),
    ("power", "pass", sampled(91.6, "2281, 92.5, 99, 80"), "91.6 TFLOP/s at 2281 MHz"),
    ("power", "warn", sampled(70.0, "2000, 60, 99, 80"), "70.0 TFLOP/s"),
    ("power", "fail", sampled(36.5, "799, 19.5, 96, 50"), "36.5 TFLOP/s at 799 MHz, 20 W"),
    ("power", "unknown", {"did": {"power": {"status": "missing", "answer": None, "said": "no environment"}}},
     "no environment"),
    ("power", "unknown", sampled(91.0, "[N/A], [N/A], [N/A], [N/A]"), "unknown clock"),
    ("hot", "pass", sampled(91.6, "2281, 92.5, 99, 80"), "80 °C"),
    ("hot", "warn", sampled(91.6, "2281, 92.5, 99, 88"), "88 °C"),
    ("hot", "fail", sampled(91.6, "2281, 92.5, 99, 92"), "92 °C"),
    ("hot", "unknown", {}, "no temperature"),
    ("torch", "pass", torch(), "CUDA 13.0"),
    ("torch", "fail", torch(cuda="12.8"), "CUDA 12.8"),
    ("torch", "fail", torch(cuda=None), "CUDA None"),
    ("torch", "fail", torch(arches=["sm_80", "sm_90"]), "neither"),
    ("torch", "fail", torch(mean=float("nan")), "gave nan"),
    ("torch", "fail", died("torch", "AssertionError: Torch not compiled with CUDA enabled"), "not compiled"),
    ("torch", "unknown", {}, "no answer"),
    ("window", "pass", torch(total=119 * GIB), "119.0 GiB of the host's 122.0 GiB"),
    ("window", "fail", torch(total=30 * GIB), "30.0 GiB of the host's 122.0 GiB"),
    ("window", "unknown", torch(total="119 GiB"), "does not tell"),
    ("window", "unknown", died("torch", "CUDA error: out of memory"), "out of memory"),
    ("nvrtc", "pass", nvrtc("/v/libnvrtc.so.13"), "libnvrtc.so.13"),
    ("nvrtc", "fail", nvrtc("/usr/lib/libnvrtc.so.12"), "libnvrtc.so.12"),
    ("nvrtc", "fail", died("nvrtc", "nvrtc: error: invalid value for --gpu-architecture (-arch)"),
     "--gpu-architecture"),
    ("nvrtc", "unknown", {}, "no answer"),
    ("link", "pass", port(), "MTU 9000"),
    ("link", "warn", port(mtu=1500), "MTU 1500"),
    ("link", "fail", port(state="1: DOWN"), "none active"),
    ("link", "fail", {**port(), **numbers(CmaTotal=0)}, "no CMA"),
    ("link", "unknown", {"link": None}, "did not say"),
    ("link", "unknown", {**port(), "memory": None}, "whether memory can be registered"),
    ("nccl", "pass", nccl(21.3), "21.3 GB/s"),
    ("nccl", "warn", nccl(9.0), "9.0 GB/s"),
    ("nccl", "fail", nccl(3.0), "3.0 GB/s"),
    ("nccl", "unknown", {}, "not measured"),
    ("teacher-server", "pass", server(), "21 of 20"),
    ("teacher-server", "fail", server(prompt=[5, 20, 20]), "5 of 20"),
    ("teacher-server", "fail", server(prompt=[], next=[]), "without log-probabilities"),
    ("teacher-server", "fail", server(error="HTTP 400: max_logprobs is 20"), "max_logprobs"),
    ("teacher-server", "unknown", server(reached=False, error="refused"), "not reached"),
    ("capabilities", "n/a", {}, "nothing is built"),
    ("capabilities", "fail", {"capabilities": {"source": "asked", "offered": None, "code": 2, "said": "no such"}},
     "status 2"),
    ("capabilities", "pass", {"capabilities": {"source": "build", "offered": {"version": "0.1.0"}}}, "0.1.0"),
    ("capabilities", "unknown", {"capabilities": None}, "did not say"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("id", "outcome", "groups", "words"), CASES, ids=[f"{c[0]}-{c[1]}-{n}" for n, c in enumerate(CASES)]
)
def test_a_check_says_what_it_found_and_what_to_do(
    facts_with: Facts, box: Host, id: str, outcome: str, groups: dict[str, Any], words: str
) -> None:
    found = judge(facts_with(**groups), box, asked=ASKED)[id]
    assert (found.outcome, words in found.measured) == (outcome, True), found
    if outcome in ("warn", "fail"):
        assert found.remedy
        assert "HOST" not in found.remedy


def test_every_check_ships_an_input_on_which_it_fails_or_warns_and_one_on_which_it_passes() -> None:
    for id in IDS:
        outcomes = {outcome for case, outcome, _groups, _words in CASES if case == id}
        if id in ("python", "memory"):
            continue  # test_need.py, test_plan.py
        assert outcomes & {"fail", "warn"}, id
        assert "pass" in outcomes, id
        assert "unknown" in outcomes, id


def test_a_gb10_on_which_nothing_is_wrong_passes_with_its_memory_fields_not_available(
    facts_with: Facts, box: Host
) -> None:
    report = judge(facts_with(), box)
    assert GB10["memory.total"] == GB10["memory.used"] == "[N/A]"
    assert {one.id for one in report.checks if one.outcome not in ("pass", "n/a")} == set()
    assert report.counts["pass"] >= 25
    assert report.code == 0


def test_gb10_checks_do_not_apply_to_another_host_unless_it_is_declared_or_probed(facts_with: Facts, box: Host) -> None:
    plain = box.model_copy(update={"gb10": False})
    other = gpu(name="NVIDIA RTX 4090", compute_cap="8.9")
    facts = facts_with(machine={"gpus": [{"name": "NVIDIA RTX 4090"}]}, **other)
    report = judge(facts, plain)
    assert {one.id for one in report.checks if one.measured == "not a GB10"} == {r.id for r in RULES if r.gb10_only}
    assert judge(facts_with(), plain).gb10  # by its GPU's own name
    declared = judge(facts, box)
    assert declared["gpu"].outcome == "fail"
    assert declared["gpu"].gate


def test_an_agent_that_answers_nothing_passes_nothing(facts_with: Facts, box: Host) -> None:
    facts = facts_with().model_copy(update={"preflight": None})
    report = judge(facts, box, asked=ASKED)
    # These rest on the plain facts of a host.
    assert {one.id for one in report.checks if one.outcome == "pass"} <= {"python", "headroom", "jobs", "disk"}


def test_a_group_that_broke_on_the_host_is_unknown_with_its_error(facts_with: Facts, box: Host) -> None:
    good = facts_with()
    broken = PreflightFacts.of({"storage": {"error": "OSError: boom"}}, asked=0.0, heard=1.0)
    report = judge(HostFacts(host=good.host, python=good.python, root="/r", preflight=broken), box)
    assert report["filesystem"].outcome == "unknown"
    assert "boom" in report["filesystem"].measured


def test_a_failure_that_is_waived_stops_nothing_and_keeps_its_reason(facts_with: Facts, box: Host) -> None:
    facts = facts_with(**tenant("VLLM::EngineCore"))
    assert [one.id for one in judge(facts, box).stopping] == ["tenants"]
    waived = judge(facts, box, waived={"tenants": "alice knows", "disk": "unused"})
    assert waived.stopping == ()
    assert (waived["tenants"].outcome, waived["tenants"].waived) == ("fail", "alice knows")
    assert waived["disk"].waived is None
