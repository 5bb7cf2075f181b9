"""Which exit code a call leaves behind when its link breaks: 6 only where nothing can have been done."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from dispatch.hosts.inventory import Host
from dispatch.transport.call import Exchange, Transport
from dispatch.transport.link import HostKeyError, LinkError, LinkLostError
from dispatch.transport.retry import ATTEMPTS, call
from latentforge.errors import LatentForgeError
from latentforge.verdicts import ExitCode


class Breaking(Transport):
    """A link that fails as it is told, one failure a call."""

    def __init__(self, *failures: LatentForgeError) -> None:
        super().__init__(Host(name="box", address="box"))
        self.failures = list(failures)

    def exchange(self, argv: list[str], stdin: bytes, *, timeout: float) -> Exchange:
        raise self.failures.pop(0)

    def pieces(self, argv: list[str], stdin: bytes, *, silence: float) -> Generator[bytes, None, Exchange]:
        raise self.failures.pop(0)

    def close(self) -> None:
        """Nothing is held."""


LOST = LinkLostError("box: the connection broke")
REFUSED = LinkError("refused", "box: nothing listens on port 22", next="is sshd running there?")


@pytest.mark.parametrize(
    ("verb", "failures", "code", "told"),
    [
        ("launch", [REFUSED], ExitCode.TRANSPORT, "nothing listens"),
        ("launch", [LOST, REFUSED], ExitCode.UNKNOWN, "whether 'launch' was done there is not known"),
        ("launch", [LOST] * ATTEMPTS, ExitCode.UNKNOWN, "whether 'launch' was done there is not known"),
        (
            "launch",
            [LOST, HostKeyError("changed host key", "host key of box changed", next="enrol")],
            ExitCode.UNKNOWN,
            "changed",
        ),
        ("probe", [LOST, REFUSED], ExitCode.TRANSPORT, "nothing listens"),
    ],
)
def test_a_launch_that_may_have_been_done_never_ends_as_nothing_was_sent(
    verb: str, failures: list[Any], code: ExitCode, told: str
) -> None:
    with pytest.raises(LatentForgeError, match=told) as ended:
        call(Breaking(*failures), verb, {})
    assert ended.value.code is code
    assert ended.value.next
