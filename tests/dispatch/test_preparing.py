"""What builds, warm-ups and pulls have in common: reserved before anything is brought; an error unless it passed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dispatch import preparing
from dispatch.hosts.facts import RunState
from dispatch.preparing import Preparation, finish, start
from latentforge.errors import FailedError

ONE = Preparation("build-1", "kin", "{}", "the build on box did not succeed", "do that", secrets={"HF_TOKEN": "canary"})


@pytest.mark.parametrize(
    ("state", "outcome", "code"),
    [("finished", "fail", 1), ("finished", "killed", 5), ("finished", "cancelled", 5), ("lost", "unknown", 3)],
)
def test_a_preparation_that_does_not_pass_is_an_error_with_the_code_that_it_earned(
    state: str, outcome: str, code: int
) -> None:
    follower: Any = SimpleNamespace(goal=None)
    follower.follow = lambda run: RunState(state=state, outcome=outcome, exit=code)
    with pytest.raises(FailedError, match="the build on box did not succeed: ") as failed:
        finish(ONE, follower)
    assert failed.value.code == code
    assert failed.value.next == "do that"
    follower.follow = lambda run: RunState(state="finished", outcome="pass", exit=0)
    assert finish(ONE, follower).passed
    assert follower.goal is None, "nothing goes on that a stopped command would leave"


def test_what_a_preparation_needs_is_brought_once_it_is_reserved_and_before_it_is_launched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[Any] = []
    monkeypatch.setattr(preparing, "call", lambda _transport, verb, args, **_: done.append((verb, args)))
    transport: Any = None
    start(ONE, transport, runner="systemd", wait_lease=True, bring=lambda: done.append("brought"))
    (reserved, asked), brought, (launched, how) = done
    assert (reserved, brought, launched) == ("reserve", "brought", "launch")
    assert asked["secrets"] == {"HF_TOKEN": "canary"}
    assert asked["launch"]["secrets"] == ["HF_TOKEN"]
    assert "canary" not in str(asked["launch"]) + repr(ONE)
    assert how == {"chain": ["build-1"], "wait_lease": True, "runner": "systemd"}
