"""``distill.compile``: the layers of a student as torch.compile makes them, and the count that they really ran so.

Each layer is compiled by itself (all of one shape share one graph), its forward and its backward pass; embedding, last
norm, head and the loss, which is an operator of its own, stay as they are. Held-out passes and samples run without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from latentforge.errors import FailedError, RefusedError

OFF = "set distill.compile = false"


class CompiledLayers:
    """The compiled passes of ``layers``: how many graphs there are (``graphs``), and how often one ran (``runs``).

    A graph that breaks is refused where it is traced, and so is a shape beyond what torch keeps graphs for. What
    torch.compile does not say is that it did nothing (``TORCHDYNAMO_DISABLE``, a frame that it skips): there the layers
    run as they are, and ``runs`` stays behind (:meth:`require`). ``on`` False lets them run as they are.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device) -> None:
        if not layers:
            raise RefusedError("distill.compile = true: this student keeps its layers in a way of its own", next=OFF)
        if device.type == "cpu":
            require_compiler()
        self.layers = len(layers)
        self.graphs = 0
        self.runs = 0
        self.on = True
        for layer in layers:
            layer.forward = self._training_alone(layer.forward)

    def require(self, runs: int) -> None:
        """FailedError where a pass did not run each layer once compiled: ``runs`` is their number before it."""
        if (ran := self.runs - runs) != self.layers:
            raise FailedError(
                f"distill.compile = true, and {ran} of {self.layers} layers ran compiled: torch.compile is off, "
                "or skipped them, without a word",
                next=f"unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, or {OFF}",
            )

    def record(self) -> dict[str, int]:
        """As ``effective.json`` says it. A graph that breaks is an error: there are none where this can be asked."""
        return {"layers": self.layers, "graphs": self.graphs, "graph_breaks": 0, "runs": self.runs}

    def _training_alone(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        made = torch.compile(plain, fullgraph=True, dynamic=False, backend=self._counted)

        def forward(*args: Any, **named: Any) -> Any:
            return made(*args, **named) if self.on and torch.is_grad_enabled() else plain(*args, **named)

        return forward

    def _counted(self, graph: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        from torch._inductor.compile_fx import compile_fx

        made = compile_fx(graph, inputs)
        self.graphs += 1

        def run(*args: Any) -> Any:
            self.runs += 1
            return made(*args)

        return run


def require_compiler() -> None:
    """RefusedError where there is no C++ compiler: on a CPU torch.compile writes C++, and would say so in step 1."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise RefusedError(
            "distill.compile = true: torch.compile needs a C++ compiler on a CPU, and there is none",
            next=f"install g++, name a compiler in CXX, or {OFF}",
        ) from None
