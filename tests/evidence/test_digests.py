"""Content digests: the same bytes under the same names, and nothing from outside the folder."""

from __future__ import annotations

import hashlib
import os
import socket
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatch.agent.folders import tree_digest
from latentforge.errors import RefusedError
from latentforge.evidence.digests import file_sha256, tree_files, tree_sha256

NAME = st.text(alphabet="abzé._- A1", min_size=1, max_size=6).filter(lambda name: name not in (".", ".."))
TREE = st.dictionaries(st.tuples(NAME, NAME).map("/".join) | NAME, st.binary(max_size=40), max_size=6)


def plant(root: Path, tree: dict[str, bytes]) -> bool:
    """Writes the files; False where a name would be both a file and a folder."""
    root.mkdir(parents=True)
    try:
        for name, content in tree.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        return False
    return True


def test_a_folders_digest_is_that_of_its_sorted_lines(tmp_path: Path) -> None:
    plant(tmp_path / "t", {"b": b"2", "a/c": b"1"})
    one, two = hashlib.sha256(b"1").hexdigest(), hashlib.sha256(b"2").hexdigest()
    assert tree_sha256(tmp_path / "t") == hashlib.sha256(f"a/c\0{one}\nb\0{two}\n".encode()).hexdigest()


def test_a_folder_that_does_not_count_changes_no_digest_and_one_of_its_name_further_down_does(tmp_path: Path) -> None:
    plain = {"b": b"2", "a/c": b"1"}
    plant(tmp_path / "t", plain)
    plant(tmp_path / "kept", {**plain, "kept/x": b"3"})
    plant(tmp_path / "deeper", {**plain, "a/kept/x": b"3"})
    alone = tree_sha256(tmp_path / "t")
    assert tree_sha256(tmp_path / "kept", without="kept") == alone != tree_sha256(tmp_path / "kept")
    assert tree_sha256(tmp_path / "deeper", without="kept") != alone


def test_a_files_digest_is_its_sha256(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 3_000_000)
    assert tree_sha256(tmp_path / "f") == file_sha256(tmp_path / "f") == hashlib.sha256(b"x" * 3_000_000).hexdigest()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREE)
def test_the_agents_own_copy_of_the_rule_gives_the_same_digest(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, bytes]
) -> None:
    root = tmp_path_factory.mktemp("tree") / "t"
    if plant(root, tree):
        assert tree_sha256(root) == tree_digest(root)[0]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREE.filter(bool), data=st.data())
def test_any_change_of_a_name_or_a_byte_changes_the_digest(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, bytes], data: st.DataObject
) -> None:
    base = tmp_path_factory.mktemp("tree")
    if not plant(base / "one", tree):
        return
    name = data.draw(st.sampled_from(sorted(tree)))
    changed = dict(tree)
    if data.draw(st.booleans()):
        changed[name] = tree[name] + b"!"
    else:
        changed[name + "x"] = changed.pop(name)
    if changed != tree and plant(base / "two", changed) and len(changed) == len(tree):
        assert tree_sha256(base / "one") != tree_sha256(base / "two")


def test_a_link_that_leads_out_is_refused(tmp_path: Path) -> None:
    plant(tmp_path / "t", {"a": b"1"})
    (tmp_path / "secret").write_text("outside")
    (tmp_path / "t" / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(RefusedError, match="leads out"):
        tree_sha256(tmp_path / "t")


@pytest.mark.parametrize("target", ["../../etc", "absent", "sub", "link"])
def test_a_link_to_a_folder_or_to_nothing_is_refused(tmp_path: Path, target: str) -> None:
    plant(tmp_path / "t", {"sub/a": b"1"})
    (tmp_path / "t" / "link").symlink_to(target)
    with pytest.raises(RefusedError, match="link"):
        tree_sha256(tmp_path / "t")


def test_a_link_inside_the_folder_counts_as_the_file_it_names(tmp_path: Path) -> None:
    plant(tmp_path / "t", {"a": b"1"})
    (tmp_path / "t" / "b").symlink_to("a")
    plant(tmp_path / "u", {"a": b"1", "b": b"1"})
    assert tree_sha256(tmp_path / "t") == tree_sha256(tmp_path / "u")


def test_pipes_and_sockets_are_refused_without_waiting(tmp_path: Path) -> None:
    (tmp_path / "t").mkdir()
    os.mkfifo(tmp_path / "t" / "pipe")
    with pytest.raises(RefusedError, match="not a regular file"):
        list(tree_files(tmp_path / "t"))
    with pytest.raises(RefusedError, match="not a regular file"):
        file_sha256(tmp_path / "t" / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        (tmp_path / "s").mkdir()
        server.bind(str(tmp_path / "s" / "k"))
        with pytest.raises(RefusedError, match="not a regular file"):
            tree_sha256(tmp_path / "s")


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="absent"):
        file_sha256(tmp_path / "absent")
