"""What all tests share: isolation from the user's folders, the rule that a skip must be expected, and who runs what."""

from __future__ import annotations

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .latent_folders import Folders

# Where the environment forbids bytecode (PYTHONDONTWRITEBYTECODE, which processes that a test starts still obey), each
# worker compiles torch, hypothesis and the rewritten tests anew, and so does each process beside it that imports torch.
sys.dont_write_bytecode = False

# Read when torch is imported: threads that spin for work make small tensors ten times as slow on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_EXPECTED = Path(__file__).parent / "expected_skips.txt"
_skipped: list[tuple[str, str]] = []
_BUILT_ONCE = ("/aarch64", "/cuda", "/teachers/vllm")
"""Folders whose tests share what one of them builds or starts."""
_BY_PACKAGE = "contracts/test_each_claim.py"
"""Where a test names the package whose claim it runs, and those of a package share what they train."""
_FIRST = ("dispatch/test_whole_line.py", "teachers/vllm/")
"""Minutes of building, and of a server's start: what would be left when all else is done."""
_TIMED = re.compile(
    r"(agent|dispatch|faults|following|preflight|pulling|serve|teachers/(serving|vllm)|train/engines)/"
    r"|train/test_(killed|resume|spread)\.py$"
)
"""Rooms whose tests wait for processes, servers and networks, which a core that others take may delay."""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several workers: a module's tests on one of them, and those of a folder that builds something."""
    from xdist.scheduler import LoadScopeScheduling

    class ByModule(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            folder = module.rpartition("/")[0]
            if module.endswith(_BY_PACKAGE):
                return nodeid.partition(":F-")[0]
            return folder if folder.endswith(_BUILT_ONCE) else module

    return ByModule(config, log)


def pytest_configure(config: pytest.Config) -> None:
    """No test is timed; the workers share what is trained for many tests (latentforge/train/rehearsal.py)."""
    from hypothesis import settings  # after bytecode was allowed, above

    # On a machine that is busy an example may take any time.
    settings.register_profile("untimed", deadline=None)
    settings.load_profile("untimed")
    if not hasattr(config, "workerinput"):  # they inherit the variable
        folder = tempfile.TemporaryDirectory(prefix="latentforge-rehearsals-")
        os.environ["LATENTFORGE_REHEARSALS"] = folder.name
        config.add_cleanup(folder.cleanup)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, for the sake of several workers. What is timed by the machine may fail once: the
    second time counts, and the summary names both (RERUN)."""
    for item in items:
        room = item.path.relative_to(Path(__file__).parent).as_posix()
        if _TIMED.match(room) and item.config.pluginmanager.hasplugin("rerunfailures"):
            item.add_marker(pytest.mark.flaky(reruns=1))
    items.sort(key=lambda item: not any(first in item.path.as_posix() for first in _FIRST))


def expected_skips() -> list[re.Pattern[str]]:
    """The reasons, as regular expressions, for which a test may be skipped where every test is to run."""
    lines = (line.strip() for line in _EXPECTED.read_text().splitlines())
    return [re.compile(line) for line in lines if line and not line.startswith("#")]


def unexpected(skips: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The skips whose reason is not expected."""
    return [(test, reason) for test, reason in skips if not any(p.search(reason) for p in expected_skips())]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Remember each skip with its reason."""
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped.append((report.nodeid, report.longrepr[2]))


def pytest_collectreport(report: pytest.CollectReport) -> None:
    """Remember modules that skip themselves as a whole."""
    if report.skipped and isinstance(report.longrepr, tuple):
        _skipped.append((report.nodeid, report.longrepr[2]))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail the session over a skip that nobody expected, where the caller asked for that."""
    if os.environ.get("LATENTFORGE_NO_UNEXPECTED_SKIPS") == "1" and exitstatus == 0 and unexpected(_skipped):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what failed the first time, and which skips were not expected."""
    for report in terminalreporter.stats.get("rerun", []):
        terminalreporter.write_sep("-", f"failed once: {report.nodeid}")
        terminalreporter.write_line(report.longreprtext)
    if os.environ.get("LATENTFORGE_NO_UNEXPECTED_SKIPS") == "1":
        for test, reason in unexpected(_skipped):
            terminalreporter.write_line(f"UNEXPECTED SKIP {test}: {reason}", red=True)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Run folders of a tiny latent and a tiny token-level student that write; not to be changed."""
    from .latent_folders import build

    return build(tmp_path_factory.mktemp("writers"))


@pytest.fixture(autouse=True)
def _isolated_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's own configuration, state or evidence, or is steered by an operator's names."""
    from latentforge.spec.choice import ALL_NAMES

    home = tmp_path_factory.mktemp("xdg")
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))
    monkeypatch.delenv("LATENTFORGE_STATE", raising=False)  # a job's: it would come before the folder above
    for name in ("GX10_HOST", "GX10_USER", "GX10_REPO_PATH", "TEACHER_REPO", "STUDENT_INIT", "STEPS", "BATCH_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("LR", "T", "ALPHA", "EVIDENCE_DIR", "EVIDENCE_KEY", "EVIDENCE_SIGNERS", "DRY_RUN", *ALL_NAMES):
        monkeypatch.delenv(name, raising=False)
