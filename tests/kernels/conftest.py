"""Modules in folders named ``interpreted`` run in a Python of their own, in which Triton interprets its kernels.

Triton decides that when it is first imported, for the whole process, and the other tests of kernels compile them. So
each such module is run once by a second pytest, and what came of each of its tests is reported under the test's name.
``TRITON_INTERPRET=1 pytest <module>`` runs one directly.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

Outcomes = dict[str, list[tuple[str, str]]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreted modules first: they take a minute each, and would be what is left when all else is done."""
    items.sort(key=lambda item: not isinstance(item, InterpretedTest))


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Take modules of an ``interpreted`` folder out of this process."""
    if module_path.parent.name != "interpreted" or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    return InterpretedModule.from_parent(parent, path=module_path)


class InterpretedModule(pytest.File):
    """A module of tests, known here by the names of its functions."""

    _outcomes: Outcomes | None = None

    def collect(self) -> Iterator[pytest.Item]:
        """One item for each test function; its parameters are run together."""
        for node in ast.parse(self.path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                item = InterpretedTest.from_parent(self, name=node.name)
                item.add_marker(pytest.mark.timeout(1500))  # the first one waits for all of the module
                yield item

    def outcomes(self) -> Outcomes:
        """(outcome, detail) of each run of each test function."""
        if self._outcomes is None:
            self._outcomes = run_interpreted(self.path)
        return self._outcomes


class InterpretedTest(pytest.Item):
    """One test function; passes if at least one run of it was made, and each passed."""

    def runtest(self) -> None:
        """Look up what came of it."""
        module = self.parent
        assert isinstance(module, InterpretedModule)
        runs = module.outcomes().get(self.name, [])
        wrong = [f"{outcome}: {detail}" for outcome, detail in runs if outcome != "passed"]
        if not runs or wrong:
            raise AssertionError("\n\n".join(wrong) or f"{self.name} did not run")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: object = None) -> str:
        """The failure as the second pytest printed it."""
        return str(excinfo.value)

    def reportinfo(self) -> tuple[Path, int | None, str]:
        """Where it is."""
        return self.path, None, self.name


def run_interpreted(module: Path) -> Outcomes:
    """Run a module of tests with TRITON_INTERPRET=1; RuntimeError where that pytest has nothing to report."""
    with TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", str(module), "-q", "-p", "no:cacheprovider", f"--junitxml={report}"]
        environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if not report.exists() or ended.returncode not in (0, 1):
            raise RuntimeError(f"pytest of {module.name} ended with {ended.returncode}:\n{ended.stdout}{ended.stderr}")
        found: Outcomes = {}
        for case in ElementTree.parse(report).iter("testcase"):
            name = case.get("name", "").partition("[")[0]
            bad = next(iter(case), None)
            outcome = "passed" if bad is None or bad.tag in ("system-out", "system-err", "properties") else bad.tag
            found.setdefault(name, []).append((outcome, "" if bad is None else (bad.text or bad.get("message") or "")))
        return found
