"""A command that is shown can be copied, and shows no secret."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from dispatch.planning.command import Command

Make = Callable[..., Any]
CANARY = "hf_canary'$(id)\" 0123456789"
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30)


@settings(max_examples=100)
@given(words=st.lists(TEXT, min_size=1, max_size=5))
def test_the_words_that_are_shown_are_the_words_for_a_shell(words: list[str]) -> None:
    command = Command.of(words, {}, {})
    assert shlex.split(str(command)) == words
    assert [word.raw for word in command.words] == words


@settings(max_examples=15)
@given(before=TEXT, after=TEXT)
def test_a_secret_in_a_word_is_shown_by_name_and_a_shell_with_it_gives_the_word_back(before: str, after: str) -> None:
    environ = {"HF_TOKEN": CANARY, "OTHER_API_KEY": CANARY + "more"}
    word = f"{before}{CANARY}more{after}"
    command = Command.of(["printf", "%s", word], {"TEACHER_REPO": f"x{CANARY}"}, environ)
    shown = str(command)
    assert "canary" not in shown
    assert "canary" not in repr(command)
    assert '"$OTHER_API_KEY"' in shown
    assert shown.startswith('TEACHER_REPO=x"$HF_TOKEN" printf ')
    got = subprocess.run(
        ["bash", "-c", shown], env={**environ, "PATH": "/usr/bin:/bin"}, capture_output=True, check=True
    )
    assert got.stdout.decode() == word


def test_a_plan_s_command_masks_a_secret_that_stands_in_a_setting(ask: Make) -> None:
    environ = {"HF_TOKEN": "hf_0123456789abcdef"}
    request = ask(None, "teacher.model=/models/hf_0123456789abcdef", env={**environ, "EVIDENCE_DIR": "a b"})
    assert "hf_0123" not in request.command
    assert '--set teacher.model=/models/"$HF_TOKEN"' in request.command
    assert request.command.startswith("EVIDENCE_DIR='a b' latentforge dispatch go tiny")
