"""The host ``local``: the same agent and protocol, through a process of this machine."""

from __future__ import annotations

import subprocess
import sys

from dispatch.hosts.inventory import Host
from dispatch.transport.call import Exchange, Transport
from latentforge.errors import UnknownOutcomeError


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

    def close(self) -> None:
        """Nothing is held."""
