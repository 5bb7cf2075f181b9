"""``distill.compile``: what it is refused with. That it computes the same, and really ran, is F-COMPILE-EQUAL-001 and
F-COMPILE-RAN-001, run here with their controls; a whole run with it is a soak test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from latentforge.errors import RefusedError
from latentforge.events import read_events
from latentforge.spec.resolve import resolve_pipeline
from latentforge.train.compiled import CompiledLayers
from latentforge.train.inprocess import execute_pipeline

from ..claims import claims_of, require_claim

ON = "distill.compile=true"


@pytest.mark.parametrize("falsifier_id", [name for name, _ in claims_of("train.test_compiled")])
def test_the_claim_holds_and_its_control_is_seen_failing(falsifier_id: str) -> None:
    require_claim(falsifier_id)


@pytest.mark.parametrize(
    ("also", "said"),
    [
        (["distill.distributed=ddp", "distill.processes=2"], "compile = true with distributed = 'ddp'"),
        (["distill.activation_checkpointing=true"], "compile = true with activation_checkpointing = true"),
        (["distill.targets=live", "distill.on_policy=0.5"], "compile = true with on_policy = 0.5"),
    ],
)
def test_what_compiled_layers_are_not_proven_with_is_refused_when_the_file_is_read(also: list[str], said: str) -> None:
    with pytest.raises(RefusedError, match=said):
        resolve_pipeline("tiny", env={}, overrides=[ON, *also])


def test_without_a_compiler_or_layers_it_is_refused_before_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RefusedError, match="keeps its layers in a way of its own"):
        CompiledLayers([], torch.device("cpu"))
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    with pytest.raises(RefusedError, match="needs a C\\+\\+ compiler on a CPU, and there is none") as refused:
        CompiledLayers([torch.nn.Linear(1, 1)], torch.device("cpu"))
    assert "install g++" in str(refused.value.next)


@pytest.mark.soak
def test_a_whole_run_and_its_twin_are_those_without_and_nothing_is_compiled_after_ready(tmp_path: Path) -> None:
    found = []
    for asked in ([ON], []):
        run = execute_pipeline(resolve_pipeline("tiny", env={}, overrides=asked).spec, tmp_path)["distill"]
        events = read_events(run.events_file)
        assert not [one for one in events if one.kind == "verdict" and one.fields["outcome"] != "pass"]
        values = [one.fields["value"] for one in events if one.kind == "metric" and one.fields["name"] == "val_loss"]
        found.append((values, json.loads(run.effective_file.read_text()).get("compiled")))
    (compiled, record), (plain, none) = found
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert record == {"layers": 1, "graphs": 1, "graph_breaks": 0, "runs": 61}
    assert none is None
