"""The real agent beside a fake `nvidia-smi`: one question, nothing written unless named, and an answer in any case."""

from __future__ import annotations

import http.server
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from dispatch.agent import bounded, preflight_actions, preflight_stack
from dispatch.agent.paths import Root
from dispatch.agent.preflight import ACTIONS
from dispatch.hosts.inventory import Host
from dispatch.preflight.facts import PreflightFacts
from dispatch.preflight.judge import GROUPS, RULES
from latentforge.errors import LatentForgeError

Probe = Callable[..., Any]


def listing(folder: Path) -> list[tuple[str, int, int]]:
    return [
        (str(one), (found := one.stat()).st_mtime_ns, found.st_size) for one in sorted([folder, *folder.rglob("*")])
    ]


def test_a_gb10_is_known_by_its_gpu_and_its_missing_memory_figures_fail_nothing(gb10: Any, probe: Probe) -> None:
    report, facts = probe()
    assert report.gb10
    assert facts.host.gpus[0]["memory.total"] is None
    assert report["gpu"].outcome == report["driver"].outcome == report["thermals"].outcome == "pass"
    assert report["headroom"].outcome == "pass"  # by the system's own figure
    assert report["root"].measured.endswith("ms")
    # A test machine is no DGX: what it lacks is told, never passed.
    assert report["platform"].outcome in ("fail", "warn")
    assert report["power"].outcome == report["nccl"].outcome == "n/a"


