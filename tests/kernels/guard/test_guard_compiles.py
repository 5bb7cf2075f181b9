"""What is compiled after set-up is seen, whoever compiled it, and nothing is imported to see it."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from latentforge.kernels.guard import compiles
from latentforge.kernels.guard.compiles import CompileWatch


def test_watching_imports_no_compiler() -> None:
    script = (
        "import sys; from latentforge.kernels.guard.compiles import CompileWatch; w = CompileWatch();"
        "assert w.drain() == []; assert 'torch' not in sys.modules; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_graph_that_torch_compiles_is_seen_once() -> None:
    import torch

    torch.compile(lambda x: x - 1, backend="eager")(torch.ones(2))
    watch = CompileWatch()
    assert watch.drain() == []
    compiled = torch.compile(lambda x: x * 3 + 1, backend="eager")
    compiled(torch.ones(2))
    (found,) = watch.drain()
    assert (found.compiler, found.count) == ("torch.compile", 1)
    compiled(torch.ones(2))
    assert watch.drain() == []
    # Another shape is another graph.
    compiled(torch.ones(2, 2))
    assert [one.compiler for one in watch.drain()] == ["torch.compile"]


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Triton's knobs as they are before anybody has set a hook."""
    knobs = SimpleNamespace(runtime=SimpleNamespace(jit_post_compile_hook=None))
    monkeypatch.setitem(sys.modules, "triton.knobs", knobs)  # type: ignore[arg-type]
    monkeypatch.setattr(compiles, "_TRITON", [])
    return knobs


def test_a_kernel_of_triton_is_seen_by_name_and_by_every_watch(triton: SimpleNamespace) -> None:
    said: list[str] = []
    triton.runtime.jit_post_compile_hook = lambda **named: said.append(named["repr"])
    first, second = CompileWatch(), CompileWatch()
    triton.runtime.jit_post_compile_hook(key="k", repr="kd_dense", fn=SimpleNamespace(name="kd_dense"))
    for watch in (first, second):
        (found,) = watch.drain()
        assert (found.compiler, found.count, found.what) == ("triton", 1, ("kd_dense",))
        assert watch.drain() == []
    assert said == ["kd_dense"]


def test_the_hook_is_what_triton_calls() -> None:
    """Of the Triton that is installed: the name of the knob, and how it is called."""
    pytest.importorskip("triton", reason="triton is not installed")
    import inspect

    from triton import knobs
    from triton.runtime import jit

    assert hasattr(knobs.runtime, "jit_post_compile_hook")
    assert "jit_post_compile_hook" in inspect.getsource(jit)
    assert "fn=" in inspect.getsource(jit.JITFunction._call_hook)


def test_an_extension_that_is_built_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: dict[str, SimpleNamespace] = {}
    module = SimpleNamespace(JIT_EXTENSION_VERSIONER=SimpleNamespace(entries=entries))
    monkeypatch.setitem(sys.modules, "torch.utils.cpp_extension", module)  # type: ignore[arg-type]
    watch = CompileWatch()
    entries["mine"] = SimpleNamespace(version=0, hash=1)
    assert [(one.compiler, one.count) for one in watch.drain()] == [("C++ extension", 1)]
    entries["mine"] = SimpleNamespace(version=1, hash=2)
    assert [one.count for one in watch.drain()] == [1]


def test_a_counter_that_was_set_back_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 5
    monkeypatch.setattr(compiles, "COMPILERS", {"one": lambda: now})
    watch = CompileWatch()
    now = 2
    assert [one.count for one in watch.drain()] == [2]
