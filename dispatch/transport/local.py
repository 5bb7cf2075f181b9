"""The host ``local``: the same agent and protocol, through a process of this machine."""

from __future__ import annotations

import os
import select
import subprocess
import sys
from collections.abc import Generator

from dispatch.hosts.inventory import Host
from dispatch.transport.call import Exchange, Transport
from dispatch.transport.link import LinkLostError
from latentforge.errors import UnknownOutcomeError

_CHUNK = 1 << 20


class LocalTransport(Transport):
    """Runs the agent with the interpreter that runs this command."""

    def __init__(self, host: Host, *, readonly: bool = False) -> None:
        super().__init__(host.model_copy(update={"python": sys.executable}), readonly=readonly)

    def exchange(self, argv: list[str], stdin: bytes, *, timeout: float) -> Exchange:
        """Run the program; past the timeout it is killed and the outcome is unknown."""
        # A session of its own: Ctrl-C at the terminal must reach this command alone, never a call under way.
        try:
            ended = subprocess.run(argv, input=stdin, capture_output=True, timeout=timeout, start_new_session=True)
        except subprocess.TimeoutExpired:
            raise UnknownOutcomeError(f"the agent on {self.host.name} did not answer within {timeout:.0f} s") from None
        return Exchange(ended.stdout, ended.stderr, ended.returncode)

    def pieces(self, argv: list[str], stdin: bytes, *, silence: float) -> Generator[bytes, None, Exchange]:
        """Run the program and yield what it writes."""
        process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(stdin)
            process.stdin.close()
            fd = process.stdout.fileno()
            while select.select([fd], [], [], silence)[0]:
                if not (piece := os.read(fd, _CHUNK)):
                    return Exchange(b"", b"", process.wait(timeout=5))
                yield piece
            raise LinkLostError(f"the agent on {self.host.name} said nothing for {silence:.0f} s")
        finally:
            process.kill()
            process.stdout.close()
            process.wait()

    def close(self) -> None:
        """Nothing is held."""