def test_everything_is_asked_in_one_exchange_and_what_loads_the_gpu_is_not_asked(
    gb10: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dispatch.transport.local import LocalTransport

    exchanges = []
    real = LocalTransport.exchange

    def exchange(self: Any, argv: list[str], stdin: bytes, *, timeout: float) -> Any:
        exchanges.append(argv)
        return real(self, argv, stdin, timeout=timeout)

    monkeypatch.setattr(LocalTransport, "exchange", exchange)
    _report, facts = probe()
    assert len(exchanges) == 1
    assert set(facts.preflight.did) == {"write"}
    asked = set(facts.preflight.commands) | {
        name for name in GROUPS if getattr(facts.preflight, name, None) is not None
    }
    assert asked >= set(GROUPS) - {"models", "reboot"}


def test_a_probe_reads_only_and_is_refused_what_writes(gb10: Any, probe: Probe, host: Host, tmp_path: Path) -> None:
    Path(str(host.root)).mkdir(mode=0o700)
    before = listing(tmp_path / "root"), listing(gb10.bin)
    report, _facts = probe(verb="probe")
    assert (listing(tmp_path / "root"), listing(gb10.bin)) == before
    assert "takes a write and a sync" in report["root"].measured
    for action in ACTIONS:
        with pytest.raises(LatentForgeError, match=f"a probe only reads; it does not do {action}"):
            probe(verb="probe", actions=[action])


def test_the_write_probe_leaves_nothing_behind_in_a_root_or_where_one_will_be(
    gb10: Any, probe: Probe, host: Host, tmp_path: Path
) -> None:
    names = {one.name for one in tmp_path.iterdir()}
    assert "(to be made in" in probe("root")[0]["root"].measured
    Path(str(host.root)).mkdir(mode=0o700)
    assert probe("root")[0]["root"].outcome == "pass"
    assert {one.name for one in tmp_path.iterdir()} - names <= {"root", "laptop", "calls"}
    assert list(Path(str(host.root)).iterdir()) == []


def test_a_driver_that_hangs_is_answered_within_its_deadline_and_leaves_no_process(
    gb10: Any, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    gb10.write(hang=True)
    begin = time.monotonic()
    found = bounded.run([str(gb10.bin / "nvidia-smi"), "-L"], 1.0)
    assert (found["status"], found["code"]) == ("timeout", None)
    assert time.monotonic() - begin < 10
    listed = subprocess.run(["ps", "-eo", "args="], capture_output=True, text=True, check=True).stdout
    assert str(gb10.bin) not in listed


def test_a_program_that_writes_without_end_is_kept_in_bounds() -> None:
    found = bounded.run([sys.executable, "-c", "import sys\nwhile 1: sys.stdout.write('x' * 65536)"], 1.0)
    assert found["status"] == "timeout"
    assert len(found["out"]) == 256 << 10


def test_the_end_of_a_long_kernel_log_is_read_however_much_stands_before_it(gb10: Any, probe: Probe) -> None:
    line = "2026-11-01T10:00:00+0000 h kernel: usb 1-1: all is well here\n"
    signs = "h kernel: NVRM: Xid (PCI:1): 79\nh kernel: NVRM: NV_ERR_NO_MEMORY"
    gb10.says("journalctl", line * 8000 + signs)
    found = probe("crash")[0]["crash"]
    assert (found.outcome, "2 lines" in found.measured) == ("warn", True), found
    gb10.says("journalctl", line * 8000)
    assert probe("crash")[0]["crash"].outcome == "pass"
    gb10.says("journalctl", "")  # what it says, quietly, to one who may not read the kernel's log
    assert probe("crash")[0]["crash"].outcome == "unknown"


def test_a_program_that_closes_its_output_and_goes_on_is_not_waited_for_beyond_its_deadline() -> None:
    begin = time.monotonic()
    found = bounded.run([sys.executable, "-c", "import os, time\nos.close(1); os.close(2); time.sleep(600)"], 1.0)
    assert found["status"] == "timeout"
    assert time.monotonic() - begin < 10


def test_a_driver_that_answers_with_an_error_is_a_failure_and_never_an_idle_gpu(gb10: Any, probe: Probe) -> None:
    gb10.write(code=9, says="NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.")
    report, _facts = probe(where=Host(name="local", gb10=True))
    assert report["gpu"].outcome == "fail"
    assert "couldn't communicate" in report["gpu"].measured
    assert report["driver"].outcome == report["thermals"].outcome == "unknown"


def test_only_what_is_named_is_asked_of_the_host(gb10: Any, probe: Probe) -> None:
    _report, facts = probe("swap")
    assert set(facts.preflight.commands) == {"gpu"}
    assert facts.preflight.memory is not None
    assert facts.preflight.storage is None
    assert facts.preflight.did == {}


@pytest.fixture
def process() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Processes that are ended with the test."""
    started = []

    def start(*argv: str, **more: Any) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(argv, stdin=subprocess.DEVNULL, **more))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()


def test_a_model_server_is_found_in_the_process_table_though_the_drivers_list_is_empty(
    gb10: Any, probe: Probe, process: Any
) -> None:
    gb10.write(apps="")
    server = process("VLLM::EngineCore", "600", executable="/bin/sleep")
    report, facts = probe("tenants")
    assert report["tenants"].outcome == "fail"
    assert f"pid {server.pid} of " in report["tenants"].measured
    assert "VLLM::EngineCore" in report["tenants"].measured
    assert facts.preflight.tenants.processes[0].age < 600
    assert report["tenants"].stops


@pytest.mark.parametrize(
    ("argv", "is_server"),
    [
        (["/usr/local/bin/ollama", "serve"], True),
        (["ollama"], True),
        (["VLLM::EngineCore"], True),
        (["VLLM::EngineCore_DP0"], True),
        (["/opt/llama.cpp/llama-server", "-m", "x.gguf"], True),
        (["python3", "-m", "sglang.launch_server"], True),
        (["/venv/bin/python3.12", "/venv/bin/vllm", "serve", "m"], True),
        (["python", "-u", "-m", "vllm.entrypoints.openai.api_server"], True),
        (["vim", "vllm.py"], False),
        (["grep", "-r", "ollama"], False),
        (["python3", "train.py", "--teacher", "vllm"], False),
        (["python3", "-c", "import vllm"], False),
        (["less", "/var/log/ollama.log"], False),
        ([], False),
    ],
)
def test_a_command_line_is_a_model_server_by_what_it_starts_not_by_what_it_mentions(
    argv: list[str], is_server: bool
) -> None:
    from dispatch.agent.preflight_tenants import _is_server

    assert _is_server(argv) is is_server


def test_a_holder_of_a_device_file_is_found_and_secrets_of_its_command_are_masked(
    gb10: Any, probe: Probe, process: Any
) -> None:
    device = Path(f"/dev/nvidia-test-{os.getpid()}")
    try:
        device.touch()
    except OSError:
        pytest.skip("needs root: device files cannot be made here")
    try:
        with open(device) as held:
            holder = process(
                sys.executable, "-c", "import time; time.sleep(600)", "--api-key=sk-verysecret", stdout=held
            )
        report, _facts = probe("tenants")
    finally:
        device.unlink()
    assert report["tenants"].outcome == "fail"
    assert f"pid {holder.pid}" in report["tenants"].measured
    assert "verysecret" not in json.dumps(report.as_json())


def test_our_own_lease_is_not_a_foreign_tenant(
    gb10: Any, probe: Probe, process: Any, host: Host, tmp_path: Path
) -> None:
    from dispatch.agent import locks

    root = Root(host.root)
    root.create()
    child = process("ollama", "600", executable="/bin/sleep")
    lease = locks.take(root.device_lock)
    assert lease is not None
    try:
        locks.note_holder(lease, {"run": "distill-1", "pid": child.pid})
        report, _facts = probe("tenants")
        assert report["tenants"].outcome == "pass"
        assert "held by distill-1" in report["tenants"].measured
        dropped = preflight_actions.drop_caches(root, str(tmp_path / "control"))
        assert dropped == {"done": False, "why": "the device is leased to distill-1"}
    finally:
        os.close(lease)
    (tmp_path / "control").write_text("")
    assert preflight_actions.drop_caches(root, str(tmp_path / "control")) == {"done": True}
    assert (tmp_path / "control").read_text() == "3\n"


def test_the_gpu_is_never_loaded_beside_a_run_and_no_run_starts_beside_the_load(
    gb10: Any, probe: Probe, host: Host, tmp_path: Path
) -> None:
    from dispatch.agent import locks

    root = Root(host.root)
    root.create()
    ran = tmp_path / "ran"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat '{root.device_lock}' >> '{ran}'\necho '{{\"tflops\": 90.0}}'\n")
    python.chmod(0o755)
    lease = locks.take(root.device_lock)
    assert lease is not None
    try:
        locks.note_holder(lease, {"run": "distill-1", "pid": os.getpid()})
        report, _facts = probe("power", "torch", python=str(python))
        for id in ("power", "torch"):
            assert report[id].outcome == "unknown"
            assert "leased to distill-1" in report[id].measured
        assert not ran.exists()
    finally:
        os.close(lease)
    assert "90.0 TFLOP/s" in probe("power", python=str(python))[0]["power"].measured
    assert "a preflight (power)" in ran.read_text()
    assert locks.holder(root.device_lock) is None


def test_a_host_that_is_no_gb10_is_not_loaded_for_checks_that_do_not_apply_to_it(
    gb10: Any, probe: Probe, tmp_path: Path
) -> None:
    gb10.write(gpu={"name": "NVIDIA H100", "compute_cap": "9.0"})
    ran, python = tmp_path / "ran", tmp_path / "python"
    python.write_text(f"#!/bin/sh\ntouch '{ran}'\n")
    python.chmod(0o755)
    report, _facts = probe("power", "torch", "nvrtc", python=str(python))
    assert {report[id].outcome for id in ("power", "torch", "nvrtc")} == {"n/a"}
    assert not ran.exists()


def test_the_capabilities_are_those_kept_beside_the_build_else_the_built_command_is_asked(tmp_path: Path) -> None:
    root = Root(str(tmp_path))
    for folder in ("venvs/v/bin", "builds/b/site"):
        (tmp_path / folder).mkdir(parents=True)
    for marker in ("venvs/v", "builds/b"):
        (tmp_path / marker / ".complete.json").write_text("{}")
    python = tmp_path / "venvs/v/bin/python"
    python.write_text('#!/bin/sh\n[ "$4" = capabilities ] && echo \'{"kinds": ["data"]}\'\n')
    python.chmod(0o755)
    found = preflight_stack.Interpreter.of(root, None, "b", "v")
    assert preflight_stack.capabilities(found)["offered"] == {"kinds": ["data"]}
    (tmp_path / "builds/b/capabilities.json").write_text('{"kinds": ["kept"]}')
    assert preflight_stack.capabilities(found) == {"source": "build", "offered": {"kinds": ["kept"]}}
    (tmp_path / "builds/b/capabilities.json").unlink()
    python.write_text("#!/bin/sh\necho 'no such command' >&2; exit 2\n")
    asked = preflight_stack.capabilities(found)
    assert (asked["offered"], asked["code"], asked["said"]) == (None, 2, "no such command")
    python.write_text("#!/bin/sh\necho '[1]'\n")
    assert preflight_stack.capabilities(found)["offered"] is None
    absent = preflight_stack.Interpreter.of(root, None, "other", "v")
    assert absent.site is None


def test_torch_triton_and_binaries_are_read_as_a_gb10_environment_lays_them(
    gb10: Any, probe: Probe, tmp_path: Path
) -> None:
    site = tmp_path / "venv/lib/python3.12/site-packages"
    programs = site / "triton/backends/nvidia/bin"
    programs.mkdir(parents=True)
    (site / "triton-3.8.0.dist-info").mkdir()
    (site / "latentforge").mkdir()
    (site / "latentforge/_native.so").write_bytes(b"\x7fELF")
    (site / "bitsandbytes").mkdir()
    (site / "bitsandbytes/lib.so").write_bytes(b"\x7fELF needs libcudart.so.12\0")
    lister = '#!/bin/sh\ncase "$1" in --list-elf) echo "ELF file    1: x.1.sm_121.cubin";; esac\n'
    for name, text in {"ptxas-blackwell": "#!/bin/sh\nexit 0\n", "cuobjdump": lister}.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir()
    python.write_text('#!/bin/sh\necho \'{"torch": "2.11", "cuda": "12.8", "arches": ["sm_90"], "mean": 1.0}\'\n')
    python.chmod(0o755)
    gb10.put("cuobjdump", lister)
    report, _facts = probe("triton", "binaries", "third-party", "torch", python=str(python))
    assert report["triton"].outcome == "pass", report["triton"]
    assert "3.8.0, ptxas-blackwell" in report["triton"].measured
    assert (report["binaries"].outcome, report["binaries"].measured) == ("pass", "_native.so: sm_121")
    assert (report["third-party"].outcome, report["torch"].outcome) == ("fail", "fail")
    (programs / "ptxas-blackwell").write_text("#!/bin/sh\necho \"Value 'sm_121a' is not defined\" >&2; exit 255\n")
    report, _facts = probe("triton", python=str(python))
    assert report["triton"].outcome == "fail"
    assert "sm_121a" in report["triton"].measured


class _Server(http.server.BaseHTTPRequestHandler):
    rows: ClassVar[list[Any]] = []
    code = 200

    def _send(self, document: Any) -> None:
        body = json.dumps(document).encode()
        self.send_response(self.code)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self._send({"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self._send({"choices": [{"prompt_logprobs": type(self).rows, "logprobs": {"top_logprobs": []}}]})

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[tuple[str, type[_Server]]]:
    """An OpenAI-compatible server on loopback that answers with the rows that it is told."""
    kind = type("Server", (_Server,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), kind) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}/v1", kind
        listening.shutdown()


def test_a_teacher_server_that_gives_fewer_log_probabilities_than_asked_fails(probe: Probe, server: Any) -> None:
    url, kind = server

    def row(count: int, value: Any = -1.0) -> dict[str, Any]:
        return {str(n): {"logprob": value} for n in range(count)}

    def ask() -> Any:
        return probe("teacher-server", server={"url": url, "k": 4})[0]["teacher-server"]

    kind.rows = [None, row(5), row(5)]
    assert ask().outcome == "pass"
    kind.rows = [None, row(5), row(2)]
    assert (ask().outcome, "2 of 4" in ask().measured) == ("fail", True)
    kind.rows = []
    assert ask().outcome == "fail"
    kind.rows = [row(5, float("-inf"))]
    assert ask().outcome == "fail"
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/v1"
        assert ask().outcome == "unknown"


def test_the_offset_is_that_of_the_middle_of_the_question_and_a_slow_link_is_unknown_not_wrong() -> None:
    def offset(received: float, answered: float, heard: float) -> tuple[float, float]:
        found = PreflightFacts.of({"received": received, "answered": answered}, asked=100.0, heard=heard).offset
        assert found is not None
        return found

    assert offset(100.5, 101.5, 102.0) == (0.0, 0.5)
    ahead, trip = offset(3700.5, 3701.5, 102.0)
    assert (ahead, trip) == (3600.0, 0.5)
    ahead, trip = offset(108.0, 108.0, 110.0)  # ten seconds on the way: it may be three ahead, or right
    assert (ahead, trip) == (3.0, 5.0)


def test_ids_are_unique_and_every_check_that_loads_the_machine_waits_to_be_named() -> None:
    assert len({rule.id for rule in RULES}) == len(RULES)
    assert {rule.action for rule in RULES if rule.action} == set(ACTIONS)
    assert {rule.id for rule in RULES if rule.action and rule.scope != "asked"} == {"root"}
