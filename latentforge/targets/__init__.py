"""The store of teacher targets on disk."""

from latentforge.targets.row import SequenceTargets
from latentforge.targets.store import Coverage, TargetStore

__all__ = ["Coverage", "SequenceTargets", "TargetStore"]
