"""Sending over a link that breaks."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.transport.open import open_transport
from dispatch.transport.retry import call

Make = Callable[..., Any]


@pytest.mark.sshd
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_connection_cut_while_something_is_sent_leaves_no_half_of_it_and_is_sent_again(
    sshd_at: Make, laptop: Any, enrolled: Make, tmp_path: Path
) -> None:
    server = sshd_at()
    transport = open_transport(enrolled(server, root=tmp_path / "remote"), laptop.places)
    transport.install()
    content = os.urandom(32 << 20)
    sha256 = hashlib.sha256(content).hexdigest()
    replies: list[Any] = []
    logins = server.logins()
    sending = threading.Thread(target=lambda: replies.append(call(transport, "put", {"sha256": sha256}, content)))
    sending.start()
    assert server.cut() >= 1
    sending.join(60)
    assert replies[0].result["sha256"] == sha256
    assert server.logins() > logins, "it was sent again over another connection"
    kept = tmp_path / "remote" / "cas"
    assert [path.name for path in kept.iterdir()] == [sha256]
    assert (kept / sha256).read_bytes() == content
    transport.close()
