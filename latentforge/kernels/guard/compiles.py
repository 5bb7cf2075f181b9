"""Which compilers have been at work in this process since one looked last.

Nothing is imported for it: a compiler that nobody has loaded has compiled nothing, and is found when it appears.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Compiles:
    """``count`` compilations by one compiler, ``what`` names them where it tells."""

    compiler: str
    count: int
    what: tuple[str, ...] = ()


class CompileWatch:
    """Counts compilations from its making on; :meth:`drain` gives those since the last look.

    Watched: torch.compile (frames of dynamo, modules of inductor), kernels that Triton compiles or loads for
    the first time, C++ extensions that are built or loaded. What the driver translates it does not tell anybody.
    """

    def __init__(self) -> None:
        _hook_triton()
        self._seen = {name: count() for name, count in COMPILERS.items()}

    @property
    def watched(self) -> list[str]:
        """The names of the compilers."""
        return list(COMPILERS)

    def drain(self) -> list[Compiles]:
        """What was compiled since the last look."""
        _hook_triton()
        found = []
        for name, count in COMPILERS.items():
            now, seen = count(), self._seen[name]
            # A counter that somebody has set back counts from there.
            new = now - seen if now >= seen else now
            if new:
                found.append(Compiles(name, new, tuple(_TRITON[seen:now]) if name == "triton" else ()))
            self._seen[name] = now
        return found


_TRITON: list[str] = []
"""The kernels that Triton has compiled in this process since the hook was set, or taken from its disk cache."""


class _Hook:
    """Called by Triton when a kernel is there for the first time; hands on to who was there before."""

    def __init__(self, before: Callable[..., Any] | None) -> None:
        self.before = before

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        _TRITON.append(str(getattr(named.get("fn"), "name", None) or named.get("repr") or "a kernel"))
        return self.before(*arguments, **named) if self.before is not None else None


def _hook_triton() -> None:
    knobs = sys.modules.get("triton.knobs")
    if knobs is not None and not isinstance(knobs.runtime.jit_post_compile_hook, _Hook):
        knobs.runtime.jit_post_compile_hook = _Hook(knobs.runtime.jit_post_compile_hook)


def _dynamo() -> int:
    module = sys.modules.get("torch._dynamo.utils")
    if module is None:
        return 0
    return int(module.counters["frames"]["total"])


def _inductor() -> int:
    module = sys.modules.get("torch._inductor.codecache")
    return 0 if module is None else len(module.PyCodeCache.modules)


def _extensions() -> int:
    module = sys.modules.get("torch.utils.cpp_extension")
    if module is None:
        return 0
    return sum(1 + entry.version for entry in module.JIT_EXTENSION_VERSIONER.entries.values())


COMPILERS: dict[str, Callable[[], int]] = {
    "torch.compile": _dynamo,
    "inductor": _inductor,
    "C++ extension": _extensions,
    "triton": lambda: len(_TRITON),
}
