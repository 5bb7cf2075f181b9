"""What a program pays for importing the kernels: nothing heavy beside torch, and not even torch before it is used."""

from __future__ import annotations

import json
import subprocess
import sys

SEEN = """
import json, sys
{before}
already = set(sys.modules)
import latentforge.kernels
{used}
print(json.dumps(sorted({{name.partition(".")[0] for name in set(sys.modules) - already}})))
print(json.dumps(sorted(set(sys.modules) - already)))
"""


def imported(before: str, used: str) -> tuple[set[str], set[str]]:
    """(packages, modules) that a fresh interpreter imports with the kernels, beyond those imported ``before``."""
    code = SEEN.format(before=before, used=used)
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    packages, modules = found.stdout.splitlines()
    return set(json.loads(packages)), set(json.loads(modules))


def test_the_package_alone_imports_no_torch() -> None:
    packages, _ = imported("", "")
    assert "torch" not in packages
    assert "numpy" not in packages


def test_the_losses_import_nothing_but_themselves_beside_torch() -> None:
    names = ("kd_loss", "KDCriterion", "linear_kd_loss", "LinearKDCriterion", "LinearTargets", "latent_decode")
    packages, modules = imported("import torch", "\n".join(f"latentforge.kernels.{name}" for name in names))
    assert "latentforge.kernels.targets" in modules
    # Neither a compiler nor a library, nor a backend before it is chosen; these are what once cost seconds.
    for heavy in ("triton", "transformers", "pydantic", "sympy", "pybind11"):
        assert heavy not in packages
    assert not {m for m in modules if m.startswith(("torch._dynamo", "torch._inductor"))}
    assert not {m for m in modules if m.startswith("latentforge.kernels.") and m.split(".")[2] in ("cuda", "triton")}
    assert "latentforge._native" not in modules


def test_a_heavy_import_would_be_seen() -> None:
    packages, modules = imported(
        "import torch", "latentforge.kernels.kd_loss\ntorch.compiler.assume_constant_result(lambda: 0)"
    )
    assert any(m.startswith("torch._dynamo") for m in modules)
    assert "sympy" in packages
