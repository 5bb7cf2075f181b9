"""A record is found again only where nothing changed that could make its kernel another one."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.kernels.guard import key as keys
from latentforge.kernels.guard.key import key_of
from latentforge.kernels.guard.machine import Machine
from latentforge.kernels.guard.variants import Variant

MACHINE = Machine((12, 1), 48, "580.142", "13.0", "13.0", "2.13.0", "3.9.0", "13.4.59", "6.17.0", (("A", "1"),))
VARIANT = Variant("kd_loss", "bf16", "cuda", "latentforge.kernels.reference.kd:row_losses", shapes=((1, 33),))
SHOWN_ONLY = {"device_name", "driver_cuda", "why_not", "unified"}

OTHER: dict[str, Any] = {
    "capability": (12, 0),
    "multiprocessors": 84,
    "code_options": (("DISABLE_PTXAS_OPT", "1"),),
}
OTHER_VARIANT: dict[str, Any] = {
    "op": "latent_decode",
    "dtype": "fp32",
    "rung": "triton",
    "entry": "latentforge.kernels.reference.kd:divergence",
    "targets": "topk",
    "direction": "reverse",
    "device": "cpu",
    "shapes": ((2, 33),),
    "options": (("fast", True),),
    "compile": "a:b",
    "deterministic": False,
    "candidates": ((("tile", 1),),),
}


@pytest.mark.parametrize("part", [one.name for one in fields(Machine) if one.name not in SHOWN_ONLY])
def test_each_part_of_the_machine_changes_the_key(part: str) -> None:
    other = replace(MACHINE, **{part: OTHER.get(part, "another version")})
    assert key_of(VARIANT, other).digest != key_of(VARIANT, MACHINE).digest


@pytest.mark.parametrize("part", [one.name for one in fields(Variant)])
def test_each_part_of_the_variant_changes_the_key(part: str) -> None:
    other = replace(VARIANT, **{part: OTHER_VARIANT[part]})
    assert key_of(other, MACHINE).digest != key_of(VARIANT, MACHINE).digest


@given(changes=st.dictionaries(st.sampled_from(["driver", "torch", "triton", "ptxas", "kernel", "nvrtc"]), st.text()))
def test_equal_keys_mean_equal_parts(changes: dict[str, str]) -> None:
    other = replace(MACHINE, **changes)  # type: ignore[arg-type]
    assert (key_of(VARIANT, other).digest == key_of(VARIANT, MACHINE).digest) is (other == MACHINE)


def test_what_is_only_shown_is_not_in_the_key() -> None:
    other = replace(MACHINE, device_name="another", driver_cuda=(13, 9), why_not="because")
    assert key_of(VARIANT, other).digest == key_of(VARIANT, MACHINE).digest


def test_a_changed_source_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "some_kernel_module.py"
    module.write_text("a = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    variant = replace(VARIANT, entry="some_kernel_module:a")
    before = key_of(variant, MACHINE).digest
    module.write_text("a = 2\n")
    keys._sources.cache_clear()
    assert key_of(variant, MACHINE).digest != before


@pytest.mark.parametrize("part", ["native_build", "guard_version"])
def test_another_build_or_guard_changes_the_key(part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of(VARIANT, MACHINE).digest
    monkeypatch.setattr(keys, part, lambda: "another")
    assert key_of(VARIANT, MACHINE).digest != before


def test_the_build_is_that_of_the_extension_file() -> None:
    assert len(keys.native_build()) == 64


def test_the_key_is_built_of_all_that_the_notes_name() -> None:
    wanted = {"build", "files", "arch", "multiprocessors", "driver", "cuda_runtime", "nvrtc", "torch", "triton"}
    wanted |= {"ptxas", "kernel", "options", "code_options", "shapes", "guard"}
    assert wanted <= key_of(VARIANT, MACHINE).parts.keys()
    assert not {"host", "clock", "memory"} & key_of(VARIANT, MACHINE).parts.keys()
