"""Verdicts: ``fail < unknown < pass``, their one-line grammar, and the exit codes that follow from them."""

from latentforge.verdicts.exitcode import ExitCode
from latentforge.verdicts.verdict import FALSIFIER_ID, Outcome, Verdict, exit_code, meet, parse_line

__all__ = ["FALSIFIER_ID", "ExitCode", "Outcome", "Verdict", "exit_code", "meet", "parse_line"]
