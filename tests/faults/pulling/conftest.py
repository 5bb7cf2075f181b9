"""The hub of tests/pulling, for its faults."""

from __future__ import annotations

from ...pulling.conftest import contents, fault, hub, model, on_host, pulled_files

__all__ = ("contents", "fault", "hub", "model", "on_host", "pulled_files")
