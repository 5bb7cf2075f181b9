"""Login shells of every kind, a host's broken Python, and values that would like to be commands."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.transport.link import LinkError, LinkLostError
from dispatch.transport.retry import call
from latentforge.errors import LatentForgeError
from latentforge.spec.canonical import canonical_bytes

Make = Callable[..., Any]

pytestmark = pytest.mark.sshd
SHELLS = [path for name in ("bash", "dash", "tcsh", "fish", "zsh") if (path := shutil.which(name))]
# What each shell reads before a command over SSH, and how it prints.
RC = {
    "bash": (".bashrc", "echo Welcome; printf '\\033[31m\\377\\n=LF-BEGIN 7=\\n{}'; echo to stderr >&2\n"),
    "dash": (".profile", ""),
    "tcsh": (".tcshrc", "echo Welcome\n"),
    "fish": (".config/fish/config.fish", "echo Welcome\n"),
    "zsh": (".zshenv", "echo Welcome\n"),
}


@pytest.mark.fault(row=29)
@pytest.mark.parametrize("shell", SHELLS, ids=os.path.basename)
def test_the_agent_answers_through_every_login_shell_however_much_it_says_first(
    sshd_here: Make, trusted: Make, reached: Make, tmp_path: Path, shell: str
) -> None:
    name, rc = RC[os.path.basename(shell)]
    home = tmp_path / "home"
    (home / name).parent.mkdir(parents=True)
    (home / name).write_text(rc)
    host = trusted(sshd_here(shell=shell, home=home))
    reply = reached(host).call("probe", {})
    assert reply.result["root"] == host.root
    assert (b"Welcome" in reply.noise) is ("Welcome" in rc)
    awkward = ["printf", "%s|", "a b", "c'd", 'e"f', "$HOME", "`id`", "\\n", "*", "~", "&;|", "{a,b}", "[z]", "^"]
    if not shell.endswith("csh"):
        awkward.append("!x")  # csh looks for its history within quotes too: one more reason to hand it no values
    assert reached(host).exchange(awkward, b"", timeout=20).stdout.endswith("|".join(awkward[2:]).encode() + b"|")


@pytest.mark.fault(row=29)
@pytest.mark.parametrize(
    ("rc", "kind", "said"),
    [
        ("echo Bye; exit 3\n", "shell noise", "(status 3)"),
        ("echo no menus here >&2; exec /nowhere/menu\n", "shell noise", "/nowhere/menu"),
        ("echo Choose 1 or 2; read answer\n", "shell noise", "without running the agent"),
        ("echo Choose 1 or 2; sleep 4\n", "shell noise", "Choose 1 or 2"),
        ("yes | head -c 3000000\nexit 1\n", "shell noise", "(status 1)"),
    ],
    ids=["exits", "becomes something else", "reads our lines", "waits", "talks and exits"],
)
def test_a_login_shell_that_gets_in_the_way_is_refused_by_what_it_said(
    sshd_here: Make,
    trusted: Make,
    reached: Make,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rc: str,
    kind: str,
    said: str,
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / ".bashrc").write_text(rc)
    if "sleep" in rc:
        monkeypatch.setattr("dispatch.transport.ssh.FIRST_WORD_SECONDS", 1.0)
    host = trusted(sshd_here(shell="/bin/bash", home=home))
    begin = time.monotonic()
    with pytest.raises(LinkError) as refused:
        reached(host).call("probe", {})
    assert refused.value.kind == kind, str(refused.value)
    assert said in str(refused.value)
    assert f"-p {host.port}" in str(refused.value.next)
    assert time.monotonic() - begin < 10


@pytest.mark.fault(row=40)
def test_whatever_is_wrong_with_a_user_s_python_the_agent_runs_or_says_so(
    sshd_here: Make, trusted: Make, reached: Make, tmp_path: Path
) -> None:
    home, evil = tmp_path / "home", tmp_path / "home/evil"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    site = home / ".local/lib" / version / "site-packages"
    for folder in (evil, site):
        folder.mkdir(parents=True)
        for module in ("json", "usercustomize", "sitecustomize", "socket", "latentforge_agent"):
            (folder / f"{module}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(9)\n")
    (home / ".bashrc").write_text(
        f"export PYTHONPATH={evil} PYTHONHOME=/nowhere PYTHONSTARTUP={evil}/json.py PYTHONUSERBASE={home}/.local\n"
        f"export PYTHONWARNINGS=error PYTHONDEVMODE=1\nPATH={evil}:$PATH\ncd {evil}\n"
    )
    (evil / "python3").write_text("#!/bin/sh\necho this python is broken >&2\nexit 1\n")
    (evil / "python3").chmod(0o755)
    host = trusted(sshd_here(shell="/bin/bash", home=home))
    assert reached(host).call("probe", {}).result["root"] == host.root
    assert not (tmp_path / "ran").exists()
    with pytest.raises(LinkError, match="this python is broken"):
        reached(host.model_copy(update={"python": "python3"})).call("probe", {})
    with pytest.raises(LinkError, match="cannot be run there") as refused:
        reached(host.model_copy(update={"python": str(evil)})).call("probe", {})
    assert refused.value.kind == "no python"


def test_an_agent_that_is_killed_within_a_call_is_no_noise_of_a_shell_and_is_asked_again(
    sshd_here: Make, trusted: Make, reached: Make, tmp_path: Path
) -> None:
    dying = tmp_path / "dying"
    dying.write_text(
        f'#!/bin/sh\nif [ -e {tmp_path}/died ]; then exec {sys.executable} "$@"; fi\ntouch {tmp_path}/died\n'
        "printf '\\n=LF-HERE=\\n'\necho out of memory >&2\nexit 137\n"
    )
    dying.chmod(0o755)
    host = trusted(sshd_here(), python=str(dying))
    with pytest.raises(LinkLostError, match=r"the agent ended .*out of memory"):
        reached(host).call("probe", {})
    (tmp_path / "died").unlink()
    assert call(reached(host), "probe", {}).result["root"] == host.root


HOSTILE = {
    "quotes": "a'b\"c",
    "newline": "first\nsecond\r\n",
    "substitution": "$(touch CANARY) `touch CANARY` ${HOME} $HOME",
    "ends": "; touch CANARY #",
    "ampersand": "&& touch CANARY",
    "percent": "%n %s %%",
    "dash": "-rf",
    "double_dash": "--help",
    "empty": "",
    "space": "   ",
    "emoji": "🦙 ünïcödé 中文",
    "escape": "\x1b]0;title\x07\x7f\x01",
    "glob": "* ? [a-z] ~ !! {a,b}",
    "large": "x" * 100_000,
    "backslash": "\\n\\\\",
}


@pytest.mark.fault(row=28)
def test_values_reach_a_job_byte_for_byte_and_none_of_them_is_ever_a_command(
    sshd_here: Make, trusted: Make, reached: Make, tmp_path: Path, eventually: Make
) -> None:
    folder = tmp_path / "a root; touch CANARY; $(touch CANARY) 'q' \"d\" 🦙"
    python = tmp_path / "my python;touch CANARY"
    python.symlink_to(sys.executable)
    host = trusted(sshd_here(), root=str(folder), python=str(python))
    transport = reached(host)
    transport.install()
    identity = canonical_bytes({"kind": "data", "hostile": True}).decode()
    run = _run_id(identity)
    program = (
        "import json, os, sys\n"
        "seen = {'argv': sys.argv[1:], 'env': {k: v for k, v in os.environ.items() if k.startswith('HOSTILE_')}}\n"
        "open('out/seen.json', 'w').write(json.dumps(seen))\n"
    )
    values = [value.replace("CANARY", str(tmp_path / "CANARY")) for value in HOSTILE.values()]
    env = {f"HOSTILE_{name}": value for name, value in zip(HOSTILE, values, strict=True)}
    launch = {
        "run": run,
        "kin": "k",
        "argv": [sys.executable, "-I", "-c", program, *values],
        "env": env,
        "lease": [],
    }
    call(transport, "reserve", {"run": run, "identity": identity, "launch": launch})
    call(transport, "launch", {"chain": [run]})
    ended = eventually(
        lambda: (s := call(transport, "status", {"runs": [run]}).result[run])["state"] == "finished" and s, "it ends"
    )
    assert ended["outcome"] == "pass", ended
    seen = json.loads((folder / "runs" / run / "out/seen.json").read_text())
    assert seen == {"argv": values, "env": env}
    assert not [path for path in tmp_path.rglob("*CANARY*") if path.name == "CANARY"]
    for wrong in ("nul\0inside", "y" * 200_000):
        with pytest.raises(LatentForgeError, match=r"NUL|longer than"):
            call(
                transport,
                "reserve",
                {"run": run, "identity": identity, "launch": {**launch, "argv": [sys.executable, wrong]}},
            )


def _run_id(identity: str) -> str:
    import hashlib

    return f"data-{hashlib.sha256(identity.encode()).hexdigest()[:20]}"
