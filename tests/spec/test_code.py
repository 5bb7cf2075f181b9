"""The code digest covers what can change a result, in a checkout and in a wheel alike."""

from __future__ import annotations

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
