"""The wire: frames amid noise, requests, the constant bootstrap line."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dispatch import agent_package
from dispatch.agent import bootstrap, gc, protocol, rubbish
from dispatch.agent.__main__ import serve
from dispatch.agent.cas import Origin

from .conftest import AgentHost, Refusal, snapshot

_NOISE = st.lists(
    st.sampled_from(
        [b"\n=LF-BEGIN 12=\n", b"\n=LF-END=\n", b"Welcome\r\n", b"\x1b[1m", b"\xff\xfe", b"=LF-BEGIN", b"{}"]
    )
    | st.binary(max_size=20),
    max_size=6,
).map(b"".join)


@given(before=_NOISE, after=_NOISE, payload=st.binary(max_size=40), value=st.text(max_size=20))
def test_a_reply_is_found_amid_whatever_a_login_shell_prints(
    before: bytes, after: bytes, payload: bytes, value: str
) -> None:
    reply = protocol.encode_reply({"ok": True, "result": {"value": value}}, payload)
    frame = protocol.find_frame(before + reply + after)
    assert frame is not None
    assert frame.document["result"] == {"value": value}
    assert (frame.noise, frame.payload, frame.rest) == (before.replace(protocol.HERE, b""), payload, after)


def test_a_reply_that_is_not_whole_is_no_reply() -> None:
    reply = protocol.encode_reply({"ok": True, "result": {}}, b"payload")
    assert all(protocol.find_frame(reply[:end]) is None for end in range(len(reply)))


def test_the_bootstrap_line_holds_nothing_that_any_shell_would_touch_inside_single_quotes() -> None:
    line = agent_package.BOOTSTRAP
    assert line.isascii()
    assert line.isprintable()
    assert not set(line) & set("'\"`$\\!\n")


def test_equal_sources_give_equal_bytes() -> None:
    first = agent_package.agent_bytes()
    agent_package.agent_bytes.cache_clear()
    assert agent_package.agent_bytes() == first
    assert agent_package.agent_sha256() == hashlib.sha256(first).hexdigest()
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        assert archive.namelist() == sorted(archive.namelist())
        assert bootstrap.unpack(first) == {name: archive.read(name) for name in archive.namelist()}
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_the_agent_uses_the_standard_library_alone(host: AgentHost) -> None:
    folder = Path(agent_package.__file__).parent / "agent"
    for path in folder.glob("*.py"):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] in (["import"], ["from"]) and "import" in words and not words[1].startswith("."):
                module = words[1].split(".")[0].rstrip(",")
                assert module in sys.stdlib_module_names, f"{path.name}: {line}"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"", "incomplete"),
        (b"{}", "incomplete"),
        (b"hello\n", "not JSON"),
        (b"[]\n", "not a JSON object"),
        (b'{"verb": 1}\n', "verb=1"),
        (b'{"verb": "fly"}\n', "verb='fly'"),
        (b'{"verb": "probe", "root": 3}\n', "root=3"),
        (b'{"verb": "probe", "args": []}\n', "args=[]"),
        (b'{"verb": "probe", "rot": null}\n', "'rot'"),
        (b'{"verb": "probe", "payload_bytes": -1}\n', "payload_bytes=-1"),
        (b'{"verb": "probe", "args": {"runz": []}}\n', "'runz'"),
        (b'{"verb": "status", "args": {"runs": ["../x"]}}\n', "run='../x'"),
        (b'{"verb": "probe", "root": "here"}\n', "root='here'"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (
            b'{"verb": "cancel", "args": {"run": "data-%s", "grace": 1%s}}\n' % (b"0" * 20, b"0" * 400),
            "is outside 0.0 to 600.0",
        ),
        (
            b'{"verb": "reserve", "args": {"run": "d", "identity": "", "launch": {}, "secrets": "hush"}}\n',
            "secrets=what",
        ),
        (b'{"verb": "status", "args": {"runs": ["%s"]}}\n' % (b"x" * (1 << 20)), "is not a run id"),
        (b'{"verb": "%s"}\n' % (b"x" * (1 << 20)), "is not one of"),
        (b'{"verb": "cancel", "args": {"run": %s}}\n' % (b"9" * 4000), "is not a string"),
    ],
)
def test_a_bad_request_is_answered_with_what_is_wrong_with_it(line: bytes, told: str) -> None:
    frame = protocol.find_frame(serve(io.BytesIO(line), Origin(agent_package.agent_bytes(), None)))
    assert frame is not None
    assert not frame.document["ok"]
    error = frame.document["error"]
    assert told in error["message"]
    assert len(error["message"]) < 500, "what was refused is quoted, not sent back"
    assert (error["kind"] in ("protocol", "refused"), "hush" in error["message"]) == (True, False)
    assert frame.document["agent"] == agent_package.agent_sha256()


def test_the_agent_carried_in_over_stdin_leaves_nothing_behind(host: AgentHost, tmp_path: Path) -> None:
    before = snapshot(tmp_path)
    none = "data-" + "0" * 20
    asked = {
        "runs": [{"id": none}],
        "kins": ["a"],
        "paths": [{"path": "/nowhere", "purpose": "corpus"}],
        "cas": ["0" * 64],
    }
    assert host.frame("probe", asked).document["result"]["root_exists"] is False
    host.frame("status", {"runs": [none]})
    host.frame("read", {"run": none, "streams": {"launch.log": None}, "max": 10, "wait": 0})
    with pytest.raises(Refusal, match="is not on this host"):
        host.frame("collect", {"run": none})
    with pytest.raises(Refusal, match="cannot be read"):
        host.frame("fetch", {"run": none, "path": "launch.log"})
    assert snapshot(tmp_path) == before
    assert not host.dir.exists()


def test_the_agent_does_not_write_bytecode_anywhere(host: AgentHost) -> None:
    host.call("install")
    host.installed = True
    before = snapshot(host.dir)
    host.frame("probe", {})
    assert snapshot(host.dir) == before


def test_a_missing_or_corrupt_installed_agent_is_named(host: AgentHost) -> None:
    host.installed = True
    with pytest.raises(Refusal) as missing:
        host.frame("probe", {})
    assert missing.value.kind == "agent-missing"
    host.installed = False
    path = Path(host.call("install")["path"])
    assert path.read_bytes() == agent_package.agent_bytes()
    data = bytearray(path.read_bytes())
    data[2000] ^= 1
    path.chmod(0o600)
    path.write_bytes(data)
    host.installed = True
    with pytest.raises(Refusal) as corrupt:
        host.frame("probe", {})
    assert corrupt.value.kind == "agent-corrupt"
    host.installed = False
    host.call("install")
    host.installed = True
    host.frame("probe", {})


def test_the_installed_file_answers_when_it_is_run_directly(host: AgentHost) -> None:
    path = host.call("install")["path"]
    done = subprocess.run(
        [sys.executable, "-I", path],
        input=protocol.encode_request("probe", root=str(host.dir)),
        capture_output=True,
        check=True,
    )
    frame = protocol.find_frame(done.stdout)
    assert frame is not None
    assert frame.document["agent"] == agent_package.agent_sha256()


def test_a_probe_reads_none_of_what_runs_jobs_or_speaks_http() -> None:
    """Every plan starts the agent anew and compiles what it imports."""
    line = agent_package.bootstrap_argv(sys.executable)
    done = subprocess.run(
        [line[0], "-X", "importtime", *line[1:]],
        input=agent_package.carried("probe") + protocol.encode_request("probe", args={"preflight": {"groups": []}}),
        capture_output=True,
        check=True,
    )
    frame = protocol.find_frame(done.stdout)
    assert frame is not None
    assert frame.document["ok"], frame.document
    read = {line.rpartition("|")[2].strip() for line in done.stderr.decode().splitlines()}
    assert "latentforge_agent.preflight" in read
    assert not read & {"latentforge_agent.job", "latentforge_agent.preflight_actions", "http.client", "ssl", "email"}


def test_an_old_python_is_answered_not_crashed() -> None:
    old = "import sys;sys.version_info=(3,8,2,chr(97),0);" + agent_package.BOOTSTRAP
    done = subprocess.run(
        [sys.executable, "-I", "-c", old],
        input=agent_package.carried() + protocol.encode_request("probe"),
        capture_output=True,
        check=True,
    )
    frame = protocol.find_frame(done.stdout)
    assert frame is not None
    assert frame.document["error"]["kind"] == "old-python"
    assert "3.8.2" in frame.document["error"]["message"]


def test_uploaded_content_is_kept_under_its_digest_or_not_at_all(host: AgentHost) -> None:
    data = b"bundle" * 100_000
    sha256 = hashlib.sha256(data).hexdigest()
    assert host.frame("put", {"sha256": sha256}, data).document["result"]["stored"] is True
    assert host.frame("put", {"sha256": sha256}, data).document["result"]["stored"] is False
    assert host.root.object(sha256).read_bytes() == data
    with pytest.raises(Refusal, match="sha256"):
        host.frame("put", {"sha256": "0" * 64}, data)
    assert host.call("probe", cas=[sha256, "0" * 64])["cas"] == {sha256: True, "0" * 64: False}
    assert [path.name for path in host.root.cas.iterdir()] == [sha256]


def test_an_upload_that_was_cut_leaves_its_beginning_under_no_name_that_counts_and_the_rest_completes_it(
    host: AgentHost,
) -> None:
    data = b"bundle" * 100_000
    sha256 = hashlib.sha256(data).hexdigest()
    request = json.dumps({"verb": "put", "root": str(host.dir), "args": {"sha256": sha256}, "payload_bytes": len(data)})
    done = subprocess.run(
        agent_package.bootstrap_argv(sys.executable),
        input=agent_package.carried() + request.encode() + b"\n" + data[:1000],
        capture_output=True,
        check=True,
    )
    frame = protocol.find_frame(done.stdout)
    assert frame is not None
    assert "1000 of 600000" in frame.document["error"]["message"]
    assert [path.name.split("-")[:2] for path in host.root.cas.iterdir()] == [[".part", sha256]]
    asked = {"sha256": sha256, "ask": True}
    assert host.call("put", **asked)["have"] == 1000
    rest = host.frame("put", {"sha256": sha256, "offset": 1000}, data[1000:]).document["result"]
    assert rest["there"] is True
    assert [path.name for path in host.root.cas.iterdir()] == [sha256]
    assert host.root.object(sha256).read_bytes() == data
    assert host.call("put", **asked)["there"] is True


def test_what_a_cut_sending_left_is_cleaned_up_unless_somebody_is_still_sending_it(host: AgentHost) -> None:
    import fcntl

    host.root.create()
    host.root.reserve_lock.touch()
    left, written = (host.root.cas / f".part-{digit * 64}-1-aa" for digit in "12")
    left.write_bytes(b"half")
    with open(written, "wb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        found = rubbish.Rubbish(host.root, rubbish.Wishes(1, False, {}), None).items
        assert [(one["room"], one["name"]) for one in found] == [("rest", f"cas/{left.name}")]
        assert gc.apply(host.root, rubbish.Wishes(1, False, {}), None, found)["removed"] == found
        assert [path.name for path in host.root.cas.iterdir()] == [written.name]


def test_a_damaged_beginning_is_dropped_and_everything_is_sent_again(host: AgentHost) -> None:
    data = os.urandom(5000)
    sha256 = hashlib.sha256(data).hexdigest()
    host.root.create()
    part = host.root.cas / f".part-{sha256}-1-aa"
    part.write_bytes(bytes([data[0] ^ 1]) + data[1:1000])
    told = host.frame("put", {"sha256": sha256, "offset": 1000}, data[1000:]).document["result"]
    assert (told["stored"], told["there"]) == (False, False)
    assert list(host.root.cas.iterdir()) == []
    told = host.frame("put", {"sha256": sha256, "offset": 1000}, data[1000:]).document["result"]
    assert (told["stored"], told["there"]) == (False, False)
    assert host.frame("put", {"sha256": sha256}, data).document["result"]["there"] is True


def test_the_agent_is_written_for_python_3_10() -> None:
    for path in (Path(agent_package.__file__).parent / "agent").glob("*.py"):
        ast.parse(path.read_text(), path.name, feature_version=(3, 10))
    # The first lines that run on a host are kept to what Python 3.6 can parse, so that it can be told to be too old.
    for name in ("bootstrap.py",):
        ast.parse((Path(agent_package.__file__).parent / "agent" / name).read_text(), name, feature_version=(3, 6))


def test_reading_verbs_change_nothing_on_a_host_with_runs(host: AgentHost) -> None:
    run = host.ran("print('x')")["run"]
    reserved = host.python("pass")
    before = snapshot(host.dir)
    host.frame("status", {"runs": [run, reserved]})
    host.frame("probe", {"runs": [{"id": run}], "kins": ["kin"]})
    host.frame("read", {"run": run, "streams": {"launch.log": None, "events.jsonl": None}})
    host.frame("read", {"run": reserved, "streams": {"launch.log": None}, "wait": 0.1})
    host.frame("collect", {"run": run})
    host.frame("fetch", {"run": run, "path": "launch.log"})
    assert snapshot(host.dir) == before


def test_a_noisy_login_shell_does_not_hide_the_reply(host: AgentHost) -> None:
    noise = "printf 'Welcome\\n=LF-BEGIN 5=\\n\\377\\n'; exec \"$@\""
    done = subprocess.run(
        ["/bin/sh", "-c", noise, "sh", *agent_package.bootstrap_argv(sys.executable)],
        input=agent_package.carried() + protocol.encode_request("probe", root=str(host.dir)),
        capture_output=True,
        check=True,
    )
    frame = protocol.find_frame(done.stdout)
    assert frame is not None
    assert frame.document["ok"]
    assert frame.noise == b"Welcome\n=LF-BEGIN 5=\n\xff\n"
