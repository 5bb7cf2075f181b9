"""Two simulated hosts on this machine, and the commands of an operator on them: what docs/dispatch.md shows.

    python examples/two_hosts.py             the transcript, with a real build and a real pipeline (minutes)
    python examples/two_hosts.py --keep DIR  the same in DIR, which stays

It starts two OpenSSH servers on 127.0.0.1, each with its own host key and state root, enrols them as ``spark1`` and
``spark2``, runs the commands, and ends both servers. Nothing outside a temporary folder is written; it needs ``sshd``
and ``ssh-keygen``, and the packages that constraints/cpu.txt pins, from pip's index or its cache.
"""

from __future__ import annotations

import argparse
import getpass
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]


class Host:
    """A simulated host: an OpenSSH server on a port of its own."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        folder.mkdir(parents=True)
        for key in ("host_key", "user_key"):
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / key)]
            subprocess.run(command, check=True)
        shutil.copy(folder / "user_key.pub", folder / "authorized_keys")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        (folder / "sshd_config").write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {folder}/host_key\n"
            f"AuthorizedKeysFile {folder}/authorized_keys\nUsePAM no\nStrictModes no\nPidFile none\n"
            "PasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n"
        )
        self.server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Listen; returns when it does."""
        sshd = shutil.which("sshd") or "/usr/sbin/sshd"
        words = [sshd, "-D", "-f", str(self.folder / "sshd_config"), "-E", str(self.folder / "log")]
        self.server = subprocess.Popen(words, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            time.sleep(0.05)
        raise SystemExit(f"sshd of {self.name} does not listen; see {self.folder / 'log'}")

    def stop(self) -> None:
        """Listen no more."""
        if self.server is not None:
            self.server.terminate()
            self.server.wait(10)
            self.server = None

    def enrol(self) -> list[str]:
        """The command that enrols it."""
        where = ["--address", "127.0.0.1", "--port", str(self.port), "--user", getpass.getuser()]
        how = ["--identity", str(self.folder / "user_key"), "--root", str(self.folder / "state")]
        return ["enrol", self.name, *where, *how, "--python", sys.executable, "--yes"]


def main() -> int:
    """Show the transcript."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this new folder, and leave it")
    parser.add_argument("--dry-run", action="store_true", help="previews only: no build, no run")
    asked = parser.parse_args()
    if os.geteuid() == 0:
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
    folder = asked.keep.resolve() if asked.keep else Path(tempfile.mkdtemp(prefix="two-hosts-"))
    hosts = [Host(name, folder / name) for name in ("spark1", "spark2")]
    env = {**os.environ, "XDG_CONFIG_HOME": f"{folder}/laptop/config", "XDG_STATE_HOME": f"{folder}/laptop/state"}
    env |= {"EVIDENCE_DIR": f"{folder}/laptop/runs"}

    def shown(*words: str) -> int:
        print(f"$ latentforge dispatch {shlex.join(words)}".replace(str(folder), "/sim"), flush=True)
        command = [sys.executable, "-P", "-m", "latentforge", "dispatch", *words]
        done = subprocess.run(command, cwd=CHECKOUT, env=env, text=True, capture_output=True, check=False)
        print(
            (done.stdout + done.stderr).replace(str(folder), "/sim").rstrip(), f"[exit {done.returncode}]\n", sep="\n"
        )
        return done.returncode

    try:
        for host in hosts:
            host.start()
            shown(*host.enrol())
        codes = [shown("plan", "tiny", "--lanes", "spark1,spark2")]
        if not asked.dry_run:
            codes.append(shown("go", "tiny", "--lanes", "spark1,spark2"))
            codes.append(shown("go", "tiny", "--lanes", "spark2,spark1"))
            codes.append(shown("plan", "tiny", "--set", "distill.steps=80", "--lanes", "spark1,spark2"))
        print("# spark1 goes away\n")
        hosts[0].stop()
        unknown = shown("plan", "tiny", "--set", "distill.steps=90", "--lanes", "spark1,spark2")
        codes.append(shown("plan", "tiny", "--set", "distill.steps=90", "--lanes", "spark1,spark2", "--abandon"))
        away = shown("status", "--each", "spark1,spark2")
        return 0 if set(codes) == {0} and (unknown, away) == (3, 6) else 1
    finally:
        for host in hosts:
            host.stop()
        if not asked.keep:
            shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
