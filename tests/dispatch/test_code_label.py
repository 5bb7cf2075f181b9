"""The code in a user's words: a plan never says a commit's name alone of files that are not that commit's."""

from __future__ import annotations

import subprocess
from pathlib import Path

from dispatch.building.bundle import code_label
from latentforge.spec.code import code_around


def test_what_is_not_in_the_commit_stands_beside_its_name(tmp_path: Path) -> None:
    package = tmp_path / "latentforge"
    package.mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "latentforge"\n')
    (package / "__init__.py").write_text("a = 1\n")
    (package / "table.bin").write_bytes(b"\0\1")

    def git(*words: str) -> str:
        who = ["-c", "user.name=me", "-c", "user.email=me@here"]
        return subprocess.run(["git", "-C", tmp_path, *who, *words], check=True, capture_output=True, text=True).stdout

    def label() -> str:
        return code_label(code_around(tmp_path))

    assert label().startswith("code "), "no git: the digest"
    git("init", "-q")
    assert label().startswith("code "), "no commit yet: the digest"
    git("add", "-A")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "--short=7", "HEAD").strip()
    assert label() == commit
    git("checkout", "-q", "--detach")
    assert label() == commit, "a detached HEAD is a commit like any other"
    (package / "new ü.py").write_text("b = 2\n")
    (tmp_path / "notes.txt").write_text("not of the code\n")
    assert label() == f"{commit} + 1 new files"
    (package / "__init__.py").write_text("a = 2\n")
    assert label() == f"{commit} + 2 changed lines + 1 new files"
    (package / "table.bin").write_bytes(b"\0\2")
    assert label() == f"{commit} + 4 changed lines + 1 new files"
