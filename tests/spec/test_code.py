"""The code digest covers what can change a result, in a checkout and in a wheel alike."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from latentforge.errors import RefusedError
from latentforge.spec import code
from latentforge.spec.code import CodeSource, checkout_root, code_around


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name, text in {
        "pyproject.toml": '[project]\nname = "latentforge"\n',
        "CMakeLists.txt": "",
        "latentforge/__init__.py": "",
        "contracts/a.yaml": "a: 1\n",
        "constraints/cpu.txt": "torch==1\n",
        "csrc/kd.cpp": "int x;\n",
        "dispatch/__init__.py": "",
        "tests/test_x.py": "",
        "README.md": "",
        "LICENSE": "",
        ".gitignore": "*.so\nsecret.txt\n",
    }.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    subprocess.run(["git", "init", "-q", str(root)], check=True)
    return root


def digest(root: Path) -> str:
    return code_around(root).digest


@pytest.mark.parametrize("name", ["csrc/kd.cpp", "latentforge/__init__.py", "contracts/a.yaml", "constraints/cpu.txt"])
def test_a_changed_file_changes_the_digest(checkout: Path, name: str) -> None:
    before = digest(checkout)
    (checkout / name).write_text("changed")
    assert digest(checkout) != before


def test_an_untracked_file_counts_and_an_ignored_one_does_not(checkout: Path) -> None:
    before = digest(checkout)
    (checkout / "latentforge" / "secret.txt").write_text("x")
    (checkout / "latentforge" / "_native.so").write_text("x")
    assert digest(checkout) == before
    (checkout / "latentforge" / "new.py").write_text("")
    assert digest(checkout) != before


@pytest.mark.parametrize("name", ["tests/test_x.py", "dispatch/__init__.py", "README.md"])
def test_what_cannot_change_a_result_does_not_change_the_digest(checkout: Path, name: str) -> None:
    before = digest(checkout)
    (checkout / name).write_text("changed")
    assert digest(checkout) == before


def test_a_deleted_file_that_git_still_tracks_is_left_out(checkout: Path) -> None:
    subprocess.run(["git", "-C", str(checkout), "add", "-A"], check=True)
    before = digest(checkout)
    (checkout / "csrc" / "kd.cpp").unlink()
    assert digest(checkout) != before


def test_an_unpacked_bundle_has_the_digest_of_its_checkout(checkout: Path, tmp_path: Path) -> None:
    source = code_around(checkout)
    for name, path in source.files.items():
        (tmp_path / "bundle" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, tmp_path / "bundle" / name)
    assert digest(tmp_path / "bundle") == source.digest


def test_a_wheel_has_the_digest_of_its_checkout(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    shutil.copytree(checkout / "latentforge", site / "latentforge")
    shutil.copytree(checkout / "dispatch", site / "dispatch")
    data = site / "latentforge" / "_data"
    shutil.copytree(checkout / "contracts", data / "contracts")
    for name in ("csrc", "constraints"):
        shutil.copytree(checkout / name, data / "source" / name)
    for name in ("pyproject.toml", "CMakeLists.txt", "README.md", "LICENSE"):
        shutil.copyfile(checkout / name, data / "source" / name)
    monkeypatch.setattr(code, "_PACKAGE", site / "latentforge")
    assert code.running_code().digest == digest(checkout)


def test_the_checkout_is_found_from_any_folder_inside_it(checkout: Path, tmp_path: Path) -> None:
    assert checkout_root(checkout / "csrc") == checkout
    assert checkout_root(tmp_path) is None


def test_a_lock_file_that_is_not_there_is_refused_with_those_that_are(checkout: Path) -> None:
    with pytest.raises(RefusedError, match=r"gb11.*cpu"):
        CodeSource(checkout, code_around(checkout).files).lock_sha256("gb11")


def test_a_link_out_of_the_checkout_is_refused_and_its_target_read_by_nobody(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "id_ed25519").write_text("a key of the user's")
    (checkout / "latentforge" / "notes").symlink_to(tmp_path / "id_ed25519")
    with pytest.raises(RefusedError, match="latentforge/notes is a link that leads out of"):
        code_around(checkout)
    (checkout / "latentforge" / "notes").unlink()
    (checkout / "latentforge" / "notes").symlink_to("__init__.py")
    assert "latentforge/notes" in code_around(checkout).files
    (checkout / "latentforge" / "kernels").symlink_to("../csrc")
    with pytest.raises(RefusedError, match="latentforge/kernels is a link to a folder"):
        code_around(checkout)


def test_the_lock_of_an_editor_which_is_a_link_to_nothing_is_no_code(checkout: Path) -> None:
    before = digest(checkout)
    (checkout / "latentforge" / ".#x.py").symlink_to("me@laptop.4711:1")
    assert digest(checkout) == before


def test_a_submodule_is_part_of_the_code_and_one_that_is_not_checked_out_is_refused(
    checkout: Path, tmp_path: Path
) -> None:
    module = checkout / "csrc" / "vendored"
    module.mkdir()
    (module / "v.h").write_text("int v;")
    (module / "junk.o").write_text("")
    (module / ".gitignore").write_text("*.o")
    subprocess.run(["git", "init", "-q", str(module)], check=True)
    assert {"csrc/vendored/v.h", "csrc/kd.cpp"} <= set(code_around(checkout).files), "a checkout of its own"
    assert "csrc/vendored/junk.o" not in code_around(checkout).files
    before = digest(checkout)
    (module / "v.h").write_text("int w;")
    assert digest(checkout) != before
    entry = f"160000,{'1' * 40},csrc/vendored"
    subprocess.run(["git", "-C", str(checkout), "update-index", "--add", "--cacheinfo", entry], check=True)
    assert "csrc/vendored/v.h" in code_around(checkout).files, "a submodule"
    shutil.rmtree(module)
    module.mkdir()
    with pytest.raises(RefusedError, match=r"the submodule csrc/vendored of .* is not checked out") as refused:
        code_around(checkout)
    assert "submodule update --init csrc/vendored" in str(refused.value.next)


def test_names_with_line_breaks_are_carried_and_those_that_are_not_utf8_refused(checkout: Path) -> None:
    from dispatch.building.bundle import pack

    odd = "csrc/two\nlines and spaces é.h"
    (checkout / odd).write_text("int x;")
    source = code_around(checkout)
    assert odd in source.files
    assert pack(source).size
    (checkout / os.fsdecode(b"csrc/latin-\xe9.h")).write_text("")
    with pytest.raises(RefusedError, match=r"latin-\\xe9.h.* has bytes that are not UTF-8 in its name"):
        code_around(checkout)


def test_a_tree_that_changes_while_it_is_bundled_is_refused_before_anything_is_sent(checkout: Path) -> None:
    from dispatch.building.bundle import pack

    source = code_around(checkout)
    assert source.digest
    (checkout / "csrc" / "kd.cpp").write_text("int y;")
    with pytest.raises(RefusedError, match="was changed while it was read") as refused:
        pack(source)
    assert refused.value.next == "the same command again"
    (checkout / "csrc" / "kd.cpp").unlink()
    with pytest.raises(RefusedError, match=r"csrc/kd.cpp of the code cannot be read: No such file"):
        pack(source)
