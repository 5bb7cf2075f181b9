"""The command's frame: fast, quiet, and exact about errors."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from types import ModuleType

import pytest
import typer

from latentforge import cli
from latentforge.cli import ENTRIES, Entry, main
from latentforge.errors import BusyError, RefusedError
from latentforge.verdicts import ExitCode


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Mounts a command ``planted`` that calls the given function."""

    def plant(function: Callable[[], object]) -> None:
        module = ModuleType("planted_module")
        app = typer.Typer()
        app.command()(function)
        module.app = app  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "planted_module", module)
        monkeypatch.setitem(ENTRIES, "planted", Entry("planted_module", "A planted command.", single=True))

    return plant


def imported_by(*arguments: str) -> set[str]:
    """The top-level packages that a command line imports."""
    report = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "latentforge", *arguments],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in report.splitlines() if "|" in line}


@pytest.mark.parametrize(
    "arguments", [("--help",), ("dispatch", "--help"), ("contracts", "--help"), ("spec", "--help")]
)
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    heavy = {"torch", "transformers", "numpy", "fabric", "paramiko", "rich", "pydantic", "yaml"}
    assert imported_by(*arguments) & heavy == set()


@pytest.mark.parametrize("arguments", [("spec", "show", "smoke"), ("contracts", "list")])
def test_what_an_operator_reads_needs_no_torch(arguments: tuple[str, ...]) -> None:
    assert imported_by(*arguments) & {"torch", "transformers", "numpy", "fabric", "paramiko"} == set()


def test_the_import_check_sees_a_heavy_import() -> None:
    report = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", "import yaml"], capture_output=True, text=True, check=True
    ).stderr
    assert "yaml" in report


@pytest.mark.parametrize("arguments", [("--help",), ("dispatch", "--help")])
def test_help_starts_in_under_a_quarter_of_a_second(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "latentforge", *arguments]
    subprocess.run(command, capture_output=True, check=True)  # bytecode is written here
    seconds = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # Processor time: what the command costs, not what else the machine does. Start-up waits for nothing, so that this
    # is its wall time on an idle machine.
    assert min(seconds) < 0.25, f"{seconds}"


def test_help_lists_every_entry(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ENTRIES)


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"latentforge {__import__('latentforge').__version__}\n"


def test_an_unknown_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dispach", "go"]) == ExitCode.REFUSED
    assert capsys.readouterr().err == "error: there is no command 'dispach'\n  next: latentforge dispatch --help\n"


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--verzion"]) == ExitCode.REFUSED
    error = capsys.readouterr().err
    assert error.startswith("error: No such option: --verzion")
    assert "Traceback" not in error


def test_an_expected_error_is_two_lines_with_its_own_code(
    planted: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def busy() -> None:
        raise BusyError("the lease of gx10 is held by distill-9a1e", next="latentforge dispatch watch distill-9a1e")

    planted(busy)
    assert main(["planted"]) == ExitCode.BUSY
    assert capsys.readouterr().err == (
        "error: the lease of gx10 is held by distill-9a1e\n  next: latentforge dispatch watch distill-9a1e\n"
    )


def test_a_failed_import_that_names_no_module_is_told_in_its_own_words(
    planted: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def lazily() -> None:  # as transformers does
        raise ModuleNotFoundError("Could not import module 'Qwen3Model'.")

    planted(lazily)
    assert main(["planted"]) == ExitCode.CRASHED
    assert "ModuleNotFoundError: Could not import module 'Qwen3Model'" in capsys.readouterr().err


def test_debug_anywhere_on_the_line_shows_the_traceback(planted: Callable[..., None]) -> None:
    def refuse() -> None:
        raise RefusedError("no")

    planted(refuse)
    with pytest.raises(RefusedError):
        main(["planted", "--debug"])
    with pytest.raises(RefusedError):
        main(["--debug", "planted"])


def test_debug_after_a_double_dash_belongs_to_the_command() -> None:
    assert cli._take_debug(["run", "--", "--debug"]) == (["run", "--", "--debug"], False)


def test_an_unexpected_error_does_not_read_as_a_failed_falsifier(
    planted: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def crash() -> None:
        raise ZeroDivisionError("planted")

    planted(crash)
    assert main(["planted"]) == ExitCode.CRASHED
    error = capsys.readouterr().err
    assert "unexpected ZeroDivisionError: planted" in error
    assert "Traceback" not in error


def test_ctrl_c_ends_with_130(planted: Callable[..., None]) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    planted(interrupt)
    assert main(["planted"]) == 130


@pytest.mark.parametrize(("returned", "code"), [(None, 0), (ExitCode.STALLED, 4), (3, 3)])
def test_what_a_command_returns_is_the_exit_code(planted: Callable[..., None], returned: object, code: int) -> None:
    planted(lambda: returned)
    assert main(["planted"]) == code


def test_a_returned_value_that_is_no_exit_code_is_not_a_pass(planted: Callable[..., None]) -> None:
    planted(lambda: "done")
    assert main(["planted"]) == ExitCode.CRASHED


def test_a_missing_library_names_the_extra_that_brings_it(
    planted: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    def train() -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    planted(train)
    assert main(["planted"]) == ExitCode.REFUSED
    assert "in a checkout:  pip install '.[train]'" in capsys.readouterr().err


@pytest.mark.parametrize("closed", ["the reader of both", "standard output"])
def test_an_error_that_nobody_reads_keeps_its_exit_code(closed: str) -> None:
    command = [sys.executable, "-m", "latentforge", "no-such-command"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        if closed == "standard output":
            ended = subprocess.run(
                ["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.DEVNULL, check=False
            )
        else:
            ended = subprocess.run(command, stdout=writer, stderr=writer, check=False)
    finally:
        os.close(writer)
    assert ended.returncode == 2
