"""Evidence: what ran, by digest; written once, chained in a ledger, verified offline.

``digests`` is what everyone hashes with; ``build_statement`` and ``record`` write a run's evidence, ``verify``
recomputes it. The format is in ``docs/evidence.md``. Names are imported when they are used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentforge.evidence.digests import file_sha256, tree_sha256
    from latentforge.evidence.manifest import record, write_manifest
    from latentforge.evidence.statement import MANIFEST, Claim, build_statement
    from latentforge.evidence.verify import Problem, Verification, verify_evidence

_HOMES = {
    "file_sha256": "digests",
    "tree_sha256": "digests",
    "record": "manifest",
    "write_manifest": "manifest",
    "MANIFEST": "statement",
    "Claim": "statement",
    "build_statement": "statement",
    "Problem": "verify",
    "Verification": "verify",
    "verify_evidence": "verify",
}

__all__ = [
    "MANIFEST",
    "Claim",
    "Problem",
    "Verification",
    "build_statement",
    "file_sha256",
    "record",
    "tree_sha256",
    "verify_evidence",
    "write_manifest",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
