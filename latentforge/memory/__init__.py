"""Memory arithmetic: parameters of a decoder, the need of each run term by term, the margins of a host."""

from latentforge.memory.estimate import kv_bytes, pipeline_memory, pipeline_peak
from latentforge.memory.plan import MemoryPlan, MemoryVerdict, Term, kill_floor, margin
from latentforge.memory.shape import ModelShape

__all__ = [
    "MemoryPlan",
    "MemoryVerdict",
    "ModelShape",
    "Term",
    "kill_floor",
    "kv_bytes",
    "margin",
    "pipeline_memory",
    "pipeline_peak",
]
