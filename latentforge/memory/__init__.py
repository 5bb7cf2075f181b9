"""Memory arithmetic: parameters of a decoder, the need of each run term by term, the margins of a host."""

from latentforge.memory.activations import kv_bytes
from latentforge.memory.admission import Admission, Condition, admission
from latentforge.memory.cache import CacheShape
from latentforge.memory.estimate import pipeline_memory, pipeline_peak
from latentforge.memory.host import HostMemory
from latentforge.memory.known import KnownModel
from latentforge.memory.measured import MeasuredMemory
from latentforge.memory.modes import MODES, Mode, ModePlan, ceiling, choose_mode, mode_of, plan_mode
from latentforge.memory.plan import MemoryPlan, MemoryVerdict, Term, kill_floor, margin
from latentforge.memory.shape import ModelShape

__all__ = [
    "MODES",
    "Admission",
    "CacheShape",
    "Condition",
    "HostMemory",
    "KnownModel",
    "MeasuredMemory",
    "MemoryPlan",
    "MemoryVerdict",
    "Mode",
    "ModePlan",
    "ModelShape",
    "Term",
    "admission",
    "ceiling",
    "choose_mode",
    "kill_floor",
    "kv_bytes",
    "margin",
    "mode_of",
    "pipeline_memory",
    "pipeline_peak",
    "plan_mode",
]
